"""What goes wrong on real machines: processes die at any moment, disks fill up, folders cannot be written, a method fails.

Three kills here; `make faults` has twenty, a full disk and the death of one process alone, and takes minutes."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from advssl import checkpoint, cli
from advssl.pretrain import Run
from advssl.suite import store
from advssl.suite.scales import resolve

pytest.importorskip("papermill")
pytest.importorskip("snakemake")

BROKEN = """
from advssl.cli import main
from advssl.method import Card, register
from advssl.methods.simclr import SimCLR

@register
class Broken(SimCLR):
    "Its objective is not a number."
    card = Card("Broken", "a test", "nbs/tests")
    def turns(self, views):
        for objective, mover in super().turns(views): yield float("nan") * objective, mover

main()
"""


def command(root: Path, *methods: str, call=("-m", "advssl")) -> list[str]:
    words = [word for name in methods for word in ("--method", name)]
    folders = ["--runs", str(root / "runs"), "--figures", str(root / "figures")]
    return [sys.executable, *call, "reproduce", "robustness", "--scale", "smoke", *folders, *words]


def start(root: Path, *methods: str, largest: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """In a group of its own, as a terminal starts it; `largest` is how many bytes a file may have."""

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # who runs the tests in the background has it ignored
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))

    root.mkdir(exist_ok=True)
    with open(root / "said", "a") as said:
        return subprocess.Popen(command(root, *methods), stdout=said, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=prepare)


def finish(root: Path, *methods: str) -> None:
    done = subprocess.run(command(root, *methods), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def tables(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((root / "figures/smoke").iterdir()) if p.suffix in (".csv", ".md")}


def results(root: Path) -> dict[Path, tuple[int, int]]:
    """Finished runs by file: inode and time of change, which a second writing would alter."""
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (root / "runs").glob("smoke/*/*/result.json")}


def check_whole(root: Path) -> None:
    """Whatever carries a final name is whole: results and pointers parse, checkpoints load, tables are those of their sidecar."""
    for pattern in ("runs/smoke/*/*/*.json", "runs/smoke/plan.json", "figures/smoke/*.json"):
        for path in root.glob(pattern): json.loads(path.read_text())
    for folder in root.glob("runs/smoke/*/*"): checkpoint.load(folder)
    for path in root.glob("figures/smoke/*.provenance.json"):
        for name, digest in json.loads(path.read_text())["files"].items(): assert store.sha256(path.parent / name) == digest


def kill_and_finish(root: Path, moments: list[float], *methods: str) -> None:
    """Kill the whole group at each of these seconds after its start, then let a last call finish; nothing that was done is done again."""
    done = {}
    for moment in moments:
        process = start(root, *methods)
        try: process.wait(moment)
        except subprocess.TimeoutExpired: os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        check_whole(root)
        found = results(root)
        assert done.items() <= found.items(), "a finished run was made again"
        done = found
    finish(root, *methods)
    assert done.items() <= results(root).items(), "a finished run was made again"
    check_whole(root)


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """A call that nobody disturbs, with a method that fails beside one that does not; and the seconds that it takes."""
    root, began = tmp_path_factory.mktemp("failed"), time.monotonic()
    (root / "broken.py").write_text(BROKEN)
    done = subprocess.run(command(root, "broken", "simclr", call=(str(root / "broken.py"),)), capture_output=True, text=True)
    return root, done, time.monotonic() - began


@pytest.fixture(scope="module")
def whole(failed):
    """The tables that every other call shall end with, and about the seconds of a call."""
    return tables(failed[0]), failed[2]


def test_a_method_that_fails_leaves_a_gap_and_no_more(failed):
    """All other runs are made, the table has their rows, and the call says what is missing and exits with an error."""
    root, done, _ = failed
    assert done.returncode == 1, done.stdout + done.stderr
    assert "advssl: broken/0-" in done.stderr and "is missing, and tables are drawn without it" in done.stderr
    if not torch.cuda.is_available():  # elsewhere the jobs are other processes, which do not know the method
        assert "is not finite" in next((root / "runs/smoke/broken").rglob("run.ipynb")).read_text()
    assert "| SimCLR |" in tables(root)["robustness.md"].decode() and "Broken" not in tables(root)["robustness.md"].decode()
    assert {p.parts[-3] for p in results(root)} == {"simclr", "untrained"}


def test_ctrl_c_and_kills_change_no_number(whole, tmp_path):
    """SIGINT once, which is answered by one line, then SIGKILL to the whole group, three times: early, in the middle, and late."""
    wanted, seconds = whole
    process = start(tmp_path, "simclr")
    while not list(tmp_path.glob("runs/smoke/*/*/config.json")) and process.poll() is None: time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    said = (tmp_path / "said").read_text()
    ours = [line for line in said.splitlines() if line.startswith("advssl: ")]
    assert ours == ["advssl: interrupted; the same command goes on where this one stopped"] and "Traceback" not in said
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    kill_and_finish(tmp_path, [seconds * draw.uniform(*span) for span in ((0.15, 0.3), (0.2, 0.45), (0.4, 0.65))], "simclr")
    assert tables(tmp_path) == wanted, f"seed of the moments: {seed}"


@pytest.mark.faults
@pytest.mark.parametrize("point", range(20))
def test_kill_at(point, whole, tmp_path):
    wanted, seconds = whole
    kill_and_finish(tmp_path, [seconds * (point + random.random()) / 20], "simclr")
    assert tables(tmp_path) == wanted


@pytest.mark.faults
def test_the_death_of_one_process_alone(whole, tmp_path):
    """The call is killed and its workflow lives on: a second call is refused as long as it does, and then finds what it made."""
    process = start(tmp_path, "simclr")
    while not list(tmp_path.glob("runs/smoke/*/*/config.json")): time.sleep(0.1)
    process.kill()
    process.wait()
    second = subprocess.run(command(tmp_path, "simclr"), capture_output=True, text=True)
    alive = subprocess.run(["pgrep", "-s", str(process.pid), "-f", "snakemake"], capture_output=True).returncode == 0
    if alive: assert second.returncode == 2 and "another `advssl reproduce` is working" in second.stderr
    for _ in range(600):
        if subprocess.run(command(tmp_path, "simclr"), capture_output=True).returncode == 0: break
        time.sleep(1)
    check_whole(tmp_path)
    assert tables(tmp_path) == whole[0]


@pytest.mark.faults
def test_a_full_disk_under_the_suite(whole, tmp_path):
    """Files of more than 200 kB cannot be written: nothing is half there, and with room again the call goes on."""
    process = start(tmp_path, "simclr", largest=200_000)
    assert process.wait() != 0
    check_whole(tmp_path)
    assert not results(tmp_path)
    finish(tmp_path, "simclr")
    assert tables(tmp_path) == whole[0]


def test_folders_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """One line that names the folder, exit status 2."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", command(tmp_path / "file", "simclr")[2:])
    with pytest.raises(SystemExit) as end: cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("advssl: ") and str(tmp_path / "file") in line


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    checkpoint.write_atomic(tmp_path / "row", "old")
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"): checkpoint.write_atomic(tmp_path / "row", "new")
    assert (tmp_path / "row").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["save_file", "torch.save", "os.fsync", "os.replace"])
def test_a_full_disk_in_a_checkpoint(name, tmp_path, monkeypatch):
    """Whatever step of a save fails, the last checkpoint is there, and the run that goes on ends with the same bits."""
    config = resolve("simclr", "smoke", 3, {"images": 128, "batch_size": 32, "epochs": 2})
    Run(config, tmp_path / "whole").train()
    Run(config, tmp_path / "cut", checkpoint_seconds=0).train(stop_after=5)
    run = Run(config, tmp_path / "cut", checkpoint_seconds=0)
    with monkeypatch.context() as patch:
        patch.setattr(f"advssl.checkpoint.{name}", full)
        with pytest.raises(OSError, match="No space"): run.train()
    assert checkpoint.load(tmp_path / "cut") and json.loads((tmp_path / "cut/checkpoint.json").read_text())["step"] == 5
    Run(config, tmp_path / "cut").train()
    (one, _), (two, _) = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "cut")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not [p.name for p in (tmp_path / "cut").iterdir() if p.name.startswith(".")]
