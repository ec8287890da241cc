"Ensembles, transfer and gradient diversity: written out a second time, bounds by hypothesis, and mutants that the same checks must reject."

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl import diversity as diverse
from advssl.diversity import directions, diversity, input_gradients
from advssl.evaluate import ensemble as module
from advssl.evaluate.ensemble import Ensemble, attacked, ensembles, transfer
from advssl.evaluate.robust import clean_mask, robust_mask
from advssl.evaluate.statistics import Accuracy
from advssl.features import Noisy
from advssl.threat import L2, Linf

examples = settings(max_examples=25, deadline=None)


def net(seed=0, scale=1.0):
    "A classifier of 27 pixels with BatchNorm, in training mode."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).double()
    with torch.no_grad(): model(torch.rand(64, 3, 3, 3, dtype=torch.float64))
    model[-1].weight.data *= scale
    return model.train()


def images(n=40, seed=0):
    torch.manual_seed(seed)
    return torch.rand(n, 3, 3, 3, dtype=torch.float64), torch.randint(0, 4, (n,))


def fitted(seed, steps=40):
    "A classifier that knows the images of `images()`, more or less by heart."
    model, (x, y) = net(seed).eval(), images()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.train()


# the ensemble


def agrees(make=Ensemble):
    "The mean of probabilities, the weights of Eq. (3), and a gradient where probabilities underflow."
    members, (x, y) = [net(s).eval() for s in range(3)], images(7)
    both = make(*members)
    p = sum(torch.stack([row.exp() / row.exp().sum() for row in m(x)]) for m in members) / 3
    ok = torch.allclose(both(x).exp(), p, rtol=1e-10) and torch.allclose(both(x).softmax(1), p, rtol=1e-10)
    leaf = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(F.cross_entropy(both(leaf), y), leaf)
    (theirs,) = torch.autograd.grad(F.nll_loss((sum(m(leaf).softmax(1) for m in members) / 3).log(), y), leaf)
    ok &= torch.allclose(ours, theirs, rtol=1e-8, atol=1e-14)
    sure = make(*(net(s, 3000.0).eval().float() for s in range(2)))
    leaf = x.float().requires_grad_()
    logits = sure(leaf)
    (grad,) = torch.autograd.grad(logits.sum(), leaf)
    return ok and bool(logits.isfinite().all()) and bool(grad.isfinite().all())


def test_the_mean_of_probabilities_in_log_space():
    assert agrees()


class MeanLogits(Ensemble):
    def forward(self, x): return torch.stack([m(x) for m in self.members]).mean(0)


class MeanLogProbabilities(Ensemble):
    def forward(self, x): return torch.stack([m(x).log_softmax(1) for m in self.members]).mean(0)


class Naive(Ensemble):
    def forward(self, x): return torch.stack([m(x).softmax(1) for m in self.members]).mean(0).log()


class Sum(Ensemble):
    def forward(self, x): return super().forward(x) + math.log(len(self.members))


class First(Ensemble):
    def forward(self, x): return self.members[0](x).log_softmax(1)


@pytest.mark.parametrize("mutant", [MeanLogits, MeanLogProbabilities, Naive, Sum, First])
def test_a_wrong_ensemble_is_seen(mutant):
    assert not agrees(mutant)


def test_combinations_order_and_copies():
    members, (x, _) = {s: net(i).eval() for i, s in enumerate("abc")}, images(5)
    made = ensembles(members)
    assert list(made) == ["a + b", "a + c", "b + c", "a + b + c"] and list(ensembles(members, 3)) == ["a + b + c"]
    torch.testing.assert_close(made["a + b"](x), Ensemble(members["b"], members["a"])(x))
    torch.testing.assert_close(Ensemble(members["a"], members["a"])(x), members["a"](x).log_softmax(1))
    with pytest.raises(ValueError, match="at least one"): Ensemble()


# transfer


def state(models): return [(m.training, {k: v.clone() for k, v in m.state_dict().items()}) for m in models]


def written(classifiers, x, y, eps, alpha, steps, starts):
    "The matrix, image by image."
    out = {}
    for m in classifiers.values(): m.eval()
    for a, source in classifiers.items():
        for b in classifiers: out[a, b] = []
        for i in range(len(x)):
            moved = (x[i : i + 1] + starts[i : i + 1]).clamp(0, 1)
            for _ in range(steps):
                leaf = moved.clone().requires_grad_()
                (g,) = torch.autograd.grad(F.cross_entropy(source(leaf), y[i : i + 1]), leaf)
                moved = torch.maximum(torch.minimum(moved + alpha * g.sign(), x[i : i + 1] + eps), x[i : i + 1] - eps).clamp(0, 1)
            for b, judge in classifiers.items():
                right = [judge(t).argmax(1).item() == y[i].item() for t in (x[i : i + 1], moved)]
                out[a, b].append(all(right))
    return {pair: torch.tensor(found) for pair, found in out.items()}


def holds():
    "The matrix against `written`, its diagonal against robust_mask, and everything left as it was."
    classifiers, (x, y) = {"a": fitted(0), "b": fitted(1, 4)}, images()
    classifiers |= ensembles(classifiers)
    before = state(classifiers.values())
    ok, starts = True, {eps: module.random_starts(x, torch.arange(len(x)), Linf(eps), 3) for eps in (0.04, 0.5)}
    for eps in starts:
        ours = module.transfer(classifiers, x, y, Linf(eps), steps=2, seed=3, batch_size=16)
        for name, model in classifiers.items(): ok &= torch.equal(ours[name, name], robust_mask(model, x, y, Linf(eps), steps=2, seed=3))
        after = state(classifiers.values())
        ok &= all(t == u and all(torch.equal(s[k], r[k]) for k in s) for (t, s), (u, r) in zip(before, after, strict=True))
        theirs = written(copy.deepcopy(classifiers), x, y, eps, 2.5 * eps / 2, 2, starts[eps])
        ok &= all(torch.equal(ours[pair], theirs[pair]) for pair in theirs) and len(ours) == 9
    return ok


def test_the_matrix_is_the_written_one_and_its_diagonal_the_white_box():
    assert holds()


@pytest.mark.parametrize("what", ["swapped", "clean forgotten", "weaker", "labels"])
def test_a_wrong_matrix_is_seen(monkeypatch, what):
    real, made = module.transfer, module.attacked
    wrong = {
        "swapped": lambda c, *a, **k: {(b, s): m for (s, b), m in real(c, *a, **k).items()},
        "clean forgotten": lambda c, x, y, t, **k: {(a, b): clean_mask(c[b], made(c[a], x, y, t, **k), y) for a in c for b in c},
    }
    if what in wrong: monkeypatch.setattr(module, "transfer", wrong[what])
    if what == "weaker": monkeypatch.setattr(module, "attacked", lambda m, x, y, t, **k: made(m, x, y, Linf(t.eps / 2), **k))
    if what == "labels": monkeypatch.setattr(module, "attacked", lambda m, x, y, t, **k: made(m, x, (y + 1) % 4, t, **k))
    assert not holds()


def test_knowing_the_target_is_worth_something():
    "No row is below the diagonal of its column by more than sampling allows; the attack on an ensemble beats its members' attacks."
    torch.manual_seed(0)
    classifiers, (x, y) = {s: fitted(i) for i, s in enumerate("abc")}, images()
    made = ensembles(classifiers)
    matrix = {p: Accuracy.of(m) for p, m in transfer(classifiers | made, x, y, Linf(0.08), steps=10).items()}
    for a, b in matrix: assert matrix[a, b].high >= matrix[b, b].value
    for name in made:
        for member in name.split(" + "): assert matrix[member, name].high >= matrix[name, name].value
    assert sum(matrix[m, n].correct - matrix[n, n].correct for n in made for m in n.split(" + ")) > 0


@examples
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([Linf, L2]), st.integers(0, 3))
def test_attacked_images_stay_in_the_ball(seed, eps, ball, steps):
    model, (x, y) = net(seed), images(6, seed)
    moved = attacked(model, x, y, ball(eps), steps=steps, seed=seed)
    assert moved.min() >= 0 and moved.max() <= 1 and model.training
    delta = (moved - x).flatten(1)
    assert (delta.abs().amax(1) if ball is Linf else delta.norm(dim=1)).max() <= eps + 1e-9
    assert torch.equal(moved, attacked(model, x, y, ball(eps), steps=steps, seed=seed, batch_size=2)) or steps
    torch.testing.assert_close(moved[3:], attacked(model, x[3:], y[3:], ball(eps), steps=steps, seed=seed, index=torch.arange(3, 6)))


def test_a_stochastic_member_gives_the_same_numbers_twice():
    model, (x, y) = Noisy(net().float(), 0.05), images(6)
    once, twice = (attacked(model, x.float(), y, Linf(0.1), steps=2, seed=1, batch_size=b) for b in (6, 6))
    assert torch.equal(once, twice)


# diversity


def slow(gradients, ridge, guard):
    "D by cofactors, image by image."
    def det(a):
        if len(a) == 1: return a[0][0]
        return sum((-1) ** j * a[0][j] * det([row[:j] + row[j + 1 :] for row in a[1:]]) for j in range(len(a)))

    out = []
    for i in range(len(gradients[0])):
        g = [t[i].flatten() / (t[i].flatten().norm() + guard) for t in gradients]
        out.append(det([[a @ b + (ridge if j == k else 0) for k, b in enumerate(g)] for j, a in enumerate(g)]).log())
    return torch.stack(out)


def right(m=3):
    torch.manual_seed(m)
    gradients = [torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(m)]
    ours, theirs = diverse.diversity(gradients), slow(gradients, 1e-5, 1e-10)
    by_ours, by_theirs = (torch.autograd.grad(v.mean(), gradients) for v in (ours, theirs))
    close = (torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(by_ours, by_theirs, strict=True))
    return torch.allclose(ours, theirs, rtol=1e-9) and all(close)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_diversity_is_the_written_determinant(m): assert right(m)


@pytest.mark.parametrize("mutant", [
    lambda g: -diversity(g), lambda g: diversity(g, ridge=1e-4), lambda g: diversity(g) / 2, lambda g: diversity([t.abs() for t in g]),
    lambda g: diversity(g[:2]) + 0 * diversity(g),
    lambda g: torch.logdet(torch.stack([t.flatten(1) for t in g], 1) @ torch.stack([t.flatten(1) for t in g], 2)),
])
def test_a_wrong_diversity_is_seen(monkeypatch, mutant):
    monkeypatch.setattr(diverse, "diversity", mutant)
    assert not right()


@examples
@given(st.integers(0, 2**31), st.integers(2, 4), st.floats(-3, 3), st.booleans())
def test_bounds_scale_and_order(seed, m, log_scale, flip):
    torch.manual_seed(seed)
    g = [torch.randn(3, 8, dtype=torch.float64) for _ in range(m)]
    d = diversity(g)
    assert (d <= m * math.log1p(1e-5) + 1e-12).all() and (d > m * math.log(1e-5)).all()
    other = [10**log_scale * g[-1] * (-1) ** flip, *g[:-1]]
    torch.testing.assert_close(diversity(other), d, rtol=1e-6, atol=1e-6)
    assert (diversity([*g, g[0]]) < d).all()  # a task that says nothing new
    torch.testing.assert_close(directions(g).norm(dim=2), torch.ones(3, m, dtype=torch.float64))


def test_a_dead_gradient_is_finite():
    g = [torch.zeros(2, 5), torch.randn(2, 5), torch.randn(2, 5)]
    leaves = [t.requires_grad_() for t in g]
    value = diversity(leaves)
    assert value.isfinite().all() and all(t.isfinite().all() for t in torch.autograd.grad(value.sum(), leaves))


def test_double_backward_in_weights():
    "Both signs through a network: descent on -D pulls the input gradients apart, on +D together."
    def run(sign):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Flatten(), nn.Linear(27, 24), nn.Softplus()).double()
        heads = nn.ModuleList([nn.Linear(24, 4).double() for _ in range(3)])
        x, ys = torch.rand(8, 3, 3, 3, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (3, 8))
        optimizer = torch.optim.Adam([*body.parameters(), *heads.parameters()], 0.01)
        values = []
        for _ in range(30):
            h = body(x)
            losses = [F.cross_entropy(f(h), y, reduction="none") for f, y in zip(heads, ys, strict=True)]
            value = diversity(input_gradients(losses, x)).mean()
            optimizer.zero_grad()
            (sign * value).backward()
            optimizer.step()
            values.append(value.item())
        return values

    apart, together = run(-1), run(+1)
    assert apart[-1] > -0.05 > -0.3 > apart[0] and together[-1] < together[0] - 0.5


def test_bad_input():
    with pytest.raises(ValueError, match="one shape"): diversity([torch.rand(2, 3), torch.rand(2, 4)])
    with pytest.raises(ValueError, match="ridge"): diversity([torch.rand(2, 3)] * 2, ridge=0.0)
    with pytest.raises(ValueError, match="two tasks"): diversity([torch.rand(2, 3)])
    with pytest.raises(ValueError, match="require a gradient"): input_gradients([torch.zeros(2)], torch.rand(2, 3))
