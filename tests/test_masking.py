"The masking panel: every check has a model that only it catches, honest models pass, AutoAttack's rules are kept."

import copy
import json
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.evaluate import masking as module
from advssl.evaluate.ensemble import attacked
from advssl.evaluate.masking import (
    ALPHA,
    dynamic,
    grey,
    grey_ball,
    mark,
    masking,
    masking_panel,
    note,
    only_weaker,
    probabilities,
    randomised,
    rising,
    square_improves,
    start_gradients,
    transfer_attack,
    zero_gradients,
)
from advssl.evaluate.robust import clean_mask, robust_mask
from advssl.features import Noisy
from advssl.threat import L1, L2, Linf

CLASSES = 4
ALL = ["randomised", "probabilities", "zero_gradients", "dynamic", "steps", "square", "transfer", "radius", "grey"]


class Centroids(nn.Module):
    "Logits fall with the distance of block means to the class patterns; a gradient attack is sure to work."

    def __init__(self, patterns):
        super().__init__()
        self.patterns = nn.Parameter(patterns.flatten(1))

    def forward(self, x): return 10 * (2 * F.avg_pool2d(x, 2).flatten(1) @ self.patterns.T - self.patterns.square().sum(1))


def toy(low, high, n=64):
    "Images of 2x2 blocks, mixtures of two class patterns; an L-infinity move of 0.8 (1/2 - share) turns one, with shares from low to high."
    signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]).repeat(1, 4)
    signs = signs[:, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    patterns = (0.5 + 0.4 * signs).view(CLASSES, 1, 4, 4)
    labels = torch.arange(n) % CLASSES
    share = (low + (high - low) * torch.linspace(0, 1, n))[:, None, None, None]
    blocks = (1 - share) * patterns[labels] + share * patterns[(labels + 1 + torch.arange(n) // CLASSES % 3) % CLASSES]
    return Centroids(patterns), blocks.repeat_interleave(2, 2).repeat_interleave(2, 3), labels


def level(x):
    "How far pixels are from the mean of their block: 0 on a clean image."
    return (x - F.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)).abs().flatten(1).mean(1)


class Lie(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, caught, kind):
        ctx.caught, ctx.kind = caught, kind
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        i = torch.arange(8)
        lie = ((i[:, None] + i) % 2 * 2.0 - 1).expand_as(g) * (ctx.kind == "board")
        return torch.where(ctx.caught[:, None, None, None], lie, g), None, None


class Trap(nn.Module):
    "Where the noise level is in a window the gradient is a lie: a chessboard that no block mean feels, or nothing. Decisions are honest."

    def __init__(self, inner, *windows, kind="board", hard=False):
        super().__init__()
        self.inner, self.windows, self.kind, self.hard = inner, windows, kind, hard

    def forward(self, x):
        v = level(x.detach())
        z = self.inner(Lie.apply(x, sum((v > a) & (v < b) for a, b in self.windows) > 0, self.kind))
        return z + (20 * F.one_hot(z.argmax(1), CLASSES) - 7 - z).detach() if self.hard else z  # hard: queries learn nothing


class Through(nn.Module):
    "A classifier between two functions."

    def __init__(self, inner, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x): return self.after(self.inner(self.before(x)))


class Dynamic(nn.Module):
    def __init__(self, inner, backward=False):
        super().__init__()
        self.inner, self.backward = inner, backward

    def forward(self, x):
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            value = self.inner(leaf).sum()
            if self.backward: value.backward()
            else: torch.autograd.grad(value, leaf)
        return self.inner(x)


def jitter(sigma): return lambda c: Through(c, lambda x: x + sigma * torch.randn_like(x))
def softmaxed(scale): return lambda c: Through(c, after=lambda z: scale * z.softmax(1))


E, FAR, NEAR = 0.05, (0.0, 0.15), (0.30, 0.48)  # FAR: truly robust at 2 E; NEAR: about half are robust at 2 E
ONLY = {  # what only this check catches: shares, eps, model, whether there is a source
    "randomised": (NEAR, 2 * E, jitter(1e-3), False),
    "probabilities": (NEAR, 2 * E, softmaxed(2.0), False),
    "zero_gradients": (FAR, E, lambda c: Trap(c, (0.2 * E, 0.6 * E), kind="zero"), False),  # stands still where nothing is to be found
    "dynamic": (NEAR, 2 * E, Dynamic, False),
    "steps": ((0.42, 0.48), 2 * E, lambda c: Trap(c, (0.0, 1.2 * E), (1.26 * E, 2.1 * E)), False),  # a gap that long steps leap over
    "square": (NEAR, 2 * E, lambda c: Trap(c, (0.3 * E, 2.1 * E)), False),  # shut at every radius up to eps
    "transfer": ((0.30, 0.41), 2 * E, lambda c: Trap(c, (0.3 * E, 2.1 * E), hard=True), True),
    "radius": ((0.40, 0.48), E, lambda c: Trap(c, (0.65 * E, 2.04 * E)), False),  # shut at twice eps only
    "grey": (FAR, E, lambda c: Trap(c, (3 * E, torch.inf)), False),  # shut at large radii only
}


def panel_of(name):
    shares, eps, make, source = ONLY[name]
    model, x, y = toy(*shares)
    return masking_panel(make(model), x, y, Linf(eps), sources=[model] if source else ())


@pytest.mark.parametrize("name", ONLY)
def test_each_check_is_necessary(name):
    record = panel_of(name)
    assert record["failed"] == [name] and not record["passed"] and record["right"] == 64
    assert list(record["checks"]) == [c for c in ALL if c != "transfer" or ONLY[name][3]]
    assert mark(record) == "†" and note(record) == f"† {name}: {module.MEANINGS[name]}"


HONEST = [(Linf, NEAR, 2 * E), (Linf, FAR, E), (Linf, (0.42, 0.48), 2 * E), (Linf, (0.40, 0.48), E)]
HONEST += [(L2, NEAR, 2 * E), (L2, FAR, E), (L1, FAR, E), (L1, (0.45, 0.49), 0.2)]


@pytest.mark.parametrize(("ball", "shares", "eps"), HONEST)
def test_honest_classifiers_pass(ball, shares, eps):
    "Robust ones and ones that nothing is left of, in three norms."
    model, x, y = toy(*shares)
    scale = {Linf: 1.0, L2: 64**0.5, L1: 64.0}[ball]
    model.train()
    record = masking_panel(model, x, y, ball(scale * eps), sources=[toy(*shares)[0]])
    assert record["failed"] == [] and record["passed"] and mark(record) == note(record) == "" and list(record["checks"]) == ALL
    assert json.loads(json.dumps(record)) == record and model.training and all(p.requires_grad for p in model.parameters())
    assert (record["norm"], record["eps"], record["images"], record["sources"]) == (ball.__name__.lower(), scale * eps, 64, 1)


MASKED = {
    "quantised": (lambda c: Through(c, lambda x: (8 * x).round() / 8), {"zero_gradients", "square", "transfer"}),
    "saturated": (lambda c: Through(c, after=lambda z: 1e4 * z), {"zero_gradients", "square", "transfer"}),
    "jittered": (jitter(0.3), {"randomised"}),
    "softmax": (softmaxed(1e3), {"probabilities", "zero_gradients"}),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_models_are_caught(name):
    make, must = MASKED[name]
    model, x, y = toy(0.40, 0.49)
    record = masking_panel(make(model), x, y, Linf(2 * E), sources=[model])
    assert must <= set(record["failed"])
    assert masking_panel(model, x, y, Linf(2 * E), sources=[make(model)])["passed"]


# AutoAttack's rules


class Heard(list):
    def warning(self, message): self.append(message)


def fronts():
    model, x, y = toy(*NEAR, n=16)
    made = {"honest": model, "jitter": jitter(1e-3)(model), "faint": jitter(1e-9)(model), "softmax": softmaxed(1.0)(model)}
    made |= {"shifted": Through(model, after=lambda z: z.softmax(1) + 1e-3), "log": Through(model, after=lambda z: z.log_softmax(1))}
    made |= {"almost": Through(model, after=lambda z: z.softmax(1) * (1 + 5e-6)), "relu": Through(model, after=lambda z: z.relu())}
    made |= {"grad": Dynamic(model), "backward": Dynamic(model, backward=True), "zero": Trap(model, (0.0, 1.0), kind="zero")}
    return made, x, y


def test_flags_are_those_of_autoattack():
    theirs = pytest.importorskip("pyautoattack.checks")
    made, x, y = fronts()
    seen = {}
    for name, model in made.items():
        heard = [Heard() for _ in range(4)]
        torch.manual_seed(0)
        with torch.no_grad(): theirs.check_randomized(model, x, y, logger=heard[0])
        theirs.check_range_output(model, x, logger=heard[1])
        gradients = start_gradients(model, x, y, Linf(E))
        theirs.check_zero_gradients(gradients, logger=heard[2])
        theirs.funcs.update(dict.fromkeys(theirs.funcs, 0))  # theirs are never reset
        tracer = sys.gettrace()
        try: theirs.check_dynamic(model, x, logger=heard[3])
        finally: sys.settrace(tracer)
        ours = [randomised(model, x, y), probabilities(model, x), zero_gradients(gradients), dynamic(model, x)]
        seen[name] = [not record["passed"] for record in ours]
        if name != "shifted": assert seen[name] == [bool(h) for h in heard], name
    none = [False] * 4
    only = lambda k: [i == k for i in range(4)]
    expected = {"honest": none, "jitter": only(0), "faint": none, "softmax": only(1), "shifted": only(1), "log": none}
    assert seen == expected | {"almost": only(1), "relu": none} | {"grad": only(3), "backward": only(3), "zero": only(2)}


@pytest.mark.parametrize(("before", "after"), [(64, 64), (64, 63), (64, 62), (64, 61), (63, 50), (0, 0)])
@pytest.mark.parametrize("n", [64, 1000])
def test_the_flag_for_square_is_that_of_autoattack(before, after, n):
    theirs = pytest.importorskip("pyautoattack.checks")
    white, black = torch.arange(n) < before, torch.arange(n) < after
    heard = Heard()
    accuracies = {"clean": 1.0, "apgd-ce": 0.9999, "fab-t": white.sum().item() / n, "square": black.sum().item() / n}
    theirs.check_square_sr(accuracies, logger=heard)
    assert square_improves(white, black) == bool(heard)


def test_scaled_probabilities_are_seen():
    model, x, _ = toy(*NEAR, n=16)
    for scale in (1e-3, 0.5, 1.0, 20.0, 1e4): assert not probabilities(softmaxed(scale)(model), x)["passed"]
    squashed = lambda z: (z / z.abs().max()).sigmoid()
    centred = lambda z: z - z.mean(1, keepdim=True) + 1  # one sum, and negative entries: logits, if odd ones
    for after in (lambda z: z, squashed, centred, lambda z: z * 0, lambda z: -z.softmax(1), lambda z: z.softmax(1) - 0.25):
        assert probabilities(Through(model, after=after), x)["passed"]


def test_a_changing_count_of_right_answers_is_random():
    "Outputs that differ by less than the limit, and decisions that differ."
    class Coin(nn.Module):
        calls = 0
        def forward(self, x):
            self.calls += 1
            return torch.tensor([[1.0, 1.0 + 1e-6 * (-1) ** self.calls]]).expand(len(x), 2)

    record = randomised(Coin(), torch.rand(4, 1, 8, 8), torch.zeros(4).long())
    assert record["distance"] < 1e-5 and record["right"] == [4, 0, 4, 0, 4] and not record["passed"]


def test_the_profiler_comes_back():
    model, x, _ = toy(*NEAR, n=4)
    seen = lambda *_: None
    sys.setprofile(seen)
    try:
        assert dynamic(Dynamic(model), x)["calls"] >= 1 and sys.getprofile() is seen
        with pytest.raises(ZeroDivisionError): dynamic(Through(model, lambda x: 1 / 0), x)
        assert sys.getprofile() is seen
    finally: sys.setprofile(None)


def test_start_gradients_are_where_pgd_starts():
    model, x, y = toy(*NEAR, n=12)
    g = start_gradients(model, x, y, Linf(E), seed=3, index=torch.arange(20, 32), batch_size=5)
    points = []
    def look(t):
        points.append(t.detach().clone())
        return t
    robust_mask(Through(model, look), x, y, Linf(E), steps=1, seed=3, index=torch.arange(20, 32), clean=torch.ones(12).bool())
    leaf = points[0].requires_grad_()
    torch.testing.assert_close(g, torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0])
    assert start_gradients(model, x[:0], y[:0], Linf(E)).shape == (0, 1, 8, 8)
    g[3], g[7, 0, 0, 0] = 0, 0
    record = zero_gradients(g)
    assert (record["dead"], record["images"], record["passed"]) == (1, 12, False)
    g[4], g[5] = torch.tensor([1.0, -1.0]).repeat(32).view(1, 8, 8), -1e-30
    assert zero_gradients(g)["dead"] == 1  # entries that cancel, and tiny ones, are no zeros
    assert zero_gradients(g[:0])["passed"]


# counting


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_only_weaker_is_the_exact_test(n, data):
    stats = pytest.importorskip("scipy.stats")
    left, tau = data.draw(st.integers(0, n)), data.draw(st.sampled_from([0.005, 0.01, 0.05]))
    only = data.draw(st.integers(0, min(left, 40)))
    strong = torch.arange(n) < left
    both = strong & (torch.arange(n) >= only)
    record = only_weaker("square", strong, both, tau)
    p = stats.binomtest(only, n, tau, alternative="greater").pvalue
    assert record["passed"] == (p > ALPHA) or abs(p - ALPHA) < 1e-9
    assert (record["only"], record["survive"], record["images"], record["share"]) == (only, left, n, only / n)
    assert record["low"] <= record["share"]


def test_false_alarms_and_power():
    "At the tolerance itself an alarm has probability ALPHA at most; a sixth of 64 images is an alarm nearly always."
    stats = pytest.importorskip("scipy.stats")
    for n in (32, 64, 100, 500, 2000):
        alarm = next(b for b in range(n) if not only_weaker("steps", torch.ones(n).bool(), torch.arange(n) >= b, 0.01)["passed"])
        assert stats.binom.sf(alarm - 1, n, 0.01) <= ALPHA
    assert stats.binom.sf(3, 64, 1 / 6) > 0.99 and only_weaker("steps", torch.ones(64).bool(), torch.arange(64) >= 3, 0.01)["passed"]
    survives_only_the_weaker = only_weaker("steps", torch.zeros(64).bool(), torch.ones(64).bool(), 0.01)
    assert survives_only_the_weaker["only"] == 0 and survives_only_the_weaker["passed"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=30, max_size=30), min_size=2, max_size=4))
def test_rising_is_the_exact_sign_test(rows):
    stats = pytest.importorskip("scipy.stats")
    masks = {0.1 * (k + 1): torch.tensor(row) for k, row in enumerate(rows)}
    record = rising(dict(reversed(masks.items())))  # in any order
    ps = []
    for a, b in zip(rows, rows[1:]):
        u, v = sum(q and not p for p, q in zip(a, b, strict=True)), sum(p and not q for p, q in zip(a, b, strict=True))
        ps.append(stats.binomtest(u, u + v, 0.5, alternative="greater").pvalue if u + v else 1.0)
    assert record["p"] == pytest.approx(min(ps)) and record["passed"] == (min(ps) > ALPHA / len(ps))
    assert record["radii"] == sorted(masks) and record["right"] == [sum(r) for r in rows]


def test_rising_counts_its_pairs():
    u = torch.arange(20)
    flat = {0.1: u < 10, 0.2: u < 18}  # p = 2 ** -8, above a third of ALPHA
    assert not rising(flat)["passed"] and rising(flat | {0.3: u < 18, 0.4: u < 18})["passed"]
    assert not rising(flat | {0.3: u < 18, 0.2: u < 19, 0.4: u < 18})["passed"]


def test_grey():
    for ball, pixels, reach in ((Linf, 784, 0.5), (L2, 784, 14.0), (L1, 784, 392.0), (L2, 3072, 0.5 * 3072**0.5)):
        far = grey_ball(ball(0.1), pixels)
        assert type(far) is ball and far.eps == pytest.approx(reach)
    assert grey_ball(Linf(0.7), 784) == Linf(0.7) and grey_ball(L1(0.1), 10).top == 1.0
    labels = torch.tensor([0] * 40 + [1] * 40 + [2] * 20)
    alive = lambda k: torch.arange(100) < k
    assert grey(alive(40), labels)["chance"] == 0.4
    assert [grey(alive(k), labels)["passed"] for k in (0, 40, 48, 52, 100)] == [True, True, True, False, False]


# transfer


def test_transfer_attack_goes_through_the_sources():
    (model, x, y), sources = toy(0.40, 0.48), []
    for seed in range(2):
        torch.manual_seed(seed)
        other = copy.deepcopy(model)
        with torch.no_grad(): other.patterns.add_(0.5 * torch.randn_like(other.patterns))
        sources.append(other)
    index, shared = torch.arange(100, 164), {"seed": 5, "batch_size": 64}
    mask, about = transfer_attack(sources)(model, x, y, Linf(E), budget=7, index=index, **shared)
    expected = clean_mask(model, x, y)
    each = [clean_mask(model, attacked(s, x, y, Linf(E), steps=7, index=index, **shared), y) for s in sources]
    for one in each: expected = expected & one
    assert torch.equal(mask, expected) and 0 < mask.sum() < min(e.sum() for e in each)  # both are needed
    assert about["steps"] == 7 and about["sources"] == 2
    some = torch.arange(64) % 2 == 0
    before = some.clone()
    assert torch.equal(transfer_attack(sources)(model, x, y, Linf(E), budget=7, index=index, clean=some, **shared)[0], mask & some)
    assert torch.equal(some, before)
    assert not transfer_attack(sources)(model, x, y, Linf(E), budget=1, clean=torch.zeros(64).bool())[0].any()
    wrong = transfer_attack([model])(model, x, (y + 1) % CLASSES, Linf(E), budget=1)[0]
    assert not wrong.any()  # wrong when clean is not robust
    assert torch.equal(transfer_attack([model])(model, x, y, Linf(E), budget=9)[0], robust_mask(model, x, y, Linf(E), steps=9))


def test_transfer_leaves_what_it_is_given_alone():
    model, x, y = toy(0.40, 0.48)
    clean = torch.ones(64).bool()
    transfer_attack([model])(model, x, y, Linf(2 * E), budget=5, clean=clean)
    assert clean.all()


# the panel


def test_noise_without_a_name_is_seeded_and_nothing_is_left_behind():
    model, x, y = toy(*NEAR, n=16)
    front = jitter(0.2)(model)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    once = masking_panel(front, x, y, Linf(E), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert masking_panel(front, x, y, Linf(E), seed=1) == once
    assert masking_panel(front, x, y, Linf(E), seed=2) != once


def test_declared_noise_is_judged_by_expectation(monkeypatch):
    model, x, y = toy(*NEAR, n=16)
    seen = []
    monkeypatch.setattr(module, "robust_mask", lambda *a, **k: seen.append(k["draws"]) or robust_mask(*a, **k))
    monkeypatch.setattr(module, "CHEAP", replace(module.CHEAP, steps=3, long=5, draws=4))
    record = masking_panel(Noisy(model, 0.05), x, y, Linf(E), sources=[model])
    assert set(seen) == {4} and record["stochastic"] and record["draws"] == 4
    assert record["failed"] == ["randomised"] and "square" not in record["checks"] and "transfer" in record["checks"]
    assert (mark(record), mark(record, eot=True)) == ("†", "") and "EOT" in note(record)
    more = record | {"failed": ["randomised", "grey"]}
    assert mark(more, eot=True) == "†"
    assert note(record, eot=True) == "" and "grey: " in note(more, eot=True)  # a note for every dagger, and no other
    assert "randomised" not in note(more, eot=True)


@pytest.mark.parametrize("front", [None, ONLY["steps"][2]])
def test_stronger_attacks_see_only_what_is_left(monkeypatch, front):
    "PGD-20 and the radii on what is right, PGD-100 on what PGD-20 leaves, Square and transfer on what both leave."
    model, x, y = toy(0.30, 0.48) if front is None else toy(*ONLY["steps"][0])
    source, model = model, model if front is None else front(model)
    x = torch.cat([x[:8], x])
    y = torch.cat([(y[:8] + 1) % CLASSES, y])  # eight wrong ones
    index, seen = torch.arange(72) + 1000, []

    def spy(name, function):
        def call(*args, **k):
            assert torch.equal(k["index"], index) and k["seed"] == 4
            found = function(*args, **k)
            after = found if name == "pgd" else found[0]
            seen.append((name, k.get("steps", k.get("budget")), args[3].eps, int(k["clean"].sum()), int(after.sum())))
            return found
        return call

    def starts(*args, index, **k):
        assert torch.equal(index, torch.arange(8, 72) + 1000)  # the right ones keep their names
        return start_gradients(*args, index=index, **k)

    monkeypatch.setattr(module, "start_gradients", starts)
    monkeypatch.setattr(module, "robust_mask", spy("pgd", module.robust_mask))
    monkeypatch.setattr(module, "square", spy("square", module.square))
    monkeypatch.setattr(module, "transfer_attack", lambda sources: spy("transfer", transfer_attack(sources)))
    record = masking_panel(model, x, y, Linf(2 * E), seed=4, index=index, sources=[source])
    left = record["checks"]["steps"]["survive"]
    assert record["right"] == 64 and (0 < left < 64) == (front is None) and record["checks"]["zero_gradients"]["images"] == 64
    by = {(name, budget, round(eps, 3)): (on, after) for name, budget, eps, on, after in seen}
    assert by["pgd", 20, 0.1] == (64, left) and by["pgd", 100, 0.1][0] == left
    assert all(by["pgd", 20, eps][0] == 64 for eps in (0.05, 0.2, 0.5)) and len(seen) == 7
    white = by["pgd", 100, 0.1][1]
    assert front is None or white < left - 40
    assert by["square", 200, 0.1][0] == by["transfer", 20, 0.1][0] == white == record["checks"]["square"]["survive"]
    assert record["checks"]["radius"]["radii"] == pytest.approx([0.05, 0.1, 0.2, 0.5])
    assert record["checks"]["grey"]["right"] == by["pgd", 20, 0.5][1] == record["checks"]["radius"]["right"][-1]


def test_thorough_has_more_on_the_stronger_side(monkeypatch):
    "A trap that PGD's step size falls into and APGD's does not is no longer Square's find alone."
    seen = []
    effort = replace(module.THOROUGH, white=tuple((attack, 5) for attack, _ in module.THOROUGH.white), queries=20, long=5, steps=3)
    monkeypatch.setattr(module, "THOROUGH", effort)
    for name in ("apgd_ce", "fab_t"): assert any(a is getattr(module, name) for a, _ in effort.white)
    wrap = lambda attack: lambda *a, **k: (seen.append((attack.__name__, int(k["clean"].sum()))), attack(*a, **k))[1]
    monkeypatch.setattr(module, "THOROUGH", replace(effort, white=tuple((wrap(a), n) for a, n in effort.white)))
    model, x, y = toy(*NEAR, n=32)
    record = masking_panel(model, x, y, Linf(2 * E), thorough=True)
    assert [name for name, _ in seen] == ["apgd_ce", "fab_t"] and seen[0][1] >= seen[1][1] >= record["checks"]["square"]["survive"]
    assert record["thorough"] and record["checks"]["square"]["tolerance"] == 0.005 and record["passed"]


def test_nothing_right_and_large_radii():
    model, x, y = toy(*NEAR, n=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record = masking_panel(model, x, (y + 1) % CLASSES, Linf(E), sources=[model])
        assert record["right"] == 0 and record["passed"]
        for eps in (0.3, 0.5, 0.8):
            found = masking_panel(model, x, y, Linf(eps))
            assert found["passed"] and found["checks"]["radius"]["radii"] == sorted({eps / 2, eps, max(0.5, eps)})
    with pytest.raises(ValueError, match="eps > 0"): masking_panel(model, x, y, Linf(0.0))


def test_the_measure(monkeypatch):
    model, x, y = toy(*NEAR)
    index, clean = torch.arange(64) * 3, clean_mask(model, x, y)
    found = masking(model, x, y, [Linf(0.0), Linf(E), L2(0.5)], seed=2, index=index, clean=clean, batch_size=40, limit=24)
    assert list(found) == ["masking.linf-0.05", "masking.l2-0.5"]
    some = torch.randperm(64, generator=module.stream(0))[:24].sort().values
    part = {"seed": 2, "index": index[some], "clean": clean[some], "batch_size": 40}
    assert found["masking.linf-0.05"] == masking_panel(model, x[some], y[some], Linf(E), **part)
    monkeypatch.setattr(module, "masking_panel", lambda *a, **k: k)
    (passed,) = masking(model, x, y, [Linf(E)], seed=2, index=index, clean=clean, batch_size=40, limit=24).values()
    for key, value in part.items(): assert torch.equal(torch.as_tensor(passed[key]), torch.as_tensor(value)), key
    monkeypatch.undo()
    assert masking(model, x, y, [Linf(E)], limit=24)["masking.linf-0.05"]["images"] == 24
    assert masking(model, x[:20], y[:20], [Linf(E)], limit=0, sources=[model])["masking.linf-0.05"]["sources"] == 1
