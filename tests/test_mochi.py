"MoCHi: its step written out a second time with vectors, every query's candidates, limits, and mutants that the same checks must reject."
import math

import pytest
import torch
from common import N, embed, seeded
from common import make_moco as make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import advssl.methods.mochi as module
from advssl.contrast import mix_pairs, mix_query
from advssl.method import count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.mochi import MoCHi, hardest
from advssl.methods.moco import MoCo

examples = settings(max_examples=25, deadline=None)
HOW = {"candidates": 6, "pairs": 8, "query_mixes": 5, "query_share": 0.4, "warmup": 0.0}
unit = nn.functional.normalize


class Spy:
    "Stands in for a mixing function and keeps what it was asked to mix."

    def __init__(self, mix): self.mix, self.asked = mix, []

    def __call__(self, *args):
        self.asked.append(args)
        return self.mix(*args)


def agrees(cls=MoCHi, symmetric=False, progress=0.0):
    """Two steps of a method: who was mixed must be legal by a sort with loops; objective and weights those of mixtures built as vectors.

    The draws are taken from what the method asked for; that they are legal is checked, so a method cannot cheat by choosing them."""
    with pytest.MonkeyPatch.context() as patch:
        pairs, queries = Spy(mix_pairs), Spy(mix_query)
        patch.setattr(module, "mix_pairs", pairs)
        patch.setattr(module, "mix_query", queries)
        ours, views = make(cls, symmetric=symmetric, **HOW)
        theirs, _ = make(symmetric=symmetric)
        ours.progress = progress
        optimizers, ok = {"network": torch.optim.SGD(ours.network.parameters(), 0.1)}, True
        for _ in range(2):  # in the second step the queue holds the queries' own keys
            pairs.asked.clear(), queries.asked.clear()
            value = play(ours, views, optimizers)
            parts = [(views.strong1, views.strong2)] + ([(views.strong2, views.strong1)] if symmetric else [])
            queue, owners, slow = theirs.queue.rows.clone(), theirs.owners.rows[:, 0].clone(), nn.Sequential(*theirs.slow.module).train()
            if len(pairs.asked) != len(parts) or len(queries.asked) != len(parts): return False
            losses, made = [], []
            for part, (x, partner) in enumerate(parts):
                with torch.no_grad(): keys = unit(slow(partner))
                made.append(keys)
                _, _, i, j, share = pairs.asked[part]
                *_, m, query_share = queries.asked[part]
                if not i.shape == j.shape == share.shape == (N, 8) or not m.shape == query_share.shape == (N, 5): return False
                ok &= bool((i != j).all()) and 0 <= share.min() and share.max() <= 1 and 0 <= query_share.min() and query_share.max() <= 0.4
                total = 0.0
                for a, q in enumerate(embed(theirs, x)):
                    others = sorted((r for r in range(len(queue)) if owners[r] != a), key=lambda r: -(q @ queue[r]).item())
                    ok &= {*i[a].tolist(), *j[a].tolist(), *m[a].tolist()} <= set(others[:6])
                    h = [share[a, s] * queue[i[a, s]] + (1 - share[a, s]) * queue[j[a, s]] for s in range(8)]
                    h += [query_share[a, s] * q.detach() + (1 - query_share[a, s]) * queue[m[a, s]] for s in range(5)]
                    everyone = [keys[a], *queue[others], *(v / v.norm() for v in h)]
                    total = total - (torch.exp(q @ everyone[0] / 0.2) / sum(torch.exp(q @ c / 0.2) for c in everyone)).log()
                losses.append(total / N)
            objective = sum(losses) / len(losses)
            fast = [p for net in (theirs.encoder, theirs.projector) for p in net.parameters()]
            grads = torch.autograd.grad(objective, fast)
            with torch.no_grad():
                for p, g in zip(fast, grads, strict=True): p -= 0.1 * g
                for s, p in zip(theirs.slow.parameters(), fast, strict=True): s.copy_(0.9 * s + 0.1 * p)
            for keys in made: theirs.push(keys, views.index)
            same = lambda a, b: a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-10)
            own = [p for net in (ours.encoder, ours.projector) for p in net.parameters()]
            ok &= same(value[0], objective.detach()) and all(same(a, b) for a, b in zip(own, fast, strict=True))
            ok &= same(ours.queue.rows, theirs.queue.rows)
        return ok


@pytest.mark.parametrize("symmetric", [False, True])
def test_two_steps_are_the_written_ones(symmetric):
    assert agrees(symmetric=symmetric)


class WithOtherCandidates(MoCHi):
    "A step whose candidates come from another function."
    @staticmethod
    def candidates_of(sim, others, size): return hardest(sim, others, size)

    def negatives(self, q, k, index):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "hardest", self.candidates_of)
            return super().negatives(q, k, index)


class QueryZerosNegativesForAll(WithOtherCandidates):
    "The mistake of one public implementation: ranks below N looked up in a list of all queries' candidates."
    @staticmethod
    def candidates_of(sim, others, size):
        rows, count = hardest(sim, others, size)
        return rows.flatten()[:size].expand_as(rows), count


class RanksTakenForRows(WithOtherCandidates):
    @staticmethod
    def candidates_of(sim, others, size):
        rows, count = hardest(sim, others, size)
        return torch.arange(rows.shape[1]).expand_as(rows), count


class OwnKeysMixed(WithOtherCandidates):
    @staticmethod
    def candidates_of(sim, others, size): return hardest(sim, None, size)


class Easiest(WithOtherCandidates):
    @staticmethod
    def candidates_of(sim, others, size): return hardest(-sim, others, size)


class OneTooMany(WithOtherCandidates):
    @staticmethod
    def candidates_of(sim, others, size): return hardest(sim, others, size + 1)


class WithItself(MoCHi):
    def draw(self, count):
        i, j, *rest = super().draw(count)
        return i, i, *rest


class QueryShareNotScaled(MoCHi):
    def draw(self, count):
        *rest, share = super().draw(count)
        return *rest, share / self.query_share


class RolesSwapped(MoCHi):
    "The query has the share that belongs to the negative."
    def draw(self, count):
        *rest, share = super().draw(count)
        return *rest, 1 - share


class FewerPairs(MoCHi):
    def draw(self, count): return tuple(v[:, :4] for v in super().draw(count))


class WithOtherMixtures(MoCHi):
    "A step whose mixtures with the query, or of two, are made otherwise; the spies are asked all the same."
    def negatives(self, q, k, index):
        kept = {name: getattr(module, name) for name in ("mix_pairs", "mix_query")}
        with pytest.MonkeyPatch.context() as patch:
            for name, spy in kept.items(): patch.setattr(module, name, Spy(self.replace(name, spy)))
            return super().negatives(q, k, index)


class NotNormalised(WithOtherMixtures):
    def replace(self, name, spy):
        if name == "mix_query": return spy
        return lambda sim, bank, i, j, c: spy(sim, bank, i, j, c) * 0 + c * sim.gather(1, i) + (1 - c) * sim.gather(1, j)


class QueryNotConstant(WithOtherMixtures):
    "The mixed query is differentiated: behind the normalisation of the mixture that is another gradient."
    def replace(self, name, spy):
        if name == "mix_pairs": return spy
        def mix(q, sim, j, c):
            spy(q, sim, j, c)
            h = c[..., None] * q[:, None] + (1 - c[..., None]) * self.queue.rows[j]
            return (q[:, None] * unit(h, dim=-1)).sum(-1)
        return mix


class NoGradientThroughMixtures(WithOtherMixtures):
    def replace(self, name, spy): return lambda *args: spy(*args).detach()


class MixturesInsteadOfTheQueue(MoCHi):
    def negatives(self, q, k, index): return super().negatives(q, k, index)[1:]


class NoMixturesOfTwo(MoCHi):
    def negatives(self, q, k, index): return [b for n, b in enumerate(super().negatives(q, k, index)) if n != 1]


class NoMixturesWithTheQuery(MoCHi):
    def negatives(self, q, k, index): return super().negatives(q, k, index)[:2]


class QueueTwice(MoCHi):
    def negatives(self, q, k, index):
        blocks = super().negatives(q, k, index)
        return [*blocks, blocks[0]]


@pytest.mark.parametrize("mutant", [
    QueryZerosNegativesForAll, RanksTakenForRows, OwnKeysMixed, Easiest, OneTooMany, WithItself, QueryShareNotScaled, RolesSwapped,
    FewerPairs, NotNormalised, QueryNotConstant, NoGradientThroughMixtures, MixturesInsteadOfTheQueue, NoMixturesOfTwo,
    NoMixturesWithTheQuery, QueueTwice,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


@pytest.mark.parametrize("pattern", [WithOtherCandidates])
def test_the_patterns_of_the_mutants_are_the_method(pattern): assert agrees(pattern)


def test_the_pattern_of_the_mixtures_is_the_method():
    class Same(WithOtherMixtures):
        def replace(self, name, spy): return spy
    assert agrees(Same)


def test_mixing_waits_for_the_end_of_the_warm_up():
    class Late(MoCHi):
        def __init__(self, *args, warmup, **options): super().__init__(*args, warmup=0.5, **options)
    assert agrees(Late, progress=0.5) and not agrees(Late, progress=0.499)


# who is mixed


@examples
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12), st.floats(0, 1))
def test_candidates_are_each_query_s_own(seed, K, size, own):
    generator = seeded(seed)
    sim, others = torch.rand(5, K, generator=generator) * 2 - 1, torch.rand(5, K, generator=generator) >= own
    for mask in (others, None):
        rows, count = hardest(sim, mask, size)
        assert rows.shape == (5, min(size, K)) and count.shape == (5, 1)
        for a in range(5):
            free = [r for r in range(K) if mask is None or mask[a, r]]
            best = sorted(free, key=lambda r: -sim[a, r].item())[:size]
            assert count[a] == len(best) and rows[a, : len(best)].tolist() == best


@examples
@given(st.integers(0, 2**31), st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 30), st.integers(0, 30))
def test_draws_are_legal(seed, count, pairs, query_mixes):
    method, _ = make(MoCHi, filled=0, **HOW | {"pairs": pairs, "query_mixes": query_mixes})
    count = torch.tensor(count)[:, None]
    stream = torch.get_rng_state()
    draws = []
    for _ in range(2):
        method.generator = seeded(seed)
        draws.append(method.draw(count))
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))  # same seed, same bits
    assert torch.equal(torch.get_rng_state(), stream)  # all randomness is the method's generator's
    i, j, share, partner, query_share = draws[0]
    assert i.shape == j.shape == share.shape == (len(count), pairs) and partner.shape == query_share.shape == (len(count), query_mixes)
    for ranks in (i, j, partner): assert (ranks >= 0).all() and (ranks < count.clamp_min(1)).all()
    assert ((i != j) | (count < 2)).all()
    assert ((share >= 0) & (share < 1)).all() and ((query_share >= 0) & (query_share <= 0.4)).all()


def test_a_queue_of_own_keys_mixes_nothing():
    "One query has no other in the queue, one has a single one, one has two."
    method, _ = make(MoCHi, filled=0, **HOW)
    queue, q = unit(torch.randn(2, 5, dtype=torch.float64)), unit(torch.randn(3, 5, dtype=torch.float64)).requires_grad_()
    method.push(queue, torch.tensor([0, 0]))
    blocks = method.negatives(q, q.detach(), torch.tensor([0, 1, 2]))
    assert [b[1].tolist() for b in blocks[1:]] == [[[False], [True], [True]]] * 2
    value = method.loss(q, q.detach(), *blocks)
    assert value.isfinite() and torch.autograd.grad(value, q)[0].isfinite().all()
    method.owners.store[1] = 9
    assert method.negatives(q[:1], q[:1].detach(), torch.tensor([0]))[1][1].tolist() == [[False]]  # one other: no pair


@examples
@given(st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_harder_and_no_new_direction(seed, tau):
    "Eqs. (3) to (6): more terms, a larger loss; a mixture is at least its parents' average; the gradient lies among the real negatives."
    method, _ = make(MoCHi, filled=0, temperature=tau, embedding_dim=12, **HOW)
    method.generator = seeded(seed)
    draw = lambda n: unit(torch.randn(n, 12, dtype=torch.float64, generator=method.generator))
    q, k, bank = draw(4).requires_grad_(), draw(4), draw(9)
    method.push(bank, torch.arange(9) + 50)
    blocks = method.negatives(q, k, torch.arange(4))
    sim = blocks[0][0]
    value = method.loss(q, k, *blocks)
    assert value >= method.loss(q, k, blocks[0])
    g, omega = (4 * tau * v for v in torch.autograd.grad(value, (q, sim), retain_graph=True))
    everything = torch.cat([(q * k).sum(1, keepdim=True), *(s for s, _ in blocks)], 1) / tau
    pi = everything.softmax(1)
    force = omega @ bank - (1 - pi[:, :1]) * k
    tangent = lambda v: v - (v * q).sum(1, keepdim=True) * q
    assert torch.allclose(tangent(g), tangent(force), rtol=1e-6, atol=1e-11)
    rows, _ = hardest(sim, None, 6)
    outside = torch.ones(4, 9, dtype=torch.bool).scatter(1, rows, False)
    plain = pi[:, 1:10]
    assert torch.allclose(omega[outside], plain[outside], rtol=1e-6)  # only candidates get more
    assert (omega >= plain - 1e-12).all()


# limits


@pytest.mark.parametrize("same", [{"pairs": 0, "query_mixes": 0}, {"warmup": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_synthetic_points_it_is_moco_to_the_bit(same, dtype):
    states = []
    for cls, options in ((MoCHi, HOW | same), (MoCo, {})):
        method, views = make(cls, shares=2, **options)
        method.to(dtype)
        for name in ("strong1", "strong2"): setattr(views, name, getattr(views, name).to(dtype))
        optimizers = {"network": torch.optim.SGD(method.network.parameters(), 0.1)}
        for _ in range(3): play(method, views, optimizers)
        states.append((method.state_dict(), method.generator.get_state()))
    for key, value in states[1][0].items(): assert torch.equal(states[0][0][key], value), key
    assert torch.equal(states[0][1], states[1][1])  # nothing was drawn


def test_autocast_trains_every_weight():
    method, views = make(MoCHi, **HOW)
    method.float()
    for name in ("strong1", "strong2"): setattr(views, name, getattr(views, name).float())
    with torch.autocast("cpu", dtype=torch.bfloat16): value, player = next(method.turns(views))
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in player.parameters())


def test_passes():
    method, views = make(MoCHi, **HOW)
    with count_passes(method.encoder, method.slow.module) as passes:
        play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
    assert passes.units(N) == 4


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"candidates": 0}, "candidates must be >= 1"), ({"pairs": -1}, "query_mixes >= 0"), ({"query_mixes": -1}, "query_mixes >= 0"),
    ({"query_share": 1.1}, "shares in"), ({"warmup": -0.1}, "shares in"), ({"warmup": math.nan}, "shares in"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(MoCHi, **HOW | wrong)


def test_card():
    assert get_method("MoCHi") is methods()["mochi"] is MoCHi
    card = MoCHi.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("", "CL", "feature", "yes", 1, (1, 2))
    assert card.adversary == "hard negative mixing"
    known, base = settings_of(MoCHi), settings_of(MoCo)
    assert all(known[name] == base[name] for name in base) and known["query_share"] == 0.5
