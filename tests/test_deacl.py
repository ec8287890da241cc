"DeACL: limits, the contract of its attack, its step written out a second time, and mutants that the same checks must reject."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import ORDER, SHAPE, examples, seeded, seeds, signs, snapshot, start_zero, untouched
from hypothesis import given
from hypothesis import strategies as st
from parity_models import TanhEncoder
from torch import nn

from advssl import checkpoint
from advssl.attack import frozen
from advssl.config import Config
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.deacl import DeACL
from advssl.pretrain import Run


def net(dtype):
    "An encoder of 12 pixels with BatchNorm statistics unlike those of any batch."
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)
    with torch.no_grad(): encoder(2 * torch.randn(32, 3, 2, 2, dtype=dtype) + 1)
    return encoder


def make(cls=DeACL, seed=0, dtype=torch.float64, **options):
    "A student, another network as its teacher, in training mode, and a batch."
    torch.manual_seed(seed)
    method = cls(net(dtype), net(dtype), **options).train()
    method.generator = seeded(seed)
    return method, torch.rand(SHAPE, dtype=dtype)


def turn(method, x):
    (one,) = list(method.turns(Views(weak=x)))
    return one


# a second implementation, image by image


def cosine(a, b): return sum(p * q for p, q in zip(a, b, strict=True)) / (a.square().sum().sqrt() * b.square().sum().sqrt())


def written_step(method, x, eps, alpha, steps, sign, weight, detach):
    "The adversary from a zero start and the objective; the teacher forwarded in every step, nothing shared."
    student, teacher = method.encoder, method.teacher
    method.eval()
    moved = []
    for image in x:
        at = image[None]
        for _ in range(steps):
            leaf = at.clone().requires_grad_()
            (g,) = torch.autograd.grad(-cosine(student(leaf)[0], teacher(image[None])[0]), leaf)
            at = torch.maximum(torch.minimum(at + sign * alpha * g.sign(), image[None] + eps), image[None] - eps).clamp(0, 1)
        moved.append(at)
    x_adv, targets = torch.cat(moved), teacher(x)
    student.train()
    both = student(torch.cat([x, x_adv]))
    objective = 0.0
    for i in range(len(x)):
        clean, attacked = both[i], both[len(x) + i]
        anchor = clean.detach() if detach else clean
        objective = objective - cosine(clean, targets[i]) / len(x) - weight * cosine(attacked, anchor) / len(x)
    return x_adv, objective, torch.autograd.grad(objective, list(student.parameters()))


HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04}


def agrees(cls, sign=1, detach=False, weight=2.0):
    "Whether a method's attack, objective, gradients, traces and statistics are those of `written_step`, with a teacher that stays."
    ours, x = make(cls, sign=sign, detach=detach, weight=weight, **HOW)
    theirs = make(sign=sign, detach=detach, weight=weight, **HOW)[0]
    x_adv, objective, grads = written_step(theirs, x, HOW["eps"], HOW["step_size"], HOW["steps"], sign, weight, detach)
    start_zero(ours)
    before = snapshot(ours)
    with torch.no_grad(): target = ours.teacher(x)
    found = ours.attack(x, target)
    traces = (
        not found.requires_grad and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None for p in ours.parameters()) and all(p.requires_grad for p in ours.encoder.parameters())
        and all(m.training for m in ours.encoder.modules()) and not any(m.training for m in ours.teacher.modules())
    )
    value, player = turn(ours, x)
    own = torch.autograd.grad(value, list(ours.encoder.parameters()), allow_unused=True)
    same = lambda a, b: a is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    return (
        traces and player.sign == -1 and len(player.parameters()) == len(own) and same(found, x_adv) and same(value, objective)
        and all(same(a, b) for a, b in zip(own, grads, strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("detach", [False, True])
def test_the_step_is_the_written_one(sign, detach):
    assert agrees(DeACL, sign, detach, weight=0.7 if detach else 2.0)


class NoAnchor(DeACL):
    def loss(self, clean, attacked, target): return self.weight * self.distance(attacked, clean).mean()


class NoAgreement(DeACL):
    def loss(self, clean, attacked, target): return self.distance(clean, target).mean()


class WeightLost(DeACL):
    def loss(self, clean, attacked, target): return (self.distance(clean, target) + self.distance(attacked, clean)).mean()


class AttackedToTeacher(DeACL):
    def loss(self, clean, attacked, target): return (self.distance(clean, target) + self.weight * self.distance(attacked, target)).mean()


class AlwaysDetached(DeACL):
    def __init__(self, *args, detach=False, **options): super().__init__(*args, detach=True, **options)


class AttackedDetached(DeACL):
    def loss(self, clean, attacked, target): return super().loss(clean, attacked.detach(), target)


class FlippedSign(DeACL):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class FlippedLoss(DeACL):
    def loss(self, *features): return -super().loss(*features)


class AgainstItself(DeACL):
    "Attacks the agreement with the clean student instead of the teacher."

    def attack(self, x, target):
        with frozen(self.encoder), torch.no_grad(): own = self.encoder(x)
        return super().attack(x, own)


class AttackInTrainMode(DeACL):
    def attack(self, x, target):
        with frozen(self.encoder, train=True):
            return self.player.find(lambda t: self.distance(self.encoder(t), target), x)


class AttackWithoutFreezing(DeACL):
    def attack(self, x, target): return self.player.find(lambda t: self.distance(self.encoder(t), target), x)


class NoAttack(DeACL):
    def attack(self, x, target): return x


class TeacherTrains(DeACL):
    def train(self, mode=True): return nn.Module.train(self, mode)


class TeacherMoves(DeACL):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.teacher.requires_grad_(True)


class TeacherSeesTheAttack(DeACL):
    def turns(self, views):
        x = views.weak
        with torch.no_grad(): x_adv = self.attack(x, self.teacher(x))
        clean, attacked = self.encoder(torch.cat([x, x_adv])).chunk(2)
        yield self.loss(clean, attacked, self.teacher(x_adv)), self.network


class TwoPasses(DeACL):
    def turns(self, views):
        x = views.weak
        with torch.no_grad(): target = self.teacher(x)
        x_adv = self.attack(x, target)
        yield self.loss(self.encoder(x), self.encoder(x_adv), target), self.network


class UnnormalisedFeatures(DeACL):
    @staticmethod
    def distance(a, b): return -(a * b).sum(-1)


@pytest.mark.parametrize("mutant", [
    NoAnchor, NoAgreement, WeightLost, AttackedToTeacher, AlwaysDetached, AttackedDetached, FlippedSign, FlippedLoss, AgainstItself,
    AttackInTrainMode, AttackWithoutFreezing, NoAttack, TeacherTrains, TeacherMoves, TeacherSeesTheAttack, TwoPasses, UnnormalisedFeatures,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# limits


@examples
@given(seeds, st.integers(0, 4), signs, st.booleans(), st.sampled_from(["linf", "l2", "l1"]))
def test_without_a_ball_the_student_distils(seed, steps, sign, detach, norm):
    method, x = make(seed=seed, eps=0.0, steps=steps, sign=sign, detach=detach, norm=norm)
    method.encoder.eval()  # rows on their own: clean and attacked are one and the same
    with torch.no_grad(): target = method.teacher(x)
    assert torch.equal(method.attack(x, target), x)
    value, _ = turn(method, x)
    leaf = list(method.encoder.parameters())
    plain = method.distance(method.encoder(x), target).mean()
    assert torch.allclose(value, plain - 2, rtol=1e-12)
    grads = (torch.autograd.grad(v, leaf) for v in (value, plain))
    for a, b in zip(*grads, strict=True): assert torch.allclose(a, b, atol=1e-12)


def test_without_weight_the_attack_is_forgotten():
    method, x = make(weight=0.0, **HOW)
    method.encoder.eval()
    with torch.no_grad(): target = method.teacher(x)
    assert torch.allclose(turn(method, x)[0], method.distance(method.encoder(x), target).mean(), rtol=1e-12)


def test_a_copy_of_the_teacher_has_nothing_to_learn_without_an_attack():
    method, x = make(eps=0.0)
    method.prepare(None, None)
    method.encoder.eval()
    value, _ = turn(method, x)
    assert torch.allclose(value, torch.tensor(-3.0, dtype=torch.float64))
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(value, list(method.encoder.parameters())))


def test_the_student_starts_from_the_teacher_or_not():
    copied, scratch = make()[0], make(from_teacher=False)[0]
    before = snapshot(scratch)
    for method in (copied, scratch): method.prepare(None, None)
    assert all(torch.equal(a, b) for a, b in zip(copied.encoder.state_dict().values(), copied.teacher.state_dict().values(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in scratch.state_dict().items())
    assert copied.encoder[1].weight.data_ptr() != copied.teacher[1].weight.data_ptr()  # a copy, not the same tensor


def test_no_steps_leave_random_noise():
    method, x = make(eps=0.1, steps=0)
    target = method.teacher(x)
    assert 0 < (method.attack(x, target) - x).abs().max() <= 0.1 + 1e-12
    assert torch.equal(start_zero(method).attack(x, target), x)


# the contract of the attack


@examples
@given(seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 8 / 255, 0.3]), st.integers(0, 3), signs, st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_contract(seed, norm, eps, steps, sign, training, dtype, clip_start):
    method, x = make(seed=seed, dtype=dtype, norm=norm, eps=eps, steps=steps, sign=sign, clip_start=clip_start)
    method.train(training)
    method.encoder[2].train(not training)  # a mixed state must come back too
    method.encoder[1].bias.requires_grad_(False)
    with torch.no_grad(): target = method.teacher(x)
    with untouched(method, x, target): found = method.attack(x, target)
    assert ((found - x).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all() and found.dtype == dtype and not found.requires_grad
    if clip_start or steps: assert found.min() >= 0 and found.max() <= 1
    method.generator = seeded(seed)
    assert torch.equal(method.attack(x, target), found)


@examples
@given(seeds)
def test_the_sign_chooses_the_direction(seed):
    how = {"eps": 1e-5, "steps": 1, "step_size": 1e-5}
    (up, x), (down, _) = make(seed=seed, sign=1, **how), make(seed=seed, sign=-1, **how)
    x = 0.1 + 0.8 * x
    target = up.teacher(x)
    higher, lower = (start_zero(m).attack(x, target) for m in (up, down))
    assert torch.allclose(higher - x, x - lower, atol=1e-12)
    up.eval()
    value = lambda t: up.distance(up.encoder(t), target).mean().item()
    assert value(lower) < value(x) < value(higher)


def test_passes_and_one_look_at_the_teacher():
    for steps in (0, 1, 5):
        method, x = make(eps=0.1, steps=steps)
        with count_passes(method.teacher) as teacher, count_passes(method.encoder) as student:
            play(method, Views(weak=x), {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
        assert (teacher.forward, teacher.backward_input, teacher.backward_weight) == (6, 0, 0)
        assert (student.forward, student.backward_input, student.backward_weight) == (6 * (steps + 2), 6 * (steps + 2), 12)
        assert (teacher.units(6) + student.units(6)) == 2 * steps + 1 + 6


def test_the_log_names_both_terms():
    method, x = make(**HOW)
    value, _ = turn(method, x)
    assert torch.allclose(value, -method.logs["anchor_similarity"] - 2 * method.logs["attacked_similarity"])
    assert not any(v.requires_grad for v in method.logs.values())


def test_autocast_trains_every_weight():
    method, x = make(dtype=torch.float32, **HOW)
    with torch.autocast("cpu", dtype=torch.bfloat16): value, _ = turn(method, x)
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in method.encoder.parameters())
    assert all(v.dtype == torch.float32 for v in method.logs.values())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_zero_features_are_no_nan():
    method, _ = make()
    zero = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    value = method.loss(zero, zero, torch.ones(2, 5, dtype=torch.float64))
    assert value.isfinite() and torch.autograd.grad(value, zero)[0].isfinite().all()


# a run


def test_a_run_trains_its_teacher_and_leaves_it_alone(tmp_path):
    "The teacher in the child's checkpoint is the parent's encoder to the bit, after training as before, and the student has left it."
    run = Run(Config("deacl", images=64, batch_size=16, epochs=2, threads=1, settings={"steps": 1}), tmp_path / "child")
    fresh = snapshot(run.method.teacher)
    run.train()
    weights, _ = checkpoint.load(tmp_path / "child")
    parent, _ = checkpoint.load(run.parents["teacher"])
    for name, value in parent.items():
        if name.startswith("encoder."): assert torch.equal(value, weights["teacher." + name.removeprefix("encoder.")]), name
    assert any(not torch.equal(v, fresh[k]) for k, v in run.method.teacher.state_dict().items())
    assert any(not torch.equal(weights[k], weights[k.replace("encoder.", "teacher.", 1)]) for k in weights if k.startswith("encoder."))
    assert run.method.evaluated() is run.method.encoder


# the official code


def test_the_method_itself_finds_the_official_perturbation():
    (case,) = json.loads((Path(__file__).parent / "parity" / "attack_deacl.json").read_text())["cases"]
    given, expected = case["inputs"], case["outputs"]
    array = lambda value: torch.tensor(value, dtype=torch.float64)
    student, teacher = (TanhEncoder({k: array(v) for k, v in given[name].items()}) for name in ("student", "teacher"))
    method = DeACL(student, teacher, eps=given["epsilon"], steps=given["steps"], step_size=given["alpha"], clip_start=False)
    method.player = replace(method.player, start=array(given["delta0"]))
    x = array(given["x"])
    assert torch.allclose(method.attack(x, method.teacher(x)), array(expected["x_adv_after_each_step"][-1]), rtol=0, atol=1e-12)
    value, _ = turn(method, x)
    value.backward()
    assert abs(value.item() - expected["formula_outer_loss"]) < 1e-12
    for name, grad in expected["formula_outer_grads"].items(): assert torch.allclose(student.grads()[name], array(grad), atol=1e-12)
    assert all(g is None for g in teacher.grads().values())


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"steps": -1}, "steps must be a whole number"), ({"norm": "l3"}, "unknown norm"),
    ({"eps": -0.1}, "eps"), ({"step_size": -0.1}, "sign chooses the direction"),
    ({"weight": -0.1}, "weight must be >= 0"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("DeACL") is methods()["deacl"] is DeACL and DeACL.parents == {"teacher": "simclr"}
    card = DeACL.card
    assert (card.type, card.level, card.combined, card.sign, card.tables) == ("memory-free", "input", "yes", 1, ())
    known = settings_of(DeACL)
    assert "teacher" not in known and (known["weight"], known["steps"], known["detach"], known["from_teacher"]) == (2.0, 5, False, True)
