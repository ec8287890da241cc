"""The tables of accuracies: which rows they take, where published numbers stand, what is bold, marked and left empty."""

import csv

import pytest
import torch

from advssl.evaluate.compare import pack
from advssl.evaluate.statistics import Accuracy
from advssl.method import get_method
from advssl.suite import notebooks, scales, store, targets

pytest.importorskip("papermill")
N = 400
SAID = {"grey": "more survive in a grey ball than guessing allows", "randomised": "two calls give two answers: judge by EOT"}


def panel(*failed):
    return {"failed": [*failed], "checks": {name: {"meaning": SAID[name]} for name in failed}}


def record(share, **more):
    mask = torch.arange(N) < round(share * N)
    return Accuracy.of(mask).to_json() | {"right": pack(mask)} | more


def attacked(protocol, name, share):
    return {
        f"{protocol}.{name}.linf-{eps:.4g}": record(share - i / 10, attack=name) for i, eps in enumerate(scales.get_scale("smoke").eps)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Both targets from rows that were written without training."""
    root = tmp_path_factory.mktemp("tables")
    judge = scales.get_scale("smoke")
    robust = {"simclr": 0.2, "acl": 0.5, "deacl": 0.5, "rush": 0.9, "adv-rotation": 0.4}
    for config in targets.configs("smoke"):
        if config.method not in (*robust, "untrained"):
            continue
        share = robust.get(config.method, 0.15)
        found = {f"{p}.clean": record(0.5 + share / 5) for p in ("knn", "linear", "linear-10%", "linear-1%")} | {
            "stochastic": config.method == "rush",
            "robust_images": N,
            "test_images": N,
        }
        found |= attacked("linear", f"pgd{judge.attack_steps}", share)
        if config.method == "rush":
            found |= attacked("linear", f"eot{judge.attack_steps}", 0.7)
            found |= {f"linear.masking.linf-{eps:.4g}": panel("randomised") for eps in judge.eps}
        if config.method == "deacl":
            found |= {f"linear.masking.linf-{judge.eps[0]:.4g}": panel("grey")}
        if config.method == "acl":
            found |= attacked("linear", "autoattack", 0.45)
        folder = scales.run_folder(root / "runs", "smoke", config)
        store.write_result(folder, "smoke", config.to_json(), found, {})
        if config.method == "adv-rotation":
            cell = {"aff.clean": record(0.8), "robust_images": N} | attacked("aff", f"pgd{judge.attack_steps}", 0.6)
            store.write_result(folder / "aff", "smoke", config.to_json(), cell, {}, "cell.json", mode="aff")
    own = scales.resolve("acl", "smoke", 0, {"temperature": 0.7})  # somebody's own run is no row of the scale
    store.write_result(scales.run_folder(root / "runs", "smoke", own), "smoke", own.to_json(), {"linear.clean": record(0.99)}, {})
    for name in ("robustness", "linear"):
        notebooks.execute(
            notebooks.NOTEBOOKS / f"{name}.ipynb",
            root / f"{name}.ipynb",
            {"scale": "smoke", "runs": str(root / "runs"), "figures": str(root / "figures")},
            here=True,
        )
    return root / "figures/smoke"


def lines(folder, name):
    with open(folder / f"{name}.csv") as f:
        return list(csv.DictReader(f))


def test_rows_and_sections(made):
    found = [(row["Protocol"], row["Method"]) for row in lines(made, "robustness")]
    names = [get_method(k).card.name for k in ("simclr", "acl", "deacl", "rush", "adv-rotation")]
    assert found == [("linear", "Untrained"), ("linear", "Untrained"), *[("linear", n) for n in names], ("aff", "Adv-Rotation")]
    text = (made / "robustness.md").read_text()
    assert "**AFF**" in text and "**ALF**" not in text and "99.0" not in text and "Screening" in text
    assert len(text.splitlines()[4].split("|")) - 2 <= 12


def test_every_note_has_its_dagger(made):
    """RUSH is judged by EOT, which answers the one check that it fails; a note names its cell."""
    text = (made / "robustness.md").read_text()
    notes = [line for line in text.splitlines() if line.startswith("† ")]
    assert notes == [f"† DeACL, linear, {scales.get_scale('smoke').eps[0]:.3g} (1 of 1 seed): grey: {SAID['grey']}"]
    cells = [(row["Method"], name) for row in lines(made, "robustness") for name, value in row.items() if "†" in value]
    assert cells == [("DeACL", f"PGD-5 at {scales.get_scale('smoke').eps[0]:.3g}, %")]


def test_unequal_training_is_told(made):
    for name in ("robustness", "linear"):
        found = {row["Method"]: row["Epochs × images"] for row in lines(made, name) if row.get("Protocol", "linear") == "linear"}
        for key in ("acl", "simclr"):
            config = scales.resolve(key, "smoke")
            assert found[get_method(key).card.name] == f"{config.epochs} × {config.images or 'all'}"
        assert found["Untrained"] == ""
        assert ("one of recipes" in (made / f"{name}.md").read_text()) == (len({*found.values()} - {""}) > 1)


def test_published_numbers_have_columns_that_say_what_they_are(made):
    table = {(row["Protocol"], row["Method"]): row for row in lines(made, "robustness")}
    papers, third = [c for c in next(iter(table.values())) if "full scale" in c]
    assert (
        papers.startswith("Papers and authors")
        and third.startswith("Third parties")
        and "CIFAR-10, 8/255" in papers
        and "PGD-20 / AutoAttack" in papers
    )
    assert table["linear", "ACL"][papers] == "– / – / 37.6" and table["linear", "ACL"][third] == "78.22 / – / 39.17"
    assert table["aff", "Adv-Rotation"][papers].startswith("85.66") and "ResNet-50v2" in table["aff", "Adv-Rotation"][papers]
    assert table["linear", "SimCLR"][papers] == table["linear", "SimCLR"][third] == ""


def test_attacks_are_never_mixed_and_stochastic_models_are_judged_by_eot(made):
    table = {row["Method"]: row for row in lines(made, "robustness") if row["Protocol"] == "linear"}
    eps = scales.get_scale("smoke").eps[0]
    pgd, auto = f"PGD-5 at {eps:.3g}, %", f"AutoAttack at {eps:.3g}, %"
    assert table["ACL"][pgd].startswith("50.0") and table["ACL"][auto].startswith("45.0") and table["SimCLR"][auto] == ""
    assert table["RUSH"][pgd].startswith("70.0") and "(EOT; one draw a gradient leaves 90.0)" in table["RUSH"][pgd]


def test_bold_is_what_cannot_be_told_from_the_best(made):
    text = (made / "robustness.md").read_text()
    line = {name: next(row for row in text.splitlines() if row.startswith(f"| {name} |")) for name in ("ACL", "DeACL", "SimCLR", "RUSH")}
    for name in ("ACL", "DeACL"):
        assert "**50.0" in line[name]
    assert "**20.0" not in line["SimCLR"] and "**70.0" not in line["RUSH"]  # a stochastic model does not compete
    assert "**" not in (made / "robustness.csv").read_text()


def test_linear_table(made):
    table = {row["Method"]: row for row in lines(made, "linear")}
    assert table["ACL"]["Linear, %"].startswith("60.0") and set(table["ACL"]) == {
        "Method",
        "Base",
        "Level",
        "Encoder",
        "Epochs × images",
        "Seeds",
        "kNN, %",
        "Linear, %",
        "10 % of labels, %",
        "1 % of labels, %",
    }
    text = (made / "linear.md").read_text()
    assert "Published linear accuracies" in text and "| SimCLR | imagenet-1k | ResNet-50 | 1000 | 69.3 |" in text
    ours, theirs = text.split("**Published")
    assert "imagenet" not in ours and "The numbers are ours" in ours and "not comparable" in theirs
