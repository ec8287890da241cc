"DynACL: limits, schedules in the loop, the step and the regularisers written out a second time, and mutants that must be rejected."
import math
from dataclasses import replace

import pytest
import torch
from common import ORDER, seeded, seeds, small_encoder, snapshot, start_zero, through, turn, untouched, written_acl_step, written_nt_xent
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.augment import RECIPES, Augment
from advssl.config import Config
from advssl.encoders import BranchedBatchNorm
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.acl import ACL
from advssl.methods.dynacl import DynACL, agreement, air_loss, divergence, invariance, weakened
from advssl.pretrain import Run, restore

examples = settings(max_examples=25, deadline=None)
shares = st.floats(0, 1)
FORMS = ("exact", "product", "upstream")
HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04}


def make(cls=DynACL, seed=0, dtype=torch.float64, progress=0.0, **options):
    "A method on 12 pixels, in training mode, every BatchNorm layer unlike the others, and three views."
    torch.manual_seed(seed)
    encoder = small_encoder()
    method = cls(encoder, hidden_dim=16, embedding_dim=5, **options).to(dtype)
    fill = seeded(seed)
    with torch.no_grad():
        for m in [*method.encoder.modules(), *method.projector.modules()]:
            if isinstance(m, nn.BatchNorm1d):
                m.running_mean.normal_(std=0.2, generator=fill)
                m.running_var.uniform_(0.05, 0.2, generator=fill)
        if getattr(method, "slow", None) is not None:  # a slow encoder that has fallen behind
            for p in method.slow.parameters(): p += 0.1 * torch.randn(p.shape, dtype=dtype)
    method.progress, method.generator = progress, seeded(seed)
    return method, *torch.rand(3, 6, 3, 2, 2, dtype=dtype, generator=seeded(seed))


def step(method, x1, x2, x):
    return next(iter([*method.turns(Views(strong1=x1, strong2=x2, clean=x))]))


# schedules


@pytest.mark.parametrize(("epochs", "every"), [(1000, 50), (100, 10), (8, 2), (60, 3)])
def test_the_schedule_is_the_published_one(epochs, every):
    method = make(refresh=every / epochs)[0]
    for e in range(1, epochs + 1):
        if e % every == 1 or every == 1: strength = 1 - (e - 1) / epochs
        method.progress = (e - 1) / epochs
        assert math.isclose(method.strength(method.progress), strength, abs_tol=1e-9)
        w = min(1 + (1 - strength) * 2 / 3, 2)
        assert all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(method.weights(), [(2 - w) / 2, w / 2], strict=True))


@examples
@given(shares, st.just(0.0) | st.floats(1e-6, 1), st.floats(0, 1), st.floats(0, 5))
def test_strength_and_weights_stay_in_range(progress, refresh, final, swap):
    method = make(refresh=refresh, final_strength=final, swap=swap, progress=progress)[0]
    s, (clean, adv) = method.strength(progress), method.weights()
    assert final - 1e-9 <= s <= 1 and method.strength(0.0) == 1
    assert method.strength(min(1, progress + 0.1)) <= s + 1e-9
    assert 0 <= clean <= 0.5 <= adv <= 1 and math.isclose(clean + adv, 1)


@examples
@given(st.sampled_from(list(RECIPES)), shares)
def test_a_weakened_recipe_lies_between_the_recipe_and_nothing(name, s):
    full, weak = RECIPES[name], weakened(RECIPES[name], s)
    assert weakened(full, 1.0) == full and weak.flip == full.flip and weak.pad == full.pad
    none = weakened(full, 0.0)
    assert none.jitter == (0.0,) * 4 and none.jitter_p == none.gray == none.blur == 0 and none.crop in (None, (1.0, 1.0))
    mean = lambda a, b: a * s + b * (1 - s)
    for key in ("jitter_p", "gray", "blur"): assert math.isclose(getattr(weak, key), mean(getattr(full, key), 0), abs_tol=1e-12)
    if full.crop: assert math.isclose(weak.crop[0], mean(full.crop[0], 1))
    Augment(weak, 8)


def test_no_strength_is_the_image_or_its_mirror():
    x = torch.rand(50, 3, 9, 9)
    drawn = Augment(weakened(RECIPES["simclr"], 0.0), 9)(x, seeded())
    gap = torch.stack([(drawn - t).abs().amax((1, 2, 3)) for t in (x, x.flip(3))])
    assert (gap.amin(0) < 1e-5).all() and (gap < 1e-5).any(1).all()


def asked(config, folder, stop=None, **options):
    "The strengths that the loop asks for, step by step, and whether the method's own progress is the same at its step."
    run = Run(config, folder, **options)
    ask, out = run.loader.augmentations, []
    run.loader.augmentations = lambda p: out.append(run.method.strength(p)) or ask(p)
    turns = run.method.turns

    def watched(views):
        assert run.method.strength(run.method.progress) == out[-1]
        yield from turns(views)

    run.method.turns = watched
    run.train(stop)
    return out


def test_the_loop_draws_at_the_strength_of_the_moment_after_a_restart_too(tmp_path):
    config = Config("dynacl", images=96, batch_size=32, epochs=2, threads=1, settings={"refresh": 0.0, "steps": 0})
    expected = [1 - i / 6 for i in range(6)]
    assert asked(config, tmp_path / "whole") == pytest.approx(expected)
    first = asked(config, tmp_path / "cut", 4, checkpoint_seconds=0)
    assert first[:4] == pytest.approx(expected[:4])
    assert asked(config, tmp_path / "cut") == pytest.approx(expected[4:])


def test_other_methods_are_drawn_as_ever():
    method = ACL(make()[0].encoder)
    assert {method.augmentation("strong1", p) for p in (0.0, 0.5, 0.99)} == {"simclr"}
    assert make(air="exact")[0].augmentation("clean", 0.5) == "none" and "clean" not in make()[0].views


# limits


@examples
@given(seeds, shares, st.sampled_from([{"final_strength": 1.0}, {"swap": 0.0}]))
def test_without_a_schedule_it_is_acl(seed, progress, how):
    "Objective and gradients, to the bit."
    method, x1, x2, x = make(seed=seed, progress=progress, **how, **HOW)
    base = make(ACL, seed=seed, **HOW)[0]
    (ours, _), (theirs, _) = step(method, x1, x2, x), turn(base, x1, x2)
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(v, list(m.parameters())) for v, m in ((ours, method), (theirs, base))]
    assert all(map(torch.equal, *grads))


@examples
@given(seeds, st.sampled_from(FORMS), shares)
def test_air_without_its_terms_is_twice_the_objective(seed, form, progress):
    plain, x1, x2, x = make(seed=seed, progress=progress, **HOW)
    with_air = make(seed=seed, progress=progress, air=form, lambda1=0.0, lambda2=0.0, **HOW)[0]
    assert torch.allclose(step(with_air, x1, x2, x)[0], 2 * step(plain, x1, x2, x)[0], rtol=1e-12)


def test_a_slow_encoder_that_has_not_fallen_behind_sees_what_the_trained_one_sees():
    method, x1, x2, x = make(momentum=0.9, **HOW)
    method.momentum = 0.0
    method.follow()
    assert all(map(torch.equal, method.slow.parameters(), [p for m in (method.encoder, method.projector) for p in m.parameters()]))
    mine = method.pair(x1, x2, ("adv", "adv"))[1]
    theirs = method.embed(x2, "adv")
    assert torch.equal(mine, theirs) and not mine.requires_grad


# the step, a second time


def written(method, x1, x2, x, w):
    "Loss and gradients of the two streams with the weights (2 - w) / 2 and w / 2, and of the network in training mode."
    moved, _, _ = written_acl_step(method, "ds", x1, x2, HOW["eps"], HOW["step_size"], HOW["steps"], +1)
    stream = lambda views, name: written_nt_xent(through(method, torch.cat(views), name).chunk(2), 0.5)
    total = ((2 - w) * stream((x1, x2), "clean") + w * stream(moved, "adv")) / 2
    return total, torch.autograd.grad(total, list(method.parameters()))


def agrees(cls, progress=0.3):
    ours, x1, x2, x = make(cls, progress=progress, refresh=0.0, **HOW)
    theirs = make(refresh=0.0, **HOW)[0]
    expected, grads = written(theirs, x1, x2, x, 1 + 2 / 3 * progress)
    value, player = step(start_zero(ours), x1, x2, x)
    own = torch.autograd.grad(value, list(ours.parameters()), allow_unused=True)
    same = lambda a, b: a is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    recipe = ours.augmentation("strong1", progress)
    drawn = recipe == weakened(RECIPES["simclr"], 1 - progress)
    return drawn and same(value, expected) and all(map(same, own, grads)) and player.sign == -1


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.9])
def test_the_step_is_the_written_one(progress):
    assert agrees(DynACL, progress)


class ConstantWeights(DynACL):
    def weights(self): return [0.5, 0.5]


class SwappedWeights(DynACL):
    def weights(self): return super().weights()[::-1]


class NoHalf(DynACL):
    def weights(self): return [2 * w for w in super().weights()]


class StrengthForward(DynACL):
    def strength(self, progress): return progress


class ConstantViews(DynACL):
    def augmentation(self, view, progress): return RECIPES[self.views[view]]


class SwapIgnored(DynACL):
    def attacked_weight(self): return 1 + (1 - self.strength(self.progress))


class FlippedSign(DynACL):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


@pytest.mark.parametrize("mutant", [ConstantWeights, SwappedWeights, NoHalf, StrengthForward, ConstantViews, SwapIgnored, FlippedSign])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# the slow encoder


def follows(cls):
    "Whether view 2 passes the slow network, in the attack too, and that one holds still, follows after the step, and is evaluated."
    method, x1, x2, x = make(cls, momentum=0.9, **HOW)
    start_zero(method)
    slow, before = [p.clone() for p in method.slow.parameters()], snapshot(method)

    def walk(part, x, name):
        for layer in part: x = layer.branches[name](x) if isinstance(layer, BranchedBatchNorm) else layer(x)
        return x

    fast = lambda x, name: through(method, x, name)
    late = lambda x, name: walk([*method.slow[0], *method.slow[1]], x, name)
    method.eval()
    moved = [x1, x2]
    for _ in range(HOW["steps"]):
        leaves = [v.clone().requires_grad_() for v in moved]
        grads = torch.autograd.grad(written_nt_xent((fast(leaves[0], "adv"), late(leaves[1], "adv")), 0.5), leaves)
        for v, x0 in ((0, x1), (1, x2)):
            t = moved[v] + HOW["step_size"] * grads[v].sign()
            moved[v] = torch.maximum(torch.minimum(t, x0 + 0.1), x0 - 0.1).clamp(0, 1)
    method.train()
    found = method.attack(x1, x2)
    ok = all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, moved, strict=True))
    ok &= all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    expected = 0.5 * sum(written_nt_xent((fast(a, n), late(b, n)), 0.5) for n, (a, b) in (("clean", (x1, x2)), ("adv", moved)))
    method.load_state_dict(before)
    optimizer = torch.optim.SGD(method.network.parameters(), 0.1)
    value = play(method, Views(strong1=x1, strong2=x2), {"network": optimizer})
    online = [p.detach() for m in (method.encoder, method.projector) for p in m.parameters()]
    ok &= torch.allclose(value[0], expected.detach(), rtol=1e-10) and not any(p.requires_grad for p in method.slow.parameters())
    ok &= all(torch.allclose(p, 0.9 * a + 0.1 * b, atol=1e-12) for p, a, b in zip(method.slow.parameters(), slow, online, strict=True))
    return ok and method.evaluated() is method.slow[0]


def test_the_slow_encoder(): assert follows(DynACL)


class BothThroughTheTrainedOne(DynACL):
    def pair(self, x1, x2, stream): return ACL.pair(self, x1, x2, stream)


class SwappedEncoders(DynACL):
    def pair(self, x1, x2, stream): return super().pair(x2, x1, stream)[::-1]


class NeverFollows(DynACL):
    def follow(self): pass


class FollowsTooFast(DynACL):
    def follow(self):
        super().follow()
        super().follow()


class SlowOnTheOtherBranch(DynACL):
    def pair(self, x1, x2, stream): return super().pair(x1, x2, (stream[0], {"adv": "clean", "clean": "adv"}[stream[1]]))


class TrainedOneEvaluated(DynACL):
    def evaluated(self): return self.encoder


class NoGradientThroughTheSlowOne(DynACL):
    def pair(self, x1, x2, stream): return super().pair(x1, x2.detach(), stream)


@pytest.mark.parametrize("mutant", [
    BothThroughTheTrainedOne, SwappedEncoders, NeverFollows, FollowsTooFast, SlowOnTheOtherBranch, TrainedOneEvaluated,
    NoGradientThroughTheSlowOne,
])
def test_mutants_of_the_slow_encoder_are_rejected(mutant):
    assert not follows(mutant)


def test_the_evaluated_encoder_survives_a_restart(tmp_path):
    config = Config("dynacl", images=64, epochs=1, batch_size=32, threads=1, settings={"steps": 1, "momentum": 0.5})
    trained, x = Run(config, tmp_path).train(), torch.rand(4, 1, 28, 28)
    restored, _ = restore(tmp_path)
    assert {m.active for m in restored.evaluated().modules() if isinstance(m, BranchedBatchNorm)} == {"adv"}
    assert torch.equal(trained.evaluated()(x), restored.evaluated()(x)) and not torch.equal(trained.encoder(x), trained.evaluated()(x))


# the contract of the attack


@examples
@given(seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 0.3]), st.integers(0, 3), st.sampled_from([1, -1]),
       st.sampled_from([0.0, 0.9]), st.booleans(), shares)
def test_contract(seed, norm, eps, steps, sign, momentum, training, progress):
    method, x1, x2, _ = make(seed=seed, norm=norm, eps=eps, steps=steps, sign=sign, momentum=momentum, progress=progress)
    method.train(training)
    method.encoder[2].train(not training)
    with untouched(method, x1, x2): found = method.attack(x1, x2)
    for x_adv, x in zip(found, (x1, x2), strict=True):
        assert ((x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad and not torch.equal(x_adv, x)
    method.generator = seeded(seed)
    assert all(map(torch.equal, method.attack(x1, x2), found))


@pytest.mark.parametrize(("how", "outer"), [
    ({}, 12), ({"momentum": 0.99}, 8), ({"air": "exact"}, 15), ({"air": "upstream", "momentum": 0.99}, 11),
])
def test_passes(how, outer):
    for steps in (0, 5):
        method, x1, x2, x = make(eps=0.1, steps=steps, **how)
        watched = [method.encoder] if method.slow is None else [method.encoder, method.slow[0]]
        with count_passes(*watched) as passes:
            play(method, Views(strong1=x1, strong2=x2, clean=x), {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
        assert passes.units(6) == 4 * steps + outer


# the regularisers


def written_invariance(z, tau, form):
    "SIR and AIR with loops over the batch."
    n = len(z[0])
    cos = lambda a, b: a @ b / a.norm() / b.norm()
    def over_batch(a, b):
        e = [math.exp(cos(a[i], b[i]) / tau) for i in range(n)]
        return [v / sum(e) for v in e]
    z1, z2, origin, adv1, adv2 = z
    def kl(q, p): return sum(b * (math.log(b) - (a if form == "upstream" else math.log(a))) for a, b in zip(p, q, strict=True))
    p, q = ([a * b for a, b in zip(over_batch(adv, origin), over_batch(adv, view), strict=True)] for adv, view in ((adv1, z1), (adv2, z2)))
    if form == "exact": p, q = ([v / sum(t) for v in t] for t in (p, q))
    return kl(over_batch(z2, origin), over_batch(z1, origin)), kl(q, p)


def right(function, seed, form, tau):
    z = torch.randn(5, 7, 4, dtype=torch.float64, generator=seeded(seed))
    close = lambda a, b: math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return all(map(close, function(*z, tau, form), written_invariance(z, tau, form)))


@examples
@given(seeds, st.sampled_from(FORMS), st.sampled_from([0.1, 0.5, 1.0]))
def test_regularisers(seed, form, tau): assert right(invariance, seed, form, tau)


def swapped_views(z1, z2, o, a1, a2, tau, form): return invariance(z2, z1, o, a2, a1, tau, form)
def no_consistency(z1, z2, o, a1, a2, tau, form): return invariance(o, o, o, a1, a2, tau, form)
def crossed_consistency(z1, z2, *rest): return invariance(z1, z2, *rest)[0], invariance(z2, z1, *rest)[1]
def no_temperature(*z_tau_form): return invariance(*z_tau_form[:5], 1.0, z_tau_form[6])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mutant", [swapped_views, no_consistency, crossed_consistency, no_temperature])
def test_mutants_of_the_regularisers_are_rejected(mutant, form): assert not right(mutant, 0, form, 0.5)


@examples
@given(seeds)
def test_exact_divergences_are_divergences(seed):
    z = torch.randn(5, 9, 4, dtype=torch.float64, generator=seeded(seed))
    assert all(v >= 0 for v in invariance(*z))
    assert all(abs(v) < 1e-12 for v in invariance(z[0], z[0], z[2], z[3], z[3]))
    log_p = agreement(z[0], z[1])
    assert abs(divergence(log_p, log_p)) < 1e-12 and divergence(log_p, log_p, upstream=True) < -1
    assert math.isclose(agreement(z[0], z[1]).exp().sum(), 1)


@examples
@given(seeds)
def test_embeddings_of_half_precision(seed):
    "Views that resemble each other have a small divergence, no negative one: the cosines are not rounded as the embeddings are."
    g = seeded(seed)
    z = (torch.randn(64, 16, generator=g) + 0.1 * torch.randn(5, 64, 16, generator=g)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16): values = invariance(*z)
    for value, exact in zip(values, invariance(*z.double()), strict=True):
        assert value.dtype == torch.float32 and value >= 0 and math.isclose(value, exact, rel_tol=0, abs_tol=2e-6)


@examples
@given(seeds, st.sampled_from(FORMS), st.floats(0, 1), st.floats(0, 2), st.floats(0, 2))
def test_the_whole_loss(seed, form, weight, lambda1, lambda2):
    z = torch.randn(5, 6, 4, dtype=torch.float64, generator=seeded(seed))
    total, parts = air_loss(*z, 0.5, weight, lambda1, lambda2, form)
    sir, air = written_invariance(z, 0.5, form)
    expected = (1 - weight) * written_nt_xent(z[:2], 0.5) + (1 + weight) * written_nt_xent(z[3:], 0.5) + lambda1 * sir + lambda2 * air
    assert math.isclose(total, expected, rel_tol=1e-9, abs_tol=1e-12) and set(parts) == {"nat", "adv", "SIR", "AIR"}


@pytest.mark.parametrize("form", FORMS)
def test_the_method_hands_its_views_to_the_loss(form):
    method, x1, x2, x = make(air=form, lambda1=0.3, lambda2=0.7, progress=0.5, refresh=0.0, **HOW)
    start_zero(method)
    moved = method.attack(x1, x2)
    value, _ = step(method, x1, x2, x)  # first: the next passes move the statistics that an attack reads
    both = lambda views, name: through(method, torch.cat(views), name).chunk(2)
    z = [*both([x1, x2], "clean"), through(method, x, "clean"), *both(moved, "adv")]
    expected, _ = air_loss(*z, 0.5, 1 / 3, 0.3, 0.7, form)
    assert torch.allclose(value, expected, rtol=1e-10)
    assert {"nat", "adv", "SIR", "AIR", "strength"} <= set(method.logs)


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"final_strength": 1.5}, "final_strength must be in"), ({"refresh": -0.1}, "refresh must be in"),
    ({"momentum": 2.0}, "momentum must be in"), ({"momentum": 1.0}, "never moves"), ({"swap": -1.0}, "swap must be >= 0"),
    ({"air": "maybe"}, "air must be"), ({"steps": -1}, "steps must be"), ({"norm": "l3"}, "unknown norm"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="strength must be in"): weakened(RECIPES["simclr"], -0.1)
    with pytest.raises(ValueError, match="form must be"): invariance(*torch.randn(5, 3, 2), form="exactly")


def test_card():
    assert get_method("DynACL") is methods()["dynacl"] is DynACL
    assert DynACL.card.tables == () and DynACL.card.sign == 1 and (DynACL.card.type, DynACL.card.level) == ("memory-free", "input")
    known = settings_of(DynACL)
    assert (known["final_strength"], known["refresh"], known["momentum"], known["air"]) == (0.0, 0.05, 0.0, "none")
    assert replace(Config("dynacl"), settings={"air": "upstream"}).settings["air"] == "upstream"
