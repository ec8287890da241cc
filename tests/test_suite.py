"""The suite end to end at smoke scale: from nothing to tables and figures, through papermill and Snakemake, and back after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from advssl import cli
from advssl.method import get_method, methods
from advssl.pretrain import build, restore
from advssl.suite import notebooks, reproduce, scales, store, targets

pytest.importorskip("papermill")
pytest.importorskip("snakemake")


FEW = ["rocl", "adco", "mae", "deacl"]  # input level, bank, masked, and one that stands on a parent's run


def command(root: Path) -> list[str]:
    """`advssl reproduce` of a few methods at smoke scale, in folders of its own."""
    folders = ["--runs", str(root / "runs"), "--figures", str(root / "figures")]
    return [sys.executable, "-m", "advssl", "reproduce", "--scale", "smoke", *folders, *(word for key in FEW for word in ("--method", key))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The suite, killed once in the middle, then made to the end."""
    root = tmp_path_factory.mktemp("suite")
    first = subprocess.Popen(command(root), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    for _ in range(600):
        if list((root / "runs").glob("smoke/*/*/result.json")) or first.poll() is not None: break
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    finished = {p: p.stat().st_mtime_ns for p in (root / "runs").glob("smoke/*/*/result.json")}
    done = subprocess.run(command(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, finished


def test_every_target_is_made_from_real_runs(made):
    root, _ = made
    for target in (name for name, t in targets.TARGETS.items() if not t.asked):
        sidecar = json.loads((root / f"figures/smoke/{target}.provenance.json").read_text())
        assert sidecar["files"] and sidecar["provenance"]["packages"]["torch"]
        for name, digest in sidecar["files"].items(): assert store.sha256(root / "figures/smoke" / name) == digest
    assert {"tradeoff.png", "tradeoff.svg"} <= {p.name for p in (root / "figures/smoke").iterdir()}
    rows = store.rows(root / "runs", "smoke")
    made_of = {*FEW, "simclr", "untrained"}  # with the parent, though nobody asked for it
    assert {r["method"] for r in rows} == made_of and not any(r["stale"] for r in rows)
    for row in rows:
        assert (Path(row["folder"]) / "run.ipynb").exists()
        for name, digest in row["checkpoint"].items(): assert store.sha256(Path(row["folder"]) / name) == digest
    table = (root / "figures/smoke/robustness.md").read_text()
    for key, cls in methods().items(): assert (f"| {cls.card.name} " in table) == (key in made_of), key


def test_children_stand_on_the_runs_beside_them(made):
    """A parent is a job of the plan, trained once, and its child's checkpoint holds the same weights."""
    root, _ = made
    plan = reproduce.plan([], "smoke", root / "runs", root / "figures", FEW)
    for job, wish in plan["jobs"].items():
        assert set(wish["parents"]) <= set(plan["jobs"])
        if not wish["parents"]: continue
        child, config = restore(root / "runs/smoke" / job)
        for name, folder in scales.parent_folders(root / "runs", "smoke", config).items():
            theirs, mine = restore(folder)[0].evaluated().state_dict(), getattr(child, name).state_dict()
            assert all(torch.equal(value, mine[key]) for key, value in theirs.items())
            assert not (root / "runs/smoke" / job / name).exists(), "the parent was trained a second time"


def test_a_kill_repeats_nothing_that_was_done(made):
    root, finished = made
    assert finished, "nothing had been finished when the first call was killed"
    for path, stamp in finished.items(): assert path.stat().st_mtime_ns == stamp, f"{path} was made twice"


def test_a_second_call_does_nothing(made):
    root, _ = made
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.name.endswith((".json", ".md", ".png")) and p.name != "plan.json"}
    done = subprocess.run(command(root), capture_output=True, text=True)
    assert done.returncode == 0
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = [p for p in before if before[p] != after[p] and ".snakemake" not in p.parts]
    assert not changed


def test_tables_and_figures_are_redrawn_from_the_store_alone(made, tmp_path, monkeypatch, capsys):
    root, _ = made
    first = root / "figures/smoke"
    (tmp_path / "smoke").mkdir()
    shutil.copy(first / store.STORE, tmp_path / "smoke")
    some = ("robustness", "gallery")  # of rows, and of what a target keeps; the committed scale is redrawn whole
    words = [sys.executable, "-m", "advssl", "reproduce", *some, "--from-store", "--scale", "smoke", "--figures", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in first.iterdir():
        if path.name.split(".")[0] not in some or path.name.endswith(".provenance.json"): continue
        assert path.read_bytes() == (tmp_path / "smoke" / path.name).read_bytes(), path.name
    said = refused([*words[3:-1], str(tmp_path / "elsewhere")], monkeypatch, capsys)
    assert "there is no store of rows" in said and not (tmp_path / "elsewhere").exists()


def test_a_store_that_knows_more_than_the_runs_is_not_touched(tmp_path, monkeypatch, capsys):
    """A clone has the committed rows and no runs: whatever a call makes there, or fails to make, the rows stay."""
    figures = tmp_path / "figures/smoke"
    figures.mkdir(parents=True)
    (figures / store.STORE).write_text(json.dumps({"file": "simclr/0-0/result.json", "row": {"method": "simclr"}}) + "\n")
    before = (figures / store.STORE).read_bytes()
    for status in (0, 1, 130):
        monkeypatch.setattr(reproduce, "snakemake", lambda *_, status=status: status)
        reproduce.reproduce(["taxonomy"], "smoke", runs=tmp_path / "runs", figures=tmp_path / "figures")
        assert (figures / store.STORE).read_bytes() == before and "stays as it is: 1 of its rows" in capsys.readouterr().err


def test_what_is_set_aside_twice_is_there_twice(tmp_path):
    """Going back and forth between two versions of the code loses neither's work."""
    folder = tmp_path / "0-abc"
    for i in range(3):
        folder.mkdir()
        (folder / "checkpoint.json").write_text('{"code": "of another version"}')
        (folder / "mine").write_text(str(i))
        reproduce.set_aside(folder, "simclr")
        assert not folder.exists()
    assert sorted(path.read_text() for path in tmp_path.glob(".stale-*/mine")) == ["0", "1", "2"]


def test_the_scale_of_a_folder(tmp_path):
    assert scales.scale_of("runs/laptop/simclr/0-abc") == "laptop" and scales.scale_of(tmp_path / "own") == "demo" == scales.scale_of("/")


def test_evaluating_a_run_again_gives_its_row_and_changes_nothing(made):
    root, _ = made
    row = next(r for r in store.rows(root / "runs", "smoke") if r["method"] == "simclr")
    before = {p: store.sha256(p) for p in Path(row["folder"]).iterdir() if p.is_file()}
    again = scales.evaluate_run(row["folder"], protocols=["knn"])
    assert again["knn.clean"] == row["evaluation"]["knn.clean"] and "linear.clean" not in again
    assert before == {p: store.sha256(p) for p in before}
    with pytest.raises(ValueError, match="choose one of knn, linear, linear-10%"): scales.evaluate_run(row["folder"], protocols=["lp"])


def test_changed_code_makes_a_row_stale_and_runs_it_again(made):
    root, _ = made
    (path,) = (root / "runs/smoke/simclr").glob("*/result.json")
    pointer = path.parent / "checkpoint.json"
    old = json.loads(pointer.read_text())
    pointer.write_text(json.dumps(old | {"code": "0" * 12}))
    path.write_text(path.read_text().replace(json.loads(path.read_text())["code"], "0" * 12))
    row = next(r for r in store.rows(root / "runs", "smoke") if r["method"] == "simclr")
    assert row["stale"]
    plan = reproduce.plan([], "smoke", root / "runs", root / "figures", FEW)
    reproduce.set_aside(path.parent, "simclr")
    (root / "again.json").write_text(json.dumps(plan))
    assert notebooks.do_job(["run", str(root / "again.json"), f"simclr/{path.parent.name}"]) == 0
    assert json.loads(path.read_text())["code"] == store.result_code("simclr")
    graves = list(path.parent.parent.glob(".stale-*"))
    assert graves and (graves[0] / "checkpoint.json").exists()  # set aside, not lost


@pytest.mark.parametrize("scale", scales.SCALES)
def test_every_method_has_a_complete_record_at_every_scale(scale):
    for config in targets.configs(scale): assert config == type(config)(**config.to_json())


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_runs_of_a_target_can_be_built(target):
    for label, group in targets.variant_configs(targets.TARGETS[target], "smoke").items():
        for config in group: assert isinstance(build(config, 1, 28), get_method(config.method)), label


def refused(words: list[str], monkeypatch, capsys) -> str:
    """What `advssl` says to words that it refuses, called in this process."""
    monkeypatch.setattr(sys, "argv", ["advssl", *words])
    with pytest.raises(SystemExit) as end: cli.main()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("words", [["table3"], ["--scale", "huge"]])
def test_wrong_words_write_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "choose" in refused(["reproduce", *words], monkeypatch, capsys) and not list(tmp_path.iterdir())


def test_an_unknown_parameter_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no parameter 'scael': choose among scale"):
        notebooks.execute(reproduce.NOTEBOOKS / "taxonomy.ipynb", tmp_path / "out.ipynb", {"scael": "demo"})
    assert not list(tmp_path.iterdir())
