"""A run that was stopped, however rudely, ends with the same bits as one that was not: for every method."""

import json
import math
import multiprocessing
import signal
import time
from dataclasses import replace

import pytest
import torch

from advssl import checkpoint
from advssl.config import Config, make_optimizer
from advssl.method import Player, get_method, methods, register
from advssl.pretrain import Run, restore
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


def test_stopped_before_the_first_checkpoint(tmp_path):
    """Nothing but lines of the log is left, and they are not written twice."""
    config = small("simclr")
    Run(config, tmp_path / "whole").train()
    Run(config, tmp_path / "cut").train(stop_after=6)
    assert [line["step"] for line in log(tmp_path / "cut")] == [4] and checkpoint.load(tmp_path / "cut") is None
    Run(config, tmp_path / "cut").train()
    assert log(tmp_path / "whole") == log(tmp_path / "cut")
    assert same(checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "cut"))


@pytest.mark.parametrize("wrong, message", [
    ({"weight_decay": -1.0}, "weight_decay must be a finite number >= 0"), ({"warmup_epochs": math.inf}, "warmup_epochs must be a finite"),
    ({"threads": -1}, "threads must be"), ({"images": -5}, "images must be"), ({"lr": math.inf}, "lr must be a finite number > 0"),
    ({"lr": math.nan}, "lr must be"), ({"seed": -1}, "seed must be"), ({"seed": 2**63}, r"seed must be less than 2\*\*63"),
])
def test_numbers_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message): Config("simclr", **wrong)


def test_an_interrupted_run_is_not_taken_for_a_finished_one(tmp_path):
    Run(small("simclr"), tmp_path, checkpoint_seconds=0).train(stop_after=6)
    with pytest.raises(ValueError, match="is trained for 6 of 8 steps: the command that began it goes on with it"): restore(tmp_path)
    Run(small("simclr"), tmp_path).train()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    restore(tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "loading a run reseeds whoever loads it"


@pytest.mark.parametrize("name, content", [("config.json", '{"method": "simclr"'), ("config.json", '{"method": "simclr", "colour": 1}'),
                                           (checkpoint.POINTER, '{"step": 1')])
def test_a_damaged_record_names_its_file(name, content, tmp_path):
    Run(small("simclr"), tmp_path).train()
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*remove .* to start the run afresh"): restore(tmp_path)


def test_settings_that_a_step_refuses_leave_nothing_behind(tmp_path):
    config = replace(small("mae"), settings=small("mae").settings | {"mask_ratio": 0.999})
    with pytest.raises(ValueError, match="take a ratio from"): Run(config, tmp_path / "run").train()
    assert not list((tmp_path / "run").glob("*"))


def test_two_modules_with_one_card_are_refused():
    other = type("Other", (get_method("rocl"),), {"__module__": "advssl.methods.of_somebody"})
    with pytest.raises(ValueError, match="advssl.methods.of_somebody and advssl.methods.rocl both register 'RoCL'"): register(other)
    assert get_method("rocl").__module__ == "advssl.methods.rocl"


def test_a_run_that_nobody_could_open_is_refused():
    for method in ("simclr", "untrained"):
        with pytest.raises(ValueError, match="epochs must be >= 1, got 0"): Config(method, epochs=0)


def test_a_player_cannot_ask_for_what_nobody_knows():
    player = Player("bank", (torch.nn.Linear(2, 2),), optimizer={"lr": 1.0, "weightdecay": 0.0})
    with pytest.raises(ValueError, match="'bank' asks for weightdecay: it may state name"): make_optimizer(player, small("simclr"))


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
