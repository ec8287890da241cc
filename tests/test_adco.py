"AdCo: single, symmetric and multi-crop steps written out with loops, and mutants that the same checks must reject."

from dataclasses import replace

import pytest
import torch
from common import Net, rows

from advssl.augment import RECIPES
from advssl.method import Views, count_passes, play
from advssl.methods.adco import AdCo

N, K, D = 5, 9, 4
FORMS = [{}, {"symmetric": True}, {"crops": 1}, {"crops": 3}]


def make(cls=AdCo, seed=0, **options):
    "A method in double precision whose slots differ in length and already move, and a batch."
    torch.manual_seed(seed)
    how = {"bank_size": K, "embedding_dim": D, "hidden_dim": 16, "temperature": 0.1, "momentum": 0.8}
    how |= {"bank_temperature": 0.05, "bank_lr": 0.5, "bank_decay": 0.01}
    method = cls(Net(), **how | options).double()
    method.bank.W.mul_(0.5 + torch.rand(K, 1))
    method.bank.velocity.normal_(std=0.1)
    side = lambda name: round(14 * method.crops[name].scale) if name in method.crops else 14
    return method, Views(**{name: torch.rand(N, 1, side(name), side(name)).double() for name in method.views})


def written_step(method, views, in_batch, symmetric, crops):
    "Objective, network gradients and the bank's pull by loops over queries and slots."
    embed = lambda x: rows(method.projector(method.encoder(x)))
    jobs = [("strong1", "strong2", 0.5 if symmetric else 1.0)] + [(f"crop{m + 1}", "strong2", 1.0) for m in range(crops)]
    if symmetric: jobs.append(("strong2", "strong1", 0.5))
    slots, objective, pull = [w / w.norm() for w in method.bank.W], 0.0, torch.zeros(K, D).double()
    for a, b, weight in jobs:
        with torch.no_grad(): keys = rows(method.slow.module(getattr(views, b)))
        for i, q in enumerate(embed(getattr(views, a))):
            others = keys if in_batch else [keys[i]]
            z = sum(torch.exp(q @ c / 0.1) for c in [*others, *slots])
            objective = objective - weight / N * (torch.exp(q @ keys[i] / 0.1) / z).log()
            q = q.detach()
            z = sum(torch.exp(q @ c / 0.05) for c in [*others, *slots])
            for k in range(K): pull[k] += weight / N / 0.05 * torch.exp(q @ slots[k] / 0.05) / z * q
    return objective, torch.autograd.grad(objective, [*method.encoder.parameters(), *method.projector.parameters()]), pull


def agrees(cls=AdCo, in_batch=True, symmetric=False, crops=0):
    "Two steps of a method against loops: objective, network, bank and average."
    how = {"in_batch": in_batch, "symmetric": symmetric, "crops": crops}
    (ours, views), (theirs, _) = make(cls, **how), make(**how)
    optimizers = {"network": torch.optim.SGD(ours.network.parameters(), 0.1)}
    same = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    for _ in range(2):
        objective, grads, pull = written_step(theirs, views, **how)
        fast = [*theirs.encoder.parameters(), *theirs.projector.parameters()]
        with torch.no_grad():
            for p, g in zip(fast, grads, strict=True): p -= 0.1 * g
            for s, p in zip(theirs.slow.parameters(), fast, strict=True): s.copy_(0.8 * s + 0.2 * p)
            for k, w in enumerate(theirs.bank.W.clone()):
                d = w / w.norm()
                theirs.bank.velocity[k] = 0.9 * theirs.bank.velocity[k] - (pull[k] - (pull[k] @ d) * d) / w.norm() + 0.01 * w
                theirs.bank.W[k] = w - 0.5 * theirs.bank.velocity[k]
        value, state = play(ours, views, optimizers), theirs.state_dict()
        compared = {k: v for k, v in ours.state_dict().items() if not any(word in k for word in ("running", "tracked", "hits"))}
        if not same(value[0], objective.detach()) or not all(same(v, state[k]) for k, v in compared.items()): return False
    return True


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_two_steps_are_the_written_ones(form, in_batch):
    assert agrees(in_batch=in_batch, **form)


class CropsAveraged(AdCo):
    def contrast(self, q, keys):
        loss, pull = super().contrast(q, keys)
        share = 1 / (1 + len(self.crops))
        return loss * share, pull * share


class CropsLeaveTheBankAlone(AdCo):
    def turns(self, views):
        move = self.bank.move
        self.bank.move = lambda *pulls, weights: move(pulls[-1], weights=weights[-1:])
        try: yield from super().turns(views)
        finally: del self.bank.move


class SymmetricSummed(AdCo):
    def contrast(self, q, keys):
        loss, pull = super().contrast(q, keys)
        return (2 * loss, 2 * pull) if self.symmetric else (loss, pull)


class KeysOfTheQueries(AdCo):
    def turns(self, views): yield from super().turns(Views(**vars(views) | {"strong2": views.strong1}))


class InBatchInTheLossAlone(AdCo):
    def contrast(self, q, keys):
        loss, _ = super().contrast(q, keys)
        return loss, self.bank.pull(q.detach(), keys[:, None])


class OnePlayersTemperature(AdCo):
    def __init__(self, *args, bank_temperature=0.05, **options): super().__init__(*args, bank_temperature=0.1, **options)


class Cooperator(AdCo):
    def __init__(self, *args, **options): super().__init__(*args, sign=-1, **options)


@pytest.mark.parametrize("mutant, form", [
    (CropsAveraged, {"crops": 3}), (CropsLeaveTheBankAlone, {"crops": 3}), (SymmetricSummed, {"symmetric": True}), (KeysOfTheQueries, {}),
    (KeysOfTheQueries, {"crops": 1}), (InBatchInTheLossAlone, {}), (OnePlayersTemperature, {}), (Cooperator, {}),
])
def test_mutants_are_rejected(mutant, form):
    assert not agrees(mutant, **form)


def test_crops_have_the_official_sizes_and_areas():
    "Of 224 pixels; the official areas are given to three digits."
    crops = AdCo(Net(), bank_size=K, crops=4).crops
    assert [round(224 * r.scale) for r in crops.values()] == [192, 160, 128, 96]
    official = [(0.172, 0.86), (0.143, 0.715), (0.114, 0.571), (0.086, 0.429)]
    for r, (low, high) in zip(crops.values(), official, strict=True): assert abs(r.crop[0] - low) < 1e-3 and abs(r.crop[1] - high) < 4e-3
    full = RECIPES["moco-v2"]
    assert {replace(r, crop=full.crop, scale=1.0) for r in crops.values()} == {full}


def test_without_crops_nothing_changes():
    plain, zero = make()[0], make(crops=0)[0]
    assert plain.views == AdCo.views == zero.views and not zero.crops


def test_the_key_is_made_once():
    method, views = make(crops=3)
    with count_passes(method.slow.module) as keys, count_passes(method.encoder) as queries:
        play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
    assert keys.forward == N and queries.forward == 4 * N


@pytest.mark.parametrize("kwargs, message", [
    ({"crops": 5}, "0 to 4"), ({"crops": -1}, "0 to 4"), ({"crops": 1, "symmetric": True}, "not both"),
])
def test_settings_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message): AdCo(Net(), **kwargs)
