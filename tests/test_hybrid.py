"The hybrid of an attacked query and a cooperating slot: limits, the contract of its attack, its step written out, and mutants."


import pytest
import torch
from common import ORDER, seeded, small_encoder, snapshot, start_zero, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.contrast import unit
from advssl.method import Views, play
from advssl.methods.caco import CaCo
from advssl.methods.hybrid import Hybrid


def make(cls=Hybrid, seed=0, **options):
    "A method on 12 pixels in double precision, in the middle of its run, and a batch."
    torch.manual_seed(seed)
    encoder = small_encoder()
    method = cls(encoder, bank_size=20, hidden_dim=16, embedding_dim=8, **options).double()
    method.generator, method.progress = seeded(seed), 0.5
    with torch.no_grad(): encoder(2 * torch.randn(32, 12).double() + 1)
    return method, Views(strong1=torch.rand(6, 3, 2, 2).double(), strong2=torch.rand(6, 3, 2, 2).double(), index=torch.arange(6))


def step(method, views):
    return play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})[0]


@pytest.mark.parametrize("signs", [(1, -1), (-1, -1), (1, 1), (0, 0)])
def test_without_a_ball_it_is_caco_to_the_bit(signs):
    how = {"negative_sign": signs[0], "positive_sign": signs[1]}
    (base, views), (still, _) = make(CaCo, **how), make(eps=0.0, **how)
    for progress in (0.01, 0.5):  # while the bank warms up, and after
        base.progress = still.progress = progress
        assert torch.equal(step(base, views), step(still, views))
    assert all(torch.equal(v, still.state_dict()[k]) for k, v in base.state_dict().items())


def agrees(cls=Hybrid, sign=1):
    "Attack and objective of one step against loops, from a zero start."
    ours, views = make(cls, eps=0.1, steps=3, sign=sign)
    start_zero(ours, step_size=0.04)
    net, _ = make(eps=0.1, steps=3, sign=sign)
    embed, d = nn.Sequential(net.encoder, net.projector), net.bank.directions.clone()
    slots = [[int((k @ d.T).argmax()) for k in unit(net.slow(x))] for x in (views.strong1, views.strong2)]

    def loss(q, chosen):
        return -sum(torch.log(torch.exp(a @ d[y] / 0.08) / torch.exp(d @ a / 0.08).sum()) for a, y in zip(q, chosen, strict=True)) / len(q)

    x = views.strong1
    embed.eval()
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(unit(embed(leaf)), slots[1]), leaf)
        x = (views.strong1 + (x + sign * 0.04 * g.sign() - views.strong1).clamp(-0.1, 0.1)).clamp(0, 1)
    embed.train()
    expected = loss(unit(embed(x)), slots[1]) + loss(unit(embed(views.strong2)), slots[0])
    before = snapshot(ours)
    found = ours.attack(views.strong1, torch.tensor(slots[1]))
    kept = all(torch.equal(v, before[k]) for k, v in ours.state_dict().items()) and all(p.grad is None for p in ours.parameters())
    return kept and torch.allclose(found, x, atol=1e-10) and torch.allclose(step(ours, views), expected.detach(), rtol=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_step_is_the_written_one(sign):
    assert agrees(sign=sign)


class FlippedSign(Hybrid):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class AttackedKeys(Hybrid):
    def turns(self, views):
        moved = self.attack(views.strong1, self.bank.nearest(unit(self.slow(views.strong2))))
        yield from CaCo.turns(self, Views(strong1=moved, strong2=views.strong2, index=views.index))


class OwnSlots(Hybrid):
    def attack(self, x, slots): return super().attack(x, self.bank.nearest(unit(self.slow(x))))


class NoAttack(Hybrid):
    def attack(self, x, slots): return x


class OtherTemperature(Hybrid):
    def inner(self, q, slots):
        self.temperature, kept = 1.0, self.temperature
        try: return super().inner(q, slots) ** 2
        finally: self.temperature = kept


@pytest.mark.parametrize("mutant", [FlippedSign, AttackedKeys, OwnSlots, NoAttack, OtherTemperature])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 0.3]), st.integers(0, 3), st.booleans())
def test_contract(seed, norm, eps, steps, training):
    method, views = make(seed=seed, norm=norm, eps=eps, steps=steps)
    method.train(training)
    slots = torch.arange(6)
    with untouched(method, *vars(views).values(), slots): found = method.attack(views.strong1, slots)
    assert ((found - views.strong1).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all() and found.min() >= 0 and found.max() <= 1
    assert not found.requires_grad and all(p.requires_grad for p in method.network.parameters())
    method.generator = seeded(seed)
    assert torch.equal(method.attack(views.strong1, slots), found)
