"""The suite's figures: drawn without rows, from rows, from runs, and again from the store, with captions that say what is drawn."""

import json
from pathlib import Path

import pytest
import torch
from execnb.nbio import read_nb

from advssl.pretrain import Run
from advssl.suite import store
from advssl.suite.notebooks import NOTEBOOKS
from advssl.suite.scales import get_scale, resolve, run_folder

plt = pytest.importorskip("matplotlib.pyplot")

FIGURES = ["tradeoff", "eps", "curves", "gain", "gallery", "features", "bank", "masks", "shifts"]
RUNS = ["simclr", "rocl", "clae", "moco-v2", "ifm", "adco", "adios", "adpe"]  # one of every kind of player
JUDGE = get_scale("smoke")


def draw(name: str, runs: Path, figures: Path | str = "") -> dict:
    """Execute a target's notebook in this process; what its cells have left."""
    space = {}
    for cell in read_nb(NOTEBOOKS / f"{name}.ipynb").cells:
        if cell.cell_type != "code": continue
        exec(compile(cell.source, name, "exec"), space)
        if "parameters" in cell.metadata.get("tags", []): space |= {"scale": "smoke", "runs": str(runs), "figures": str(figures)}
    plt.close("all")
    return space


def accuracy(value: float, total: int, **more) -> dict:
    correct = round(value * total)
    ends = {"low": max(0.0, value - 0.05), "high": min(1.0, value + 0.05), "level": 0.95}
    return {"correct": correct, "total": total, "value": correct / total} | ends | more


def write_row(runs: Path, method: str, seed: int = 0, clean: float = 0.8, robust: float = 0.4) -> Path:
    """A result row as a finished run leaves it, with made-up accuracies."""
    config = resolve(method, "smoke", seed)
    folder = run_folder(runs, "smoke", config)
    folder.mkdir(parents=True, exist_ok=True)
    noisy = method == "rush"
    found = {"test_images": 200, "robust_images": 50, "stochastic": noisy, "linear.clean": accuracy(clean, 200)}
    for attack, lower in [("pgd", 0.0)] + [("eot", 0.2)] * noisy:
        for eps in JUDGE.eps:
            value = robust * 0.1 / (0.05 + eps) - lower
            found[f"linear.{attack}{JUDGE.attack_steps}.linf-{eps:.3g}"] = accuracy(value, 50, clean_correct=round(50 * clean))
    row = {
        "scale": "smoke", "method": method, "seed": seed, "config": config.to_json(), "evaluation": found, "seconds": {"pretrain": 1.0},
        "code": store.result_code(method), "provenance": {"commit": None, "dirty": None}, "checkpoint": {},
    }
    (folder / "result.json").write_text(json.dumps(row))
    return folder


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Rows of many methods without runs; logs of two of them."""
    runs = tmp_path_factory.mktemp("rows")
    some = ["untrained", "simclr", "acl", "advcl", "rush", "adco", "byorl", "rotation", "mae", "adpe", "rocl"]
    for i, method in enumerate(some): write_row(runs, method, clean=0.79 + 0.004 * i, robust=0.05 * i + 0.3 * (method == "rush"))
    for method, objectives in (("simclr", [5.0, 4.5]), ("mae", [0.9, 0.8])):
        lines = [json.dumps({"step": 4 * e, "epoch": e, "objective": o, "seconds_per_step": 0.25}) for e, o in enumerate(objectives, 1)]
        (write_row(runs, method) / "log.jsonl").write_text("\n".join(lines) + "\n")
    return runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of the smoke scale after a single step: a checkpoint, a log and a row each."""
    runs = tmp_path_factory.mktemp("runs")
    for method in RUNS:
        config = resolve(method, "smoke")
        folder = write_row(runs, method)
        run = Run(config, folder)
        run.method.train()
        run.begin()
        run.one_step(next(run.loader.epoch(0)))
        run.write_log({"step": 1, "epoch": 1, **run.meter.means(), "seconds_per_step": 0.1})
        run.record()
        run.total = run.step  # finished, as far as a reader can see
        run.save()
        row = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(row | {"checkpoint": json.loads((folder / "checkpoint.json").read_text())["files"]}))
    return runs


def check_form(space: dict) -> None:
    """No wider than two columns, and no text smaller than 6.5 points."""
    fig = space["fig"]
    assert fig.get_figwidth() <= 7.0 and fig.get_figheight() <= 9.5
    small = {t.get_text() for t in fig.findobj(plt.Text) if t.get_visible() and t.get_text().strip() and t.get_fontsize() < 6.5}
    assert not small, small


@pytest.mark.parametrize("name", FIGURES)
def test_without_rows_a_figure_says_so(name, tmp_path):
    space = draw(name, tmp_path / "runs")
    assert "no data" in space["caption"]
    texts = " ".join(t.get_text() for t in space["fig"].findobj(plt.Text))
    assert "no data" in texts or "no run" in texts
    check_form(space)


def test_files_are_written_and_the_sidecar_has_the_caption(tmp_path):
    space = draw("features", tmp_path / "runs", tmp_path / "figures")
    assert {p.name for p in (tmp_path / "figures/smoke").iterdir()} == {f"features.{kind}" for kind in ("png", "svg", "provenance.json")}
    assert json.loads((tmp_path / "figures/smoke/features.provenance.json").read_text())["caption"] == space["caption"]


def test_tradeoff_names_every_method_once_and_noise_by_its_honest_value(made_up, tmp_path):
    space = draw("tradeoff", made_up, tmp_path / "one")
    check_form(space)
    table = {line["method"]: line for line in space["table"]}
    assert table["rush"]["attack"] == f"eot{JUDGE.attack_steps}" and table["acl"]["attack"] == f"pgd{JUDGE.attack_steps}"
    row = next(r for r in space["read"] if r["method"] == "rush")["evaluation"]
    honest, other = (row[f"linear.{attack}{JUDGE.attack_steps}.linf-0.05"]["value"] for attack in ("eot", "pgd"))
    assert table["rush"]["robust_value"] == honest < other
    names = [t.get_text() for ax in space["fig"].axes for t in ax.texts]
    assert sorted(names) == sorted(line["name"] for line in space["table"])
    for words in ("10 methods, 1 seed each", "Stars (RUSH)", "50 test images", "Screening"): assert words in space["caption"], words
    fig = space["fig"]
    fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = [t.get_window_extent() for t in ax.texts]
        for i, a in enumerate(boxes):
            for j, b in enumerate(boxes[:i]):
                apart = min(a.x1, b.x1) - max(a.x0, b.x0) < 2 or min(a.y1, b.y1) - max(a.y0, b.y0) < 2  # pixels
                assert apart, (ax.texts[i].get_text(), ax.texts[j].get_text())
    store.write_store(tmp_path / "rows.jsonl", made_up, "smoke")
    draw("tradeoff", tmp_path / "rows.jsonl", tmp_path / "two")
    assert (tmp_path / "one/smoke/tradeoff.svg").read_bytes() == (tmp_path / "two/smoke/tradeoff.svg").read_bytes()


def test_eps_starts_at_the_same_images_unattacked(made_up):
    space = draw("eps", made_up)
    check_form(space)
    lines = {(line["method"], line["eps"]): line for line in space["table"]}
    assert {eps for _, eps in lines} == {0.0, *JUDGE.eps} and ("untrained", 0.0) not in lines
    row = next(r for r in space["read"] if r["method"] == "acl")["evaluation"]
    record = row[f"linear.pgd{JUDGE.attack_steps}.linf-0.1"]
    assert lines["acl", 0.0]["value"] == record["clean_correct"] / record["total"] and lines["acl", 0.1]["value"] == record["value"]
    assert "two radii (0.05, 0.1)" in space["caption"] and "RUSH: EOT-5" in space["caption"] and "10 methods" in space["caption"]


def test_curves_are_read_from_the_logs_and_kept(made_up):
    space = draw("curves", made_up)
    check_form(space)
    found = [(line["method"], line["epoch"], line["objective"]) for line in space["table"]]
    assert found == [("mae", 1, 0.9), ("mae", 2, 0.8), ("simclr", 1, 5.0), ("simclr", 2, 4.5)]
    assert space["table"][0]["milliseconds_per_image"] == pytest.approx(250 / resolve("mae", "smoke").batch_size)
    assert "2 methods, 1 seed each" in space["caption"]
    assert (made_up / "smoke/targets/curves.json").exists()


def test_gallery_shows_each_kind_of_player(trained):
    space = draw("gallery", trained)
    check_form(space)
    kinds = {name: record["kind"] for name, record in space["portraits"].items() if name != "images"}
    assert kinds == {"rocl": "perturbation", "clae": "perturbation", "adios": "mask", "adpe": "shift"}
    for name in ("rocl", "clae"):
        eps = space["first"][name]["config"]["settings"]["eps"]
        assert space["portraits"][name]["size"] == pytest.approx(eps, abs=1e-4)
        delta = space["from_text"](space["portraits"][name]["delta"])
        assert delta.shape == (10, 1, 28, 28) and 0.2 * eps < delta.abs().mean() <= eps * 1.01
    absent = space["caption"].split("No picture for ")[1].split(".")[0].split(", ")
    assert "ACL" in absent and not {"RoCL", "CLAE", "ADIOS", "AdPE"} & {*absent}
    assert "4 methods" in space["caption"]
    after = space["from_text"](space["portraits"]["rocl"]["after"])
    image = space["images"][0]
    strength = [(a - image).abs().max().item() for a in after]
    assert all(b > 1.5 * a for a, b in zip(strength, strength[1:3]))  # the radius doubles


def test_features_bank_masks_and_shifts(trained):
    features = draw("features", trained)
    assert set(features["players"]) == {"moco-v2", "ifm"} and "No data for MoCHi, HCL" in features["caption"]
    assert sum(w for w in features["players"]["moco-v2"]["weight"]) > 0 and 0 < features["players"]["moco-v2"]["total"] < 1
    bank = draw("bank", trained)
    moments = [(line["method"], line["moment"]) for line in bank["table"]]
    assert moments == [(method, moment) for method in ("moco-v2", "adco") for moment in ("before", "after")]
    assert "512 fresh queries" in bank["caption"] and bank["seen"]["adco"]["moved"] < 1
    masks = draw("masks", trained)
    assert sum(line["area_median"] for line in masks["table"]) == pytest.approx(1, abs=0.1) and "last epoch" in masks["caption"]
    shifts = draw("shifts", trained)
    line, = shifts["table"]
    assert torch.tensor([line["columns"], line["rows"]]).norm() <= line["radius"] + 1e-5 and "columns and" in shifts["caption"]
    for space in (features, bank, masks, shifts): check_form(space)


COMMITTED = Path(__file__).resolve().parents[1] / "figures/laptop"


@pytest.mark.parametrize("sidecar", sorted(COMMITTED.glob("*.provenance.json")), ids=lambda path: path.name.split(".")[0])
def test_every_committed_picture_has_its_caption(sidecar):
    record = json.loads(sidecar.read_text())
    assert any(name.endswith(".png") for name in record["files"]) == bool(record.get("caption"))


def test_no_bar_in_a_formula_breaks_the_survey_table():
    text = (COMMITTED / "taxonomy.md").read_text()
    assert r"\\|" not in text and r"\Vert" in text


@pytest.mark.parametrize("name", ["gallery", "bank"])
def test_the_store_alone_redraws_a_figure_to_the_byte(name, trained, tmp_path):
    """Without runs, data or a network: everything that is drawn stands in the store."""
    draw(name, trained, tmp_path / "figures")
    store.write_store(tmp_path / "rows.jsonl", trained, "smoke")
    hidden = trained.rename(trained.with_name("hidden"))
    try: draw(name, tmp_path / "rows.jsonl", tmp_path / "again")
    finally: hidden.rename(trained)
    for file in (f"{name}.png", f"{name}.svg"):
        first, again = ((tmp_path / folder / "smoke" / file).read_bytes() for folder in ("figures", "again"))
        assert first == again, file


def test_gain_counts_passes_of_runs_and_their_parents(trained):
    space = draw("gain", trained)
    check_form(space)
    assert space["own"] == 6 * resolve("simclr", "smoke").epochs  # two forward, two back to the input, two to the weights
    rocl = next(line for line in space["table"] if line["method"] == "rocl")
    steps = resolve("rocl", "smoke").settings["steps"]
    assert rocl["passes"] >= (2 * steps + 9) * resolve("rocl", "smoke").epochs  # every step of the attack costs two, the outer step nine
    assert {line["method"] for line in space["table"]} == set(RUNS) - {"simclr"} and "spends 6" in space["caption"]
    deacl = resolve("deacl", "smoke").to_json()
    alone, parent = deacl["epochs"], deacl["parents"]["teacher"]["epochs"]
    assert space["whole"](deacl, {"deacl": 10.0, "simclr": 6.0}) == 10 * alone + 6 * parent
