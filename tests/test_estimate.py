"""Estimates: counts that need neither data nor device, linear arithmetic, a question at the right time, nothing written."""

import json
import os
import re
import sys
from dataclasses import replace
from itertools import count as counter
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from advssl import cli, data
from advssl.encoders import Encoder
from advssl.method import get_method
from advssl.pretrain import Run, training_code
from advssl.suite import estimate, probe
from advssl.suite.cost import Trial, count, peak_bytes, trial
from advssl.suite.estimate import Estimate, behind, doubts, estimate_one, estimate_plan, estimate_run, scaled, tell
from advssl.suite.passes import Passes, record
from advssl.suite.probe import FEW, SHAPES, Pace, Tally, pool, stand_in, steps_of, tally
from advssl.suite.scales import job_name, resolve

# images


def numbers(text):
    return {int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", text)}


def test_sizes_are_those_of_the_loaders(monkeypatch):
    """Every data set has a size; the loaders' own descriptions name it."""
    assert set(SHAPES) == set(data.LOADERS)
    say = {"fashion": data.fashion, "fashion-full": data.fashion_full, "cifar10": data.cifar, "cifar100": data.cifar, "stl10": data.stl10}
    for name, loader in say.items():
        n, channels, side = SHAPES[name]
        where = loader.__doc__ if name != "fashion-full" else loader.__doc__ + data.fashion.__doc__
        assert n in numbers(where) and f"{channels}x{side}x{side}" in where, name
    seen = []
    monkeypatch.setattr(data, "image_folders", lambda name, root, size: seen.append((name, size)))
    for name in ("imagenet", "imagenet100"):
        data.load(name, "/nowhere")
    assert seen == [(name, SHAPES[name][2]) for name in ("imagenet", "imagenet100")]
    for name in say:
        try:
            splits = data.load(name)
        except FileNotFoundError:
            continue
        images = (splits.unlabelled or splits.train).images
        assert (len(images), images.shape[1], images.shape[3]) == SHAPES[name]


def test_stand_in_takes_no_memory_and_is_used_only_without_the_files(tmp_path, monkeypatch):
    for name, (n, channels, side) in SHAPES.items():
        one = stand_in(name)
        assert one.images.shape == (n, channels, side, side) and len(one.labels) == n
        assert one.images.untyped_storage().nbytes() == channels * side**2 and one.images[0].float().std() > 30
    assert pool("fashion").name == "fashion/train"
    assert pool("cifar10", str(tmp_path)).name == "cifar10/random"
    monkeypatch.setattr(probe, "load", lambda *_: pytest.fail("the first use of ImageNet's files is hours of decoding"))
    assert pool("imagenet").name == "imagenet/random"
    extra, train = object(), object()
    monkeypatch.setattr(probe, "load", lambda *_: SimpleNamespace(unlabelled=extra, train=train))
    assert pool("stl10") is extra
    monkeypatch.setattr(probe, "load", lambda *_: (_ for _ in ()).throw(ValueError("damaged")))
    with pytest.raises(ValueError, match="damaged"):  # a damaged file is not a missing one
        pool("cifar10")


def test_steps_are_those_of_the_run(tmp_path):
    for given in ({}, {"images": 0, "batch_size": 300}, {"images": 10**6, "epochs": 3}):
        config = resolve("simclr", "smoke", 0, given)
        assert steps_of(config) == Run(config, tmp_path / str(len(given)) / str(given.get("epochs"))).total


# probes


@pytest.mark.parametrize(
    "name, overrides",
    [("moco-v2", {}), ("moco-v2", {"queue_size": 128}), ("adco", {}), ("caco", {})]
    + [("advcl", {}), ("advcl", {"weight": 0.0}), ("deacl", {}), ("simclr", {})],
)
def test_preparation_is_counted_as_it_is_computed(name, overrides, tmp_path):
    """A real preparation of 640 images in batches of 64, counted by hooks, beside the one in which nothing is computed."""
    if "queue_size" in overrides and "queue_size" not in resolve(name, "demo").settings:
        overrides = {next(k for k in resolve(name, "demo").settings if "size" in k or "queue" in k): 128}
    config = resolve(name, "demo", 0, {"images": 640, "batch_size": 64} | overrides)
    run = Trial(config, tmp_path)
    with record(run.method, run.data.images[:1] / 255) as found:
        run.begin()
    assert found.passes.graph == 0
    assert probe.probe(config, stand_in("fashion"), 16, "cpu").before == pytest.approx(found.passes.constant)


def test_a_probe_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tally(resolve("moco-v2", "demo"))
        assert torch.get_num_threads() == 2  # the run asks for one
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before) and not list(tmp_path.iterdir())


def test_encoders_compute_again_afterwards():
    run = probe.probe(resolve("moco-v2", "demo"), stand_in("fashion"), 4, "cpu")
    x = torch.rand(2, 1, 28, 28)
    run.method.eval()
    assert torch.equal(run.method.encoder(x), run.method.encoder(x))
    with probe.nothing_computed(run.method) as seen:
        assert not torch.equal(run.method.encoder(x), run.method.encoder(x)) and seen == [2, 2]
    assert not any("forward" in vars(m) for m in run.method.modules() if isinstance(m, Encoder))
    assert next(run.source).index.max() < FEW < run.loader.count


def test_units():
    """Eq. (1): every kind has its own price."""
    assert Passes(graph=3, constant=5, to_input=7, to_weights=11).units(2) == (3 + 5 + 7 + 2 * 11) / 2


@pytest.mark.parametrize("name", ["rocl", "acl", "moco-v2", "advcl", "simmim", "adios", "untrained"])
def test_counts_do_not_depend_on_the_batch(name):
    found = count(trial(name, "demo", 16, 128))
    assert tally(resolve(name, "demo")).units == pytest.approx(found.passes.units(16))


@pytest.mark.parametrize("name", ["rocl", "mae"])
def test_bytes_lie_on_the_line(name):
    """Eq. (2) holds for batches that it was not made of; optimizers' state is held, and not part of the peak."""
    config = resolve(name, "demo")
    found, run = tally(config), probe.probe(config, stand_in("fashion"), 64, "cpu")
    run.whole_step()
    assert found.peak(64) == pytest.approx(peak_bytes(run.whole_step), rel=0.1)
    assert 0 < 4 * found.base < found.peak(64) and found.peak(100) == found.base + 100 * found.each
    weights = sum(p.nbytes for p in run.method.parameters() if p.requires_grad)
    assert found.held >= 3 * weights  # AdamW has two moments beside them


def fake_run(monkeypatch, draws, steps):
    """A run whose steps take as long as they are told to, by a clock that only they move."""
    now, log = [0.0], []

    def take(seconds, what):
        now[0] += seconds
        log.append(what)

    def source():
        for seconds in draws:
            take(seconds, "draw")
            yield None

    queue = iter(steps)
    run = SimpleNamespace(
        fabric=SimpleNamespace(device="cpu"),
        source=source(),
        one_step=lambda _: take(next(queue), "step"),
        whole_step=None,
        data=SimpleNamespace(images=torch.zeros(1)),
    )
    monkeypatch.setattr(probe, "clock", lambda _: now[0])
    monkeypatch.setattr(probe, "probe", lambda *_: run)
    monkeypatch.setattr(probe, "peak_bytes", lambda *_: 100)
    monkeypatch.setattr(probe, "held_bytes", lambda _: 7)
    return log


def test_the_median_behind_the_warm_up_is_kept(monkeypatch):
    log = fake_run(monkeypatch, [9, 9, 9, 1, 2, 3, 4, 50], [90, 90, 90, 10, 40, 20, 30, 500])
    assert probe.timed(resolve("simclr", "smoke"), 16, 5, 1e6) == Pace(16, 3, 30, 100, 7)
    assert log.count("step") == 8


def test_patience_ends_a_probe(monkeypatch):
    """It is not overdrawn by more than a step, and what there is serves."""
    log = fake_run(monkeypatch, [1] * 9, [5, 6, 7, 8, 9])
    assert probe.timed(resolve("simclr", "smoke"), 16, 20, 10.0).step == 6 and log.count("step") == 2


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried = []

    def timed(config, batch, steps, patience):
        tried.append(batch)
        if batch > 16:
            raise torch.OutOfMemoryError
        return Pace(batch, 1, 2, 100, 7)

    monkeypatch.setattr(probe, "timed", timed)
    assert probe.pace(resolve("simclr", "smoke")).images == 16 and tried == [64, 32, 16]
    monkeypatch.setattr(probe, "timed", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        probe.pace(resolve("simclr", "smoke"))
    with pytest.raises(ValueError, match="at least one step"):
        probe.pace(resolve("simclr", "smoke"), 0)


# arithmetic


@pytest.fixture
def known(monkeypatch):
    """Counts and a pace that are known: only arithmetic is left."""
    tallies = {"simclr": Tally(6, 0, 1e6, 1e4, 10**6), "rocl": Tally(12, 0, 1e6, 2e4, 10**6), "moco-v2": Tally(6, 640, 1e6, 1e4, 10**6)}
    probed = []

    def fake_pace(config, steps=20):
        probed.append(config.method)
        return Pace(32, draw=0.32, step=1.92, peak=2 * (1e6 + 32e4), held=1e6 + 5e6)  # 0.01 s a pass, 0.005 s a view; images of 5 MB

    monkeypatch.setattr(estimate, "tally", lambda config: tallies.get(config.method, tallies["simclr"]))
    monkeypatch.setattr(estimate, "pace", fake_pace)
    return probed


def one(name, **overrides):
    return resolve(name, "smoke", overrides.pop("seed", 0), overrides)


def test_one_run(known):
    """Eq. (1), by hand."""
    found = estimate_run(one("moco-v2", batch_size=64, epochs=2))
    assert found.per_step == pytest.approx(2 * (0.32 + 1.92)) and found.steps == 16 and found.passes == 6
    assert found.before == pytest.approx(640 * 0.01)
    assert found.hours == pytest.approx((16 * 4.48 + 6.4) / 3600)
    assert found.gigabytes == pytest.approx((2 * 2 * 1.32e6 + 6e6) / 1e9)
    later = estimate_run(one("moco-v2", batch_size=64, epochs=2), done=10)
    assert (later.steps, later.before) == (6, 0) and estimate_run(one("moco-v2"), done=99).hours == 0


def test_another_method(known):
    """Eqs. (2) and (3), by hand: the views of the method and its own weights count, rho is two."""
    ref, found = Tally(6, 0, 1e6, 1e4, 10**6), Pace(32, 0.32, 1.92, 2 * (1e6 + 32e4), 6e6)
    seconds, before, peak = scaled(one("rocl", batch_size=64), Tally(12, 100, 1e6, 2e4, 3 * 10**6), ref, 2, found)
    assert seconds == pytest.approx(64 * (0.01 * 12 + 0.005 * len(get_method("rocl").views)))
    assert before == pytest.approx(1.0) and peak == pytest.approx(3e6 + 5e6 + 2 * (1e6 + 64 * 2e4))


def test_a_suite_is_linear(known):
    """In epochs and in seeds; twice the passes cost twice, but for augmentation; a probe per encoder."""
    hours = lambda *configs: {e.method: e.hours for e in estimate_plan(configs)}
    base = hours(one("simclr"))["simclr"]
    assert base > 0 and hours(one("simclr", epochs=5))["simclr"] == pytest.approx(5 * base)
    assert hours(*(one("simclr", seed=s) for s in range(3)))["simclr"] == pytest.approx(3 * base)
    assert hours(one("simclr"), one("simclr"))["simclr"] == pytest.approx(base)  # the same run is trained once
    del known[:]
    found = {e.method: e for e in estimate_plan([one("simclr"), one("rocl", seed=1), one("moco-v2")])}
    assert known == ["simclr"]
    passes = lambda e: e.per_step / one(e.method).batch_size - 0.005 * len(get_method(e.method).views)
    assert passes(found["rocl"]) == pytest.approx(2 * passes(found["simclr"])) and found["moco-v2"].before > 0
    estimate_plan([one("simclr"), one("simclr", precision="bf16-mixed"), one("mae")])
    assert known[1:] == ["simclr", "simclr", "mae"]  # other precision, other kind of encoder: other probes


def test_parents_are_trained_once(known):
    rows = estimate_plan([one("deacl"), one("deacl", weight=3.0), one("deacl", seed=1), one("simclr")])
    assert [(e.method, e.runs) for e in rows] == [("simclr", 2), ("deacl", 2), ("deacl", 1)]  # one teacher for each seed
    assert [e.method for e in estimate_one(one("deacl"), "nowhere")] == ["simclr", "deacl"]


def test_what_is_done_is_not_counted(known, tmp_path):
    half, full, other = one("simclr", epochs=2), one("simclr", seed=1, epochs=2), one("simclr", seed=2, epochs=2)
    for config, step, code in ((half, 3, None), (full, 8, None), (other, 5, "somebody's")):
        place = tmp_path / job_name(config)
        place.mkdir(parents=True)
        (place / "checkpoint.json").write_text(json.dumps({"step": step, "code": code or training_code(get_method("simclr"))}))
    assert [behind(c, tmp_path / job_name(c)) for c in (half, full, other, one("rocl"))] == [3, 8, 0, 0]
    (row,) = estimate_plan([half, full, other], folder=tmp_path)
    assert (row.runs, row.steps) == (2, 5 + 8)
    del known[:]
    assert estimate_plan([full], folder=tmp_path) == [] == estimate_one(full, tmp_path) and not known
    assert "nothing is left" in tell([])


def test_bank_of_a_run_that_goes_on_is_full(known, tmp_path):
    fresh, begun = one("moco-v2"), one("moco-v2", seed=1)
    (tmp_path / job_name(begun)).mkdir(parents=True)
    (tmp_path / job_name(begun) / "checkpoint.json").write_text(json.dumps({"step": 1, "code": training_code(get_method("moco-v2"))}))
    (row,) = estimate_plan([fresh, begun], folder=tmp_path)
    assert row.before == pytest.approx(640 * 0.01)


def test_a_real_estimate_needs_no_data(tmp_path, monkeypatch):
    """Three channels, the recipe of a GPU scale, no file anywhere."""
    monkeypatch.setenv("ADVSSL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(probe, "CPU_BATCH", 8)
    config = resolve("deacl", "cifar10", 0, {"encoder": "small_convnet", "batch_size": 16, "steps": 1})
    with pytest.raises(FileNotFoundError):
        Run(config, tmp_path / "run")
    rows = {e.method: e for e in estimate_plan([config], steps=1)}
    assert set(rows) == {"simclr", "deacl"} and all(e.hours > 0 and e.gigabytes > 0 for e in rows.values())
    assert rows["deacl"].steps == config.epochs * (50_000 // 16) and rows["deacl"].passes > rows["simclr"].passes
    assert not (tmp_path / "data").exists()


def test_in_a_process_of_its_own():
    assert estimate.apart(os.getpid) != os.getpid()


# the question

CHEAP = Estimate("rocl", "a device", "core-hours", 20, 0.5, 7200, 0.0, 1e-3)  # one hour


def test_doubts():
    assert CHEAP.hours == 1 and doubts([CHEAP], 1) == "" and doubts([], 0) == ""
    assert "2 core-hours exceed the limit of 1.5" in doubts([CHEAP, CHEAP], 1.5)
    huge = replace(CHEAP, gigabytes=1e6)
    assert "rocl needs about 1e+06 GB" in doubts([CHEAP, huge], 99) and ";" in doubts([huge], 0.5)


def test_what_is_said():
    line = tell([CHEAP])
    wanted = ("1 core-hours", "a device", "rocl", "7200 steps of 0.5 s", "20 passes", "not included")
    assert "\n" not in line and all(word in line for word in wanted)
    table = tell([CHEAP, replace(CHEAP, method="acl", runs=3, steps=14400)])
    assert table.count("\n") == 4 and "3 core-hours" in table and "| acl" in table


@pytest.fixture
def typed(monkeypatch, tmp_path):
    """The command line with estimates that are known, and training that is only noted down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    calls = {"estimates": 0, "trained": [], "made": 0}

    def known(*_, **__):
        calls["estimates"] += 1
        return [CHEAP, replace(CHEAP, steps=10 * CHEAP.steps)]  # eleven hours

    monkeypatch.setattr(estimate, "estimate_one", known)
    monkeypatch.setattr(estimate, "apart", lambda work, *args, **options: known())
    monkeypatch.setattr("advssl.pretrain.pretrain", lambda config, *_, **__: calls["trained"].append(config))

    def make(*_):
        calls["made"] += 1
        return 0

    monkeypatch.setattr("advssl.suite.reproduce.reproduce", make)
    monkeypatch.setattr(data, "load", lambda name: calls.setdefault("data", name))
    monkeypatch.setattr("lightning_fabric.Fabric.launch", lambda self: None)

    def call(*words, answer=None, terminal=True):
        monkeypatch.setattr(estimate, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: terminal)))
        calls.update(estimates=0, trained=[], made=0)
        result = CliRunner().invoke(cli.app, list(words), input=answer)
        return result, SimpleNamespace(**calls)

    return call


def test_missing_data_are_told_before_anything_is_probed(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVSSL_DATA", str(tmp_path))
    monkeypatch.setattr(estimate, "estimate_one", lambda *_: pytest.fail("probed without data"))
    said = CliRunner().invoke(cli.app, ["pretrain", "rocl", "--scale", "cifar10", "--yes", "--runs", str(tmp_path / "runs")])
    assert isinstance(said.exception, FileNotFoundError) and "load('cifar10', download=True)" in str(said.exception)
    assert not list(tmp_path.iterdir())


def test_words_that_would_be_ignored_or_mean_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in ((["pretrain", "simclr", "--devices", "-3"], "--devices is a number"),
                           (["reproduce", "--cores", "-1"], "--cores counts jobs"),
                           (["reproduce", "--from-store", "--dry-run", "--method", "simclr"], "--method and --dry-run would be ignored"),
                           (["reproduce", "--from-store", "--scale", "huge"], "unknown scale 'huge'")):
        said = CliRunner().invoke(cli.app, words)
        assert isinstance(said.exception, ValueError) and message in str(said.exception), (words, said.output)
    assert not list(tmp_path.iterdir())


LONG = [("pretrain", "rocl", "--scale", "cifar10"), ("reproduce", "--scale", "cifar10", "--method", "rocl")]


@pytest.mark.parametrize("words", LONG, ids=["pretrain", "reproduce"])
def test_the_question(typed, words, tmp_path):
    """Not asked below the limit, asked above it, answered by --yes, an error without a terminal."""
    started = lambda calls: len(calls.trained) + calls.made
    result, calls = typed(*words)  # eleven hours, limit twelve
    assert result.exit_code == 0 and (calls.estimates, started(calls)) == (1, 1)
    assert "11 core-hours" in result.stderr and "Start" not in result.output
    for answer, begun in (("n\n", 0), ("y\n", 1), ("", 0)):
        result, calls = typed(*words, "--limit", "10", answer=answer)
        assert started(calls) == begun and (result.exit_code == 0) == bool(begun)
        assert "exceed the limit of 10. Start all the same?" in result.output
    result, calls = typed(*words, "--limit", "10", "--yes", terminal=False)
    assert result.exit_code == 0 and started(calls) == 1 and "Start" not in result.output
    result, calls = typed(*words, "--limit", "10", terminal=False)
    assert isinstance(result.exception, ValueError) and "--yes" in str(result.exception) and "--limit" in str(result.exception)
    assert started(calls) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", LONG, ids=["pretrain", "reproduce"])
def test_estimate_only(typed, words, tmp_path):
    result, calls = typed(*words, "--estimate", "--limit", "1", terminal=False)
    assert result.exit_code == 0 and "11 core-hours" in result.stdout and (calls.trained, calls.made) == ([], 0)
    small = [w.replace("cifar10", "smoke") for w in words]
    result, calls = typed(*small, "--estimate")
    assert calls.estimates == 1 and (calls.trained, calls.made) == ([], 0) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", ["smoke", "demo", "laptop"])
def test_small_scales_start_at_once(typed, scale):
    for words in (("pretrain", "rocl", "--scale", scale), ("reproduce", "--scale", scale)):
        result, calls = typed(*words, "--limit", "0", terminal=False)
        assert result.exit_code == 0 and calls.estimates == 0 and len(calls.trained) + calls.made == 1


def test_where_this_machine_says_nothing(typed, monkeypatch):
    """A dry run starts nothing, a profile's machine is another one, a process of several follows the one that asked."""
    for more in (("--dry-run",), ("--profile", "slurm")):
        assert typed(*LONG[1], *more, "--limit", "0", terminal=False)[1].estimates == 0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert typed(*LONG[0], "--limit", "0", terminal=False)[1].estimates == 0


def test_refusal_is_exit_status_two(typed, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["advssl", *LONG[0], "--limit", "1"])
    monkeypatch.setattr(estimate, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: False)))
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and "--yes" in capsys.readouterr().err and not list(tmp_path.iterdir())


# switches


def test_switches_override_the_record(typed):
    config = lambda *words: typed("pretrain", "rocl", "--scale", "demo", *words)[1].trained[0]
    default = config()
    assert (default.precision, default.channels_last, default.compile) == ("32-true", True, False)
    assert config("--precision", "bf16-mixed") == replace(default, precision="bf16-mixed")
    assert config("--no-channels-last") == replace(default, channels_last=False)
    assert config("--compile") == replace(default, compile=True)
    assert config("--no-compile", "--channels-last") == default
    assert config("-o", "compile=True", "-o", "channels_last=False", "--no-compile").compile is False
    assert config("-o", "compile=True").compile is True
    result, calls = typed("pretrain", "rocl", "--precision", "64-true")
    assert "bf16-mixed" in str(result.exception) and not calls.trained


def after_a_step(folder, **switches):
    run = Run(resolve("simclr", "smoke", 0, {"images": 64, "batch_size": 32} | switches), folder)
    run.method.train()
    run.begin()
    run.one_step(next(run.loader.epoch(0)))
    return run


def test_switches_change_rounding_alone(tmp_path):
    names = counter()
    objective = lambda **s: float(after_a_step(tmp_path / str(next(names)), **s).meter.sums["objective"])
    plain = objective(channels_last=False)
    assert objective(channels_last=True) == pytest.approx(plain, rel=1e-4)
    half = objective(precision="bf16-mixed", channels_last=False)
    assert half == pytest.approx(plain, rel=0.05) and half != plain
