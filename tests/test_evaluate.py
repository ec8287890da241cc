"Intervals, neighbours, linear probe, robust accuracy and the one call: what is too dull or too slow for the pages."
import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from common import CLASSES, fingerprint, image_set, make_net, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.data import Splits
from advssl.evaluate import protocol, robust
from advssl.evaluate.knn import knn_accuracy, knn_predict
from advssl.evaluate.linear import PENALTIES, fit_softmax, fold, linear_probe, softmax_objective, standardise
from advssl.evaluate.protocol import Outcome, evaluate, find_attack, result_key, robust_sample
from advssl.evaluate.robust import clean_mask, random_starts, robust_accuracy, robust_mask
from advssl.evaluate.statistics import Accuracy, t_interval, t_quantile, wilson
from advssl.features import extract, to_unit
from advssl.threat import L1, L2, Linf


@pytest.fixture(scope="module")
def data():
    return Splits(image_set(240, 0, "toy/train"), image_set(120, 1, "toy/test"))


# statistics


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 20_000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_equals_scipy(total, share, level):
    stats = pytest.importorskip("scipy.stats")
    correct = round(share * total)
    theirs = stats.binomtest(correct, total).proportion_ci(level, method="wilson")
    ours = wilson(correct, total, level)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)
    assert 0 <= ours[0] <= correct / total <= ours[1] <= 1


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 30, 101])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.999])
def test_t_quantile_equals_scipy(df, level):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(df, level) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-8)


def test_t_interval_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = [44.1, 46.3, 45.0, 43.2]
    assert t_interval(values, 0.9) == pytest.approx(stats.t.interval(0.9, 3, 44.65, stats.sem(values)))
    assert t_interval([1.0, 1.0]) == (1.0, 1.0)


def test_accuracy_record():
    a = Accuracy.of(torch.tensor([True, False, True]))
    assert (a.correct, a.total, a.value) == (2, 3, 2 / 3)
    assert Accuracy.from_json(json.loads(json.dumps(a.to_json() | {"eps": 0.1}))) == a
    assert Accuracy.from_json({"correct": 1, "total": 2, "level": 0.9}).level == 0.9
    assert (Accuracy(0, 9).low, Accuracy(9, 9).high) == (0.0, 1.0)
    assert Accuracy(5, 10, 0.99).low < Accuracy(5, 10).low
    for bad in ((3, 2), (-1, 2), (0, 0), (0.5, 1), (True, 1), (1, 2, 0), (1, 2, 1), (1, 2, 95), (0, 0, 0.95)):
        with pytest.raises(ValueError): Accuracy(*bad)
    for k, n in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"got {k} of {n}"): wilson(k, n)
    for bad in ([], [1.0]):
        with pytest.raises(ValueError, match="2 seeds"): t_interval(bad)
    with pytest.raises(ValueError, match="at least 1"): t_quantile(0)


# features


def test_extract_is_a_function_of_each_image(data):
    net, images = make_net(), data.train.images
    before = fingerprint(net)
    features = extract(net, images)
    assert fingerprint(net) == before
    assert not features.requires_grad and features.shape == (240, 12)
    for batch_size in (1, 7, 240): torch.testing.assert_close(extract(net, images, batch_size), features)
    order = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(extract(net, images[order], 50), features[order])
    torch.testing.assert_close(features, copy.deepcopy(net).eval()(images.float() / 255).detach())


def test_extract_restores_after_an_error(data):
    net = nn.Sequential(make_net(), nn.Unflatten(1, (3, 4)))
    before = fingerprint(net)
    with pytest.raises(ValueError, match="pool or flatten"): extract(net, data.train.images)
    assert fingerprint(net) == before
    with pytest.raises(ValueError, match="divide bytes by 255"): extract(make_net(), data.train.images.float())


# nearest neighbours


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 70), st.sampled_from([0.01, 0.07, 0.5, 100.0]))
def test_knn_ignores_chunks_lengths_and_order(seed, k, chunk, temperature):
    g = torch.Generator().manual_seed(seed)
    keys, queries = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (40, 33))
    labels = torch.randint(0, 4, (40,), generator=g)
    answer = knn_predict(queries, keys, labels, k, temperature)
    lengths = torch.rand(40, 1, generator=g, dtype=torch.float64) + 0.1
    assert torch.equal(knn_predict(queries * 3, keys * lengths, labels, k, temperature, chunk), answer)
    order = torch.randperm(40, generator=g)
    assert torch.equal(knn_predict(queries, keys[order], labels[order], k, temperature), answer)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 0.2), (200, 0.1)])
def test_knn_equals_lightly(k, temperature):
    benchmarking = pytest.importorskip("lightly.utils.benchmarking")
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (500,), generator=g)
    centres = torch.randn(7, 10, generator=g, dtype=torch.float64)
    keys = centres[labels] + 1.5 * torch.randn(500, 10, generator=g, dtype=torch.float64)
    queries = torch.randn(300, 10, generator=g, dtype=torch.float64)
    bank = F.normalize(keys, dim=1).T
    theirs = benchmarking.knn_predict(F.normalize(queries, dim=1), bank, labels, 7, knn_k=k, knn_t=temperature)[:, 0]
    assert torch.equal(knn_predict(queries, keys, labels, k, temperature), theirs)


def test_knn_weights_matter():
    "One near neighbour outweighs two far ones at a small temperature, and loses the vote at a large one."
    angle = torch.tensor([0.05, 1.0, -1.0])
    keys, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(query, keys, labels, 3, 0.07).item() == 0
    assert knn_predict(query, keys, labels, 3, 100.0).item() == 1
    assert knn_predict(query, keys, labels, 3, 1e-30).item() == 0  # no overflow
    assert knn_accuracy(query, torch.tensor([0]), keys, labels, 3) == Accuracy(1, 1)
    with pytest.raises(ValueError, match="pass the labelled part"): knn_predict(query, keys, torch.tensor([0, -1, 1]), 3)


# linear probe


def hard_features(n=300, d=20, classes=5, seed=0):
    "Correlated features of very different scales and offsets."
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = torch.randn(classes, d, generator=g)[labels] + 2 * torch.randn(n, d, generator=g)
    mix = torch.eye(d) + 0.8 * torch.randn(d, d, generator=g) / d**0.5
    return x @ mix * torch.logspace(-2, 2, d) + torch.linspace(-3, 3, d), labels


@pytest.mark.parametrize("penalty", PENALTIES)
def test_probe_is_the_optimum(penalty):
    x, y = hard_features()
    probe = linear_probe(x, y, penalties=[penalty])
    mu, s = standardise(x)
    W, b = (probe.head.weight.double() * s).requires_grad_(), None
    b = (probe.head.bias.double() + probe.head.weight.double() @ mu).detach().requires_grad_()
    W = W.detach().requires_grad_()
    loss = F.cross_entropy(((x - mu) / s) @ W.T + b, y) + penalty / 2 * W.square().sum()
    grads = torch.autograd.grad(loss, (W, b))
    assert max(g.abs().max() for g in grads) < 1e-4  # float32 of the head included
    assert probe.gradient < 5e-5 and probe.penalty == penalty and not probe.heldout


def test_no_head_is_better():
    "An independent search, Newton's method on all parameters with autograd's Hessian, ends at the same value."
    x, y = hard_features(120, 4, 3)
    mu, s = standardise(x)
    x, penalty = (x - mu) / s, 1e-2
    zero = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    W, b = fit_softmax(x, y, penalty, zero)

    def J(w): return softmax_objective(x, y, w[:12].view(3, 4), w[12:], penalty)[0]

    w = torch.zeros(15, dtype=torch.float64)
    for _ in range(30):
        w = w - torch.linalg.pinv(torch.autograd.functional.hessian(J, w)) @ torch.func.grad(J)(w)
    assert abs(J(torch.cat([W.flatten(), b])) - J(w)) < 1e-9
    torch.testing.assert_close(W.flatten(), w[:12], rtol=0, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_probe_ignores_scale_and_shift(seed):
    g = torch.Generator().manual_seed(seed)
    x, y = hard_features(150, 6, 3)
    moved = x * torch.logspace(-1, 2, 6)[torch.randperm(6, generator=g)] + 5 * torch.randn(6, generator=g)
    one, two = linear_probe(x, y, penalties=[1e-2]), linear_probe(moved, y, penalties=[1e-2])
    torch.testing.assert_close(two.head(moved).softmax(1), one.head(x).softmax(1), rtol=0, atol=2e-3)


def test_folding_is_exact():
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=g).double() for shape in ((50, 7), (4, 7), (4,)))
    x = x * 3 + 2
    mu, s = standardise(x)
    torch.testing.assert_close((x - mu).square().mean(0), s.square())
    head = fold(W, b, mu, s)
    torch.testing.assert_close(head(x.float()).double(), (x - mu) / s @ W.T + b, rtol=1e-4, atol=1e-4)
    x[:, 3] = 1e6
    mu, s = standardise(x)
    assert s[3] == math.inf and fold(W, b, mu, s).weight[:, 3].eq(0).all() and fold(W, b, mu, s).bias.isfinite().all()


def test_penalty_is_chosen_on_held_out_training_images():
    "Many features and few images: the weakest penalty fits the training images best, and must not win."
    g = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.randn(3, 60, generator=g)[y] * 0.35 + torch.randn(90, 60, generator=g)
    probe = linear_probe(x, y)
    assert probe.penalty > min(PENALTIES)
    assert tuple(probe.heldout) == PENALTIES and {a.total for a in probe.heldout.values()} == {18}
    assert probe.heldout[probe.penalty].value == max(a.value for a in probe.heldout.values())
    assert max(a.value for a in probe.heldout.values()) < 1  # so these are not the images it was fitted on
    again, other = linear_probe(x, y), [linear_probe(x, y, seed=s).heldout for s in range(1, 4)]
    assert torch.equal(again.head.weight, probe.head.weight) and any(o != probe.heldout for o in other)
    alone = linear_probe(x, y, penalties=[probe.penalty])  # the head is refitted on all training images
    torch.testing.assert_close(alone.head(x), probe.head(x), rtol=0, atol=1e-3)


def test_probe_in_an_unfinished_search_warns():
    x, y = hard_features(100, 5, 3)
    mu, s = standardise(x)
    zero = torch.zeros(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="not that of the optimum"): fit_softmax((x - mu) / s, y, 1e-4, zero, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_softmax((x - mu) / s, y, 1e-4, zero)


def test_probe_errors():
    x, y = hard_features(30, 4, 3)
    for args, kwargs, message in (
        ((x, y[:-1]), {}, r"\(30, 4\) and \(29,\)"),
        ((x[None], y), {}, "shape"),
        ((x, y), {"penalties": []}, "> 0"),
        ((x, y), {"penalties": [1.0, -1.0]}, "> 0"),
        ((x, y - 1), {}, "no labels"),
        ((x[:3], y[:3]), {}, "pass one penalty"),
    ):
        with pytest.raises(ValueError, match=message): linear_probe(*args, **kwargs)
    assert linear_probe(x[:3], y[:3], penalties=[0.1]).head.weight.shape == (3, 4)  # one image of each class
    assert linear_probe(x, y, classes=7, penalties=[0.1]).head.out_features == 7


# robust accuracy


@pytest.mark.parametrize("eps", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_pgd20_equals_foolbox(data, eps, start):
    "The same images survive, from the same start; float64, so that no sign hangs on rounding."
    foolbox = pytest.importorskip("foolbox")
    net = trained(data.train)
    x, y = to_unit(data.test.images).double(), data.test.labels
    delta = random_starts(x, torch.arange(len(x)), Linf(eps), seed=3)

    class FromStart(foolbox.attacks.LinfPGD):
        def get_random_start(self, x0, epsilon): return x0 + type(x0)(delta)

    ours = robust_mask(net, x, y, Linf(eps), seed=3, start=start)
    attack = FromStart(steps=20, abs_stepsize=2.5 * eps / 20, random_start=start == "random")
    model = foolbox.PyTorchModel(copy.deepcopy(net).eval(), bounds=(0, 1))
    _, _, success = attack(model, x, y, epsilons=eps)
    assert torch.equal(ours, ~success & clean_mask(net, x, y))
    assert 0 < ours.sum() < clean_mask(net, x, y).sum()


class WrongAtOnePoint(nn.Module):
    "Wrong (class 1) on the grey image alone, right (class 0) everywhere else."

    def forward(self, x):
        wrong = (x == 0.5).flatten(1).all(1).to(x)
        return torch.stack([1 - 2 * wrong + 0 * x.flatten(1).sum(1), wrong], 1)


def test_an_image_that_is_wrong_when_clean_is_not_robust():
    x, y = torch.full((6, 1, 8, 8), 0.5), torch.zeros(6).long()
    x[:2] = 0.3
    model = WrongAtOnePoint()
    assert robust_mask(model, x, y, Linf(0.1)).tolist() == [True] * 2 + [False] * 4
    assert robust_mask(model, x, y, Linf(0.1), clean=clean_mask(model, x, y)).tolist() == [True] * 2 + [False] * 4
    assert robust_accuracy(model, x[2:], y[2:], Linf(0.1)) == Accuracy(0, 4)


class Hyperplane(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(64, generator=g, dtype=torch.float64))

    def margin(self, x): return (x.flatten(1) - 0.5) @ self.w

    def forward(self, x): return torch.stack([-self.margin(x), self.margin(x)], 1)


@pytest.mark.parametrize(("threat", "dual"), [(Linf(0.02), 1), (L2(0.1), 2), (L1(0.2, top=0.001), math.inf)])
def test_robust_accuracy_of_a_hyperplane_is_exact(threat, dual):
    "Robust if and only if the margin exceeds eps times the dual norm of the weights."
    model, g = Hyperplane(), torch.Generator().manual_seed(1)
    x, y = 0.3 + 0.4 * torch.rand(200, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, 2, (200,), generator=g)
    margin = ((2 * y - 1) * model.margin(x)).detach()
    bound = threat.eps * model.w.detach().norm(p=dual)
    robust = robust_mask(model, x, y, threat, steps=100)
    assert torch.equal(robust, margin > bound) or (margin[robust != (margin > bound)] - bound).abs().max() < 0.02 * bound
    assert 0 < robust.sum() < (margin > 0).sum()


def test_attack_depends_on_image_seed_and_index_only(data):
    net, x, y = trained(data.train), to_unit(data.test.images).double(), data.test.labels
    call = lambda **k: robust_mask(net, x, y, Linf(0.03), steps=3, **k)
    mask = call()
    for batch_size in (1, 13, 120): assert torch.equal(call(batch_size=batch_size), mask)
    some = torch.tensor([100, 3, 57, 4])
    assert torch.equal(robust_mask(net, x[some], y[some], Linf(0.03), steps=3, index=some), mask[some])
    starts = [random_starts(x, torch.arange(120), Linf(0.03), seed) for seed in (0, 1)]
    assert (starts[0] != starts[1]).any() and (starts[0][0] != starts[0][1]).any()
    assert torch.equal(random_starts(x[some], some, Linf(0.03), 1), starts[1][some])


def test_the_seed_and_the_index_reach_the_attack(data, monkeypatch):
    net, x, y = trained(data.train, steps=5), to_unit(data.test.images).double(), data.test.labels
    seen, real = [], robust.pgd
    monkeypatch.setattr(robust, "pgd", lambda *a, **k: seen.append(k["start"]) or real(*a, **k))
    for settings_ in ({}, {"seed": 1}, {"index": torch.arange(120) + 7}): robust_mask(net, x, y, Linf(0.03), steps=1, **settings_)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_model_is_left_as_it_was(data, dtype):
    net = trained(data.train, dtype)
    before = fingerprint(net)
    robust_accuracy(net, to_unit(data.test.images).to(dtype), data.test.labels, Linf(0.05), steps=3)
    assert fingerprint(net) == before
    with pytest.raises(ValueError): robust_accuracy(net, data.test.images.to(dtype), data.test.labels, Linf(0.05))
    assert fingerprint(net) == before


def test_accuracy_falls_with_eps_to_zero(data):
    net, x, y = trained(data.train), to_unit(data.test.images).double(), data.test.labels
    found = [robust_accuracy(net, x, y, Linf(eps)) for eps in (0, 0.01, 0.03, 0.1, 0.5)]
    assert found[0] == Accuracy.of(clean_mask(net, x, y)) and found[0].value > 0.8
    assert all(a.correct > b.correct for a, b in zip(found[:3], found[1:4], strict=True)) and found[-1].correct == 0
    assert robust_accuracy(net, x, y, Linf(0.03), steps=0).value >= found[2].value


def test_robust_errors(data):
    net, x, y = trained(data.train, torch.float32, 1), data.test.images, data.test.labels
    for args, settings_, message in (
        ((x.float(), y), {}, "divide bytes by 255"),
        ((x, y[:-1]), {}, r"labels of shape \(120,\)"),
        ((x[:0], y[:0]), {}, "no images"),
        ((x, y + 1), {}, "head missing"),
        ((x, y), {"start": "ones"}, "'random' or 'zero'"),
        ((x, y), {"steps": -1}, "steps"),
    ):
        with pytest.raises(ValueError, match=message): robust_accuracy(net, *args, Linf(0.1), **settings_)


# the one call


def test_evaluate_end_to_end(data):
    net = make_net()
    before = fingerprint(net)
    balls = [Linf(0.01), L2(0.2)]
    result = evaluate(net, data, threat=balls, robust_images=60, attacks=("pgd3", "pgd"), attack_steps=5)
    assert fingerprint(net) == before
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    keys = [k for k in result if "." in k]
    robust = [f"linear.pgd{n}.{ball}" for n in (3, 5) for ball in ("linf-0.01", "l2-0.2")]
    assert keys == ["knn.clean", "linear.clean", *robust, "linear-10%.clean", "linear-1%.clean"]  # few labels: not attacked
    record = result["linear.pgd5.l2-0.2"]
    expected = {"total": 60, "steps": 5, "eps": 0.2, "norm": "l2", "attack": "pgd5", "protocol": "linear", "step_size": 0.1}
    assert {k: record[k] for k in expected} == expected and record["correct"] <= record["clean_correct"] <= 60
    assert (result["robust_images"], result["test_images"], result["train_images"]) == (60, 120, 240)

    # the same by hand, from pixels to logits
    features = extract(net, data.train.images)
    probe = linear_probe(features, data.train.labels, classes=CLASSES, penalties=[protocol.PENALTY])
    classifier, some = nn.Sequential(net, probe.head), robust_sample(120, 60)
    assert result["linear.clean"]["penalty"] == probe.penalty
    assert Accuracy.from_json(result["linear.clean"]) == Accuracy.of(clean_mask(classifier, data.test.images, data.test.labels))
    by_hand = robust_accuracy(classifier, data.test.images[some], data.test.labels[some], Linf(0.01), 5, index=some)
    assert Accuracy.from_json(result["linear.pgd5.linf-0.01"]) == by_hand


def test_evaluate_is_reproducible(data):
    call = lambda net, **k: evaluate(net, data, threat=Linf(0.02), robust_images=0, attack_steps=2, **k)
    counts = lambda r: {k: v["correct"] for k, v in r.items() if "." in k}
    one = call(make_net())
    assert call(make_net()) == one and call(make_net().eval()) == one  # the mode it comes in has no say
    assert counts(call(make_net(), batch_size=11)) == counts(one)
    assert call(make_net(), seed=1)["seed"] == 1


def test_test_data_have_no_influence_on_the_head(data, monkeypatch):
    "Other test images and labels: the same penalty and the same head to the last bit."
    heads, real = [], protocol.linear_probe
    monkeypatch.setattr(protocol, "linear_probe", lambda *a, **k: heads.append(real(*a, **k)) or heads[-1])
    others = (
        data.test,
        replace(data.test, labels=data.test.labels.roll(1), sha256=""),
        image_set(45, 7, "toy/other", noise=0.05),
    )
    for test in others: evaluate(make_net(), replace(data, test=test), threat=(), protocols=["linear"])
    assert len({h.penalty for h in heads}) == 1 and all(h.heldout == heads[0].heldout for h in heads)
    assert all(torch.equal(h.head.weight, heads[0].head.weight) for h in heads)


def test_names_are_checked_before_anything_runs(data):
    class Never(nn.Module):
        def forward(self, x): raise AssertionError("ran")

    for k, message in (
        ({"protocols": ["knn", "lp"]}, "unknown protocol 'lp': choose one of knn, linear"),
        ({"attacks": ["fgsm"]}, "unknown attack 'fgsm': choose one of pgd"),
        ({"attacks": ["pgd0"]}, "an attack of 0 steps or queries is none"),
        ({"attacks": [""]}, "unknown attack"),
    ):
        with pytest.raises(ValueError, match=message): evaluate(Never(), data, threat=Linf(0.1), **k)
    unlabelled = replace(data.train, labels=torch.full((240,), -1), sha256="")
    with pytest.raises(ValueError, match="no labels"): evaluate(Never(), replace(data, train=unlabelled), threat=Linf(0.1))


def test_new_protocols_and_attacks_are_one_line(data, monkeypatch):
    def everything(task): return Outcome(torch.ones(120).bool(), {"x": 1}, nn.Sequential(task.encoder, nn.Linear(12, 3)))

    def nothing_survives(classifier, images, labels, threat, *, budget, seed, index, clean, **_):
        assert seed == 5 and set(index.tolist()) <= set(robust_sample(120, 10).tolist()) and clean.all()  # those that are right when clean
        assert torch.equal(images, data.test.images[index]) and torch.equal(labels, data.test.labels[index])
        return torch.zeros(len(images)).bool(), {"queries": budget}

    monkeypatch.setitem(protocol.PROTOCOLS, "all", everything)
    monkeypatch.setitem(protocol.ATTACKS, "square", nothing_survives)
    result = evaluate(make_net(), data, threat=Linf(0.1), protocols=["all"], attacks=["square500"], robust_images=10, seed=5)
    assert result["all.clean"]["correct"] == 120 and result["all.clean"]["x"] == 1
    record = result[result_key("all", "square500", Linf(0.1))]
    assert (record["correct"], record["total"], record["queries"]) == (0, 10, 500)


def test_another_device_means_a_copy(data, monkeypatch):
    seen, net = [], make_net()
    monkeypatch.setitem(protocol.PROTOCOLS, "spy", lambda task: seen.append(task.encoder) or Outcome(torch.ones(1).bool()))
    evaluate(net, data, threat=(), protocols=["spy"])
    evaluate(net, data, threat=(), protocols=["spy"], device="cpu")
    monkeypatch.setattr(protocol, "device_of", lambda module: torch.device("meta"))  # as if it were elsewhere
    evaluate(net, data, threat=(), protocols=["spy"], device="cpu")
    assert seen[0] is seen[1] is net and seen[2] is not net
    torch.testing.assert_close(seen[2].state_dict(), net.state_dict())


def test_robust_sample_is_nested_and_mixed():
    one, two = robust_sample(1000, 100), robust_sample(1000, 300)
    assert set(one.tolist()) < set(two.tolist()) and len(one.unique()) == 100
    assert one.float().mean() == pytest.approx(500, abs=100)  # not the first hundred
    assert torch.equal(robust_sample(50, 0), torch.arange(50)) and torch.equal(robust_sample(50, 80), torch.arange(50))
    assert find_attack("pgd", 7)[::2] == ("pgd7", 7) and find_attack("pgd020", 7)[2] == 20
