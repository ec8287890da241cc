"RoCL: limits, the contract of its attack, its step written out a second time, and mutants that the same checks must reject."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import ORDER, examples, seeded, seeds, signs, snapshot, start_zero, turn, untouched, written_nt_xent
from common import make_contrastive as make
from hypothesis import given
from hypothesis import strategies as st
from parity_models import TanhEncoder
from torch import nn

from advssl.attack import frozen
from advssl.augment import Augment
from advssl.contrast import nt_xent
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.rocl import RoCL, smoothed_features

# a second implementation, with loops


def written_step(method, x1, x2, eps, alpha, steps, sign, weight, tau=0.5):
    "The adversary from a zero start and the objective, both views forwarded in every step, nothing shared, nothing reused."
    f = lambda t: method.projector(method.encoder(t))
    x = x1
    method.eval()
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(written_nt_xent(f(torch.cat([leaf, x2])).chunk(2), tau), leaf)
        x = torch.maximum(torch.minimum(x + sign * alpha * g.sign(), x1 + eps), x1 - eps).clamp(0, 1)
    method.train()
    z1, z2, z_adv = f(torch.cat([x1, x2, x])).chunk(3)
    objective = written_nt_xent((z1, z2, z_adv), tau) + weight * written_nt_xent((z_adv, z2), tau)
    return x, objective, torch.autograd.grad(objective, list(method.parameters()))


HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04, "weight": 0.25}


def agrees(cls, sign=1):
    "Whether a method's attack, its objective, its gradients, its traces and its statistics are those of `written_step`."
    ours, x1, x2 = make(cls, sign=sign, **HOW)
    theirs = make(sign=sign, **HOW)[0]
    x_adv, objective, grads = written_step(theirs, x1, x2, HOW["eps"], HOW["step_size"], HOW["steps"], sign, HOW["weight"])
    start_zero(ours)
    before = snapshot(ours)
    found = ours.attack(x1, x2)
    traces = (
        not found.requires_grad and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None and p.requires_grad for p in ours.parameters()) and all(m.training for m in ours.modules())
    )
    value, player = turn(ours, x1, x2)
    own = torch.autograd.grad(value, list(ours.parameters()), allow_unused=True)
    same = lambda a, b: a is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    return (
        traces and player.sign == -1 and same(found, x_adv) and same(value, objective)
        and all(same(a, b) for a, b in zip(own, grads, strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_step_is_the_written_one(sign):
    assert agrees(RoCL, sign)


class NoRegulariser(RoCL):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weight = 0.0


class RegulariserOnTheCleanPair(RoCL):
    def loss(self, *z):
        if len(z) == 3: self.clean = z[0]
        return super().loss(self.clean, z[1]) if len(z) == 2 and self.training and self.encoder.training else super().loss(*z)


class FlippedSign(RoCL):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class AttackInTrainMode(RoCL):
    def attack(self, x1, x2):
        with frozen(self.encoder, self.projector, train=True):
            target = self.embed(x2).detach()
            return self.player.find(lambda x: self.loss(self.embed(x), target), x1)


class AttackWithoutFreezing(RoCL):
    def attack(self, x1, x2):
        self.eval()
        target = self.embed(x2).detach()
        return self.player.find(lambda x: self.loss(self.embed(x), target), x1)


class GraphOfTheAttackKept(RoCL):
    def attack(self, x1, x2): return super().attack(x1, x2).requires_grad_()


class OtherView(RoCL):
    def attack(self, x1, x2): return super().attack(x2, x1)


class NoAttack(RoCL):
    def attack(self, x1, x2): return x1


class AttackedViewOnly(RoCL):
    def loss(self, *z): return super().loss(*z[-2:])


class MeanOfPositives(RoCL):
    def __init__(self, *args, **options): super().__init__(*args, positives="mean", **options)


class StoppedColumns(RoCL):
    def __init__(self, *args, **options): super().__init__(*args, stop_columns=True, **options)


class TwoPasses(RoCL):
    def turns(self, views):
        x1, x2 = views.strong1, views.strong2
        x_adv = self.attack(x1, x2)
        (z1, z2), z_adv = self.embed(torch.cat([x1, x2])).chunk(2), self.embed(x_adv)
        yield self.loss(z1, z2, z_adv) + self.weight * self.loss(z_adv, z2), self.network


@pytest.mark.parametrize("mutant", [
    NoRegulariser, RegulariserOnTheCleanPair, FlippedSign, AttackInTrainMode, AttackWithoutFreezing, GraphOfTheAttackKept, OtherView,
    NoAttack, AttackedViewOnly, MeanOfPositives, StoppedColumns, TwoPasses,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# limits


@examples
@given(seeds, st.integers(0, 4), signs, st.sampled_from([0.0, 1 / 256, 1.0]), st.sampled_from(["linf", "l2", "l1"]))
def test_without_a_ball_the_third_view_is_the_first(seed, steps, sign, weight, norm):
    method, x1, x2 = make(seed=seed, eps=0.0, steps=steps, sign=sign, weight=weight, norm=norm)
    assert torch.equal(method.attack(x1, x2), x1)
    value, _ = turn(method, x1, x2)
    with torch.no_grad(): z1, z2, _ = method.embed(torch.cat([x1, x2, x1])).chunk(3)
    expected = nt_xent(torch.stack([z1, z2, z1]), positives="sum") + weight * nt_xent(torch.stack([z1, z2]))
    assert torch.allclose(value, expected, rtol=1e-10)


def test_no_steps_leave_random_noise():
    method, x1, x2 = make(eps=0.1, steps=0)
    noise = method.attack(x1, x2) - x1
    assert 0 < noise.abs().max() <= 0.1 + 1e-12
    assert torch.equal(start_zero(method).attack(x1, x2), x1)


def test_settings_reach_the_loss():
    z = torch.randn(3, 6, 5, dtype=torch.float64)
    for how in ({"temperature": 0.1}, {"positives": "inside"}, {"positives": "mean"}, {"stop_columns": True}):
        assert torch.equal(make(**how)[0].loss(*z), nt_xent(z, **{"temperature": 0.5, "positives": "sum"} | how))
    assert torch.allclose(2 * make(positives="mean")[0].loss(*z), make()[0].loss(*z))
    official = make(upstream=True)[0]
    assert torch.equal(official.loss(*z), nt_xent(z, 0.5, positives="sum", stop_columns=True, guard=1e-8))
    assert torch.allclose(official.loss(*z), make()[0].loss(*z), rtol=1e-5)  # the same value, another gradient
    leaf = z.requires_grad_()
    ours, theirs = (torch.autograd.grad(m.loss(*leaf), leaf)[0] for m in (make()[0], official))
    assert 0.3 < theirs.norm() / ours.norm() < 0.8


# the contract of the attack


@examples
@given(seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 8 / 255, 0.3]), st.integers(0, 3), signs, st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0.0, 0.01, 1.0]))
def test_contract(seed, norm, eps, steps, sign, training, dtype, step_size):
    how = {"norm": norm, "eps": eps, "steps": steps, "sign": sign, "step_size": step_size}
    method, x1, x2 = make(seed=seed, dtype=dtype, **how)
    method.train(training)
    method.encoder[2].train(not training)  # a mixed state must come back too
    method.projector[0].bias.requires_grad_(False)
    with untouched(method, x1, x2): found = method.attack(x1, x2)
    assert ((found - x1).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
    assert found.dtype == dtype and found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    method.generator = seeded(seed)
    assert torch.equal(method.attack(x1, x2), found)


@examples
@given(seeds)
def test_the_sign_chooses_the_direction(seed):
    "Small steps from the view itself: up raises the loss of the pair, down lowers it, by the same amount to first order."
    how = {"eps": 1e-5, "steps": 1, "step_size": 1e-5}
    (up, x1, x2), (down, _, _) = make(seed=seed, sign=1, **how), make(seed=seed, sign=-1, **how)
    x1 = 0.1 + 0.8 * x1
    higher, lower = (start_zero(m).attack(x1, x2) for m in (up, down))
    assert torch.allclose(higher - x1, x1 - lower, atol=1e-12)
    up.eval()
    pair = lambda x: up.loss(up.embed(x), up.embed(x2)).item()
    assert pair(lower) < pair(x1) < pair(higher)


def test_the_attack_does_not_depend_on_the_batch_statistics():
    "In evaluation mode an image's embedding is its own: whatever the mode before, and whoever sits beside it."
    method, x1, x2 = make(eps=0.1, steps=3)
    start_zero(method)
    assert torch.equal(method.train().attack(x1, x2), method.eval().attack(x1, x2))


def test_the_whole_network_holds_still():
    "While the player looks, encoder and projector are in evaluation mode and no weight asks for a gradient."
    method, x1, x2 = make(eps=0.1, steps=2)
    looks = []
    for part in (method.encoder, method.projector):
        part.register_forward_hook(lambda m, *_: looks.append(m.training or any(p.requires_grad for p in m.parameters())))
    method.attack(x1, x2)
    assert looks == [False] * 6


def test_passes_and_one_look_at_the_target():
    for steps in (0, 3):
        method, x1, x2 = make(eps=0.1, steps=steps)
        with count_passes(method.encoder) as passes: method.attack(x1, x2)
        assert (passes.forward, passes.backward_input, passes.backward_weight) == ((steps + 1) * 6, steps * 6, 0)
        with count_passes(method.encoder) as passes:
            play(method, Views(strong1=x1, strong2=x2), {"network": torch.optim.SGD(method.parameters(), 0.1)})
        assert passes.units(6) == 2 * steps + 1 + 9


def test_batch_norm_sees_the_three_views_once():
    method, x1, x2 = make(eps=0.1, steps=2)
    layer = method.encoder[2]
    layer.reset_running_stats()
    start_zero(method)
    x_adv = method.attack(x1, x2)
    turn(method, x1, x2)
    assert layer.num_batches_tracked == 1
    seen = method.encoder[1](torch.cat([x1, x2, x_adv]).flatten(1))
    assert torch.allclose(layer.running_mean, 0.1 * seen.mean(0), rtol=1e-9)


def test_autocast_trains_every_weight():
    method, x1, x2 = make(dtype=torch.float32, eps=0.1, steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16): value, _ = turn(method, x1, x2)
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_a_player_makes_the_pair_less_alike_and_the_log_says_so():
    method, x1, x2 = make(eps=0.2, steps=5)
    turn(method, x1, x2)
    assert set(method.logs) == {"pair_similarity", "attacked_similarity"}
    assert method.logs["attacked_similarity"] < method.logs["pair_similarity"]
    assert not any(v.requires_grad for v in method.logs.values())


# the official code


def official_cases():
    path = Path(__file__).parent / "parity" / "attack_rocl.json"
    yield from json.loads(path.read_text())["cases"]


@pytest.mark.parametrize("case", official_cases(), ids=lambda case: case["label"])
def test_the_method_itself_finds_the_official_perturbation(case):
    "With `upstream` and the official settings; images in [0, 1], where the order of clip and projection does not matter."
    given, expected = case["inputs"], case["outputs"]
    array = lambda value: torch.tensor(value, dtype=torch.float64)
    encoder = TanhEncoder({k: array(v) for k, v in given["encoder"].items()})
    encoder.out_dim = 8
    how = {"eps": given["epsilon"], "steps": given["steps"], "step_size": given["alpha"], "temperature": given["temperature"]}
    method = RoCL(encoder, upstream=True, weight=1 / given["weight"], **how)
    method.projector = nn.Identity()
    method.player = replace(method.player, start=array(given["delta0"]))
    x_adv = method.attack(array(given["x1"]), array(given["x2"]))
    assert torch.allclose(x_adv, array(expected["x_adv_after_each_step"][-1]), rtol=0, atol=1e-12)
    partner = array(given["x2"] if given["regularizer"] == "other" else given["x1"])
    reg = method.weight * method.loss(method.embed(x_adv), method.embed(partner))
    reg.backward()
    assert abs(reg.item() - expected["reg_loss"]) < 1e-12
    for name, grad in encoder.grads().items(): assert torch.allclose(grad, array(expected["reg_grads"][name]), rtol=1e-8, atol=1e-12)


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"steps": -1}, "steps must be a whole number"), ({"norm": "l3"}, "unknown norm"),
    ({"eps": -0.1}, "eps"), ({"step_size": -0.1}, "sign chooses the direction"),
    ({"weight": -0.1}, "weight must be >= 0"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


@pytest.mark.parametrize(("wrong", "message"), [({"positives": "max"}, "positives must be"), ({"temperature": 0.0}, "temperature must be")])
def test_wrong_settings_of_the_loss(wrong, message):
    method, x1, x2 = make(**wrong)
    with pytest.raises(ValueError, match=message): turn(method, x1, x2)


def test_card():
    assert get_method("RoCL") is methods()["rocl"] is RoCL
    card = RoCL.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("memory-free", "CL", "input", "yes", 1, (1, 2))
    known = settings_of(RoCL)
    assert (known["norm"], known["eps"], known["steps"], known["weight"], known["sign"]) == ("linf", 8 / 255, 7, 1 / 256, 1)


# smoothed inference


@examples
@given(seeds, st.integers(1, 4))
def test_smoothed_features(seed, samples):
    method, x1, _ = make(seed=seed)
    encoder, crops = method.encoder.eval(), Augment("simclr", 2)
    x = x1.float().requires_grad_()
    encoder.float()
    smooth = smoothed_features(encoder, x, crops, samples, seeded(seed))
    generator = seeded(seed)
    assert torch.allclose(smooth, torch.stack([encoder(crops(x, generator)) for _ in range(samples)]).mean(0), atol=1e-6)
    assert torch.equal(smooth, smoothed_features(encoder, x, crops, samples, seeded(seed)))
    assert torch.autograd.grad(smooth.sum(), x)[0].isfinite().all()
    assert torch.allclose(smoothed_features(encoder, x, lambda t, g: t, samples), encoder(x), atol=1e-6)


def test_smoothing_approaches_the_expectation():
    "The average of 400 transformations is nearer to that of 4,000 others than a single one is."
    x, noise = torch.rand(1, 3, 2, 2), lambda t, g: t + torch.randn(t.shape, generator=g)
    smooth = lambda samples, seed: smoothed_features(nn.Flatten(), x, noise, samples, seeded(seed))
    assert (smooth(400, 1) - smooth(4000, 2)).norm() < 0.2 * (smooth(1, 1) - smooth(4000, 2)).norm()
    with pytest.raises(ValueError, match="number of transformations"): smoothed_features(nn.Flatten(), x, noise, 0)
