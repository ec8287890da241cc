"RUSH and what its evaluation stands on: named noise, votes, averaged gradients, certified radii; and mutants that must be rejected."
import copy
import math
from contextlib import contextmanager
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from common import CLASSES, fingerprint, image_set, make_net, seeded, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from advssl import features
from advssl.checkpoint import load as load_checkpoint
from advssl.config import Config
from advssl.data import Splits
from advssl.evaluate import measures, protocol, robust, smoothing
from advssl.evaluate.protocol import EOT_DRAWS, STANDARD, evaluate
from advssl.evaluate.robust import VOTES, clean_mask, decide, random_starts, robust_accuracy, robust_mask
from advssl.evaluate.smoothing import ABSTAIN, certified, certify, lower_bound, noisy_counts, predict, radius
from advssl.features import PURPOSES, Noisy, extract, is_stochastic, named_noise, to_unit
from advssl.images import stream
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.rush import RUSH
from advssl.methods.simclr import SimCLR
from advssl.pretrain import Run
from advssl.threat import L1, L2, Linf

examples = settings(max_examples=40, deadline=None)
phi = NormalDist()


@pytest.fixture(scope="module")
def data():
    return Splits(image_set(240, 0, "toy/train"), image_set(120, 1, "toy/test"))


@pytest.fixture(scope="module")
def net(data): return trained(data.train)


@pytest.fixture(scope="module")
def x(data): return to_unit(data.test.images).double()


# the method


def test_rush_is_simclr_in_training(tmp_path):
    "The same objective, the same random numbers, the same weights to the bit."
    config = {"images": 64, "batch_size": 16, "epochs": 2, "threads": 1}
    one, two = Run(Config("rush", **config), tmp_path / "a"), Run(Config("simclr", **config), tmp_path / "b")
    one.train()
    two.train()
    (a, state), (b, other) = load_checkpoint(tmp_path / "a"), load_checkpoint(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    assert torch.equal(state["generator"], other["generator"])


def tiny(sigma=0.25):
    encoder = make_net()
    encoder.out_dim = 12
    return RUSH(encoder, sigma=sigma)


def test_the_evaluated_module():
    method = tiny()
    seen = method.evaluated()
    assert isinstance(method, SimCLR) and is_stochastic(seen) and seen.module is method.encoder and seen.sigma == 0.25
    assert not is_stochastic(method.encoder) and not is_stochastic(tiny(0.0).evaluated())
    assert {k.removeprefix("module.") for k in seen.state_dict()} == set(method.encoder.state_dict())
    for sigma in (-0.1, math.nan):
        with pytest.raises(ValueError, match="standard deviation"): tiny(sigma)


def test_without_noise_every_number_is_that_of_the_encoder(data):
    method = tiny(0.0)
    call = lambda encoder: evaluate(encoder, data, threat=Linf(0.02), robust_images=40, attack_steps=3)
    assert call(method.evaluated()) == call(method.encoder)


def test_passes():
    method, (a, b) = tiny(), torch.rand(2, 6, 1, 8, 8)
    with count_passes(method.encoder) as passes:
        play(method, Views(strong1=a, strong2=b), {"network": torch.optim.SGD(method.parameters(), 0.1)})
    assert passes.units(6) == 6


def test_card():
    assert get_method("RUSH") is methods()["rush"] is RUSH
    card = RUSH.card
    assert (card.type, card.base, card.adversary, card.level) == ("memory-free", "CL", "randomized smoothing", "input")
    assert (card.combined, card.sign, card.tables) == ("no", 0, (1,))
    assert settings_of(RUSH)["sigma"] == 0.25


# noise with names


@examples
@given(st.integers(0, 2**31), st.sampled_from(PURPOSES), st.lists(st.integers(0, 9999), min_size=1, max_size=6), st.integers(1, 3))
def test_noise_belongs_to_the_image(seed, purpose, index, calls):
    "The same to the bit in any company, any order and any cut of the draws; whatever torch's global source has done."
    see, blank = Noisy(nn.Identity(), 1.0), torch.zeros(len(index), 1, 4, 4)
    before = torch.get_rng_state()
    with named_noise(see, seed, purpose, index): one = torch.stack([see(blank) for _ in range(calls)])
    with named_noise(see, seed, purpose, index): assert torch.equal(see(blank.repeat(calls, 1, 1, 1)), one.flatten(0, 1))
    for k, i in enumerate(index):
        with named_noise(see, seed, purpose, [i]): assert torch.equal(torch.cat([see(blank[:1]) for _ in range(calls)]), one[:, k])
    with named_noise(see, seed, purpose, index): assert torch.equal(see(blank.double()), one[0].double())
    assert torch.equal(torch.get_rng_state(), before) and see.streams is None
    written = torch.stack([torch.randn(1, 4, 4, generator=stream(seed, PURPOSES.index(purpose), i, 0)) for i in index])
    assert torch.equal(one[0], written)


def test_names_tell_apart():
    "Another seed, purpose, image, draw or layer is another noise, without correlation."
    see = nn.Sequential(Noisy(nn.Identity(), 1.0), Noisy(nn.Identity(), 1.0))
    blank, found = torch.zeros(2, 1, 40, 40), []
    for seed, purpose in ((0, "fit"), (1, "fit"), (0, "predict"), (0, "attack")):
        for layer in see:
            with named_noise(see, seed, purpose, [3, 4]): found += [*layer(blank), *layer(blank)]
    correlation = torch.corrcoef(torch.stack(found).flatten(1))
    assert (correlation - torch.eye(len(found))).abs().max() < 0.12


def test_noise_is_restored_and_not_clipped():
    see = Noisy(nn.Identity(), 2.0)
    with pytest.raises(RuntimeError), named_noise(see, 0, "fit", [0]): raise RuntimeError
    assert see.streams is None
    with named_noise(see, 0, "fit", [0]):
        with named_noise(see, 0, "attack", [1, 2]): inner = see.streams
        assert len(see.streams) == 1 and see.streams is not inner
        assert see(torch.rand(1, 1, 8, 8)).min() < 0
        with pytest.raises(ValueError, match="name as many images"), named_noise(see, 0, "fit", [0, 1]): see(torch.rand(3, 1, 8, 8))
    with pytest.raises(ValueError, match="unknown purpose"), named_noise(see, 0, "test", [0]): pass
    copy.deepcopy(see)


def test_extract_under_noise(data):
    net = make_net()
    noisy, images = Noisy(net, 0.3), data.train.images[:50]
    before = fingerprint(noisy)
    one = extract(noisy, images, seed=4)
    assert fingerprint(noisy) == before and torch.equal(extract(noisy, images, seed=4), one)
    torch.testing.assert_close(extract(noisy, images, batch_size=7, seed=4), one)
    with named_noise(noisy, 4, "fit", range(50)), torch.no_grad():
        noisy.eval()
        draws = [noisy(to_unit(images)) for _ in range(3)]
    torch.testing.assert_close(extract(noisy, images, seed=4, draws=3), sum(draws) / 3)
    assert torch.equal(extract(net, images, draws=5), extract(net, images))


# votes


def written_votes(model, x, index, seed):
    "Image by image: the class that most of the draws name."
    answers = []
    for image, i in zip(x, index, strict=True):
        g, counts = stream(seed, PURPOSES.index("predict"), int(i), 0), [0] * CLASSES
        for _ in range(VOTES):
            eta = torch.randn(image.shape, generator=g).to(image)
            counts[int(model[0].module(image[None] + model[0].sigma * eta)[0].argmax())] += 1
        answers.append(counts.index(max(counts)))
    return torch.tensor(answers)


def classifier(net, sigma=0.15): return nn.Sequential(Noisy(net, sigma), nn.Identity()).eval()


def test_a_verdict_is_a_vote(data, net, x):
    model, index, y = classifier(net), torch.arange(40) + 5, data.test.labels[:40]
    expected = written_votes(model, x[:40], index, 2)
    assert torch.equal(decide(model, x[:40], index, 2).argmax(1), expected)
    assert torch.equal(clean_mask(model, x[:40], y, seed=2, index=index), expected == y)
    assert torch.equal(clean_mask(model, x[:40], y, seed=2, index=index, batch_size=7), expected == y)
    shares = decide(model, x[:40], index, 2, votes=5)
    assert torch.equal(shares.sum(1), torch.ones(40)) and torch.equal((5 * shares).round(), 5 * shares)
    single = [decide(model, x[:40], index, s, votes=1).argmax(1) for s in range(4)]
    assert any(not torch.equal(single[0], s) for s in single)  # the dice matter
    assert torch.equal(decide(net.eval(), x[:9], index[:9]), net(x[:9]))


# averaged gradients


def written_attack(model, x, y, index, eps, steps, draws, seed):
    "Image by image, draw by draw, one gradient at a time."
    moved = []
    for image, label, i in zip(x, y, index, strict=True):
        g = stream(seed, PURPOSES.index("attack"), int(i), 0)
        at = (image[None] + random_starts(image[None], torch.tensor([int(i)]), Linf(eps), seed)).clamp(0, 1)
        for _ in range(steps):
            total = torch.zeros_like(at)
            for _ in range(draws):
                leaf = at.clone().requires_grad_()
                eta = torch.randn(image.shape, generator=g).to(image)
                loss = cross_entropy(model[0].module(leaf + model[0].sigma * eta), label[None])
                total += torch.autograd.grad(loss, leaf)[0] / draws
            at = (image[None] + (at + 2.5 * eps / steps * total.sign() - image[None]).clamp(-eps, eps)).clamp(0, 1)
        moved.append(at)
    return torch.cat(moved)


def attack_agrees(monkeypatch, data, net, x, draws=3, batch_size=250):
    "Whether robust_mask walks where the written attack walks, and gives its verdict."
    model, eps, steps, seed = classifier(net), 0.04, 3, 6
    clean = torch.zeros(120).bool()
    clean[[1, 4, 9, 16, 25, 36]] = True  # these are attacked, whatever the model thinks of them
    index, found, real = torch.arange(120) + 50, [], robust.pgd
    with monkeypatch.context() as m:
        m.setattr(robust, "pgd", lambda *a, **k: found.append(real(*a, **k)) or found[-1])
        how = {"steps": steps, "draws": draws, "seed": seed, "index": index, "clean": clean, "batch_size": batch_size}
        mask = robust_mask(model, x, data.test.labels, Linf(eps), **how)
    some = clean.nonzero()[:, 0]
    expected = written_attack(model, x[some], data.test.labels[some], index[some], eps, steps, draws, seed)
    right = written_votes(model, expected, index[some], seed) == data.test.labels[some]
    return torch.allclose(torch.cat(found), expected, atol=1e-12) and torch.equal(mask[some], right) and not mask[~clean].any()


@pytest.mark.parametrize(("draws", "batch_size"), [(1, 250), (3, 250), (3, 4), (3, 1)])
def test_the_attack_is_the_written_one(monkeypatch, data, net, x, draws, batch_size):
    assert attack_agrees(monkeypatch, data, net, x, draws, batch_size)


def one_draw(logits, y, reduction): return cross_entropy(logits, y, reduction=reduction) * (torch.arange(len(y)) < 6)


@contextmanager
def verdict_noise(module, seed, purpose, index):
    with named_noise(module, seed, "predict", index): yield


@contextmanager
def no_names(module, seed, purpose, index): yield


@contextmanager
def one_noise_for_all(module, seed, purpose, index):
    with named_noise(module, seed, purpose, [int(index[0])] * len(index)): yield


@contextmanager
def places_in_the_batch(module, seed, purpose, index):
    with named_noise(module, seed, purpose, range(len(index))): yield


@contextmanager
def other_seed(module, seed, purpose, index):
    with named_noise(module, 0, purpose, index): yield


@pytest.mark.parametrize("mutant", [verdict_noise, no_names, one_noise_for_all, places_in_the_batch, other_seed], ids=lambda f: f.__name__)
def test_mutants_of_the_noise_are_rejected(monkeypatch, data, net, x, mutant):
    monkeypatch.setattr(robust, "named_noise", mutant)
    assert not attack_agrees(monkeypatch, data, net, x)


def test_mutants_of_the_average_are_rejected(monkeypatch, data, net, x):
    with monkeypatch.context() as m:
        m.setattr(robust.F, "cross_entropy", one_draw)  # only the first of three draws counts
        assert not attack_agrees(monkeypatch, data, net, x)
    real = robust.pgd
    monkeypatch.setattr(robust, "pgd", lambda *a, **k: real(*a, **k, sign=-1))
    assert not attack_agrees(monkeypatch, data, net, x)


def test_robust_mask_under_noise_is_a_function(data, net, x):
    model, y = classifier(net), data.test.labels
    before, state = fingerprint(model), torch.get_rng_state()
    call = lambda **k: robust_mask(model, x, y, Linf(0.03), **{"steps": 3, "draws": 3, "seed": 1} | k)
    mask = call()
    for batch_size in (13, 120): assert torch.equal(call(batch_size=batch_size), mask)
    some = torch.tensor([100, 3, 57, 4])
    assert torch.equal(robust_mask(model, x[some], y[some], Linf(0.03), steps=3, draws=3, seed=1, index=some), mask[some])
    assert fingerprint(model) == before and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(robust_mask(model, x, y, Linf(0.0), draws=2, seed=1), clean_mask(model, x, y, seed=1))
    with pytest.raises(ValueError, match="at least 1"): call(draws=0)


def test_without_noise_draws_change_nothing(data, net, x):
    "To the bit, and at no cost."
    with count_passes(net) as one: a = robust_mask(net, x, data.test.labels, Linf(0.03), steps=4)
    with count_passes(net) as many: b = robust_mask(net, x, data.test.labels, Linf(0.03), steps=4, draws=7)
    assert torch.equal(a, b) and one == many


def test_averaging_finds_more():
    "A hyperplane that noise hides: each draw adds a large random slope, the mean of the gradients is the plane's."

    class Slopes(nn.Module):
        def forward(self, noise_and_x):  # the first half of the pixels carries the noise as a slope
            a, b = noise_and_x.flatten(1).chunk(2, 1)
            margin = (b - 0.5) @ torch.ones(32, dtype=b.dtype) + ((a - 0.5) * 40 * (b - 0.5)).sum(1)
            return torch.stack([-margin, margin], 1)

    x = torch.full((40, 1, 8, 8), 0.5, dtype=torch.float64)
    x.flatten(1)[:, 32:] += 0.02
    model, y = nn.Sequential(Noisy(Slopes(), 0.2)), torch.ones(40).long()
    found = [robust_accuracy(model, x, y, Linf(0.05), steps=10, draws=m).correct for m in (1, 30)]
    assert found[1] < found[0]


# the one call


def test_evaluate_reports_both(data):
    call = lambda encoder, **k: evaluate(encoder, data, threat=[Linf(0.02), L2(0.2)], robust_images=30, attack_steps=2, seed=3, **k)
    noisy = Noisy(make_net(), 0.1)
    before, state = fingerprint(noisy), torch.get_rng_state()
    result = call(noisy)
    robust_keys = [k for k in result if k.count(".") > 1]
    assert [k for k in result if k.endswith(".clean")] == [f"{name}.clean" for name in STANDARD] and result["stochastic"]
    assert sorted({k.split(".")[1] for k in robust_keys}) == ["eot2", "pgd2"] and len(robust_keys) == 4
    assert {(k.split(".")[1], result[k]["draws"]) for k in robust_keys} == {("eot2", EOT_DRAWS), ("pgd2", 1)}
    assert {result[k]["votes"] for k in [*robust_keys, "linear.clean"]} == {VOTES}
    assert fingerprint(noisy) == before and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    counts = lambda r: {k: v["correct"] for k, v in r.items() if "." in k}
    assert call(noisy) == result and counts(call(noisy, attacks=("pgd2", "eot2"), batch_size=60)) == counts(result)
    assert call(noisy, attacks=("eot2",)).keys() == {k for k in result if ".pgd" not in k}
    other = evaluate(noisy, data, threat=(), seed=4)
    assert any(other[k]["correct"] != result[k]["correct"] for k in ("knn.clean", "linear.clean"))


def test_twins_of_a_deterministic_encoder_are_one(data):
    result = evaluate(make_net(), data, threat=Linf(0.01), robust_images=40, attacks=("pgd4", "eot4"), protocols=("linear",))
    assert not result["stochastic"] and result["linear.eot4.linf-0.01"] | {"attack": "pgd4"} == result["linear.pgd4.linf-0.01"]
    alone = evaluate(make_net(), data, threat=Linf(0.01), robust_images=40, attacks=("pgd4",), protocols=("linear",))
    assert not [k for k in alone if ".eot" in k]


def test_the_head_is_fitted_on_noisy_features(data, monkeypatch):
    seen, real = [], protocol.linear_probe
    monkeypatch.setattr(protocol, "linear_probe", lambda f, *a, **k: seen.append(f) or real(f, *a, **k))
    noisy = Noisy(make_net(), 0.3)
    evaluate(noisy, data, threat=(), protocols=["linear"], seed=2)
    assert torch.equal(seen[0], extract(noisy, data.train.images, 250, seed=2))
    assert not torch.allclose(seen[0], extract(noisy.module, data.train.images), atol=0.1)


# certified radii


@examples
@given(st.integers(1, 2000), st.floats(0, 1), st.floats(1e-6, 0.5))
def test_the_bound_equals_scipy(n, share, alpha):
    stats = pytest.importorskip("scipy.stats")
    k = round(share * n)
    theirs = stats.binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact").low
    assert lower_bound(k, n, alpha) == pytest.approx(theirs, rel=1e-7, abs=1e-10)
    assert 0 <= lower_bound(k, n, alpha) <= k / n and (k == 0 or lower_bound(k - 1, n, alpha) < lower_bound(k, n, alpha))


def coverage_is_kept(bound, n=60, alpha=0.05):
    "Whether the bound is too high with a probability of at most alpha for every p, and wastes little of it."
    bounds, k = torch.tensor([bound(j, n, alpha) for j in range(n + 1)], dtype=torch.float64), torch.arange(n + 1).double()
    chance = lambda p: torch.distributions.Binomial(n, p).log_prob(k).exp()
    wrong = [chance(p)[bounds > p].sum().item() for p in torch.linspace(0.005, 0.995, 199).double()]
    return max(wrong) <= alpha and max(wrong) > 0.9 * alpha


def test_the_bound_keeps_its_promise():
    assert coverage_is_kept(lower_bound)
    for mutant in (
        lambda k, n, a: k / n,  # no bound at all
        lambda k, n, a: lower_bound(k, n, a / 2),  # half of a two-sided interval: kept, but wasteful
        lambda k, n, a: lower_bound(k, n, 2 * a),
        lambda k, n, a: lower_bound(min(k + 1, n), n, a),
        lambda k, n, a: max(0.0, k / n - 1.645 * math.sqrt(k / n * (1 - k / n) / n)),  # the normal interval, certain at k = n
    ): assert not coverage_is_kept(mutant)


class Plane(nn.Module):
    "Two classes, one hyperplane in 16 pixels; the smoothed radius is the distance."

    def __init__(self, dtype=torch.float32):
        super().__init__()
        g = seeded(0)
        self.w = nn.Parameter(torch.randn(16, generator=g).to(dtype))

    def distance(self, x): return ((x.flatten(1) - 0.5) @ self.w / self.w.norm()).detach()
    def forward(self, x): return torch.stack([-self.distance(x), self.distance(x)], 1)


def plane(n=100): return Plane(), torch.rand(n, 1, 4, 4, generator=seeded(1))


def test_the_radius_of_a_hyperplane():
    model, x = plane(70)
    exact, sigma, alpha = model.distance(x).double(), 0.3, 0.01
    y = (exact > 0).long()
    found = certified(model, x, y, sigma, draws=600, alpha=alpha)
    sure = found.answers != ABSTAIN
    assert torch.equal(found.answers[sure], y[sure]) and (found.radii[sure] > exact[sure].abs()).sum() <= 4  # one expected at most
    assert (found.radii[~sure] == 0).all() and (exact[~sure].abs() < 0.08).all()
    best = exact.abs().clamp_max(radius(alpha ** (1 / 600), sigma))
    assert 0 < (best - found.radii).mean() < 0.05
    assert found.accuracy().correct == (sure & (found.answers == y)).sum()
    accuracies = [found.accuracy(eps).correct for eps in (0, 0.05, 0.1, 0.3, 2)]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] == 0
    assert replace(found, labels=1 - y).accuracy().correct == 0


def test_the_theorem_for_random_sets():
    "For any set, moving the image by delta leaves at least what the half space keeps; one dimension, exact."
    g = seeded(3)
    mass = lambda edges, at, s: sum(phi.cdf((b - at) / s) - phi.cdf((a - at) / s) for a, b in zip(edges[::2], edges[1::2], strict=True))
    for _ in range(200):
        edges, sigma = torch.randn(6, generator=g).sort().values.tolist(), 0.1 + torch.rand(1, generator=g).item()
        p = mass(edges, 0.0, sigma)
        if p > 0.5:
            safe = radius(p, sigma)
            assert all(mass(edges, d * safe, sigma) > 0.5 - 1e-12 for d in (-0.999, -0.5, 0.5, 0.999))
    assert radius(0.5, 1.0) == radius(0.1, 1.0) == 0.0 and radius(1.0, 1.0) == math.inf
    assert radius(phi.cdf(1.3), 0.5) == pytest.approx(0.65)


def test_attack_and_certificate_agree():
    "No image turns within its certified radius under the strongest attack on a hyperplane, the step along its normal."
    model, x = plane(60)
    y = (model.distance(x) > 0).long()
    found = certified(model, x, y, 0.3, draws=500, alpha=0.001)
    sure = (found.answers == y).nonzero()[:, 0]
    normal = (model.w / model.w.norm()).detach().view(1, 4, 4)
    moved = x[sure] - ((2 * y[sure] - 1) * found.radii[sure] * 0.99).float().view(-1, 1, 1, 1) * normal
    assert torch.equal((model.distance(moved) > 0).long(), y[sure])


def test_counts_are_seeded_and_cut_as_one_likes():
    model, x = plane(8)
    draw = lambda batch_size, seed=0: noisy_counts(model, x[0], 0.3, 105, seeded(seed), batch_size)
    one = draw(250)
    assert one.sum() == 105 and all(torch.equal(draw(b), one) for b in (1, 10, 105))
    assert any(not torch.equal(draw(250, s), one) for s in range(1, 5))
    y = torch.zeros(8).long()
    call = lambda images=x, labels=y, **k: certified(model, images, labels, 0.3, draws=150, **k)
    assert torch.equal(call(batch_size=7).radii, call().radii)
    some = torch.tensor([6, 2])
    assert torch.equal(call(x[some], y[some], index=some).radii, call().radii[some]) and not torch.equal(call(seed=1).radii, call().radii)


def test_selection_and_estimation_are_different_draws(monkeypatch):
    seen, real = [], smoothing.certify
    monkeypatch.setattr(smoothing, "certify", lambda a, b, *r: seen.append((a, b)) or real(a, b, *r))
    model, x = plane(20)
    certified(model, x, torch.zeros(20).long(), 0.5, select=100, draws=100)
    assert all(a.sum() == b.sum() == 100 for a, b in seen) and any(not torch.equal(a, b) for a, b in seen)
    # luck of the selection is not counted: two classes alike, and the radius is nearly always none
    answers = [certify(torch.tensor([60, 40]), torch.tensor([k, 100 - k]), 0.3, 0.05)[0] for k in (40, 50, 58, 60, 70)]
    assert answers == [ABSTAIN, ABSTAIN, ABSTAIN, 0, 0]
    assert certify(torch.tensor([40, 60]), torch.tensor([90, 10]), 0.3) == (ABSTAIN, 0.0)


@examples
@given(st.lists(st.integers(0, 300), min_size=2, max_size=6), st.sampled_from([0.001, 0.05]))
def test_predict_equals_the_binomial_test(counts, alpha):
    stats = pytest.importorskip("scipy.stats")
    first, second = sorted(counts, reverse=True)[:2]
    answer = predict(torch.tensor(counts), alpha)
    if first == 0 or stats.binomtest(first, first + second, 0.5).pvalue > alpha: assert answer == ABSTAIN
    else: assert counts[answer] == first > second


def test_errors_and_traces_of_the_certificates():
    model, x = plane(5)
    y, before = torch.zeros(5).long(), fingerprint(model.train())
    certified(model, x, y, 0.2, select=10, draws=20)
    assert fingerprint(model) == before
    for args, message in (
        ((Noisy(model, 0.1), x, y, 0.2), "noise is added here"), ((model, x, y, 0.0), "> 0"), ((model, x, y[:-1], 0.2), "as many labels"),
        ((model, x[:0], y[:0], 0.2), "at least one"), ((model, 255 * x, y, 0.2), "divide bytes by 255"),
    ):
        with pytest.raises(ValueError, match=message): certified(*args)
    for k, n, alpha in ((-1, 5, 0.1), (6, 5, 0.1), (0, 0, 0.1), (1, 5, 0.0), (1, 5, 1.0)):
        with pytest.raises(ValueError): lower_bound(k, n, alpha)


def test_the_radii_of_a_certificate_are_those_of_balls_in_l2():
    model, x = plane(6)
    y = (model.distance(x) > 0).long()
    keys = lambda *balls: set(measures.certified(model, x, y, balls, select=5, draws=20))
    assert keys(Linf(0.3), L2(0.7), L1(9.0)) == {"certified.l2-0", "certified.l2-0.7"}
    assert keys(Linf(0.3)) == {"certified.l2-0"} | {f"certified.l2-{r}" for r in measures.RADII}


def test_the_noise_layer_is_one_class():
    "What the evaluation asks is what the method makes."
    assert features.Noisy is Noisy and isinstance(tiny().evaluated(), features.Noisy)
