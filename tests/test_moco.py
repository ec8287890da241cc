"MoCo: its step written out a second time with loops, shares of a batch, and mutants that the same checks must reject."

import pytest
import torch
from common import N, embed
from common import make_moco as make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.encoders import SplitBatchNorm, split_batch_norm
from advssl.method import Views, count_passes, play
from advssl.methods.moco import MoCo

examples = settings(max_examples=25, deadline=None)


def written_loss(queries, keys, queue, owners, index, tau, skip):
    total = 0.0
    for q, k, i in zip(queries, keys, index, strict=True):
        others = [n for n, o in zip(queue, owners, strict=True) if not (skip and o == i)]
        total = total - (torch.exp(q @ k / tau) / sum(torch.exp(q @ c / tau) for c in [k, *others])).log()
    return total / len(queries)


def agrees(cls=MoCo, symmetric=False, skip=True):
    "Two steps of a method against loops: objective, gradients, queue, owners and the slow network."
    ours, views = make(cls, symmetric=symmetric, skip_own=skip)
    theirs, _ = make(symmetric=symmetric, skip_own=skip)
    queue, owners = [*theirs.queue.rows.clone()], [float(o) for o in theirs.owners.rows[:, 0]]
    ok, optimizers = True, {"network": torch.optim.SGD(ours.network.parameters(), 0.1)}
    for _ in range(2):  # in the second step the queue holds the queries' own keys, and then it is full
        pairs = [(views.strong1, views.strong2)] + ([(views.strong2, views.strong1)] if symmetric else [])
        slow = nn.Sequential(*theirs.slow.module).train()
        losses, all_keys = [], []
        for x, partner in pairs:
            with torch.no_grad(): keys = slow(partner)
            keys = keys / keys.norm(dim=1, keepdim=True)
            losses.append(written_loss(embed(theirs, x), keys, queue, owners, views.index, 0.2, skip))
            all_keys.append(keys)
        objective = sum(losses) / len(losses)
        fast = [p for m in (theirs.encoder, theirs.projector) for p in m.parameters()]
        grads = torch.autograd.grad(objective, fast)
        with torch.no_grad():
            for p, g in zip(fast, grads, strict=True): p -= 0.1 * g
            for s, p in zip(theirs.slow.parameters(), fast, strict=True): s.copy_(0.9 * s + 0.1 * p)
        for keys in all_keys:
            queue, owners = (queue + [*keys])[-20:], (owners + views.index.tolist())[-20:]
        value = play(ours, views, optimizers)
        own = [p for m in (ours.encoder, ours.projector) for p in m.parameters()]
        same = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-10)
        ok &= same(value[0], objective.detach()) and all(same(a, b) for a, b in zip(own, fast, strict=True))
        ok &= all(same(a, b) for a, b in zip(ours.slow.parameters(), theirs.slow.parameters(), strict=True))
        oldest_first = ours.queue.rows.roll(-(ours.queue.pushed % 20), 0) if ours.queue.pushed > 20 else ours.queue.rows
        ok &= same(oldest_first, torch.stack(queue)) and sorted(ours.owners.rows[:, 0].tolist()) == sorted(owners)
        if not ok: return False
    return ok


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("skip", [True, False])
def test_two_steps_are_the_written_ones(symmetric, skip):
    assert agrees(symmetric=symmetric, skip=skip)


class KeysWithGradient(MoCo):
    def keys(self, x): return nn.functional.normalize(nn.Sequential(self.encoder, self.projector)(x))


class OrderNotUndone(MoCo):
    def keys(self, x): return super().keys(x).roll(1, 0)


class QueueForgets(MoCo):
    def push(self, keys, index): super().push(keys[:-1], index[:-1])


class PushBefore(MoCo):
    def negatives(self, q, k, index):
        self.push(k, index)
        return super().negatives(q, k, index)


class OwnKeysKept(MoCo):
    def negatives(self, q, k, index): return [(q @ self.queue.rows.T, None)]


class PositiveAmongTheNegatives(MoCo):
    def negatives(self, q, k, index): return [*super().negatives(q, k, index), (q * k).sum(1, keepdim=True)]


class SlowNetworkStands(MoCo):
    def turns(self, views):
        self.slow.update = lambda *_: None
        yield from super().turns(views)


@pytest.mark.parametrize("mutant", [
    KeysWithGradient, OrderNotUndone, QueueForgets, PushBefore, OwnKeysKept, PositiveAmongTheNegatives, SlowNetworkStands,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


def test_the_log_has_the_mean_similarities():
    method, views = make()
    q, queue = embed(method, views.strong1).detach(), method.queue.rows.clone()
    k = make()[0].keys(views.strong2)
    next(method.turns(views))
    assert torch.isclose(method.logs["positive"].double(), (q * k).sum(1).mean())
    assert torch.isclose(method.logs["negative"].double(), (q @ queue.T).mean())


def test_passes():
    for symmetric, units in ((False, 4), (True, 8)):
        method, views = make(symmetric=symmetric)
        with count_passes(method.encoder, method.slow.module) as passes:
            play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
        assert passes.units(N) == units


def test_the_queue_starts_with_the_first_images_and_no_more():
    method, _ = make(filled=0)
    batch = lambda i: Views(strong2=torch.rand(N, 3, 2, 2).double(), index=torch.arange(N) + N * i)
    method.prepare(map(batch, range(100)), torch.empty(15, 3, 2, 2))
    assert method.queue.pushed == 12 and method.owners.rows[:, 0].tolist() == list(range(12))
    method, _ = make(filled=0, queue_size=9)
    method.prepare(map(batch, range(100)), torch.empty(1000, 3, 2, 2))
    assert 0 < method.queue.pushed <= 9


@examples
@given(st.integers(0, 2**31), st.sampled_from([1, 2, 3, 6]), st.sampled_from([(5,), (5, 3, 3)]), st.booleans())
def test_shares_are_batches_of_their_own(seed, shares, shape, affine):
    "Outputs, gradients and running averages, against each share through a plain layer."
    torch.manual_seed(seed)
    plain = (nn.BatchNorm1d if len(shape) == 1 else nn.BatchNorm2d)(5, affine=affine).double()
    if affine: nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    split = SplitBatchNorm(plain, shares)
    x = (3 * torch.randn(12, *shape) + 2).double().requires_grad_()
    start = plain.running_mean.clone(), plain.running_var.clone()
    weight = torch.randn(12, *shape).double()
    parts = x.chunk(shares)
    one = [nn.functional.batch_norm(p, None, None, plain.weight, plain.bias, True) for p in parts]
    out = split.train()(x)
    assert torch.allclose(out, torch.cat(one))
    mine, theirs = (torch.autograd.grad((weight * o).sum(), x)[0] for o in (out, torch.cat(one)))
    assert torch.allclose(mine, theirs, atol=1e-10)
    channels = [p.detach().transpose(0, 1).flatten(1) for p in parts]
    assert torch.allclose(plain.running_mean, 0.9 * start[0] + 0.1 * sum(c.mean(1) for c in channels) / shares)
    assert torch.allclose(plain.running_var, 0.9 * start[1] + 0.1 * sum(c.var(1) for c in channels) / shares)
    assert torch.equal(split.eval()(x), plain.eval()(x))


def test_shares_are_those_of_an_independent_implementation():
    theirs = pytest.importorskip("lightly.models.batchnorm")
    torch.manual_seed(0)
    x, mine = torch.randn(8, 3, 4, 4), SplitBatchNorm(nn.BatchNorm2d(3), 2).train()
    order = torch.arange(8).view(-1, 2).T.flatten()  # theirs deals the images out in turn, ours cuts the batch
    assert torch.allclose(mine(x[order])[order.argsort()], theirs.SplitBatchNorm(3, num_splits=2).train()(x), atol=1e-5)


def test_every_layer_is_split_and_keys_are_permuted():
    method, views = make(shares=2)
    assert isinstance(method.encoder[2], SplitBatchNorm) and isinstance(method.slow.module[0][2], SplitBatchNorm)
    assert split_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), 1)[0].__class__ is nn.BatchNorm1d
    seen = []
    method.slow.module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    method.keys(views.strong2)
    sums = [sorted(x.sum((1, 2, 3)).tolist()) for x in (seen[0], views.strong2)]
    assert not torch.equal(seen[0], views.strong2) and sums[0] == sums[1]
