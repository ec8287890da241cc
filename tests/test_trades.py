"The two supervised adversarial losses: written out a second time with loops, and mutants that the same checks must reject."

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl import trades as module
from advssl.attack import Perturbation
from advssl.threat import make_threat
from advssl.trades import adversarial_cross_entropy, divergence, trades

examples = settings(max_examples=30, deadline=None)


def make(seed=0):
    "A classifier of 12 pixels with BatchNorm, in training mode, images and labels."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)).double()
    with torch.no_grad(): model(2 * torch.randn(32, 3, 2, 2, dtype=torch.float64) + 1)
    return model, torch.rand(6, 3, 2, 2, dtype=torch.float64), torch.randint(0, 4, (6,))


def written(model, x, y, eps, alpha, steps, start, beta, labelled):
    "Both losses, image by image; the clean answer is forwarded in every step."
    def kl(a, b): return sum(p * (p.log() - q.log()) for p, q in zip(a.softmax(0), b.softmax(0), strict=True))
    model.eval()
    x_adv = (x + start).clamp(0, 1)
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        logits, clean = model(leaf), model(x).detach()
        value = F.cross_entropy(logits, y, reduction="sum") if labelled else sum(map(kl, clean, logits))
        (g,) = torch.autograd.grad(value, leaf)
        x_adv = torch.maximum(torch.minimum(x_adv + alpha * g.sign(), x + eps), x - eps).clamp(0, 1)
    model.train()
    if labelled: return F.cross_entropy(model(x_adv), y)
    clean = model(x)
    return F.cross_entropy(clean, y) + beta * sum(map(kl, clean, model(x_adv))) / len(x)


def agrees(beta=3.0):
    "Values and gradients of both losses against `written`."
    ok = True
    for labelled in (True, False):
        model, x, y = make()
        start = 0.05 * (2 * torch.rand_like(x) - 1)
        player = Perturbation(make_threat("linf", 0.1), 3, 0.04, start)
        ours = module.adversarial_cross_entropy(model, x, y, player) if labelled else module.trades(model, x, y, player, beta)
        theirs = written(make()[0], x, y, 0.1, 0.04, 3, start, beta, labelled)
        ok &= torch.allclose(ours, theirs, rtol=1e-10)
        other = make()[0]
        by_ours = torch.autograd.grad(ours, list(model.parameters()))
        by_theirs = torch.autograd.grad(written(other, x, y, 0.1, 0.04, 3, start, beta, labelled), list(other.parameters()))
        ok &= all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(by_ours, by_theirs, strict=True))
    return ok


def test_both_losses_are_the_written_ones():
    assert agrees() and agrees(0.5)


def reversed_divergence(clean, attacked): return divergence(attacked, clean)
def constant_clean_side(clean, attacked): return divergence(clean.detach(), attacked)
def descending(clean, attacked): return -divergence(clean, attacked)
def mean_over_classes(clean, attacked): return divergence(clean, attacked) / 4


@pytest.mark.parametrize("mutant", [reversed_divergence, constant_clean_side, descending, mean_over_classes])
def test_mutants_are_rejected(monkeypatch, mutant):
    monkeypatch.setattr(module, "divergence", mutant)
    assert not agrees()


@examples
@given(st.integers(0, 2**31), st.sampled_from(["linf", "l2", "l1"]), st.booleans(), st.booleans())
def test_the_attack_leaves_no_trace(seed, norm, training, labelled):
    "Modes, flags, gradients; the statistics move only by the training passes, whatever the number of steps."
    states = []
    for steps in (0, 3):
        model, x, y = make(seed)
        model.train(training)
        player = Perturbation(make_threat(norm, 0.1), steps)
        generator = torch.Generator().manual_seed(seed)
        loss = (adversarial_cross_entropy if labelled else trades)(model, x, y, player, generator=generator)
        assert loss.isfinite() and model.training == training and all(p.requires_grad and p.grad is None for p in model.parameters())
        states.append(model[2].num_batches_tracked.item())
    assert states[0] == states[1] == 1 + training * (1 if labelled else 2)


def test_refusals():
    model, x, y = make()
    player = Perturbation(make_threat("linf", 0.1), 2)
    with pytest.raises(ValueError, match="labels must be whole numbers"): trades(model, x, y.float(), player)
    with pytest.raises(ValueError, match="labels must be whole numbers"): adversarial_cross_entropy(model, x, y[:3], player)
    with pytest.raises(ValueError, match="beta must be >= 0"): trades(model, x, y, player, beta=-1.0)
