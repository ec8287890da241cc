"""Machines: the profiles that come with the package, a GPU for each job, and kernels that never meet on a port."""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest

from advssl.suite import notebooks, profiles, reproduce

yaml = pytest.importorskip("yaml")
pytest.importorskip("snakemake")
LOCAL = ("local", "gpu", "gpus")  # profiles that can be tried without a cluster


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan of the scale for GPUs: one method, one seed of each, nothing made."""
    work = tmp_path_factory.mktemp("a plan") / "cifar10"  # with a blank
    work.mkdir()
    path = work / "plan.json"
    path.write_text(json.dumps(reproduce.plan(["robustness"], "cifar10", work.parent, work.parent / "figures", ["simclr"])))
    return path


def dry_run(plan: Path, *options: str) -> subprocess.CompletedProcess:
    words = ["--snakefile", str(reproduce.SNAKEFILE), "--directory", str(plan.parent), "--config", f"plan={plan}"]
    words += ["--dry-run", "--printshellcmds"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    return subprocess.run([sys.executable, "-c", reproduce.LAUNCH, *words, *options], capture_output=True, text=True, env=env)


def test_no_job_leaves_a_timer_behind(tmp_path):
    """Snakemake starts one after every selection of jobs, and each wakes the scheduler once a second to the end of the workflow."""
    rules = "rule all:\n    input: expand('{i}', i=range(6))\nrule one:\n    output: '{i}'\n    shell: 'touch {output}'\n"
    (tmp_path / "Snakefile").write_text(rules)
    watched = """
import atexit, threading
made, start = [], threading.Timer.start
threading.Timer.start = lambda self: made.append(self) or start(self)
atexit.register(lambda: print("timers", len(made)))
"""

    def timers(launch):
        for i in range(6): (tmp_path / str(i)).unlink(missing_ok=True)
        words = ["--cores", "1", "--directory", str(tmp_path), "--snakefile", str(tmp_path / "Snakefile")]
        done = subprocess.run([sys.executable, "-c", watched + launch, *words], capture_output=True, text=True)
        assert done.returncode == 0 and all((tmp_path / str(i)).exists() for i in range(6)), done.stderr
        return int(done.stdout.rsplit("timers", 1)[1])

    assert timers(reproduce.LAUNCH) == 0
    assert timers("from snakemake.cli import main\nmain()\n") >= 6, "Snakemake no longer does this: the launcher is not needed"


@pytest.mark.parametrize("name", LOCAL)
def test_a_profile_plans_the_gpu_scale(plan, name):
    done = dry_run(plan, *profiles.machine(name))
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = done.stdout.count("-m advssl job run")
    assert jobs == 6 and done.stdout.count("on_a_gpu()") == jobs  # three seeds of SimCLR and of the untrained encoder, each on its own GPU
    assert done.stdout.count("-m advssl job target") == 1
    assert done.stdout.count(f" {shlex.quote(str(plan))} ") == jobs + 1, "a blank in a path would part it"


def test_the_number_of_gpus_is_counted(monkeypatch):
    """`gpus` and a call without a profile allow a job for each visible GPU."""
    from snakemake.profiles import ProfileConfigFileParser

    for given, count in (("0,1,2", 3), ("4", 1), ("", 1), ("GPU-aa,GPU-bb", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        with open(profiles.find_profile("gpus") / "config.yaml") as file: read = ProfileConfigFileParser().parse(file)
        assert read["resources"] == [f"gpu={count}"]
        assert f"gpu={count}" in profiles.machine()


@pytest.mark.parametrize("name", [p.parent.name for p in profiles.PROFILES.glob("*/config.yaml")])
def test_form(name):
    """Each profile says what it is for; its keys are options of Snakemake, and a cluster's has no cores of this machine."""
    text = (profiles.find_profile(name) / "config.yaml").read_text()
    assert text.startswith("# ")
    keys = {key for key in yaml.safe_load(text) if not key.startswith("__")}
    from snakemake.cli import get_argument_parser

    options = {word.removeprefix("--") for action in get_argument_parser()._actions for word in action.option_strings}
    assert keys <= options, keys - options
    assert ("cores" in keys) == (name in LOCAL) and ({"executor", "jobs"} <= keys) == (name not in LOCAL)


def test_cores_of_this_machine_do_not_throttle_a_cluster(tmp_path):
    assert "--cores" not in profiles.machine("slurm") and profiles.machine("slurm", 3)[-2:] == ["--cores", "3"]
    (tmp_path / "config.yaml").write_text("jobs: 2\n")
    assert profiles.machine(str(tmp_path)) == ["--profile", str(tmp_path)]


def test_an_unknown_profile_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="choose one of gpu, gpus, local, slurm"):
        reproduce.reproduce(["taxonomy"], "smoke", runs=tmp_path / "runs", figures=tmp_path / "figures", profile="cloud")
    assert not list(tmp_path.iterdir())


def test_no_two_jobs_meet_on_a_gpu(tmp_path):
    """Six jobs on two GPUs, one of them killed: every GPU has one job at a time, and all others are done."""
    log = tmp_path / "log"
    say = "import os, sys, time; gpu = os.environ['CUDA_VISIBLE_DEVICES']\n"
    act = f"{say}log = open({str(log)!r}, 'a', buffering=1)\nprint(gpu, 'in', file=log); time.sleep(0.2); print(gpu, 'out', file=log)"
    hang = f"{say}print(gpu, flush=True); time.sleep(600)"
    take = [sys.executable, "-c", "from advssl.suite.profiles import on_a_gpu; on_a_gpu()", sys.executable, "-c"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "3,5", "TMPDIR": str(tmp_path)}
    victim = subprocess.Popen([*take, hang], env=env, stdout=subprocess.PIPE, text=True)
    held = victim.stdout.readline().strip()
    jobs = [subprocess.Popen([*take, act], env=env) for _ in range(5)]
    while not log.exists() or "out" not in log.read_text(): time.sleep(0.05)
    assert held not in {line.split()[0] for line in log.read_text().splitlines()}, "a job ran on the GPU that another holds"
    victim.kill()
    victim.wait()
    assert [job.wait(60) for job in jobs] == [0] * 5
    busy, lines = set(), [line.split() for line in log.read_text().splitlines()]
    for gpu, what in lines:
        assert (gpu in busy) == (what == "out"), lines
        busy ^= {gpu}
    assert len(lines) == 10 and {gpu for gpu, _ in lines} <= {"3", "5"}


def test_a_clusters_jobs_keep_their_own_numbers(monkeypatch):
    """Two jobs of a scheduler on one node both see a GPU 0, and they are not the same."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    here = profiles.locks()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert profiles.locks() != here and profiles.locks().name.endswith("-17")


def test_notebooks_at_once_share_no_port(tmp_path):
    """Kernels of notebooks that run side by side listen on sockets of the file system, each in a place of its own."""
    code = """import json, ipykernel\nline = json.load(open(ipykernel.get_connection_file()))\nprint(line["transport"], line["ip"])"""
    cells = [nbformat.v4.new_code_cell("out = 0", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "say.ipynb")
    done, say = [tmp_path / f"{i}.ipynb" for i in range(3)], tmp_path / "say.ipynb"
    with ThreadPoolExecutor(3) as pool: list(pool.map(lambda out: notebooks.execute(say, out, {"out": 1}, tmp_path), done))
    said = [nbformat.read(path, 4).cells[-1].outputs[0].text.split() for path in done]
    assert {transport for transport, _ in said} == {"ipc"} and len({place for _, place in said}) == 3
