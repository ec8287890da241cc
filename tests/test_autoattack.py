"""AutoAttack through the library: its own numbers, nothing believed that is not an image in the ball, and nothing left behind."""

import copy
import hashlib
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advssl.data import Splits, load
from advssl.encoders import add_branches, branch, make_encoder
from advssl.evaluate import autoattack as module
from advssl.evaluate import protocol
from advssl.evaluate.autoattack import SINGLE, admissible, apgd, apgd_ce, apgd_t, autoattack, fab_t, square
from advssl.evaluate.protocol import evaluate, find_attack
from advssl.evaluate.robust import clean_mask, robust_mask
from advssl.features import Noisy
from advssl.images import ImageSet
from advssl.threat import L1, L2, Linf

pyautoattack = pytest.importorskip("pyautoattack")
BALLS = [Linf(0.05), L2(0.3), L1(1.5)]
FULL = os.environ.get("ADVSSL_FULL") == "1"


def toy(n, classes=5, size=8, seed=1):
    "Blurry patterns under noise."
    patterns = torch.rand(classes, 1, size, size, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    noise = torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return (0.5 + 0.3 * (patterns[labels] - 0.5) + 0.15 * noise).clamp(0, 1), labels


def trained(x, y, classes, steps=60, move=0.0):
    "A small network with BatchNorm and dropout, left in train mode; `move`: radius of the training attack."
    torch.manual_seed(0)
    size = x.shape[-1]
    body = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.Flatten())
    net = nn.Sequential(*body, nn.Linear(6 * (size // 2) ** 2, classes))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        noise = (torch.rand_like(x) * 2 - 1) * move
        if move:
            noise.requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(net(x + noise), y), noise)
            noise = (noise.detach() + 1.25 * move * g.sign()).clamp(-move, move)
        optimizer.zero_grad()
        F.cross_entropy(net((x + noise).clamp(0, 1)), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net


@pytest.fixture(scope="module")
def case():
    net = trained(*toy(150, seed=0), 5)
    return (net, *toy(30))


def fingerprint(net):
    "Weights, buffers, modes, flags and gradients."
    digest = hashlib.sha256(str([m.training for m in net.modules()]).encode())
    for name, t in net.state_dict().items(): digest.update(name.encode() + t.numpy().tobytes())
    digest.update(str([(p.requires_grad, p.grad is None) for p in net.parameters()]).encode())
    return digest.hexdigest()


def library(net, x, y, ball, attacks, batch_size, seed=0):
    "The survivors of the library's own AutoAttack, standard version."
    net = copy.deepcopy(net).eval().requires_grad_(False)
    theirs = pyautoattack.AutoAttack(net, norm=type(ball).__name__, eps=ball.eps, seed=seed, version="standard")
    theirs.attacks_to_run = attacks
    theirs.apgd_targeted.n_target_classes = min(theirs.apgd_targeted.n_target_classes, net(x[:1]).shape[1] - 1)
    theirs.fab.n_target_classes = min(9, net(x[:1]).shape[1] - 1)
    x_adv, _ = theirs.run_standard_evaluation(x, y, batch_size=batch_size)
    assert (x_adv - x).flatten(1).norm(module.ORDERS[type(ball).__name__], 1).max() <= ball.eps * (1 + 1e-4)
    return net(x_adv).argmax(1) == y


@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_both_apgd_equal_the_library(case, monkeypatch, ball):
    "Image by image, from different seeds; in L2 and L1 with fewer steps, which the library's objects are made for."
    net, x, y = case
    budget = 100 if isinstance(ball, Linf) else 20
    for name in ("APGDAttack", "APGDAttack_targeted"):
        real = getattr(pyautoattack.autoattack, name)
        monkeypatch.setattr(pyautoattack.autoattack, name, lambda *a, real=real, **k: real(*a, **k | {"n_iter": budget}))
    ours, settings = apgd(net, x, y, ball, budget=budget, batch_size=16, seed=4)
    assert torch.equal(ours, library(net, x, y, ball, ["apgd-ce", "apgd-t"], 16, seed=4))
    counts = [s["correct"] for s in settings["stages"].values()]
    assert 0 < counts[1] <= counts[0] < clean_mask(net, x, y).sum()
    stages = list(settings["stages"].items())
    assert [name for name, _ in stages] == [f"apgd-ce{budget}", f"apgd-t{budget}"]
    assert [s["restarts"] for _, s in stages] == ([5, 1] if isinstance(ball, L1) else [1, 1]) and stages[1][1]["targets"] == 4


def test_in_l1_five_targets(case):
    "As many as in the library's standard, where there are more classes than that."
    net, x = copy.deepcopy(case[0]).eval(), case[1][:2]
    torch.manual_seed(0)
    many = nn.Sequential(net, nn.Linear(5, 12))
    y = many(x).argmax(1)
    assert [apgd_t(many, x, y, ball, budget=3)[1]["targets"] for ball in BALLS] == [9, 9, 5]
    assert [fab_t(many, x, y, ball, budget=3)[1]["targets"] for ball in BALLS] == [9, 9, 9]


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_in_l1_apgd_needs_a_step_for_each_of_three_balls(case, name):
    net, x, y = case
    assert SINGLE[name][0](net, x[:2], y[:2], BALLS[2], budget=3)[0].dtype == torch.bool
    with pytest.raises(ValueError, match="at least 3"): SINGLE[name][0](net, x[:2], y[:2], BALLS[2], budget=2)
    assert len(SINGLE[name][0](net, x[:2], y[:2], BALLS[0], budget=1)[0]) == 2


@pytest.mark.parametrize("ball", BALLS, ids=str)
@pytest.mark.parametrize("name", ["fab-t", "square"])
def test_the_other_two_equal_the_library(case, monkeypatch, ball, name):
    "With fewer steps: the library's object has its budget replaced before it runs."
    net, x, y = case
    budget = {"fab-t": 12, "square": 100}[name]
    real = pyautoattack.AutoAttack._set_version

    def cheaper(self, version):
        real(self, version)
        self.fab.n_iter, self.square.n_queries = 12, 100

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", cheaper)
    ours = SINGLE[name][0](net, x, y, ball, budget=budget, batch_size=16)[0]
    assert torch.equal(ours, library(net, x, y, ball, [name], 16))
    assert 0 < ours.sum() < clean_mask(net, x, y).sum()


def test_standard_is_the_four_in_order_with_their_budgets(case, monkeypatch):
    net, x, y = case
    called = []

    def stage(name, attack, classifier, images, labels, threat, *, clean, budget, **settings):
        called.append((name, attack, budget, clean.clone(), settings))
        right = clean.clone()
        right[len(called) - 1] = False
        return right, {}

    right, settings = autoattack(net, x, y, BALLS[0], each=stage, seed=3, batch_size=7, clean=torch.ones(30).bool())
    assert [c[1:3] for c in called] == [(apgd_ce, 100), (apgd_t, 100), (fab_t, 100), (square, 5000)]
    assert [c[0] for c in called] == list(settings["stages"]) == ["apgd-ce100", "apgd-t100", "fab-t100", "square5000"]
    assert [int(c[3].sum()) for c in called] == [30, 29, 28, 27] and all(c[4] == {"seed": 3, "batch_size": 7} for c in called)
    assert right.tolist() == [False] * 4 + [True] * 26 and [s["correct"] for s in settings["stages"].values()] == [29, 28, 27, 26]


@pytest.mark.skipif(not FULL, reason="minutes: ADVSSL_FULL=1 runs it")
@pytest.mark.parametrize("ball", [Linf(0.1), L2(1.2)], ids=str)
def test_full_autoattack_equals_the_library_on_1000_images(ball):
    "An adversarially trained network on 1,000 images: with the same seed the same answer to every image."
    data = load("fashion")
    net = trained(data.train.images[:2000].float() / 255, data.train.labels[:2000], 10, 120, 0.1)
    x, y = data.test.images[:1000].float() / 255, data.test.labels[:1000]
    ours, settings = autoattack(net, x, y, ball)
    theirs = library(net, x, y, ball, ["apgd-ce", "apgd-t", "fab-t", "square"], 250)
    left, pgd = [s["correct"] for s in settings["stages"].values()], int(robust_mask(net, x, y, ball).sum())
    print(f"\n{ball}: clean {int(clean_mask(net, x, y).sum())}, PGD-20 {pgd}, ours {left}, library {int(theirs.sum())}")
    assert torch.equal(ours, theirs) and 50 < ours.sum() < 950


CHEAP = {"apgd-ce": 5, "apgd-t": 3, "fab-t": 3, "square": 20}


@pytest.mark.parametrize("name", CHEAP)
def test_a_function_of_its_arguments_that_leaves_nothing_behind(case, name):
    net, x, y = case
    call = lambda *a, **k: SINGLE[name][0](*a, budget=CHEAP[name], **k)[0]
    before, state = fingerprint(net), torch.random.get_rng_state()
    one = call(net, x, y, BALLS[0])
    assert fingerprint(net) == before and torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(call(net, x, y, BALLS[0], index=torch.arange(30) + 9), one)  # neither global state nor names have a say
    assert torch.equal(call(copy.deepcopy(net).eval(), x, y, BALLS[0], clean=clean_mask(net, x, y)), one)
    torch.random.set_rng_state(state)
    pixels = (x * 255).round().byte()
    assert torch.equal(call(net, pixels, y, BALLS[0]), call(net, pixels.float() / 255, y, BALLS[0]))
    assert torch.equal(call(copy.deepcopy(net).double(), x.double(), y, Linf(1e-4)), clean_mask(net, x, y))  # any precision
    assert torch.equal(call(net, x, y, Linf(0.0)), clean_mask(net, x, y))


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("ball", BALLS, ids=str)
def test_every_attacked_image_is_one(case, monkeypatch, name, ball):
    "What is judged lies in the ball and in the pixel range, and only images that are right when clean are attacked."
    net, x, _ = case
    x = (x + x.roll(1, 0)) / 2  # between two classes, where few steps suffice on any processor
    y = copy.deepcopy(net).eval()(x).argmax(1)
    y[:6] = (y[:6] + 1) % 5
    clean, seen, real = clean_mask(net, x, y), [], module.clean_mask
    monkeypatch.setattr(module, "clean_mask", lambda model, t, *a, **k: seen.append(t) or real(model, t, *a, **k))
    right = SINGLE[name][0](net, x, y, ball, budget=CHEAP[name], clean=clean, batch_size=10)[0]
    assert not right[~clean].any() and not clean[:6].all()
    moved = torch.cat(seen)
    size = (moved - x[clean]).flatten(1).norm(module.ORDERS[type(ball).__name__], 1)
    assert len(moved) == clean.sum() and size.max() <= ball.eps * (1 + 1e-4) and moved.min() >= 0 and moved.max() <= 1
    assert (size > (0 if "fab" in name else 0.5 * ball.eps)).sum() > 2  # FAB looks for the smallest move, the others use the whole ball


class Stepped(nn.Module):
    "Rounds pixels: the same answers at the levels, and no gradient anywhere."

    def forward(self, x): return (x * 31).round() / 31


def test_what_is_no_number_or_outside_the_ball_is_no_success(case, monkeypatch):
    net, x, y = case
    x = (x * 31).round() / 31
    flat = nn.Sequential(Stepped(), net)
    assert torch.equal(fab_t(flat, x, y, Linf(0.06), budget=3)[0], clean_mask(flat, x, y))
    for wrong in (torch.full_like(x, torch.nan), torch.full_like(x, torch.inf), x.roll(1, 0)):
        with monkeypatch.context() as m:
            m.setattr(pyautoattack.fab_pt.FABAttack_PT, "perturb", lambda self, t, labels, wrong=wrong: wrong[: len(t)])
            assert torch.equal(fab_t(net, x, y, Linf(0.06), clean=torch.ones(30).bool())[0], clean_mask(net, x, y))
    for ball in BALLS:
        delta = ball.random_start(x, torch.Generator().manual_seed(0)) * 0.9
        bad = x + delta
        bad[0, 0, 0, 0], bad[1] = torch.nan, x[1] + 3 * delta[1] / delta[1].flatten().norm(module.ORDERS[type(ball).__name__]) * ball.eps
        good = admissible(bad, x, ball)
        assert torch.equal(good[:2], x[:2]) and not torch.equal(good[2:], x[2:]) and good.min() >= 0 and good.max() <= 1
    with pytest.warns(UserWarning, match="without a gradient where apgd-t starts"): apgd_t(flat, x, y, Linf(0.06), budget=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apgd_t(net, x, y, Linf(0.06), budget=2)


def test_classes_and_noise_are_checked(case):
    net, x, y = case
    for classes, targets in ((4, 3), (5, 4), (12, 9)):
        wide = nn.Sequential(net, nn.Linear(5, classes))
        for attack in (apgd_t, fab_t): assert attack(wide, x[:4], y[:4] % classes, Linf(0.01), budget=1)[1]["targets"] == targets
    few = nn.Sequential(net, nn.Linear(5, 2))
    with pytest.raises(ValueError, match="this classifier has 2: use apgd-ce, fab-t and square"): apgd_t(few, x, y % 2, Linf(0.1))
    for attack in (apgd_ce, fab_t, square): assert attack(few, x, y % 2, Linf(0.1), budget=2)[0].shape == (30,)
    for attack in (apgd_ce, apgd_t, fab_t, square, apgd, autoattack):
        with pytest.raises(ValueError, match="meaningless on a stochastic model.*such as eot20"): attack(Noisy(net, 0.1), x, y, Linf(0.1))


# by name, in the one call


@pytest.fixture(scope="module")
def data():
    sets = [ImageSet.from_float(*toy(n, 4, 28, seed), tuple("abcd"), name) for n, seed, name in ((60, 0, "toy/train"), (24, 1, "toy/test"))]
    return Splits(*sets)


def test_names_carry_their_budgets():
    names = ("apgd-ce", "apgd-t", "fab-t", "square", "apgd", "square50", "pgd")
    expected = ["apgd-ce100", "apgd-t100", "fab-t100", "square5000", "apgd100", "square50", "pgd20"]
    assert [find_attack(name, 20)[0] for name in names] == expected
    assert find_attack("autoattack", 20)[::2] == ("autoattack", None) and find_attack("apgd-t7", 20)[2] == 7
    with pytest.raises(ValueError, match="with another it would not be autoattack"): find_attack("autoattack20", 20)


@pytest.mark.parametrize("kind", ["small_convnet", "vit_demo", "branched"])
def test_encoders_are_left_as_they_were_saved(data, monkeypatch, kind):
    "No protocol, attack or measure changes a weight, a buffer, a mode, or the active branch; the result says which branch it was."
    torch.manual_seed(0)
    net = make_encoder("vit_demo" if kind == "vit_demo" else "small_convnet").train()
    if kind == "branched": net = add_branches(net, ["clean", "adv"]).train()
    monkeypatch.setitem(protocol.MEASURES, "certified", lambda *a, **k: real(*a, **k, select=5, draws=10))
    from advssl.evaluate.measures import certified as real

    before = fingerprint(net)
    attacks = ("pgd2", "apgd-ce2", "apgd-t1", "fab-t1", "square3", "apgd1")
    protocols = ("knn", "linear", "linear-10%", "slf") if kind == "small_convnet" else ("linear",)
    names = {"protocols": protocols, "attacks": attacks, "measures": ["certified"]}
    call = lambda: evaluate(net, data, threat=[Linf(0.02), L2(0.3)], robust_images=8, tuning="smoke", **names)
    if kind == "branched":
        with branch(net, "adv"): adv = call()
        assert adv["branch"] == "adv" and call()["branch"] == "clean"
        assert {m.active for m in net.modules() if hasattr(m, "active")} == {"clean"}
    else:
        result = call()
        assert result["branch"] is None and {"linear.apgd1.l2-0.3", "linear.square3.linf-0.02", "linear.certified.l2-0.3"} <= set(result)
        assert all(len(r["right"]) == 2 * -(-r["total"] // 8) for key, r in result.items() if "." in key)
    assert fingerprint(net) == before


def test_stochastic_encoders_are_refused_before_anything_runs(data):
    class Never(nn.Module):
        def forward(self, x): raise AssertionError("ran")

    for name in ("apgd-ce", "autoattack", "square10"):
        with pytest.raises(ValueError, match="such as eot20"):
            evaluate(Noisy(Never(), 0.1), data, threat=Linf(0.1), attacks=["pgd2", name])
    with pytest.raises(ValueError, match="unknown measure 'fog': choose one of masking"):
        evaluate(Never(), data, threat=Linf(0.1), measures=["fog"])
