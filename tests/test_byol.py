"BYOL: two steps written out a second time, mutants that the same check must reject, limits, the gauge of collapse, lightly as an oracle."
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from common import examples, optimizers, seeded, seeds, snapshot, written_byol_step
from common import make_byol as make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from advssl.encoders import cosine_momentum
from advssl.method import Views, cards, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.byol import BYOL, bootstrap_loss, spread

# the step, against a second implementation without modules


def agrees(cls):
    "Whether two steps, early and in the middle of the run, lead to the written losses and states."
    method, x1, x2 = make(cls, momentum=0.8)
    state, views = snapshot(make(momentum=0.8)[0]), Views(strong1=x1, strong2=x2)
    for method.progress, m in ((0.0, 0.8), (0.5, 0.9)):
        expected, state = written_byol_step(state, x1, x2, m)
        (loss,) = play(method, views, optimizers(method))
        ours = method.state_dict()
        if not torch.allclose(loss, expected, rtol=1e-9): return False
        if not all(torch.allclose(ours[k].double(), v.double(), rtol=1e-8, atol=1e-10) for k, v in state.items() if k in ours): return False
    return True


def test_two_steps_are_the_written_ones(): assert agrees(BYOL)


class GradientAtBothEnds(BYOL):
    def objective(self, pair):
        weights = self.target.module.requires_grad_(True)
        q, z = [self.predict(v) for v in pair], [weights(v) for v in pair]
        return self.loss(q, z)


class OnlineIsTheTarget(BYOL):
    def objective(self, pair): return self.loss([self.predict(v) for v in pair], [self.embed(v) for v in pair])


class TargetInEvaluationMode(BYOL):
    def objective(self, pair):
        q = [self.predict(v) for v in pair]
        self.target.eval()
        return self.loss(q, [self.target(v) for v in pair])


class ViewsShareAPass(BYOL):
    def objective(self, pair): return self.loss(self.predict(torch.cat(pair)).chunk(2), self.target(torch.cat(pair)).chunk(2))


class SameView(BYOL):
    def loss(self, q, z): return super().loss(q, z[::-1])


class OneHalf(BYOL):
    def loss(self, q, z): return 2 * bootstrap_loss(q[0], z[1]).mean()


class MeanOfHalves(BYOL):
    def loss(self, q, z): return super().loss(q, z) / 2


class NoPredictor(BYOL):
    def predict(self, x): return self.embed(x)


class NoDirections(BYOL):
    def loss(self, q, z): return sum((a - b).square().sum(1) for a, b in zip(q, z[::-1], strict=True)).mean()


class FlippedSign(BYOL):
    def loss(self, q, z): return 8 - super().loss(q, z)


class UpdateBeforeTheStep(BYOL):
    def turns(self, views):
        objective = self.objective([views.strong1, views.strong2])
        self.target.update(self.embed, cosine_momentum(self.target.momentum, self.progress))
        yield objective, self.network


class NoUpdate(BYOL):
    def turns(self, views): yield self.objective([views.strong1, views.strong2]), self.network


class ConstantMomentum(BYOL):
    def turns(self, views):
        yield self.objective([views.strong1, views.strong2]), self.network
        self.target.update(self.embed)


class MomentumTheOtherWay(BYOL):
    def turns(self, views):
        yield self.objective([views.strong1, views.strong2]), self.network
        self.target.update(self.embed, 1 - cosine_momentum(self.target.momentum, self.progress))


@pytest.mark.parametrize("mutant", [
    GradientAtBothEnds, OnlineIsTheTarget, TargetInEvaluationMode, ViewsShareAPass, SameView, OneHalf, MeanOfHalves, NoPredictor,
    NoDirections, FlippedSign, UpdateBeforeTheStep, NoUpdate, ConstantMomentum, MomentumTheOtherWay,
])
def test_mutants_are_rejected(mutant): assert not agrees(mutant)


def test_the_target_is_nobodys_to_move():
    "None of its weights is among the player's, and a backward pass through everything leaves no gradient there."
    method, x1, x2 = make()
    names = {id(p) for p in method.network.parameters()}
    assert not names & {id(p) for p in method.target.parameters()}
    loss, _ = next(method.turns(Views(strong1=x1, strong2=x2)))
    loss.backward()
    assert all(p.grad is None for p in method.target.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.network.parameters())


# the loss and the gauge


vectors = st.tuples(seeds, st.integers(2, 12), st.integers(2, 9))


def pair_of(drawn):
    seed, n, d = drawn
    return torch.randn(2, n, d, dtype=torch.float64, generator=seeded(seed))


@examples
@given(vectors, st.floats(1e-3, 1e3))
def test_the_loss_is_an_angle(drawn, scale):
    q, z = pair_of(drawn)
    loss = bootstrap_loss(q, z)
    assert loss.shape == (len(q),) and (loss >= 0).all() and (loss <= 4).all()
    assert torch.allclose(bootstrap_loss(scale * q, z), loss, rtol=1e-9, atol=1e-12)
    assert torch.allclose(bootstrap_loss(z, q), loss, rtol=1e-12)
    assert torch.allclose(loss, 2 - 2 * F.cosine_similarity(q, z), rtol=1e-9, atol=1e-12)
    assert bootstrap_loss(q, q).abs().max() < 1e-12 and torch.allclose(bootstrap_loss(q, -q), torch.full_like(loss, 4))


@examples
@given(vectors)
def test_the_gauge_lies_between_collapse_and_an_even_spread(drawn):
    z, shift = pair_of(drawn)
    u = F.normalize(z, dim=1)
    top = (1 - u.mean(0).square().sum()).clamp(min=0).sqrt()
    assert 0 <= spread(z) <= top + 1e-12 <= 1 + 1e-12
    assert torch.allclose(spread(z), u.var(0, correction=0).sqrt().sum() / math.sqrt(z.shape[1]), rtol=1e-12)
    assert spread(shift[:1].expand_as(z) * (1 + torch.arange(len(z))[:, None])) < 1e-7
    even = torch.cat([torch.eye(z.shape[1]), -torch.eye(z.shape[1])])
    assert torch.allclose(spread(even), torch.tensor(1.0))


def test_zero_embeddings_do_no_harm():
    q = torch.zeros(3, 4, requires_grad=True)
    loss = bootstrap_loss(q, torch.randn(3, 4))
    loss.sum().backward()
    assert torch.equal(loss.detach(), torch.full((3,), 2.0)) and q.grad.isfinite().all()


# limits


@pytest.mark.parametrize(("momentum", "progress"), [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0)])
def test_a_copy_and_a_statue(momentum, progress):
    method, x1, x2 = make(momentum=momentum)
    before, method.progress = [p.clone() for p in method.target.parameters()], progress
    play(method, Views(strong1=x1, strong2=x2), optimizers(method))
    followed = list(method.embed.parameters()) if momentum == 0 else before
    for mine, theirs in zip(method.target.parameters(), followed, strict=True): assert torch.equal(mine, theirs)
    for mine, theirs in zip(method.target.buffers(), method.embed.buffers(), strict=True): assert torch.equal(mine, theirs)


def test_the_order_of_the_views_does_not_matter():
    method, x1, x2 = make()
    assert torch.allclose(method.objective([x1, x2]), method.objective([x2, x1]), rtol=1e-12)


def test_without_batch_norm_halves_of_the_batch_average_to_the_whole():
    "So the averaged gradients of several processes are those of one: nothing has to be gathered."
    method, x1, x2 = make(batch_norm=False)
    halves = [method.objective([x1[part], x2[part]]) for part in (slice(3), slice(3, 6))]
    assert torch.allclose(sum(halves) / 2, method.objective([x1, x2]), rtol=1e-12)


def test_each_view_passes_alone():
    method, x1, x2 = make()
    before = method.encoder[2].num_batches_tracked.item()
    with count_passes(method.encoder, method.target.module[0]) as passes:
        play(method, Views(strong1=x1, strong2=x2), optimizers(method))
    assert method.encoder[2].num_batches_tracked == before + 2
    assert (passes.forward, passes.backward_input, passes.backward_weight) == (24, 12, 12) and passes.units(6) == 8


def test_autocast_trains_every_weight():
    method, x1, x2 = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16): loss, mover = next(method.turns(Views(strong1=x1, strong2=x2)))
    loss.backward()
    assert loss.dtype == torch.float32 and set(method.logs) == {"spread"} and not method.logs["spread"].requires_grad
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mover.parameters())


def test_a_collapse_shows_in_the_log():
    method, x1, x2 = make()
    method.objective([x1, x2])
    assert method.logs["spread"] > 0.2
    with torch.no_grad(): method.target.module[1][3].weight.zero_()
    method.objective([x1, x2])
    assert method.logs["spread"] < 1e-7


def test_card():
    assert get_method("byol") is methods()["byol"] is BYOL
    assert (BYOL.card.base, BYOL.card.tables, BYOL.card.sign, BYOL.card.type) == ("BYOL", (), 0, "")
    assert "byol" in [c["key"] for c in cards()]
    known = settings_of(BYOL)
    assert known == {"momentum": 0.996, "hidden_dim": 4096, "embedding_dim": 256}
    with pytest.raises(ValueError, match="momentum must be in"): make(momentum=1.5)


# an independent oracle


def test_lightly_agrees():
    "Its heads with our weights, its loss, its moving average, its schedule and its gauge."
    pytest.importorskip("lightly")
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.utils.debug import std_of_l2_normalized
    from lightly.utils.scheduler import cosine_schedule

    method, x1, x2 = make(momentum=0.8)
    heads = {}
    layers = lambda head: [m for m in head.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
    for name, kind, ours, width in (
        ("projector", BYOLProjectionHead, method.projector, 16), ("predictor", BYOLPredictionHead, method.predictor, 5),
        ("target", BYOLProjectionHead, method.target.module[1], 16),
    ):
        heads[name] = kind(width, 16, 5).double()
        for a, b in zip(layers(heads[name]), layers(ours), strict=True): a.load_state_dict(b.state_dict())
    encoder, slow = copy.deepcopy(method.encoder), copy.deepcopy(method.target.module[0])
    criterion, z = NegativeCosineSimilarity(), []
    for x in (x1, x2):
        with torch.no_grad(): z.append(heads["target"](slow(x)))
    q = [heads["predictor"](heads["projector"](encoder(x))) for x in (x1, x2)]
    theirs = 4 + 2 * (criterion(q[0], z[1]) + criterion(q[1], z[0]))
    ours = method.objective([x1, x2])
    assert torch.allclose(ours, theirs, rtol=1e-10)
    for a, b in zip(method.encoder.parameters(), torch.autograd.grad(theirs, list(encoder.parameters())), strict=True):
        assert torch.allclose(torch.autograd.grad(ours, a, retain_graph=True)[0], b, rtol=1e-8, atol=1e-12)
    n = len(x1)
    assert torch.allclose(spread(z[0]), std_of_l2_normalized(z[0]) * math.sqrt(5 * (n - 1) / n), rtol=1e-10)

    for step in range(11): assert math.isclose(cosine_momentum(0.8, step / 10), cosine_schedule(step, 11, 0.8, 1.0), rel_tol=1e-12)
    followed = copy.deepcopy(method.target.module)
    method.target.update(method.embed, 0.8)
    update_momentum(method.embed, followed, 0.8)
    for a, b in zip(method.target.parameters(), followed.parameters(), strict=True): assert torch.allclose(a, b, rtol=1e-12)
