"HCL: its step written out a second time in linear space, limits, and mutants that the same checks must reject."

import pytest
import torch
from common import SHAPE, make_contrastive, seeded, turn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.contrast import contrast, hard_log_sum, log_sum, nt_xent, unit, view_pairs
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.hcl import HCL
from advssl.methods.simclr import SimCLR

examples = settings(max_examples=25, deadline=None)
HOW = {"beta": 1.3, "tau_plus": 0.5, "temperature": 0.05}  # at which some queries of the small batch are clamped


def make(cls=HCL, seed=0, **options): return make_contrastive(cls, seed, **options)


def written_loss(z1, z2, beta, tau_plus, temperature, detach):
    "With loops, as probabilities; and the share of clamped queries."
    tau = temperature
    u, total, clamped = [row / row.norm() for row in torch.cat([z1, z2])], 0.0, 0
    n = len(z1)
    for i, query in enumerate(u):
        pos = torch.exp(query @ u[(i + n) % (2 * n)] / tau)
        e = torch.stack([torch.exp(query @ u[j] / tau) for j in range(2 * n) if j % n != i % n])
        weights = e**beta / sum(e**beta)
        if detach: weights = weights.detach()
        estimate = (len(e) * sum(weights * e) - tau_plus * len(e) * pos) / (1 - tau_plus)
        floor = len(e) * torch.exp(torch.tensor(-1 / tau, dtype=e.dtype))
        clamped += bool(estimate < floor)
        total = total - torch.log(pos / (pos + torch.maximum(estimate, floor)))
    return total / (2 * n), clamped / (2 * n)


def agrees(cls=HCL, detach=False, seed=0, **how):
    "Objective, gradients, BatchNorm statistics and the logged share of a step, against the loops."
    how = HOW | how
    (ours, x1, x2), theirs = make(cls, seed, detach_weights=detach, **how), make(seed=seed)[0]
    z1, z2 = theirs.projector(theirs.encoder(torch.cat([x1, x2]))).chunk(2)
    objective, clamped = written_loss(z1, z2, **how, detach=detach)
    value, player = turn(ours, x1, x2)
    grads, wanted = (torch.autograd.grad(v, list(m.parameters())) for v, m in ((value, ours), (objective, theirs)))
    same = lambda a, b: torch.allclose(a.double(), b.double(), rtol=1e-8, atol=1e-10)
    return (
        player.sign == -1 and same(value, objective) and all(same(a, b) for a, b in zip(grads, wanted, strict=True))
        and abs(ours.logs["clamped"].item() - clamped) < 1e-6
        and all(same(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("how", [{}, {"beta": 0.0}, {"tau_plus": 0.0}, {"beta": -0.5}, {"beta": 4.0, "tau_plus": 0.05, "temperature": 0.5}])
def test_the_step_is_the_written_one(detach, how):
    assert agrees(detach=detach, **how)


def test_the_checks_meet_clamped_and_free_queries():
    "Otherwise a mutant of the clamp would be right by luck."
    method, x1, x2 = make(**HOW)
    turn(method, x1, x2)
    assert 0 < method.logs["clamped"] < 1


class Mutant(HCL):
    def loss(self, z1, z2):
        pos, neg = view_pairs(unit(torch.stack([z1, z2])))
        log_neg, clamped = self.negatives(pos, neg, **self.draw)
        self.log(clamped=clamped.float().mean())
        return contrast(pos, log_neg, self.temperature).mean()

    def negatives(self, pos, neg, **draw): return hard_log_sum(pos, neg, **draw)


class DetachFlipped(Mutant):
    def negatives(self, pos, neg, detach_weights, **draw): return hard_log_sum(pos, neg, detach_weights=not detach_weights, **draw)


class NotDebiased(Mutant):
    def negatives(self, pos, neg, tau_plus, **draw): return hard_log_sum(pos, neg, tau_plus=0.0, **draw)


class NotHard(Mutant):
    def negatives(self, pos, neg, beta, **draw): return hard_log_sum(pos, neg, beta=0.0, **draw)


class FlippedHardness(Mutant):
    def negatives(self, pos, neg, beta, **draw): return hard_log_sum(pos, neg, beta=-beta / 2, **draw)


class WeightsNotNormalised(Mutant):
    "The sum of e^((1 + beta) s / tau) as it is."
    def negatives(self, pos, neg, beta, temperature, **_):
        return log_sum(neg, temperature=temperature, power=1 + beta), torch.zeros(pos.shape[:-1])


class BetaOutsideTheExponent(Mutant):
    "The paper's pseudo-code: weights beta e^(s / tau) over their mean."
    def negatives(self, pos, neg, beta, temperature, tau_plus, **_):
        (sim, mask), n = neg, 2 * pos.shape[1] - 2
        e, e_pos = (sim / temperature).exp() * mask, (pos[..., 0] / temperature).exp()
        weights = beta * e / (e.sum(-1, keepdim=True) / n)
        estimate = ((weights * e).sum(-1) - tau_plus * n * e_pos) / (1 - tau_plus)
        floor = n * torch.exp(torch.tensor(-1 / temperature))
        return estimate.clamp(min=floor).log(), estimate < floor


class PositiveAmongTheNegatives(Mutant):
    def negatives(self, pos, neg, **draw): return hard_log_sum(pos, neg, pos, **draw)


class OneViewAsks(Mutant):
    def loss(self, z1, z2):
        pos, (sim, mask) = view_pairs(unit(torch.stack([z1, z2])))
        log_neg, clamped = hard_log_sum(pos[:1], (sim[:1], mask), **self.draw)
        self.log(clamped=clamped.float().mean())
        return contrast(pos[:1], log_neg, self.temperature).mean()


class NoClamp(Mutant):
    "Absolute value instead of a bound."
    def negatives(self, pos, neg, beta, temperature, tau_plus, **_):
        log_r, _ = hard_log_sum(pos, neg, beta=beta, temperature=temperature, tau_plus=0.0)
        n, e_pos = 2 * pos.shape[1] - 2, (pos[..., 0] / temperature).exp()
        estimate = (log_r.exp() - tau_plus * n * e_pos) / (1 - tau_plus)
        return estimate.abs().log(), estimate < n * torch.exp(torch.tensor(-1 / temperature))


class ShareNotDividedOut(Mutant):
    def negatives(self, pos, neg, tau_plus, **draw):
        log_neg, clamped = hard_log_sum(pos, neg, tau_plus=tau_plus, **draw)
        return torch.where(clamped, log_neg, log_neg + torch.log1p(torch.tensor(-tau_plus))), clamped


class TwoPasses(HCL):
    def turns(self, views):
        yield self.loss(self.embed(views.strong1), self.embed(views.strong2)), self.network


class NothingLogged(HCL):
    def log(self, **values): super().log(clamped=torch.zeros(()))


@pytest.mark.parametrize("mutant", [
    DetachFlipped, NotDebiased, NotHard, FlippedHardness, WeightsNotNormalised, BetaOutsideTheExponent, PositiveAmongTheNegatives,
    OneViewAsks, NoClamp, ShareNotDividedOut, TwoPasses, NothingLogged,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


def test_the_pattern_of_the_mutants_is_the_method(): assert agrees(Mutant)


# limits


@examples
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.booleans())
def test_without_the_player_it_is_simclr(seed, tau, detach):
    z = torch.randn(2, 6, 5, dtype=torch.float64, generator=seeded(seed)).requires_grad_()
    ours, base = make(beta=0.0, tau_plus=0.0, temperature=tau, detach_weights=detach)[0].loss(*z), nt_xent(z, tau)
    assert torch.allclose(ours, base, rtol=1e-12)
    a, b = (torch.autograd.grad(v, z)[0] for v in (ours, base))
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-13)


def test_without_the_player_a_step_is_simclr_s():
    weights = []
    for cls, how in ((HCL, {"beta": 0.0, "tau_plus": 0.0}), (SimCLR, {})):
        method, x1, x2 = make(cls, **how)
        play(method, Views(strong1=x1, strong2=x2), {"network": torch.optim.SGD(method.parameters(), 0.1)})
        weights.append(torch.cat([p.detach().flatten() for p in method.parameters()]))
    assert torch.allclose(*weights, rtol=1e-10, atol=1e-13)


@examples
@given(st.integers(0, 2**31), st.floats(-0.9, 5.0), st.floats(0.05, 1.0))
def test_both_gradients_and_who_is_attracted(seed, beta, tau):
    "Eqs. (5) to (7): the loss rises with hardness, both gradients are the written ones, and only differentiated weights attract."
    s = (2 * torch.rand(3, 9, dtype=torch.float64, generator=seeded(seed)) - 1).requires_grad_()
    x, pos = s.detach() / tau, torch.zeros(3, 1, dtype=torch.float64)
    p = lambda c: (c * x).softmax(1)
    value = lambda b, detach=False: hard_log_sum(pos, s, temperature=tau, beta=b, tau_plus=0.0, detach_weights=detach)[0]
    assert (value(beta + 0.1) >= value(beta) - 1e-12).all()
    for detach, wanted in ((False, (1 + beta) * p(1 + beta) - beta * p(beta)), (True, p(1 + beta))):
        (g,) = torch.autograd.grad(value(beta, detach).sum(), s)
        assert torch.allclose(tau * g, wanted, rtol=1e-6, atol=1e-12) and torch.allclose(tau * g.sum(1), torch.ones(3).double())
        assert not (detach and (g < -1e-12).any())


def test_order_of_the_samples_and_of_the_views_cannot_matter():
    method, z = make(**HOW)[0], torch.randn(2, 6, 5, dtype=torch.float64)
    assert torch.allclose(method.loss(*z), method.loss(*z.flip(1))) and torch.allclose(method.loss(*z), method.loss(*z.flip(0)))


def test_low_temperature_in_half_precision():
    z = torch.randn(2, 8, 16, dtype=torch.bfloat16).requires_grad_()
    for tau in (0.5, 0.05, 0.01):
        value = make(temperature=tau)[0].loss(*z)
        assert value.dtype == torch.float32 and value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()


def test_autocast_trains_every_weight():
    method, x1, x2 = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16): value, _ = turn(method, x1, x2)
    value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_passes():
    method, x1, x2 = make()
    with count_passes(method.encoder) as passes:
        play(method, Views(strong1=x1, strong2=x2), {"network": torch.optim.SGD(method.parameters(), 0.1)})
    assert passes.units(SHAPE[0]) == 6


@pytest.mark.parametrize("n", [0, 1])
def test_a_batch_without_negatives_is_refused(n):
    method, z = make()[0], torch.randn(2, n, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"a batch of {n} has no negatives"): method.loss(*z)


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"beta": -1.0}, "beta must be > -1"), ({"beta": float("nan")}, "beta must be"),
    ({"tau_plus": 1.0}, "about 1 / classes"), ({"tau_plus": -0.1}, "in \\[0, 1\\)"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("HCL") is methods()["hcl"] is HCL
    card = HCL.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("", "CL", "feature", "yes", 1, (1, 2))
    assert card.adversary == "hard negative sampling"
    known = settings_of(HCL)
    assert (known["beta"], known["tau_plus"], known["temperature"], known["detach_weights"]) == (1.0, 0.1, 0.5, False)
    assert isinstance(make()[0].projector, nn.Sequential)
