"The table of masked image modelling: whose rows it takes, and where each number stands."

import csv
import json

import pytest

from advssl.evaluate.statistics import Accuracy
from advssl.method import get_method, methods
from advssl.suite import notebooks, reproduce, scales, store, targets

pytest.importorskip("papermill")
FAMILY = [k for k in methods() if "MIM" in get_method(k).card.base]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The target from rows that were written without training: a different accuracy for every run of the scale."""
    root = tmp_path_factory.mktemp("masked")
    judge, values = scales.get_scale("smoke"), {}
    for i, config in enumerate(targets.configs("smoke")):
        evaluation = {"knn.clean": Accuracy(i + 1, 200).to_json(), "linear.clean": Accuracy(i + 60, 200).to_json()}
        evaluation |= {f"linear.pgd{judge.attack_steps}.linf-{eps:.4g}": Accuracy(i % 50, 50).to_json() for eps in judge.eps}
        store.write_result(scales.run_folder(root / "runs", "smoke", config), "smoke", config.to_json(), evaluation, {})
        values[config.method, config.encoder] = evaluation
    parameters = {"scale": "smoke", "runs": str(root / "runs"), "figures": str(root / "figures")}
    notebooks.execute(reproduce.NOTEBOOKS / "masked.ipynb", root / "out.ipynb", parameters, here=True)
    return root / "figures/smoke", values


def lines(folder):
    with open(folder / "masked.csv") as f: return list(csv.DictReader(f))


def test_masked_target_is_known():
    assert "masked" in targets.TARGETS and targets.TARGETS["masked"].runs
    assert {"mae", "simmim", "adpe", "adios", "advmim", "unified"} <= set(FAMILY) and "simclr" not in FAMILY
    plan = reproduce.plan(["masked"], "smoke", "runs", "figures")
    assert {job.split("/")[0] for job in plan["jobs"]} == {"untrained", *FAMILY}


def test_masked_table_has_the_family_and_the_untrained_encoders(made):
    folder, _ = made
    names, judge = [row["Method"] for row in lines(folder)], scales.get_scale("smoke")
    assert names == ["Untrained", "Untrained", *[get_method(k).card.name for k in FAMILY]]
    encoders = {row["Method"]: row["Encoder"] for row in lines(folder)}
    assert all(encoders[get_method(k).card.name] == getattr(judge, get_method(k).backbone) for k in FAMILY)
    text = (folder / "masked.md").read_text()
    for name in names: assert f"| {name} |" in text
    assert "Screening" in text and "| SimCLR |" not in text


def test_masked_numbers_are_those_of_the_rows(made):
    folder, values = made
    for row, key in zip(lines(folder), ["untrained", "untrained", *FAMILY], strict=True):
        found = values[key, row["Encoder"]]
        for column, name in (("kNN, %", "knn.clean"), ("Linear, %", "linear.clean")):
            a = Accuracy.from_json(found[name])
            assert row[column] == f"{100 * a.value:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]"
        robust = [c for c in row if c.startswith("PGD-5 at")]
        assert len(robust) == len(scales.get_scale("smoke").eps) and all(row[c].endswith("]") for c in robust)


def test_masked_published_numbers_stand_apart_with_protocol_and_source(made):
    (column,) = [c for c in lines(made[0])[0] if c.startswith("Published")]
    assert "ImageNet-1K" in column and "fine-tuned" in column
    found = {row["Method"]: row[column] for row in lines(made[0]) if row[column]}
    assert {k: v[:4] for k, v in found.items()} == {"MAE": "83.6", "MAE+": "84.2", "SimMIM": "83.8", "AdPE": "84.4"}
    assert all("/" in v for v in found.values()) and "800 epochs" in found["SimMIM"] and "83.9, absolute positions" in found["MAE+"]


def test_masked_sidecar_names_the_rows_it_read(made):
    sidecar = json.loads((made[0] / "masked.provenance.json").read_text())
    assert {r["run"].split("/")[0] for r in sidecar["runs"]} == {"untrained", *FAMILY}
    for name, digest in sidecar["files"].items(): assert store.sha256(made[0] / name) == digest
