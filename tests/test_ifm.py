"IFM: its step written out a second time with vectors that move, limits, and mutants that the same checks must reject."

import pytest
import torch
from common import N, embed
from common import make_moco as make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.contrast import info_nce
from advssl.method import count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.ifm import IFM
from advssl.methods.moco import MoCo

examples = settings(max_examples=25, deadline=None)
HOW = {"margin": 0.15, "alpha": 0.4, "momentum": 0.9}


def written_loss(queries, keys, queue, owners, index, margin, alpha, tau=0.2):
    "Both losses with loops; key and negatives are vectors that move along the query, a constant to them. alpha None: only the second."
    losses = []
    for size in (0.0, margin):
        total = 0.0
        for q, k, i in zip(queries, keys, index, strict=True):
            step = size * q.detach()
            others = [n + step for n, o in zip(queue, owners, strict=True) if o != i]
            total = total - (torch.exp(q @ (k - step) / tau) / sum(torch.exp(q @ c / tau) for c in [k - step, *others])).log()
        losses.append(total / len(queries))
    return losses[1] if alpha is None else (losses[0] + alpha * losses[1]) / (1 + alpha)


def agrees(cls=IFM, sign=1, ifm_only=False, symmetric=False):
    "Whether two steps of a method have the objective and leave the weights, the slow network and the queue of the written ones."
    ours, views = make(cls, sign=sign, ifm_only=ifm_only, symmetric=symmetric, **HOW)
    theirs, _ = make(symmetric=symmetric)
    optimizers, ok = {"network": torch.optim.SGD(ours.network.parameters(), 0.1)}, True
    for _ in range(2):  # in the second step the queue holds the queries' own keys
        pairs = [(views.strong1, views.strong2)] + ([(views.strong2, views.strong1)] if symmetric else [])
        queue, owners, slow = theirs.queue.rows.clone(), theirs.owners.rows[:, 0].clone(), nn.Sequential(*theirs.slow.module).train()
        losses, made = [], []
        for x, partner in pairs:
            with torch.no_grad(): keys = nn.functional.normalize(slow(partner))
            losses.append(written_loss(embed(theirs, x), keys, queue, owners, views.index, sign * 0.15, None if ifm_only else 0.4))
            made.append(keys)
        objective = sum(losses) / len(losses)
        fast = [p for m in (theirs.encoder, theirs.projector) for p in m.parameters()]
        grads = torch.autograd.grad(objective, fast)
        with torch.no_grad():
            for p, g in zip(fast, grads, strict=True): p -= 0.1 * g
            for s, p in zip(theirs.slow.parameters(), fast, strict=True): s.copy_(0.9 * s + 0.1 * p)
        for keys in made: theirs.push(keys, views.index)
        value = play(ours, views, optimizers)
        same = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-10)
        own = [p for m in (ours.encoder, ours.projector) for p in m.parameters()]
        ok &= same(value[0], objective.detach()) and all(same(a, b) for a, b in zip(own, fast, strict=True))
        ok &= all(same(a, b) for a, b in zip(ours.slow.parameters(), theirs.slow.parameters(), strict=True))
        ok &= same(ours.queue.rows, theirs.queue.rows) and torch.equal(ours.owners.rows, theirs.owners.rows)
    return ok


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ifm_only", [False, True])
def test_two_steps_are_the_written_ones(sign, ifm_only):
    assert agrees(sign=sign, ifm_only=ifm_only)


def test_symmetric_steps_are_the_written_ones():
    assert agrees(symmetric=True)


class FlippedSign(IFM):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class KeyAlone(IFM):
    def loss(self, q, k, *blocks):
        return info_nce(q, k, *blocks, temperature=self.temperature, margin=(self.margin, 0.0), alpha=self.alpha)


class OppositeMoves(IFM):
    "Key and negatives both towards the query: nothing happens."
    def loss(self, q, k, *blocks):
        return info_nce(q, k, *blocks, temperature=self.temperature, margin=(-self.margin, self.margin), alpha=self.alpha)


class MarginInLogits(IFM):
    def loss(self, q, k, *blocks):
        e = self.margin * self.temperature
        return info_nce(q, k, *blocks, temperature=self.temperature, margin=(e, e), alpha=self.alpha)


class NotDivided(IFM):
    def loss(self, q, k, *blocks): return super().loss(q, k, *blocks) * (1 + self.alpha)


class PlainOnly(IFM):
    def loss(self, q, k, *blocks): return MoCo.loss(self, q, k, *blocks)


class MovedOnly(IFM):
    def loss(self, q, k, *blocks): return info_nce(q, k, *blocks, temperature=self.temperature, margin=(self.margin, self.margin))


class AlphaSwapped(IFM):
    def __init__(self, *args, alpha=1.0, **options): super().__init__(*args, alpha=1 / alpha, **options)


class BackOnTheSphere(IFM):
    "The moved vectors scaled to length 1 again."
    def loss(self, q, k, *blocks):
        (sim, others), e = blocks[0], self.margin
        turned = lambda s, e: (s + e) / (1 + 2 * e * s + e**2).sqrt()
        moved = info_nce(q, nn.functional.normalize(k - e * q.detach()), (turned(sim, e), others), temperature=self.temperature)
        return (MoCo.loss(self, q, k, *blocks) + self.alpha * moved) / (1 + self.alpha)


class OwnKeysBack(IFM):
    def loss(self, q, k, *blocks): return super().loss(q, k, blocks[0][0])


@pytest.mark.parametrize("mutant", [
    FlippedSign, KeyAlone, OppositeMoves, MarginInLogits, NotDivided, PlainOnly, MovedOnly, AlphaSwapped, BackOnTheSphere, OwnKeysBack,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# limits


@pytest.mark.parametrize("same", [{"margin": 0.0}, {"margin": 0.0, "ifm_only": True}, {"margin": 0.0, "sign": -1}, {"alpha": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_move_it_is_moco_to_the_bit(same, dtype):
    states = []
    for cls, options in ((IFM, same), (MoCo, {})):
        method, views = make(cls, shares=2, **options)
        method.to(dtype)
        for name in ("strong1", "strong2"): setattr(views, name, getattr(views, name).to(dtype))
        optimizers = {"network": torch.optim.SGD(method.network.parameters(), 0.1)}
        for _ in range(3): play(method, views, optimizers)
        states.append(method.state_dict())
    for key, value in states[1].items(): assert torch.equal(states[0][key], value), key


@examples
@given(st.integers(0, 2**31), st.floats(0.01, 0.5), st.floats(0.05, 1.0), st.sampled_from([0.0, 0.5, 3.0]))
def test_the_gradient_of_a_query_is_multiplied(seed, margin, tau, alpha):
    "Eqs. (6) to (8): one query, its gradient against that of MoCo; adversary above, cooperator below; and the ceiling of p+."
    torch.manual_seed(seed)
    q = nn.functional.normalize(torch.randn(1, 5, dtype=torch.float64))
    s = torch.rand(1, 1, dtype=torch.float64) * 2 - 1
    k, sim = s * q, (torch.rand(1, 7, dtype=torch.float64) * 2 - 1).requires_grad_()
    found = {}
    for sign in (0, 1, -1):
        method = make(IFM, filled=0, margin=abs(sign) * margin, sign=sign or 1, temperature=tau, alpha=alpha)[0]
        value = method.loss(q, k, (sim, None))
        found[sign] = value.item(), torch.autograd.grad(value, sim)[0]
    p = torch.tensor(-found[0][0], dtype=torch.float64).exp()
    for sign in (1, -1):
        m = torch.tensor(2 * sign * margin / tau, dtype=torch.float64)
        rho = m.exp() / (p + (1 - p) * m.exp())
        assert torch.allclose(found[sign][1], (1 + alpha * rho) / (1 + alpha) * found[0][1], rtol=1e-6, atol=1e-14)
        assert (found[sign][0] - found[0][0]) * sign >= -1e-12 and (rho - 1) * sign >= -1e-12
    assert p <= 1 / (1 + 7 * torch.exp(-(s - sim.mean()) / tau)) + 1e-12


def test_autocast_trains_every_weight():
    method, views = make(IFM)
    method.float()
    for name in ("strong1", "strong2"): setattr(views, name, getattr(views, name).float())
    with torch.autocast("cpu", dtype=torch.bfloat16): (value, player), = [next(method.turns(views))]
    value.backward()
    trained = [p for p in player.parameters()]
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert not any(p.requires_grad for p in method.slow.parameters())


def test_passes():
    method, views = make(IFM)
    with count_passes(method.encoder, method.slow.module) as passes:
        play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
    assert passes.units(N) == 4


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"margin": -0.1}, "sign chooses"), ({"alpha": -1.0}, "sign chooses"), ({"sign": 0}, "cooperator"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(IFM, **wrong)


def test_card():
    assert get_method("IFM") is methods()["ifm"] is IFM
    card = IFM.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("memory-free", "CL", "feature", "yes", 1, (1, 2))
    known, base = settings_of(IFM), settings_of(MoCo)
    assert not {"norm", "eps", "steps"} & known.keys()  # those names take the pixel threat model
    assert base.keys() - known.keys() == set() and all(known[name] == base[name] for name in base if name != "momentum")
