"CLAE: limits, the contract of its attack, its step written out a second time, and mutants that the same checks must reject."
import copy
import json
from pathlib import Path

import pytest
import torch
from common import ORDER, make_contrastive, seeded, seeds, signs, snapshot, turn, untouched, written_nt_xent
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_models import TanhEncoder
from torch import nn

from advssl.attack import frozen
from advssl.contrast import nt_xent, unit
from advssl.encoders import branch
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.clae import CLAE
from advssl.methods.simclr import SimCLR

examples = settings(max_examples=25, deadline=None)
HOW = {"eps": 0.1, "weight": 0.25}


def make(cls=CLAE, seed=0, dtype=torch.float64, batch_norm=True, **options):
    "A method in training mode whose two branches differ in everything, and two views."
    method, x1, x2 = make_contrastive(cls, seed, dtype, batch_norm, **options)
    if batch_norm:
        adv = method.encoder[2].branches["adv"]
        with torch.no_grad():
            for t in (adv.weight, adv.bias, adv.running_mean): t.add_(0.3 * torch.randn(16, dtype=dtype))
    return method, x1, x2


def embed(method, x, name):
    with branch(method.encoder, name): return method.projector(method.encoder(x))


# a second implementation, with loops


def written_step(method, x1, x2, eps, weight, sign):
    "The move and the objective; view and copy are embedded separately, by a twin whose statistics may move."
    twin = copy.deepcopy(method).train()
    z, leaf = embed(twin, x1, "adv").detach(), x1.clone().requires_grad_()
    (g,) = torch.autograd.grad(written_nt_xent((z, embed(twin, leaf, "adv")), 0.5), leaf)
    x_adv = (x1 + sign * eps * g.sign()).clamp(0, 1)
    z1, z2 = embed(method, torch.cat([x1, x2]), "clean").chunk(2)
    objective = written_nt_xent((z1, z2), 0.5) + weight * written_nt_xent((z1, embed(method, x_adv, "adv")), 0.5)
    return x_adv, objective, torch.autograd.grad(objective, list(method.parameters()))


def agrees(cls, sign=1):
    "Whether a method's attack, objective, gradients, traces and statistics are those of `written_step`."
    ours, x1, x2 = make(cls, sign=sign, **HOW)
    theirs = make(sign=sign, **HOW)[0]
    x_adv, objective, grads = written_step(theirs, x1, x2, sign=sign, **HOW)
    before = snapshot(ours)
    found = ours.attack(x1)
    traces = (
        not found.requires_grad and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None and p.requires_grad for p in ours.parameters()) and all(m.training for m in ours.modules())
        and ours.encoder[2].active == "clean"
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
    assert agrees(CLAE, sign)


class FlippedSign(CLAE):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class NoAttack(CLAE):
    def attack(self, x): return x


class NoClipping(CLAE):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pixels = None


class TracesLeft(CLAE):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.upstream = True


class HalfTheRadius(CLAE):
    def __init__(self, *args, eps=0.1, **options): super().__init__(*args, eps=eps / 2, **options)


class AttackInTheCleanBranch(CLAE):
    def attack(self, x):
        embed = self.embed
        def clean(copy):
            with branch(self, "clean"): return embed(copy)
        self.embed = clean
        try: return super().attack(x)
        finally: del self.embed


class AttackInEvaluationMode(CLAE):
    def attack(self, x):
        mode = self.training
        try: return super(AttackInEvaluationMode, self.eval()).attack(x)
        finally: self.train(mode)


class AttackWithoutFreezing(CLAE):
    def attack(self, x):
        with branch(self, "adv"):
            leaf = x.clone().requires_grad_()
            z = self.embed(leaf)
            self.loss(z.detach(), z).backward()
            return (x + self.threat.eps * self.sign * leaf.grad.sign()).clamp(0, 1)


class GraphOfTheAttackKept(CLAE):
    def attack(self, x): return super().attack(x).requires_grad_()


class OtherView(CLAE):
    def turns(self, views): yield from super().turns(Views(strong1=views.strong2, strong2=views.strong1))


class CopyInTheCleanBranch(CLAE):
    def turns(self, views):
        x_adv = self.attack(views.strong1)
        z1, z2 = self.embed(torch.cat([views.strong1, views.strong2])).chunk(2)
        yield self.loss(z1, z2) + self.weight * self.loss(z1, self.embed(x_adv)), self.network


class CopyAgainstTheOtherView(CLAE):
    def loss(self, z1, z2):
        if self.encoder.training and z1.requires_grad:
            self.pair, first = (z1, z2), getattr(self, "pair", None)
            if first is not None and z1 is first[0]: return super().loss(first[1], z2)
        return super().loss(z1, z2)


class NoCleanPair(CLAE):
    def turns(self, views):
        for value, player in super().turns(views):
            with torch.no_grad(): z1, z2 = self.embed(torch.cat([views.strong1, views.strong2])).chunk(2)
            yield value - self.loss(z1, z2), player


class NoMovedPair(CLAE):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weight = 0.0


class FastBranch(CLAE):
    def __init__(self, *args, **options): super().__init__(*args, momentum=0.1, **options)


@pytest.mark.parametrize("mutant", [
    FlippedSign, NoAttack, NoClipping, TracesLeft, HalfTheRadius, AttackInTheCleanBranch, AttackInEvaluationMode, AttackWithoutFreezing,
    GraphOfTheAttackKept, OtherView, CopyInTheCleanBranch, CopyAgainstTheOtherView, NoCleanPair, NoMovedPair, FastBranch,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# the start of the attack


@examples
@given(seeds, st.booleans())
def test_the_positive_is_silent_at_the_start(seed, training):
    "Eq. (4): the similarity of copy and view has no gradient; that of two different views has one."
    method, x1, x2 = make(seed=seed)
    method.train(training)
    x = x1.clone().requires_grad_()
    z, other = embed(method, x, "adv"), embed(method, x2, "adv").detach()
    grad = lambda target: torch.autograd.grad((unit(z) * unit(target)).sum(), x, retain_graph=True)[0].norm()
    assert grad(z.detach()) < 1e-13 < 1e-3 < grad(other)


@examples
@given(seeds)
def test_a_view_that_moves_along_changes_nothing(seed):
    "Without the stopped gradient in Eq. (1) both copies get the same gradient: twice the length, the same signs."
    method, x1, _ = make(seed=seed)
    z = torch.randn(6, 5, dtype=torch.float64, generator=seeded(seed)).requires_grad_()
    (alone,) = torch.autograd.grad(method.loss(z.detach(), z), z)
    (along,) = torch.autograd.grad(method.loss(z, z), z)
    assert torch.allclose(along, 2 * alone, rtol=1e-9, atol=1e-14)


# limits


def test_without_weight_it_is_simclr_to_the_bit():
    "Objective and all shared weights, over three steps."
    weights, values = [], []
    for method, x1, x2 in (make(weight=0.0, eps=0.1), make_contrastive(SimCLR)):
        optimizers = {"network": torch.optim.SGD(method.parameters(), 0.5, momentum=0.9)}
        values.append(torch.stack([play(method, Views(strong1=x1, strong2=x2), optimizers) for _ in range(3)]))
        weights.append({k.replace("branches.clean.", ""): v for k, v in method.state_dict().items() if "adv" not in k})
    assert torch.equal(*values)
    assert weights[0].keys() == weights[1].keys() and all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


@examples
@given(seeds, signs, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([0.0, 0.3, 1.0]))
def test_without_a_ball_the_copy_stands_still(seed, sign, norm, weight):
    method, x1, x2 = make(seed=seed, eps=0.0, sign=sign, norm=norm, weight=weight)
    assert torch.equal(method.attack(x1), x1)
    z1, z2 = embed(copy.deepcopy(method), torch.cat([x1, x2]), "clean").chunk(2)
    expected = nt_xent(torch.stack([z1, z2])) + weight * nt_xent(torch.stack([z1, embed(copy.deepcopy(method), x1, "adv")]))
    assert torch.allclose(turn(method, x1, x2)[0], expected, rtol=1e-12)


def test_temperature_reaches_loss_and_attack():
    z = torch.randn(2, 6, 5, dtype=torch.float64)
    assert torch.equal(make(temperature=0.1)[0].loss(*z), nt_xent(z, 0.1))
    (cold, x1, _), (warm, _, _) = make(temperature=0.05, eps=0.1), make(temperature=5.0, eps=0.1)
    assert not torch.equal(cold.attack(x1), warm.attack(x1))


# the contract of the attack


@examples
@given(seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 8 / 255, 0.3]), signs, st.booleans(),
       st.sampled_from([torch.float32, torch.float64]))
def test_contract(seed, norm, eps, sign, training, dtype):
    method, x1, _ = make(seed=seed, dtype=dtype, norm=norm, eps=eps, sign=sign)
    method.train(training)
    method.encoder[1].train(not training)  # a mixed state must come back too
    method.projector[0].bias.requires_grad_(False)
    own_stream = method.generator.get_state()
    with untouched(method, x1): found = method.attack(x1)
    assert ((found - x1).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
    assert found.dtype == dtype and found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    assert method.encoder[2].active == "clean" and torch.equal(method.generator.get_state(), own_stream)  # nothing is drawn
    assert torch.equal(method.attack(x1), found)


@examples
@given(seeds)
def test_the_sign_chooses_the_direction(seed):
    (up, x1, _), (down, _, _) = make(seed=seed, sign=1, eps=1e-5), make(seed=seed, sign=-1, eps=1e-5)
    x1 = 0.1 + 0.8 * x1
    higher, lower = up.attack(x1), down.attack(x1)
    assert torch.allclose(higher - x1, x1 - lower, atol=1e-12)
    with torch.no_grad(), frozen(up.encoder, train=True):
        z = embed(up, x1, "adv")
        pair = lambda x: up.loss(z, embed(up, x, "adv")).item()
        assert pair(lower) < pair(x1) < pair(higher)


def test_upstream_clips_nothing_and_moves_the_statistics_twice():
    method, x1, _ = make(upstream=True, eps=0.1)
    twin, before = copy.deepcopy(method), snapshot(method)
    found = method.attack(x1)
    assert torch.allclose((found - x1).abs(), torch.full_like(x1, 0.1)) and (found.min() < 0 or found.max() > 1)
    for _ in range(2): embed(twin, x1, "adv")
    after = method.state_dict()
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in after.items())
    assert all(torch.equal(v, before[k]) for k, v in after.items() if "branches.adv" not in k)
    assert all(p.grad is None and p.requires_grad for p in method.parameters())
    inside = make(eps=0.1)[0].attack(x1)
    assert torch.allclose(found.clamp(0, 1), inside, atol=1e-12)  # where it stays in range, the move is the same


# branches and passes


def test_branches():
    method, x1, x2 = make(eps=0.1, momentum=0.02)
    assert {k: b.momentum for k, b in method.encoder[2].branches.items()} == {"clean": 0.1, "adv": 0.02}
    turn(method, x1, x2)
    seen = {k: b.num_batches_tracked.item() for k, b in method.encoder[2].branches.items()}
    assert seen == {"clean": 2, "adv": 1}  # one clean batch came from `make`
    features = method.eval().evaluated()(x1)
    with torch.no_grad(): method.encoder[2].branches["adv"].weight.zero_()
    assert method.evaluated() is method.encoder and torch.equal(method.evaluated()(x1), features)


def test_passes():
    method, x1, x2 = make(eps=0.1)
    with count_passes(method.encoder) as passes: method.attack(x1)
    assert (passes.forward, passes.backward_input, passes.backward_weight) == (6, 6, 0)
    optimizers = {"network": torch.optim.SGD(method.parameters(), 0.1)}
    with count_passes(method.encoder) as passes: play(method, Views(strong1=x1, strong2=x2), optimizers)
    assert passes.units(6) == 11


def test_autocast_trains_every_weight():
    method, x1, x2 = make(dtype=torch.float32, eps=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16): value, _ = turn(method, x1, x2)
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_the_log():
    method, x1, x2 = make(eps=0.1)
    turn(method, x1, x2)
    assert set(method.logs) == {"pair_similarity", "attacked_similarity"} and not any(v.requires_grad for v in method.logs.values())


# the official code


def official_cases():
    path = Path(__file__).parent / "parity" / "attack_clae.json"
    yield from json.loads(path.read_text())["cases"]


@pytest.mark.parametrize("case", official_cases(), ids=lambda case: case["label"])
def test_the_method_itself_finds_the_official_perturbation(case):
    given, expected = case["inputs"], case["outputs"]
    array = lambda value: torch.tensor(value, dtype=torch.float64)
    encoder = TanhEncoder({k: array(v) for k, v in given["encoder"].items()})
    encoder.out_dim = 8
    method = CLAE(encoder, given["temperature"], eps=given["epsilon"], upstream=True)
    method.projector = nn.Identity()
    x, f = array(given["x"]), method.embed
    x_adv = method.attack(x)
    assert torch.allclose(x_adv, array(expected["x_adv"]), rtol=0, atol=1e-12)
    for name, moved in (("loss_before", x), ("loss_after", x_adv)): assert abs(method.loss(f(x), f(moved)).item() - expected[name]) < 1e-12


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"norm": "l3"}, "unknown norm"), ({"eps": -0.1}, "eps"),
    ({"momentum": 2.0}, "share of the newest batch"), ({"weight": -0.1}, "weight must be >= 0"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("CLAE") is methods()["clae"] is CLAE
    card = CLAE.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("memory-free", "CL", "input", "yes", 1, (1, 2))
    known = settings_of(CLAE)
    assert (known["norm"], known["eps"], known["weight"], known["sign"], known["momentum"]) == ("linf", 0.015, 1.0, 1, 0.01)
