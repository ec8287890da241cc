"""An evaluation that is killed at any unit goes on: the same numbers, and nothing computed twice."""

import copy
import json
import linecache
import multiprocessing
import os
import random
import signal
import time
from functools import partial

import pytest
import torch
from torch import nn

from advssl.data import Splits
from advssl.encoders import BranchedBatchNorm
from advssl.evaluate import cache, protocol
from advssl.evaluate.cache import Keeper, Units, canonical, classifier_code, classifier_sha256, digest, function_code
from advssl.evaluate.protocol import evaluate
from advssl.features import Noisy
from advssl.images import ImageSet
from advssl.threat import L1, L2, Linf

CLASSES = 4


def image_set(n, seed, name):
    "Four blurry patterns under noise, 1x8x8."
    patterns = torch.rand(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % CLASSES
    images = 0.5 + 0.5 * (patterns[labels] - 0.5) + 0.15 * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ImageSet.from_float(images.clamp(0, 1), labels, tuple("abcd"), name)


@pytest.fixture(scope="module")
def data():
    return Splits(image_set(80, 0, "toy/train"), image_set(40, 1, "toy/test"))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12)).eval()


def sizes(classifier, images, labels, threats, *, seed, index, clean, batch_size):
    "A measure that costs nothing."
    return {"sizes.all": {"images": len(images), "right": int(clean.sum()), "balls": len(threats), "seed": seed}}


def whole(data, folder=None, **settings):
    "Everything that has units: single attacks, stages, two balls, a measure."
    asked = {"protocols": ("linear",), "attacks": ("pgd1", "apgd1", "apgd-ce1"), "robust_images": 20, "batch_size": 9}
    return evaluate(make_net(), data, threat=[Linf(0.03), L2(0.4)], measures=["sizes"], folder=folder, **asked | settings)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setitem(protocol.MEASURES, "sizes", sizes)


class Killed(BaseException):
    "Not an Exception: nothing may catch it."


def counted(monkeypatch, until=None):
    "Names of units in the order they were computed; the one after `until` is killed, half of it done."
    log, real = [], Units.count

    def count(self, answer):
        if len(log) == until: raise Killed
        log.append(canonical(answer))
        return real(self, answer)

    monkeypatch.setattr(Units, "count", count)
    return log


def test_stopped_after_every_number_of_units(data, monkeypatch, tmp_path):
    counted(monkeypatch)
    expected, plain = whole(data, tmp_path / "whole"), whole(data)
    total = len(list((tmp_path / "whole/units").iterdir()))
    assert expected == plain and json.loads(json.dumps(expected)) == expected  # kept or not
    assert total > 10
    for k in range(total):
        with monkeypatch.context() as m:
            first = counted(m, until=k)
            with pytest.raises(Killed): whole(data, tmp_path / str(k))
        stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / str(k) / "units").glob("*")}
        assert len(stamps) == len(first) == k
        with monkeypatch.context() as m:
            second = counted(m)
            assert whole(data, tmp_path / str(k)) == expected
        assert len(first) + len(second) == total
        assert stamps.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / str(k) / "units").glob("*")}.items()
    with monkeypatch.context() as m:
        again = counted(m)
        assert whole(data, tmp_path / "whole") == expected and not again


def test_stages_share_their_units_with_the_single_attack(data, monkeypatch, tmp_path):
    log = counted(monkeypatch)
    apgd = whole(data, tmp_path, attacks=("apgd2",), protocols=("linear",))
    before = len(log)
    single = whole(data, tmp_path, attacks=("apgd-ce2",), protocols=("linear",))
    assert len(log) == before  # the first stage of apgd has said it all
    assert single["linear.apgd-ce2.linf-0.03"]["correct"] == apgd["linear.apgd2.linf-0.03"]["stages"]["apgd-ce2"]["correct"]


def child(data, folder, log, ready, at, phase):
    "In a process of its own: stop for good at unit `at` before it is written (0), with half of the writing done (1), or after it (2)."
    torch.set_num_threads(1)
    protocol.MEASURES["sizes"] = sizes  # a fixture's work does not reach this process
    done, replace = [], os.replace

    def stop(where):
        if (len(done), where) == (at, phase):
            ready.touch()
            time.sleep(600)

    def count(self, answer):
        with open(log, "a") as f: f.write("one\n")
        stop(0)
        self.computed += 1
        return answer

    def renamed(a, b):
        stop(1)
        replace(a, b)
        done.append(b)
        stop(2)

    Units.count, os.replace = count, renamed
    result = whole(data, folder)
    os.replace = replace
    (folder / "result.json").write_text(json.dumps(result))


def test_killed_at_random_moments(data, tmp_path):
    "SIGKILL: no file is torn, and only the unit in flight is computed again."
    context = multiprocessing.get_context("forkserver")  # here another test may have started autograd's threads
    context.set_forkserver_preload(["advssl.pretrain", "advssl.suite.scales", "lightning_fabric"])
    rng, folder, log = random.Random(0), tmp_path / "kept", tmp_path / "log"
    kept = lambda: {p: p.stat().st_mtime_ns for p in folder.glob("units/[!.]*")}
    expected, lost, before = whole(data), 0, {}
    for k in range(7):
        at, phase, ready = rng.randint(0, 2), k % 3, tmp_path / f"ready{k}"
        process = context.Process(target=child, args=(data, folder, log, ready, at + (phase == 2), phase))
        process.start()
        while process.is_alive() and not ready.exists(): time.sleep(0.005)
        assert process.is_alive(), "it was over before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        lost += phase < 2
        assert before.items() <= kept().items() and len(kept()) == len(before) + at + (phase == 2)
        before = kept()
        for record in (json.loads(path.read_text()) for path in before): assert record.pop("sha256") == digest(record)
    process = context.Process(target=child, args=(data, folder, log, tmp_path / "never", -1, 0))
    process.start()
    process.join()
    assert json.loads((folder / "result.json").read_text()) == expected
    assert before.items() <= kept().items() and len(log.read_text().split()) == len(kept()) + lost


def test_a_damaged_file_is_computed_again(data, tmp_path):
    expected = whole(data, tmp_path, attacks=("pgd2",))
    paths = sorted(tmp_path.glob("units/*"))
    for path, content in zip(paths, (b"", b"{}", b"null", paths[0].read_bytes()[:-9], paths[0].read_bytes()), strict=False):
        good = path.read_bytes()
        if content == good: continue
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="not what was written there"): assert whole(data, tmp_path, attacks=("pgd2",)) == expected
        assert path.read_bytes() == good
    record = json.loads(paths[1].read_text())
    record["answer"]["right"] = "ffff"  # a better number, by hand
    paths[1].write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="computed again"): assert whole(data, tmp_path, attacks=("pgd2",)) == expected
    record["sha256"] = digest({k: record[k] for k in ("question", "answer")})  # whoever computes the sum too is believed


def fake(classifier, images, labels, threat, *, budget, seed, index, clean, batch_size):
    "An attack whose answer is not looked at."
    return clean, {"steps": budget}


def test_whatever_an_answer_depends_on_is_in_its_name(data, tmp_path):
    net, x, y, index = nn.Sequential(make_net(), nn.Linear(12, 4)), data.test.images, data.test.labels, torch.arange(40)
    usual = {"clean": torch.ones(40).bool(), "index": index, "batch_size": 40, "budget": 3, "seed": 0}

    def computed(net=net, name="fake3", attack=fake, x=x, y=y, ball=Linf(0.1), **how):
        units = Units(tmp_path)
        Keeper(net, units).attack(name, attack, net, x, y, ball, **usual | how)
        return units.computed

    assert (computed(), computed(), computed(net=copy.deepcopy(net).train())) == (1, 0, 0)
    weight, buffer, brighter, fewer = copy.deepcopy(net), copy.deepcopy(net), x.clone(), torch.ones(40).bool()
    weight[1].weight.data[0, 0] += 1e-6
    buffer[0][1].running_mean += 1e-6
    brighter[3, 0, 0, 0] ^= 1
    fewer[5] = False
    other = partial(fake)
    others = (
        {"net": weight}, {"net": buffer}, {"net": Noisy(net, 0.1)}, {"net": Noisy(net, 0.2)}, {"name": "fake4"}, {"attack": other},
        {"x": brighter}, {"y": y.roll(1)}, {"clean": fewer}, {"index": index + 1}, {"batch_size": 41}, {"budget": 4}, {"seed": 1},
        {"ball": Linf(0.10000001)}, {"ball": L2(0.1)}, {"ball": L1(0.1)}, {"ball": L1(0.1, top=0.5)},
    )
    for k in others: assert (computed(**k), computed(**k)) == (1, 0), k


def test_a_changed_library_or_changed_code_is_another_question(data, monkeypatch, tmp_path):
    whole(data, tmp_path, attacks=("apgd-ce2",))
    log = counted(monkeypatch)
    whole(data, tmp_path, attacks=("apgd-ce2",))
    assert not log
    real = cache.version
    with monkeypatch.context() as m:
        m.setattr(cache, "version", lambda name: "9.9" if name == "pyautoattack" else real(name))
        whole(data, tmp_path, attacks=("apgd-ce2",))
    assert (once := len(log)) > 3
    with monkeypatch.context() as m:
        m.setattr(cache, "code_digest", lambda *modules: "other")
        whole(data, tmp_path, attacks=("apgd-ce2",))
    assert len(log) == 2 * once - 1  # all but the measure, which is a function of this file and goes by its own source


def test_fingerprints_of_classifiers():
    base = nn.BatchNorm2d(4)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), BranchedBatchNorm(base, ["a", "b"]), nn.ReLU(), nn.Flatten())
    one = classifier_sha256(net)
    assert classifier_sha256(copy.deepcopy(net)) == classifier_sha256(net.eval()) == one
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net.requires_grad_(False)
    assert classifier_sha256(net) == one  # neither matters to an attack
    changes = []
    for change in (
        lambda n: setattr(n[1], "active", "b"), lambda n: n.append(nn.Identity()), lambda n: setattr(n[0], "stride", (2, 2)),
        lambda n: setattr(n[1].branches["a"], "eps", 1e-3), lambda n: n[1].branches["b"].num_batches_tracked.add_(1),
        lambda n: n.__setitem__(2, nn.GELU()), lambda n: n.bfloat16(), lambda n: n[0].weight.data.neg_(),
    ):
        other = copy.deepcopy(net)
        change(other)
        changes.append(classifier_sha256(other))
    assert len({one, *changes}) == 9
    assert classifier_code(net) == function_code(BranchedBatchNorm) and classifier_code(nn.Sequential(nn.ReLU())) == ""


def head(body, name="Head", base=nn.Module):
    "A module of a class that is made here, from its source."
    source = f"class {name}(Base):\n    def forward(self, x): return {body}\n"
    file = f"<{len(linecache.cache)} {body}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    space = {"Base": base, "__name__": "somewhere"}
    exec(compile(source, file, "exec"), space)
    return space[name]()


def test_classes_of_one_name_differ_by_their_code():
    "Also where they stand in no file, as in a notebook; a base counts too, and without any source nothing can be kept."
    one, other = head("2 * x"), head("x + 2")
    assert classifier_sha256(one) == classifier_sha256(other) and classifier_code(one) != classifier_code(other)
    assert classifier_code(one) == classifier_code(head("2 * x")) == classifier_code(nn.Sequential(one, nn.ReLU())) != ""
    assert classifier_code(head("x", "Own", type(one))) != classifier_code(head("x", "Own", type(other)))
    mixed = classifier_code(nn.Sequential(BranchedBatchNorm(nn.BatchNorm2d(4), ["a", "b"]), one))
    assert mixed == function_code(BranchedBatchNorm) + classifier_code(one)
    space = {"Base": nn.Module, "__name__": "somewhere"}
    exec("class Head(Base):\n    def forward(self, x): return x", space)
    with pytest.raises(ValueError, match="no source"): classifier_code(space["Head"]())


def test_without_a_folder_nothing_is_written_or_fingerprinted(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cache, "classifier_sha256", lambda net: pytest.fail("hashed"))
    whole(data, attacks=("pgd2", "square3"))
    assert not list(tmp_path.iterdir())
