"BYORL: limits, the contract of its attack, its step written out a second time, and mutants that the same checks must reject."
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from common import (
    ORDER,
    examples,
    optimizers,
    seeded,
    seeds,
    signs,
    snapshot,
    start_zero,
    untouched,
    written_byol_step,
    written_embedding,
    written_head,
)
from common import make_byol as make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from advssl.attack import frozen
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.byol import BYOL, bootstrap_loss
from advssl.methods.byorl import BYORL

norms = st.sampled_from(["linf", "l2", "l1"])


def made(cls=BYORL, **options): return make(cls, **{"momentum": 0.8} | options)


# a second implementation, with loops, of the attack; the step is BYOL's with other views


def evaluated(state, x):
    "The online prediction in evaluation mode: statistics are the running ones, put into the weights of `written_embedding`'s formula."
    def norm(h, name):
        h = (h - state[f"{name}.running_mean"]) / (state[f"{name}.running_var"] + 1e-5).sqrt()
        return h * state[f"{name}.weight"] + state[f"{name}.bias"]
    h = torch.tanh(norm(x.flatten(1) @ state["encoder.1.weight"].T + state["encoder.1.bias"], "encoder.2"))
    for name in ("projector", "predictor"):
        h = norm(h @ state[f"{name}.0.weight"].T, f"{name}.1").clamp(min=0) @ state[f"{name}.3.weight"].T + state[f"{name}.3.bias"]
    return h


def in_batch(state, x):
    "The same with the statistics of the batch."
    return written_head(state, written_embedding(state, x, ("encoder", "projector")), "predictor")


def written_attack(state, x, other, norm, eps, alpha, steps, sign, predict=evaluated):
    "Image by image and from a zero start, on the cosine, with the target forwarded in every step."
    x_adv = x.clone()
    for _ in range(steps):
        leaf = x_adv.clone().requires_grad_()
        z = written_embedding(state, other, ("target.module.0", "target.module.1"))
        cosine = sum(a @ b / a.norm() / b.norm() for a, b in zip(predict(state, leaf), z, strict=True))
        (g,) = torch.autograd.grad(cosine, leaf)
        for i in range(len(x)):
            direction = -g[i].sign() if norm == "linf" else -g[i] / g[i].norm()
            delta = x_adv[i] - x[i] + sign * alpha * direction
            delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1.0, eps / delta.norm().item())
            x_adv[i] = (x[i] + delta).clamp(0, 1)
    return x_adv


HOW = {"linf": {"eps": 0.1, "steps": 3, "step_size": 0.04}, "l2": {"eps": 0.5, "steps": 3, "step_size": 0.25}}


def agrees(cls, norm="linf", sign=1, **options):
    "Whether two steps lead to the written losses and states, with traces of the attack nowhere."
    how = HOW[norm]
    method, x1, x2 = made(cls, norm=norm, sign=sign, **how, **options)
    start_zero(method)
    state, views = snapshot(made(norm=norm, **how)[0]), Views(strong1=x1, strong2=x2)
    predict = in_batch if options.get("batch_statistics") else evaluated
    for method.progress, m in ((0.0, 0.8), (0.5, 0.9)):
        numbers = how["eps"], how["step_size"], how["steps"], sign
        moved = [written_attack(state, a, b, norm, *numbers, predict) for a, b in ((x1, x2), (x2, x1))]
        before, z = snapshot(method), method.target(x2)
        restored = snapshot(method)
        found = method.attack(x1, z)
        if found.requires_grad or not torch.allclose(found, moved[0], rtol=0, atol=1e-9): return False
        if not all(torch.equal(v, restored[k]) for k, v in method.state_dict().items()): return False
        if not all(mod.training for mod in method.modules()) or any(p.grad is not None for p in method.parameters()): return False
        method.load_state_dict(before)
        expected, state = written_byol_step(state, x1, x2, m, moved=moved)
        (loss,) = play(method, views, optimizers(method))
        ours = method.state_dict()
        if not torch.allclose(loss, expected, rtol=1e-8): return False
        if not all(torch.allclose(ours[k].double(), v.double(), rtol=1e-7, atol=1e-9) for k, v in state.items()): return False
    return True


@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"sign": -1}, {"norm": "l2", "sign": -1}, {"batch_statistics": True}], ids=str)
def test_two_steps_are_the_written_ones(options): assert agrees(BYORL, **options)


class FlippedSign(BYORL):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class OtherMode(BYORL):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.batch_statistics = not self.batch_statistics


class AttackWithoutFreezing(BYORL):
    def attack(self, x, other):
        self.eval()
        return self.player.find(lambda t: bootstrap_loss(self.predict(t), other), x)


class GraphOfTheAttackKept(BYORL):
    def attack(self, x, other): return super().attack(x, other).requires_grad_()


class WithoutThePredictor(BYORL):
    def attack(self, x, other):
        with frozen(self.embed): return self.player.find(lambda t: bootstrap_loss(self.embed(t), other), x)


class NoAttack(BYORL):
    def attack(self, x, other): return x


class OneViewAttacked(BYORL):
    def branches(self, pair):
        q, z = super().branches(pair)
        return [q[0], self.predict(pair[1])], z


class AttackAgainstItsOwnTarget(BYORL):
    def branches(self, pair):
        z = [self.target(v) for v in pair]
        return [self.predict(self.attack(v, other)) for v, other in zip(pair, z, strict=True)], z


class SecondAttackMeetsMovedStatistics(BYORL):
    def branches(self, pair):
        z, q = [self.target(v) for v in pair], []
        for v, other in zip(pair, z[::-1], strict=True): q.append(self.predict(self.attack(v, other)))
        return q, z


class TargetSeesTheAttackedView(BYORL):
    def branches(self, pair):
        z = [self.target(v) for v in pair]
        x_adv = [self.attack(v, other) for v, other in zip(pair, z[::-1], strict=True)]
        return [self.predict(v) for v in x_adv], [self.target(v) for v in x_adv]


class WithTheCleanPair(BYORL):
    def __init__(self, *args, **options): super().__init__(*args, **options | {"clean_weight": 0.5})


class AttackOnTheTarget(BYORL):
    def __init__(self, *args, **options): super().__init__(*args, **options | {"attack_target": True})


class BallOfTheOtherNorm(BYORL):
    def __init__(self, *args, norm="linf", **options): super().__init__(*args, norm={"linf": "l2", "l2": "linf"}[norm], **options)


class NoUpdateOfTheTarget(BYORL):
    def turns(self, views): yield self.objective([views.strong1, views.strong2]), self.network


@pytest.mark.parametrize("mutant", [
    FlippedSign, OtherMode, AttackWithoutFreezing, GraphOfTheAttackKept, WithoutThePredictor, NoAttack, OneViewAttacked,
    AttackAgainstItsOwnTarget, SecondAttackMeetsMovedStatistics, TargetSeesTheAttackedView, WithTheCleanPair, AttackOnTheTarget,
    BallOfTheOtherNorm, NoUpdateOfTheTarget,
])
def test_mutants_are_rejected(mutant): assert not agrees(mutant)


# limits


LIMITS = [{"norm": "linf"}, {"norm": "l2"}, {"batch_statistics": True}, {"attack_target": True}, {"keep": "best"}]


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_without_a_ball_it_is_byol_to_the_bit(options):
    (ours, x1, x2), (base, *_) = made(eps=0.0, steps=2, **options), made(BYOL)
    views = Views(strong1=x1, strong2=x2)
    for ours.progress in (0.0, 0.3):
        base.progress = ours.progress
        a, b = (play(m, views, optimizers(m)) for m in (ours, base))
        assert torch.equal(a, b)
        assert all(torch.equal(v, base.state_dict()[k]) for k, v in ours.state_dict().items())


def test_no_steps_leave_random_noise():
    method, x1, x2 = made(eps=0.1, steps=0)
    z = method.target(x2)
    noise = method.attack(x1, z) - x1
    assert 0 < noise.abs().max() <= 0.1 + 1e-12
    assert torch.equal(start_zero(method).attack(x1, z), x1)


@examples
@given(seeds, st.sampled_from([0.0, 0.3, 2.0]))
def test_the_clean_pair_is_added_with_its_weight(seed, weight):
    (with_it, x1, x2), (without, *_), (base, *_) = (made(cls, seed=seed, **how) for cls, how in
        ((BYORL, {"clean_weight": weight, "eps": 0.1, "steps": 2}), (BYORL, {"eps": 0.1, "steps": 2}), (BYOL, {})))
    for m in (with_it, without): start_zero(m)
    total = without.objective([x1, x2]) + weight * base.objective([x1, x2])
    assert torch.allclose(with_it.objective([x1, x2]), total, rtol=1e-12)


def test_attack_on_the_target_moves_the_label_only():
    method, x1, x2 = made(eps=0.1, steps=3, attack_target=True)
    start_zero(method)
    state = snapshot(method)
    twin = made(eps=0.1, steps=3, attack_target=True)[0]
    twin.load_state_dict(state)
    q = [twin.predict(v) for v in (x1, x2)]
    moved = []
    for x, other in ((x1, q[1]), (x2, q[0])):
        x_adv = x
        for _ in range(3):
            leaf = x_adv.clone().requires_grad_()
            with frozen(twin.target): value = bootstrap_loss(twin.target.module(leaf), other.detach()).sum()
            (g,) = torch.autograd.grad(value, leaf)
            x_adv = (x + (x_adv - x + 2.5 * 0.1 / 3 * g.sign()).clamp(-0.1, 0.1)).clamp(0, 1)
        moved.append(x_adv)
    z = [twin.target(v) for v in moved]
    expected = twin.loss(q, z)
    objective, mover = next(method.turns(Views(strong1=x1, strong2=x2)))
    assert torch.allclose(objective, expected, rtol=1e-9)
    assert objective > twin.loss(q, [twin.target(v) for v in (x1, x2)])
    pairs = (objective, method), (expected, twin)
    grads = [torch.autograd.grad(value, m.network.parameters(), retain_graph=True) for value, m in pairs]
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(*grads, strict=True))
    objective.backward()
    assert all(p.grad is None for p in method.target.parameters())


@examples
@given(seeds, st.sampled_from(["linf", "l2"]), signs)
def test_the_best_iterate_is_at_least_the_last(seed, norm, sign):
    reached = {}
    for keep in ("last", "best"):
        method, x1, x2 = made(seed=seed, norm=norm, eps=0.3, steps=4, sign=sign, keep=keep)
        z = method.target(x2)
        x_adv = method.attack(x1, z)
        reached[keep] = sign * bootstrap_loss(method.eval().predict(x_adv), z)
    assert (reached["best"] >= reached["last"] - 1e-12).all()


# the contract of the attack


@examples
@given(seeds, norms, st.sampled_from([1e-3, 8 / 255, 0.3]), st.integers(0, 3), signs, st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0.0, 0.01, 1.0]))
def test_contract(seed, norm, eps, steps, sign, training, batch_statistics, attack_target, dtype, step_size):
    how = {"norm": norm, "eps": eps, "steps": steps, "sign": sign, "step_size": step_size}
    method, x1, x2 = made(seed=seed, dtype=dtype, batch_statistics=batch_statistics, attack_target=attack_target, **how)
    method.train(training)
    method.encoder[2].train(not training)  # a mixed state must come back too
    method.predictor[0].weight.requires_grad_(False)
    other = torch.randn(6, 5, dtype=dtype)
    with untouched(method, x1, other): found = method.attack(x1, other)
    assert ((found - x1).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
    assert found.dtype == dtype and found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    method.generator = seeded(seed)
    assert torch.equal(method.attack(x1, other), found)


@examples
@given(seeds, st.sampled_from(["linf", "l2"]))
def test_the_sign_chooses_the_direction(seed, norm):
    "Small steps from the view itself: up raises the loss of every image, down lowers it."
    how = {"norm": norm, "eps": 1e-5, "steps": 1, "step_size": 1e-5}
    (up, x1, x2), (down, _, _) = made(seed=seed, sign=1, **how), made(seed=seed, sign=-1, **how)
    x1, z = 0.1 + 0.8 * x1, up.target(x2)
    higher, lower = (start_zero(m).attack(x1, z) for m in (up, down))
    assert torch.allclose(higher - x1, x1 - lower, atol=1e-12)
    up.eval()
    values = [bootstrap_loss(up.predict(x), z) for x in (lower, x1, higher)]
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()


def test_in_evaluation_mode_every_image_is_attacked_alone():
    method, x1, x2 = made(eps=0.1, steps=3)
    z = start_zero(method).target(x2)
    whole = method.attack(x1, z)
    assert torch.allclose(whole, torch.cat([method.attack(x1[i : i + 1], z[i : i + 1]) for i in range(6)]), atol=1e-12)
    assert torch.equal(whole, method.eval().attack(x1, z))
    method.batch_statistics = True
    assert (method.attack(x1, z) - whole).abs().max() > 1e-3


@examples
@given(seeds)
def test_the_three_objectives_are_one(seed):
    "Loss, cosine and angle lead to one image, as only directions count."
    for norm in ("linf", "l2"):
        method, x1, x2 = made(seed=seed, norm=norm, eps=0.2, steps=3)
        z, method = method.target(x2), start_zero(method)
        found = method.attack(x1, z)
        for of_cosine in (torch.neg, torch.arccos):
            with frozen(method.encoder, method.projector, method.predictor):
                objective = lambda x, m=method, z=z, f=of_cosine: f(F.cosine_similarity(m.predict(x), z))
                assert torch.allclose(method.player.find(objective, x1), found, atol=1e-8)


# the step


@pytest.mark.parametrize(("options", "units"), [
    ({"steps": 0}, 8), ({"steps": 1}, 12), ({"steps": 5}, 28), ({"steps": 5, "keep": "best"}, 30), ({"steps": 2, "clean_weight": 1.0}, 22),
    ({"steps": 5, "attack_target": True}, 28), ({"steps": 5, "batch_statistics": True}, 28)], ids=str)
def test_passes(options, units):
    method, x1, x2 = made(eps=0.1, **options)
    with count_passes(method.encoder, method.target.module[0]) as passes: play(method, Views(strong1=x1, strong2=x2), optimizers(method))
    assert passes.units(6) == units
    assert passes.backward_weight == 12 + 12 * bool(options.get("clean_weight"))


def test_the_target_looks_once_at_each_view_and_both_attacks_meet_one_network():
    method, x1, x2 = made(eps=0.1, steps=3)
    seen, statistics = [], []
    method.target.module.register_forward_pre_hook(lambda m, args: seen.append((args[0].clone(), m.training)))
    method.encoder.register_forward_hook(lambda m, *_: statistics.append(m[2].running_mean.clone()) if not m.training else None)
    method.objective([x1, x2])
    assert [torch.equal(x, v) and mode for (x, mode), v in zip(seen, (x1, x2), strict=True)] == [True, True]
    assert len(statistics) == 6 and all(torch.equal(s, statistics[0]) for s in statistics)


def test_a_player_turns_the_predictions_away_and_the_log_says_so():
    logs = {}
    for sign in (1, -1):
        method, x1, x2 = made(eps=0.2, steps=5, sign=sign)
        loss, mover = next(method.turns(Views(strong1=x1, strong2=x2)))
        assert mover.sign == -1 and set(method.logs) == {"spread", "attacked_similarity"}
        assert not any(v.requires_grad for v in method.logs.values())
        logs[sign] = method.logs["attacked_similarity"]
    assert logs[1] < logs[-1]


def test_autocast_trains_every_weight():
    method, x1, x2 = made(dtype=torch.float32, eps=0.1, steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16): loss, mover = next(method.turns(Views(strong1=x1, strong2=x2)))
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in mover.parameters())


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"steps": -1}, "steps must be a whole number"), ({"norm": "l3"}, "unknown norm"),
    ({"eps": -0.1}, "eps"), ({"step_size": -0.1}, "sign chooses the direction"), ({"keep": "first"}, "keep must be"),
    ({"clean_weight": 1.0, "attack_target": True}, "choose one of them"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): made(**wrong)


def test_card():
    assert get_method("BYORL") is methods()["byorl"] is BYORL
    card = BYORL.card
    assert (card.type, card.base, card.level, card.combined) == ("memory-free", "BYOL", "input", "no")
    assert (card.sign, card.tables, card.source) == (1, (1,), "")
    known = settings_of(BYORL)
    assert (known["norm"], known["eps"], known["steps"], known["sign"]) == ("linf", 8 / 255, 40, 1)
    assert (known["clean_weight"], known["attack_target"], known["batch_statistics"]) == (0.0, False, False)
    assert set(settings_of(BYOL)) < set(known)


def test_a_start_can_be_given():
    "So that an adaptive or a warm start needs no code here."
    method, x1, x2 = made(eps=0.1, steps=0)
    method.player = replace(method.player, start=torch.full_like(x1, 0.05))
    assert torch.allclose(method.attack(x1, method.target(x2)), (x1 + 0.05).clamp(0, 1)) and isinstance(method.target.module, nn.Module)
