"CaCo: its step written out again with loops, symmetries of the bank, small views in the loop, and mutants that must be rejected."

import itertools
import math

import pytest
import torch
from common import Net, Watch, rows, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.augment import RECIPES
from advssl.config import Config
from advssl.encoders import cosine_momentum
from advssl.method import Views, get_method, play
from advssl.methods.caco import CaCo
from advssl.pretrain import Run

examples = settings(max_examples=25, deadline=None)
N, K, D = 6, 11, 5
SIGNS = [(1, -1), (-1, -1), (0, -1), (1, 0), (1, 1), (-1, 1)]


def make(cls=CaCo, seed=0, **options):
    "A method in double precision whose slots differ in length and already move, in the middle of its run, and a batch."
    torch.manual_seed(seed)
    how = {"bank_size": K, "embedding_dim": D, "hidden_dim": 16, "temperature": 0.1, "momentum": 0.8}
    how |= {"bank_temperature": 0.07, "bank_lr": 0.5, "bank_warmup": 0.5}
    method = cls(Net(), **how | options).double()
    method.bank.W.mul_(0.5 + torch.rand(K, 1))
    method.bank.velocity.normal_(std=0.1)
    method.progress = 0.2
    shape = lambda name: (N, 1, 4, 4) if name in method.crops else (N, 1, 6, 6)
    return method, Views(**{name: torch.rand(shape(name)).double() for name in method.views})


def written_step(method, views, minus, plus, crops):
    "Objective, network gradients and the bank's pull by loops over queries and slots."
    embed = lambda x: rows(method.projector(method.encoder(x)))
    with torch.no_grad(): keys = {v: rows(method.slow.module(getattr(views, v))) for v in ("strong1", "strong2")}
    slots = [w / w.norm() for w in method.bank.W]
    positive = {v: [max(range(K), key=lambda k: float(slots[k] @ key)) for key in keys[v]] for v in keys}
    jobs = [("strong1", "strong2", 1.0), ("strong2", "strong1", 1.0)]
    small = [(f"crop{m + 1}", b, 0.5 / crops) for m in range(crops) for b in ("strong1", "strong2")]
    if crops: jobs = [(a, b, 0.5) for a, b, _ in jobs] + small
    queries = {a: embed(getattr(views, a)) for a in dict.fromkeys(a for a, _, _ in jobs)}
    objective, pull, hits = 0.0, torch.zeros(K, D).double(), [0] * K
    for a, b, weight in jobs:
        for q, y in zip(queries[a], positive[b], strict=True):
            e = [torch.exp(q @ s / 0.1) for s in slots]
            objective = objective - weight / N * (e[y] / sum(e)).log()
            e = [torch.exp(q.detach() @ s / 0.07) for s in slots]
            hits[y] += 1
            for k in range(K):
                p = e[k] / sum(e)
                pull[k] += weight / N / 0.07 * (plus * (p - 1) if k == y else minus * p) * q.detach()
    parameters = [*method.encoder.parameters(), *method.projector.parameters()]
    return objective, torch.autograd.grad(objective, parameters), pull, hits


def agrees(cls=CaCo, crops=0, minus=1, plus=-1):
    "Two steps of a method against loops: objective, network, bank, hits and average."
    how = {"crops": crops, "negative_sign": minus, "positive_sign": plus}
    (ours, views), (theirs, _) = make(cls, **how), make(**how)
    optimizers = {"network": torch.optim.SGD(ours.network.parameters(), 0.1)}
    same = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    for progress in (0.2, 0.7):
        ours.progress = progress
        objective, grads, pull, hits = written_step(theirs, views, minus, plus, crops)
        fast = [*theirs.encoder.parameters(), *theirs.projector.parameters()]
        eta, m = 0.5 * min(1, progress / 0.5), 1 - 0.2 * 0.5 * (1 + math.cos(math.pi * progress))
        with torch.no_grad():
            for p, g in zip(fast, grads, strict=True): p -= 0.1 * g
            for s, p in zip(theirs.slow.parameters(), fast, strict=True): s.copy_(m * s + (1 - m) * p)
            for k, w in enumerate(theirs.bank.W.clone()):
                d = w / w.norm()
                theirs.bank.velocity[k] = 0.9 * theirs.bank.velocity[k] - (pull[k] - (pull[k] @ d) * d) / w.norm()
                theirs.bank.W[k] = w - eta * theirs.bank.velocity[k]
            theirs.bank.hits += torch.tensor(hits)
        value = play(ours, views, optimizers)
        state = theirs.state_dict()
        compared = {k: v for k, v in ours.state_dict().items() if "running" not in k and "tracked" not in k}
        if not same(value[0], objective.detach()) or not all(same(v.double(), state[k].double()) for k, v in compared.items()): return False
        if any(p.grad is not None for p in ours.slow.parameters()) or len(value) != 1: return False
    return True


@pytest.mark.parametrize("crops", [0, 1, 3])
def test_two_steps_are_the_written_ones(crops):
    assert agrees(crops=crops)


@pytest.mark.parametrize("minus, plus", SIGNS)
def test_two_steps_for_all_signs(minus, plus):
    assert agrees(minus=minus, plus=plus)


# mutants


class OwnPositive(CaCo):
    def contrast(self, q, *slots): return super().contrast(q, self.bank.nearest(q.detach()))


class PositiveFromTheSameView(CaCo):
    def turns(self, views):
        nearest, keys = self.bank.nearest, [nn.functional.normalize(self.slow(x), dim=1) for x in (views.strong2, views.strong1)]
        self.bank.nearest = lambda _: nearest(keys.pop(0))
        try: yield from super().turns(views)
        finally: del self.bank.nearest


class KeysOfTheNetwork(CaCo):
    def turns(self, views):
        slow, self.slow.module = self.slow.module, nn.Sequential(self.encoder, self.projector)
        game = super().turns(views)
        first = next(game)
        self.slow.module = slow
        yield first
        yield from game


class MeanOfTheViews(CaCo):
    def contrast(self, q, *slots):
        loss, pull = super().contrast(q, *slots)
        return loss / 2, pull


class PullsAveraged(CaCo):
    def contrast(self, q, *slots):
        loss, pull = super().contrast(q, *slots)
        return loss, pull / 2


class OnePlayersTemperature(CaCo):
    def __init__(self, *args, bank_temperature=0.07, **options): super().__init__(*args, bank_temperature=0.1, **options)


class FlippedNegatives(CaCo):
    def __init__(self, *args, negative_sign=1, **options): super().__init__(*args, negative_sign=-negative_sign, **options)


class FlippedPositives(CaCo):
    def __init__(self, *args, positive_sign=-1, **options): super().__init__(*args, positive_sign=-positive_sign, **options)


class NoPositives(CaCo):
    def contrast(self, q, *slots):
        loss, _ = super().contrast(q, *slots)
        hits = self.bank.hits.clone()
        pull = self.bank.pull(q.detach())
        self.bank.hits.copy_(hits)
        return loss, pull


class OneViewMovesTheBank(CaCo):
    def turns(self, views):
        move = self.bank.move
        self.bank.move = lambda *pulls, weights: move(pulls[0], weights=weights[:1])
        try: yield from super().turns(views)
        finally: del self.bank.move


class BankMovesAfterTheNetwork(CaCo):
    "With the queries of after the network's step."

    def turns(self, views):
        move = self.bank.move
        def late(*pulls, weights):
            fresh = [nn.functional.normalize(self.projector(self.encoder(x)), dim=1).detach() for x in (views.strong1, views.strong2)]
            labels = [self.bank.nearest(nn.functional.normalize(self.slow(x), dim=1)) for x in (views.strong2, views.strong1)]
            hits = self.bank.hits.clone()
            move(*(self.bank.pull(q, positives=y) for q, y in zip(fresh, labels, strict=True)), weights=weights)
            self.bank.hits.copy_(hits)
        self.bank.move = late
        try: yield from super().turns(views)
        finally: del self.bank.move


class NoWarmUp(CaCo):
    def __init__(self, *args, bank_warmup=0.0, **options): super().__init__(*args, bank_warmup=0.0, **options)


class ConstantMomentum(CaCo):
    def turns(self, views):
        update = self.slow.update
        self.slow.update = lambda source, momentum: update(source)
        try: yield from super().turns(views)
        finally: del self.slow.update


class AverageBeforeTheStep(CaCo):
    def turns(self, views):
        update = self.slow.update
        self.slow.update = lambda *_: None
        game = super().turns(views)
        first = next(game)
        update(nn.Sequential(self.encoder, self.projector), cosine_momentum(0.8, self.progress))
        yield first
        yield from game
        del self.slow.update


class GradientOfTheDirections(CaCo):
    "The radial part of the pull is kept."

    def contrast(self, q, *slots):
        loss, pull = super().contrast(q, *slots)
        return loss, pull + 0.1 * self.bank.directions


BANK = [
    OwnPositive, PositiveFromTheSameView, KeysOfTheNetwork, MeanOfTheViews, PullsAveraged, OnePlayersTemperature, FlippedNegatives,
    FlippedPositives, NoPositives, OneViewMovesTheBank, BankMovesAfterTheNetwork, NoWarmUp, ConstantMomentum, AverageBeforeTheStep,
]


@pytest.mark.parametrize("mutant", BANK)
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


def test_a_radial_pull_is_no_pull():
    "Not a mutant at all: what is added along the slots is projected away."
    assert agrees(GradientOfTheDirections)


class SmallViewsSummed(CaCo):
    def contrast(self, q, *slots):
        loss, pull = super().contrast(q, *slots)
        return loss * len(slots), pull * len(slots)


class OneKeyForSmallViews(CaCo):
    def contrast(self, q, *slots): return super().contrast(q, slots[0])


class FullViewsSummed(CaCo):
    def contrast(self, q, *slots):
        loss, pull = super().contrast(q, *slots)
        scale = 2 if len(slots) == 1 else 1
        return loss * scale, pull * scale


class SmallViewsLeaveTheBankAlone(CaCo):
    def contrast(self, q, *slots):
        loss, pull = super().contrast(q, *slots)
        return loss, pull * (len(slots) == 1)


@pytest.mark.parametrize("mutant", [SmallViewsSummed, OneKeyForSmallViews, FullViewsSummed, SmallViewsLeaveTheBankAlone])
def test_mutants_of_small_views_are_rejected(mutant):
    assert not agrees(mutant, crops=3)


# properties


@examples
@given(st.integers(0, 2**31), st.sampled_from(SIGNS), st.floats(0.02, 1), st.floats(0.02, 1))
def test_a_step_of_the_bank_has_the_signs_of_its_roles(seed, signs, tau, bank_tau):
    "In a small step of the bank alone a query and its positive move by -positive_sign, a query and any other slot by negative_sign."
    method, _ = make(seed=seed, negative_sign=signs[0], positive_sign=signs[1], temperature=tau, bank_temperature=bank_tau)
    method.bank.velocity.zero_()
    q = torch.nn.functional.normalize(torch.randn(1, D, dtype=torch.float64), dim=1)
    y = torch.randint(K, (1,))
    before, method.bank.lr = q @ method.bank.directions.T, 1e-6
    loss, pull = method.contrast(q, y)
    method.bank.move(pull)
    change = (q @ method.bank.directions.T - before)[0]
    role = torch.full((K,), float(signs[0])).double()
    role[y] = -signs[1]
    moved = change.abs() > 1e-13  # a probability may be too small to see
    assert (change[moved].sign() == role[moved]).all() and not change[role == 0].any()


@examples
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from(SIGNS))
def test_the_order_of_the_slots_does_not_matter(seed, other, signs):
    (one, views), (two, _) = (make(seed=seed, negative_sign=signs[0], positive_sign=signs[1]) for _ in range(2))
    order = torch.randperm(K, generator=seeded(other))
    for buffer in (two.bank.W, two.bank.velocity): buffer.copy_(buffer[order].clone())
    values = [play(m, views, {"network": torch.optim.SGD(m.network.parameters(), 0.1)}) for m in (one, two)]
    assert torch.allclose(*values, rtol=1e-10)
    assert torch.allclose(one.bank.W[order], two.bank.W, atol=1e-10) and torch.equal(one.bank.hits[order], two.bank.hits)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True))


@examples
@given(st.integers(0, 2**31), st.floats(0.1, 10))
def test_the_length_of_a_slot_matters_to_its_step_alone(seed, factor):
    (one, views), (two, _) = make(seed=seed), make(seed=seed)
    two.bank.W.mul_(factor)
    assert torch.allclose(next(one.turns(views))[0], next(two.turns(views))[0], rtol=1e-10)


@pytest.mark.parametrize("kwargs", [{"bank_lr": 0.0}, {"negative_sign": 0, "positive_sign": 0}])
def test_a_frozen_bank_is_frozen_bit_for_bit(kwargs):
    method, views = make(**kwargs)
    method.bank.velocity.zero_()
    W, start = method.bank.W.clone(), [p.clone() for p in method.encoder.parameters()]
    for _ in range(3): play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
    assert torch.equal(method.bank.W, W) and not any(torch.equal(a, b) for a, b in zip(start, method.encoder.parameters(), strict=True))


def test_the_signs_do_not_touch_the_network():
    "The network's objective and gradients are the same whoever the bank is."
    seen = []
    for minus, plus in SIGNS:
        method, views = make(negative_sign=minus, positive_sign=plus)
        objective, player = next(method.turns(views))
        seen.append([objective.detach(), *torch.autograd.grad(objective, player.parameters())])
    for other in seen[1:]: assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_the_same_seed_gives_the_same_bits():
    runs = []
    for _ in range(2):
        method, views = make(crops=2)
        play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
        runs.append(method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


# start, precision, log


@pytest.mark.parametrize("name", ["caco", "adco"])
def test_a_bank_bigger_than_the_data_is_full_of_keys(name):
    "32 images and 100 slots: no slot keeps its random start, all are unit, the same run gives the same bank."
    banks = []
    for _ in range(2):
        torch.manual_seed(0)
        x, method = torch.rand(32, 1, 6, 6), get_method(name)(Net(), bank_size=100, hidden_dim=16, embedding_dim=8)
        start = method.bank.W.clone()

        generator = seeded(1)
        again = (part + 0.1 * torch.rand(part.shape, generator=generator) for part in itertools.cycle(x.split(16)))
        method.prepare((Views(strong2=part) for part in again), x)
        assert (method.bank.W != start).any(1).all() and not method.bank.velocity.any() and not method.bank.hits.any()
        torch.testing.assert_close(method.bank.W.norm(dim=1), torch.ones(100))
        assert method.bank.W.unique(dim=0).shape == method.bank.W.shape  # further crops, not copies
        banks.append(method.bank.W)
    assert torch.equal(*banks)


def test_autocast_trains_every_weight_and_moves_the_bank_in_full_precision():
    torch.manual_seed(0)
    method = CaCo(Net(), bank_size=K, embedding_dim=D, hidden_dim=16, bank_warmup=0.0)
    views = Views(**{name: torch.rand(N, 1, 6, 6) for name in method.views})
    with torch.autocast("cpu", torch.bfloat16): objective, player = next(method.turns(views))
    objective.backward()
    assert objective.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in player.parameters())
    q, y = torch.nn.functional.normalize(torch.randn(N, D), dim=1), torch.arange(N)
    with torch.autocast("cpu", torch.bfloat16): pull = method.contrast(q, y)[1]
    assert pull.dtype == torch.float32 and torch.equal(pull, method.bank.pull(q, positives=y))


@pytest.mark.parametrize("crops", [0, 2])
def test_a_step_waits_for_nothing(crops):
    "The host reads no number in a whole step: of loss, bank, average and log."
    method, views = make(crops=crops)
    optimizers = {"network": torch.optim.SGD(method.network.parameters(), 0.1)}
    with Watch(1) as watch: play(method, views, optimizers)
    assert watch.made and not watch.synced


def test_the_log_says_what_the_bank_says():
    method, views = make()
    logged = next(method.turns(views)) and method.logs
    assert {"usage", "dead", "norm", "perplexity", "hardness", "positive"} == set(logged)
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 and not v.requires_grad for v in logged.values())


@pytest.mark.parametrize("name, crops", [("caco", 0), ("caco", 2), ("hybrid", 0)])
def test_the_log_counts_the_choices_of_its_own_step(name, crops):
    method, views = make(get_method(name), **{"crops": crops} if crops else {})
    next(method.turns(views))
    share = method.bank.hits / method.bank.hits.sum()
    assert method.bank.hits.sum() == N * (2 + 2 * crops) and method.logs["dead"] == (share == 0).sum() < K
    assert torch.isclose(method.logs["usage"].float(), torch.special.entr(share).sum().exp().float())


# small views in the loop


def config(name, crops, **how):
    settings = {"bank_size": 32, "hidden_dim": 16, "embedding_dim": 8, "crops": crops}
    return Config(name, images=32, batch_size=16, epochs=1, warmup_epochs=0, threads=1, settings=settings, **how)


@pytest.mark.parametrize("name, crops, sides", [("caco", 2, [28, 28, 12, 12]), ("adco", 4, [24, 20, 16, 12, 28])])
def test_the_loop_draws_small_views(name, crops, sides, tmp_path):
    run, seen = Run(config(name, crops), tmp_path), []
    run.method.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]))
    run.train()
    assert seen == sides * 2 and run.step == 2
    assert set(get_method(name).views) == {"strong1", "strong2"}  # an object's views are its own


def test_a_vision_transformer_refuses_small_views(tmp_path):
    for name in ("caco", "adco"):
        run = Run(config(name, 1, encoder="vit_demo"), tmp_path / name)
        with pytest.raises(ValueError, match="28 pixels only, got"): run.train()


def test_recipes_of_the_views():
    method = CaCo(Net(), crops=6)
    assert list(method.views) == ["strong1", "strong2", *(f"crop{i}" for i in range(1, 7))]
    assert {method.views[f"crop{i}"] for i in range(1, 7)} == {method.views["crop1"]}
    assert (method.views["crop1"].crop, method.views["strong1"].crop, method.views["crop1"].scale) == ((0.05, 0.14), (0.14, 1.0), 3 / 7)
    assert CaCo(Net()).views == CaCo.views and {r.crop for r in CaCo.views.values()} == {RECIPES["moco-v2"].crop}


@pytest.mark.parametrize("kwargs, message", [
    ({"crops": -1}, "crops must be >= 0"), ({"bank_warmup": 10.0}, "share of the run"), ({"positive_sign": 2}, "signs must be"),
    ({"bank_temperature": 0.0}, "temperature must be > 0"), ({"bank_lr": -1.0}, "give a sign of -1"),
])
def test_settings_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message): CaCo(Net(), **kwargs)
