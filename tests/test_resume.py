"""A run that was stopped, however rudely, ends with the same bits as one that was not: for every method."""

import json
import math
import multiprocessing
import signal
import time

import pytest
import torch

from advssl import checkpoint
from advssl.method import get_method, methods
from advssl.pretrain import Run
from advssl.suite.scales import resolve

KEYS = [k for k in methods() if k != "untrained"]
DIRECTIONS = {"caco": 2, "hybrid": 2}  # losses in one objective: each view is the query once


def small(method: str):
    """Two epochs of four steps."""
    return resolve(method, "smoke", 3, {"images": 128, "batch_size": 32, "epochs": 2})


def same(a, b) -> bool:
    """Equal to the bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(same, a, b))
    return a == b


def log(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds_per_step"} for line in lines]


@pytest.mark.parametrize("method", KEYS)
def test_stopped_run_ends_with_the_same_bits(method, tmp_path):
    """Weights, averages, banks, players, optimizers and random numbers, stopped in the middle of the second epoch."""
    config = small(method)
    Run(config, tmp_path / "whole").train()
    Run(config, tmp_path / "cut", checkpoint_seconds=0).train(stop_after=6)
    torch.manual_seed(99)  # a new process would have other random numbers
    resumed = Run(config, tmp_path / "cut")
    assert resumed.step == 6
    resumed.train()
    (whole, state), (cut, cut_state) = checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "cut")
    assert same(whole, cut) and same(state, cut_state)
    assert log(tmp_path / "whole") == log(tmp_path / "cut")


@pytest.mark.parametrize("method", KEYS)
def test_objective_falls(method, tmp_path):
    """A few epochs on a few images lower the objective: catches a sign or a detached graph in any method."""
    cls = get_method(method)
    config = resolve(method, "smoke", 0, {"images": 256, "batch_size": 64, "epochs": 6 if cls.backbone == "convnet" else 12})
    Run(config, tmp_path).train()
    values = [line["objective"] for line in log(tmp_path)]
    assert values[-1] < values[0] - 0.02, values
    if bank := config.settings.get("queue_size") or config.settings.get("bank_size"):  # better than guessing among a bank and one positive
        assert values[-1] < DIRECTIONS.get(method, 1) * math.log(bank + 1), values


def train(folder, ready):
    """A process to be killed; `ready` is set when the first step begins."""
    torch.set_num_threads(1)
    run = Run(resolve("adco", "smoke", 3, {"images": 256, "batch_size": 32, "epochs": 3}), folder, checkpoint_seconds=0)
    ready.set()
    run.train()


def test_kill_9_at_random_moments(tmp_path):
    """SIGKILL, whenever it comes, leaves a readable checkpoint; the run that goes on ends with the same bits."""
    server = multiprocessing.get_context("forkserver")  # a process of its own, without waiting for the libraries each time
    server.set_forkserver_preload(["advssl.pretrain", "advssl.suite.scales", "lightning_fabric"])

    def start(name):
        process = server.Process(target=train, args=(tmp_path / name, ready := server.Event()))
        process.start()
        assert ready.wait(300)
        return process

    (whole := start("whole")).join()
    assert whole.exitcode == 0
    for wait in (0.05, 0.35, 0.8):
        process = start("cut")
        time.sleep(wait)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL or wait == 0.8, "the run was over before it could be killed"
        checkpoint.load(tmp_path / "cut")  # whole or absent, never damaged
    start("cut").join()
    assert same(checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "cut"))
    assert not [p for p in (tmp_path / "cut").iterdir() if p.name.startswith(".")]
