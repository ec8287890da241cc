"""The grid of pretrainings by fine-tunings: its plan, what a cell leaves behind, and what the targets say about known rows."""

import csv
import json
import re
import shutil
from itertools import product

import pytest
import torch

from advssl.evaluate.finetune import MODES, TUNINGS, find_tuning
from advssl.evaluate.protocol import result_key
from advssl.evaluate.statistics import Accuracy
from advssl.pretrain import pretrain
from advssl.suite import grid, notebooks, reproduce, scales, store, targets
from advssl.threat import make_threat

pytest.importorskip("papermill")
GRID, ENSEMBLE = (targets.TARGETS[name] for name in ("pretrain_by_finetune", "ensemble"))


# the plan


def test_the_plan_holds_every_cell_and_the_run_below_it():
    plan = reproduce.plan(["pretrain_by_finetune", "ensemble"], "demo", "runs", "figures")
    found = {(job.split("/")[0], mode) for cell in plan["cells"] for job, mode in [cell.rsplit("/", 1)]}
    assert found == set(product(targets.PRETEXT, MODES)) and len(plan["cells"]) == 28 and len(plan["jobs"]) == 7
    for cell, wish in plan["cells"].items():
        assert wish["job"] in plan["jobs"] and cell == f"{wish['job']}/{wish['mode']}"
        assert wish["code"] == plan["jobs"][wish["job"]]["code"]
    wanted = plan["targets"]
    assert set(wanted["pretrain_by_finetune"]["cells"]) == set(plan["cells"])
    assert {tuple(c.split("/")[::2]) for c in wanted["ensemble"]["cells"]} == {(m, "aff") for m in targets.PRETEXT[-3:]}
    for target in wanted.values(): assert {plan["cells"][c]["job"] for c in target["cells"]} == set(target["jobs"])
    assert json.dumps(plan)


def test_parents_of_a_cells_run_come_first(monkeypatch):
    monkeypatch.setitem(targets.TARGETS, "ensemble", targets.Target("ensemble", "", runs=False, cells=(("deacl", "aff"),)))
    plan = reproduce.plan(["ensemble"], "smoke", "runs", "figures")
    jobs = list(plan["jobs"])
    for job, wish in plan["jobs"].items():
        for parent in wish["parents"]: assert jobs.index(parent) < jobs.index(job)
    assert [j.split("/")[0] for j in jobs] == ["simclr", "deacl"] and len(plan["cells"]) == 1


def test_a_run_is_shared_with_the_other_targets():
    both = reproduce.plan(["robustness", "pretrain_by_finetune"], "demo", "runs", "figures")
    assert set(both["jobs"]) == set(reproduce.plan(["robustness"], "demo", "runs", "figures")["jobs"])
    assert reproduce.plan([], "demo", "runs", "figures")["cells"].keys() >= both["cells"].keys(), "the grid is part of the suite"


def test_chosen_methods_bring_the_baseline_and_nothing_else():
    names = lambda *only: {c.method for c, _ in targets.cell_configs(GRID, "smoke", only)}
    assert names("rotation") == {"untrained", "rotation"} and names("simclr") == set() and names() == set(targets.PRETEXT)
    assert len(targets.cell_configs(GRID, "laptop")) == 3 * 28


@pytest.mark.parametrize("scale", scales.SCALES)
def test_every_scale_has_a_recipe_for_its_grid(scale):
    for mode in MODES:
        recipe = scales.cell_recipe(mode, scale)
        assert json.loads(json.dumps(recipe)) == recipe and recipe["eps"] == scales.get_scale(scale).eps[0]
    if scale == "cifar10":
        assert recipe["epochs"] == find_tuning("chen2020", "aff").epochs and recipe["loss"] == "ce"


# cells of a real run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two adversarial runs at smoke scale; one fine-tuned in two modes, the other in one."""
    root = tmp_path_factory.mktemp("grid")
    plan = reproduce.plan(["pretrain_by_finetune", "ensemble"], "smoke", root / "runs", root / "figures")
    paths = {}
    for method, modes in (("adv-rotation", ("slf", "aff")), ("adv-jigsaw", ("aff",))):
        config = scales.resolve(method, "smoke")
        folder = scales.run_folder(root / "runs", "smoke", config)
        pretrain(config, folder)
        for mode in modes: paths[method, mode] = grid.finetune_cell(folder, mode)
    return root, plan, paths


def test_a_cell_lies_in_its_run_and_says_what_it_stands_on(made):
    root, plan, paths = made
    for (method, mode), path in paths.items():
        row, run = json.loads(path.read_text()), path.parents[1]
        assert f"{method}/{run.name}/{mode}" in plan["cells"] and path.parent.name == row["mode"] == mode
        assert row["config"] == json.loads((run / "config.json").read_text()) and row["scale"] == "smoke"
        for name, digest in row["stands_on"].items(): assert store.sha256(run / name) == digest
        for name, digest in row["checkpoint"].items(): assert store.sha256(path.parent / name) == digest
        record = row["evaluation"][f"{mode}.clean"]
        assert [h["epoch"] for h in record["history"]] == list(range(1, record["epochs"] + 1))
        best = record["history"][record["epoch"] - 1]
        assert (best["standard"], best["robust"]) == (record["heldout_standard"], record["heldout_robust"])
        assert (record["images"] + record["heldout_images"], record["total"]) == (512, 200)
    assert not store.rows(root / "runs", "smoke"), "a cell is not the row of a run"
    assert sum(map(len, grid.cell_rows(root / "runs", "smoke", GRID).values())) == len(paths)


def test_a_cell_is_not_repeated(made):
    _, _, paths = made
    path = paths["adv-rotation", "slf"]
    trained = [p for p in path.parent.iterdir() if p.name.startswith(("weights", "state", "checkpoint"))]
    before = {p.name: (store.sha256(p), p.stat().st_mtime_ns) for p in trained}
    old = json.loads(path.read_text())
    assert json.loads(grid.finetune_cell(path.parents[1], "slf").read_text())["evaluation"] == old["evaluation"]
    assert before == {name: (store.sha256(path.parent / name), (path.parent / name).stat().st_mtime_ns) for name in before}
    reproduce.set_aside(path.parent, "adv-rotation", scales.cell_recipe("slf", "smoke"))
    assert path.exists() and json.loads(path.read_text())["code"] == store.result_code("adv-rotation")


def test_a_killed_cell_goes_on(made, monkeypatch):
    """Killed after the first epoch: the second is trained alone, and the row is the one of a cell that was not killed."""
    from advssl.evaluate import finetune

    _, _, paths = made
    path = paths["adv-rotation", "slf"]
    run, whole = path.parents[1], json.loads(path.read_text())
    path.parent.rename(run / "whole")
    real, steps = finetune.TuningRun.one_step, []

    def one_step(self, views):
        steps.append(self.step)
        if self.step == self.loader.steps and len(steps) == self.loader.steps + 1: raise KeyboardInterrupt
        real(self, views)

    monkeypatch.setattr(finetune.TuningRun, "one_step", one_step)
    started = finetune.TuningRun.__init__
    always = lambda self, *args, **options: started(self, *args, **options | {"checkpoint_seconds": 0.0})
    monkeypatch.setattr(finetune.TuningRun, "__init__", always)
    with pytest.raises(KeyboardInterrupt): grid.finetune_cell(run, "slf")
    assert not path.exists() and (path.parent / "checkpoint.json").exists()
    done = len(steps) - 1
    row = json.loads(grid.finetune_cell(run, "slf").read_text())
    assert steps[done + 1 :] == list(range(done, 2 * done)), "what was trained before the kill is not trained again"
    one, other = (r["evaluation"]["slf.clean"] for r in (row, whole))
    for h in one["history"] + other["history"]: del h["seconds"]  # the one thing that a kill may change
    assert one == other


@pytest.mark.parametrize("what", ["training", "evaluation", "recipe"])
def test_a_stale_cell_is_set_aside_and_not_lost(made, tmp_path, what):
    _, _, paths = made
    folder = tmp_path / "0-abc/slf"
    shutil.copytree(paths["adv-rotation", "slf"].parent, folder)
    recipe, pointer, row = scales.cell_recipe("slf", "smoke"), folder / "checkpoint.json", folder / "cell.json"
    if what == "training": pointer.write_text(json.dumps(json.loads(pointer.read_text()) | {"code": "0" * 12}))
    if what == "evaluation": row.write_text(json.dumps(json.loads(row.read_text()) | {"code": "0" * 12}))
    reproduce.set_aside(folder, "adv-rotation", recipe | ({"lr": 1.0} if what == "recipe" else {}))
    if what == "evaluation":  # the training is still good
        assert not row.exists() and (folder / "cell.stale.json").exists() and pointer.exists()
    else: assert not folder.exists() and [p.name[:10] for p in folder.parent.iterdir()] == [".stale-slf"]


def test_the_job_of_the_workflow_makes_a_cell(made):
    root, plan, paths = made
    (key,) = [c for c in plan["cells"] if c.startswith("adv-jigsaw/") and c.endswith("/slf")]
    notebooks.cell_job(plan, key)
    folder = root / "runs/smoke" / key
    assert (folder / "cell.ipynb").exists() and json.loads((folder / "cell.json").read_text())["mode"] == "slf"


def test_a_classifier_comes_back_without_training(made):
    root, _, paths = made
    (row,) = grid.cell_rows(root / "runs", "smoke", ENSEMBLE)["adv-jigsaw", "aff"]
    test = scales.labelled("fashion", scales.get_scale("smoke")).test
    with torch.no_grad(): right = (grid.cell_classifier(row)(test.images / 255).argmax(1) == test.labels).sum()
    assert int(right) == row["evaluation"]["aff.clean"]["correct"]


def execute(name, runs, root):
    parameters = {"scale": "smoke", "runs": str(runs), "figures": str(root / "figures")}
    notebooks.execute(reproduce.NOTEBOOKS / f"{name}.ipynb", root / f"{name}.ipynb", parameters, here=True)
    with open(root / f"figures/smoke/{name}.csv") as f: return list(csv.DictReader(f)), (root / f"figures/smoke/{name}.md").read_text()


def test_the_ensemble_has_numbers_for_the_pair_that_is_there(made, tmp_path):
    root, _, _ = made
    lines, text = execute("ensemble", root / "runs", tmp_path)
    found = {(line["Attacked"], line["Judged"]): line for line in lines}
    assert len(found) == 7 + 49
    for (a, b), line in found.items():
        there = "Selfie" not in a + b
        assert (line["Accuracy, %"] != "no data") == there and line["Seeds"] == str(int(there)), (a, b)
    rows = grid.cell_rows(root / "runs", "smoke", ENSEMBLE)
    (row,) = rows["adv-rotation", "aff"]
    clean, white = (Accuracy.from_json(row["evaluation"][k]) for k in ("aff.clean", "aff.pgd5.linf-0.05"))
    assert found["nobody", "Rotation"]["Accuracy, %"].startswith(f"{100 * clean.value:.1f} [")
    assert abs(float(found["Rotation", "Rotation"]["Accuracy, %"].split()[0]) / 100 - white.value) <= 1 / white.total + 1e-9
    assert found["nobody", "Selfie + Rotation + Jigsaw"]["Published, %"] == "86.04"
    assert re.search(r"\| Rotation \+ Jigsaw \|.*\| (supported|contradicted|undecided at this scale) \| 85.36 \| 53.08 \|", text)
    assert re.search(r"\| Selfie \+ Rotation \+ Jigsaw \| 0 \| no data \| no data \| no data \| 86.04 \| 54.64 \|", text)
    sidecar = json.loads((tmp_path / "figures/smoke/ensemble.provenance.json").read_text())
    assert {tuple(r["run"].split("/")[::2]) for r in sidecar["runs"]} == {("adv-rotation", "aff"), ("adv-jigsaw", "aff")}


# what the targets say about rows that are known

ROBUST = {  # right of 500, (P3,F4): above, below and inside the interval of (P1,F4) and of (P2,F4)
    "untrained": 250, "selfie": 250, "rotation": 250, "jigsaw": 250, "adv-selfie": 350, "adv-rotation": 150, "adv-jigsaw": 255,
}
HISTORY = {  # held-out robust accuracy by epoch: the baseline is at 0.4 of 500 images, [0.358, 0.444], from epoch 3 on
    "untrained": (0.1, 0.2, 0.4), "adv-selfie": (0.3, 0.46, 0.5), "adv-rotation": (0.1, 0.2, 0.3), "adv-jigsaw": (0.2, 0.38, 0.41),
}


def fabricate(runs, left_out=()):
    """A row for every cell, as if trained, but for those left out."""
    judge = scales.get_scale("smoke")
    for method, mode in product(targets.PRETEXT, MODES):
        if (method, mode) in left_out: continue
        config = scales.resolve(method, "smoke")
        told = enumerate(HISTORY.get(method, (0.1, 0.2, 0.3)), 1)
        history = [{"epoch": e, "standard": 0.8, "robust": r, "objective": 1.0, "seconds": 2.0} for e, r in told]
        best = max(h["robust"] for h in history)
        robust = ROBUST[method] if mode == "aff" else 10 * list(MODES).index(mode)
        evaluation = {
            f"{mode}.clean": Accuracy(400 if method == "untrained" else 402, 500).to_json()
            | {"epoch": 3, "epochs": 3, "images": 400, "heldout_images": 500, "heldout_robust": best, "history": history},
            result_key(mode, f"pgd{judge.attack_steps}", make_threat(judge.norm, judge.eps[0])): Accuracy(robust, 500).to_json(),
        }
        folder = scales.run_folder(runs, "smoke", config) / mode
        store.write_result(folder, "smoke", config.to_json(), evaluation, {}, "cell.json", mode=mode)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    root = tmp_path_factory.mktemp("told")
    fabricate(root / "runs", {("adv-selfie", "alf"), ("jigsaw", "aff")})
    return root, *execute("pretrain_by_finetune", root / "runs", root)


def answer(text, start):
    """The last word of the one line of the answers or the claims that begins so."""
    (line,) = [s for s in text.splitlines() if f"| {start}" in s]
    words = (store.SUPPORTED, store.CONTRADICTED, store.UNDECIDED, store.NO_DATA)
    return [word for word in line.strip("| ").split(" | ") if word in words][-1]


def test_claims_are_supported_contradicted_and_undecided_as_the_rows_are(told):
    _, _, text = told
    than = "(P3,F4) {} is more robust than (P1,F4)".format
    assert [answer(text, than(t)) for t in ("Selfie", "Rotation", "Jigsaw")] == [store.SUPPORTED, store.CONTRADICTED, store.UNDECIDED]
    assert answer(text, "Does adversarial pretraining help?") == store.UNDECIDED, "the tasks disagree"
    sooner = "(P3,F4) {} is as robust as the best of (P1,F4), sooner".format
    assert [answer(text, sooner(t)) for t in ("Selfie", "Rotation", "Jigsaw")] == [store.SUPPORTED, store.CONTRADICTED, store.UNDECIDED]
    assert answer(text, "Robustness comes from fine-tuning") == store.SUPPORTED  # 50 % of (P1,F4) against 4 % of (P3,F3)
    assert answer(text, "Pretraining brings clean accuracy") == store.UNDECIDED  # 80.4 % against 80.0 %
    assert answer(text, "The task matters under F4") == store.SUPPORTED
    assert answer(text, "(P3,F4) Selfie is more robust than (P3,F4) Rotation") == store.SUPPORTED
    assert answer(text, "(P3,F4) Rotation is more robust than (P3,F4) Jigsaw") == store.CONTRADICTED


def test_a_missing_row_gives_no_data_and_no_number(told):
    _, lines, text = told
    assert len(lines) == 28
    for line in lines:
        missing = (line["Pretraining"], line["Task"], line["Fine-tuning"][:2]) in {("P3", "Selfie", "F2"), ("P2", "Jigsaw", "F4")}
        assert (line["Clean, %"] == line["PGD-5, %"] == line["Epoch"] == "no data") == missing and line["Seeds"] == str(int(not missing))
    assert answer(text, "The task matters under F2") == store.NO_DATA
    assert answer(text, "(P3,F4) Jigsaw is more robust than (P2,F4)") == store.NO_DATA
    assert answer(text, "Does the adversary in it help?") == store.NO_DATA


def test_numbers_are_those_of_the_rows_and_the_published_stand_apart(told):
    _, lines, text = told
    found = {(line["Pretraining"], line["Task"], line["Fine-tuning"][:2]): line for line in lines}
    line = found["P3", "Rotation", "F4"]
    a = Accuracy(150, 500)
    assert line["PGD-5, %"] == f"{100 * a.value:.1f} [{100 * a.low:.1f}, {100 * a.high:.1f}]" and line["Epoch"] == "3 of 3"
    assert (line["Epochs to best of (P1,F4)"], line["Seconds to it"]) == ("never", "–")
    assert (found["P3", "Selfie", "F4"]["Epochs to best of (P1,F4)"], found["P3", "Selfie", "F4"]["Seconds to it"]) == ("2", "4")
    published = {k: [line[c] for c in line if c.startswith("Published")] for k, line in found.items()}
    assert published["P3", "Rotation", "F4"] == ["85.66", "50.40", "46"] and published["P1", "none", "F4"] == ["84.72", "47.22", "99"]
    assert sum(any(v) for v in published.values()) == 2 + 6 + 12
    assert not any(published["P1", "none", "F1"] + published["P2", "Selfie", "F2"])
    assert "Screening" in text and "ResNet-50v2" in text and "not ours" in text


def test_several_seeds_must_agree():
    history = lambda *robust: {"history": [{"epoch": e, "robust": r} for e, r in enumerate(robust, 1)], "heldout_images": 500}
    row = lambda seed, *robust: {"seed": seed, "mode": "aff", "evaluation": {"aff.clean": history(*robust)}}
    none = [row(0, 0.1, 0.2, 0.4), row(1, 0.1, 0.2, 0.4)]
    assert grid.faster_seeds([row(0, 0.5), row(1, 0.5)], none) == store.SUPPORTED
    assert grid.faster_seeds([row(0, 0.5), row(1, 0.1)], none) == store.UNDECIDED
    assert grid.faster_seeds([row(0, 0.5), row(2, 0.5)], none) == store.NO_DATA


def test_the_demo_grid_holds_back_enough_to_choose_on():
    for mode, tuning in TUNINGS["demo"].items(): assert 10_000 * tuning.labels * tuning.heldout >= 300 and tuning.epochs >= 3, mode
