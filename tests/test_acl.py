"ACL: limits, the contract of its attack, its step written out a second time, and mutants that the same checks must reject."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import (
    ORDER,
    SHAPE,
    seeded,
    seeds,
    signs,
    small_encoder,
    snapshot,
    start_zero,
    turn,
    untouched,
    written_acl_step,
    written_nt_xent,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_models import TanhEncoder
from torch import nn

from advssl.attack import frozen
from advssl.config import Config
from advssl.contrast import nt_xent
from advssl.encoders import BranchedBatchNorm, branch
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.acl import ACL, FORMS
from advssl.methods.simclr import SimCLR
from advssl.pretrain import Run, restore

examples = settings(max_examples=25, deadline=None)
forms = st.sampled_from(list(FORMS))


def make(cls=ACL, seed=0, dtype=torch.float64, equal=False, **options):
    "A method on 12 pixels, in training mode, every BatchNorm layer unlike the others unless equal, and two views."
    torch.manual_seed(seed)
    encoder = small_encoder()
    method = cls(encoder, hidden_dim=16, embedding_dim=5, **options).to(dtype)
    if not equal:
        with torch.no_grad():
            for m in method.modules():
                if isinstance(m, nn.BatchNorm1d):
                    m.running_mean.normal_(std=0.2)
                    m.running_var.uniform_(0.05, 0.2)
                    if m.affine: m.weight.uniform_(0.5, 1.5)
    method.generator = seeded(seed)
    return method, *torch.rand(2, *SHAPE, dtype=dtype)


# the step, against a second implementation with loops


HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04}


def agrees(cls, form="ds", sign=1):
    "Whether a method's attack, objective, gradients, traces and statistics are those of `written_acl_step`."
    ours, x1, x2 = make(cls, form=form, sign=sign, **HOW)
    theirs = make(form=form, sign=sign, **HOW)[0]
    moved, objective, grads = written_acl_step(theirs, form, x1, x2, HOW["eps"], HOW["step_size"], HOW["steps"], sign)
    start_zero(ours)
    before = snapshot(ours)
    found = ours.attack(x1, x2)
    traces = (
        not any(x.requires_grad for x in found) and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None and p.requires_grad for p in ours.parameters()) and all(m.training for m in ours.modules())
    )
    value, player = turn(ours, x1, x2)
    own = torch.autograd.grad(value, list(ours.parameters()), allow_unused=True)
    same = lambda a, b: a is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    return (
        traces and player.sign == -1 and all(map(same, found, moved)) and same(value, objective)
        and all(same(a, b) for a, b in zip(own, grads, strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", FORMS)
def test_the_step_is_the_written_one(form, sign):
    assert agrees(ACL, form, sign)


class FlippedSign(ACL):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class AttackOnTheCleanBranch(ACL):
    def attack(self, x1, x2):
        with frozen(self.encoder, self.projector):
            return self.player.find(lambda x: self.loss(*self.pair(*x.chunk(2), ("clean", "clean"))), torch.cat([x1, x2])).chunk(2)


class SwappedStreams(ACL):
    def embed(self, x, name): return super().embed(x, {"adv": "clean", "clean": "adv"}[name])


class SharedProjector(ACL):
    "The encoder alone has two branches in use."
    def embed(self, x, name):
        with branch(self.encoder, name): return self.projector(self.encoder(x))


class AttackInTrainMode(ACL):
    def attack(self, x1, x2):
        with frozen(self.encoder, self.projector, train=True):
            return self.player.find(lambda x: self.loss(*self.pair(*x.chunk(2), ("adv", "adv"))), torch.cat([x1, x2])).chunk(2)


class AttackWithoutFreezing(ACL):
    def attack(self, x1, x2):
        self.eval()
        return self.player.find(lambda x: self.loss(*self.pair(*x.chunk(2), ("adv", "adv"))), torch.cat([x1, x2])).chunk(2)


class GraphOfTheAttackKept(ACL):
    def attack(self, x1, x2): return tuple(x.requires_grad_() for x in super().attack(x1, x2))


class OneViewOnly(ACL):
    def attack(self, x1, x2): return super().attack(x1, x2)[0], x2


class OneAfterTheOther(ACL):
    "Each view attacked on its own, against the other as drawn."
    def attack(self, x1, x2):
        with frozen(self.encoder, self.projector):
            loss = lambda a, b: self.loss(*self.pair(a, b, ("adv", "adv")))
            return self.player.find(lambda x: loss(x, x2), x1), self.player.find(lambda x: loss(x1, x), x2)


class SwappedViews(ACL):
    def attack(self, x1, x2): return super().attack(x2, x1)


class NoAttack(ACL):
    def attack(self, x1, x2): return x1, x2


class NoCleanStream(ACL):
    def weights(self): return [0.0, 1.0]


class SumOfStreams(ACL):
    def weights(self): return [1.0, 1.0]


class OnePassForEachView(ACL):
    def pair(self, x1, x2, stream): return self.embed(x1, stream[0]), self.embed(x2, stream[1])


class OneBatchNorm(ACL):
    def __init__(self, *args, dual=True, **options): super().__init__(*args, dual=False, **options)


@pytest.mark.parametrize("mutant", [
    FlippedSign, AttackOnTheCleanBranch, SwappedStreams, SharedProjector, AttackInTrainMode, AttackWithoutFreezing, GraphOfTheAttackKept,
    OneViewOnly, OneAfterTheOther, SwappedViews, NoAttack, NoCleanStream, SumOfStreams, OnePassForEachView,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


def test_a_shared_batch_norm_is_rejected():
    assert len(make(OneBatchNorm)[0].state_dict()) < len(make()[0].state_dict())


# limits


@examples
@given(seeds, st.integers(0, 3), signs, st.sampled_from(["a2a", "ds"]), st.booleans(), st.sampled_from(["linf", "l2", "l1"]))
def test_without_a_ball_all_joint_forms_are_simclr(seed, steps, sign, form, zero_steps, norm):
    "Equal branches and no perturbation: the value of SimCLR behind the same projector, to the bit."
    how = {"eps": 0.1, "steps": 0} if zero_steps else {"eps": 0.0, "steps": steps}
    method, x1, x2 = make(seed=seed, equal=True, form=form, sign=sign, norm=norm, **how)
    base = make(seed=seed, equal=True, form="s2s", dual=False)[0]
    simclr = SimCLR(base.encoder)
    simclr.projector = base.projector
    if zero_steps: start_zero(method)
    assert all(torch.equal(a, b) for a, b in zip(method.attack(x1, x2), (x1, x2), strict=True))
    assert torch.equal(turn(method, x1, x2)[0], turn(simclr, x1, x2)[0])


@examples
@given(seeds)
def test_s2s_is_simclr_with_a_branch(seed):
    "Values, gradients and statistics, to the bit."
    method, x1, x2 = make(seed=seed, equal=True, form="s2s")
    simclr = SimCLR(make(seed=seed, equal=True, form="s2s", dual=False)[0].encoder)
    simclr.projector = make(seed=seed, equal=True, form="s2s", dual=False)[0].projector
    (ours, _), (theirs, _) = turn(method, x1, x2), turn(simclr, x1, x2)
    assert torch.equal(ours, theirs)
    both = [torch.autograd.grad(v, list(m.parameters())) for v, m in ((ours, method), (theirs, simclr))]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    state = {k.replace("branches.clean.", ""): v for k, v in method.state_dict().items()}
    assert state.keys() == simclr.state_dict().keys() and all(torch.equal(v, state[k]) for k, v in simclr.state_dict().items())


def test_a2s_without_a_ball_is_simclr_of_two_passes():
    method, x1, x2 = make(equal=True, form="a2s", eps=0.0)
    method.eval()
    z = [method.embed(x, "clean") for x in (x1, x2)]
    assert torch.allclose(turn(method, x1, x2)[0], nt_xent(torch.stack(z)), rtol=1e-12)


def test_no_steps_leave_random_noise():
    method, x1, x2 = make(eps=0.1, steps=0)
    for found, x in zip(method.attack(x1, x2), (x1, x2), strict=True): assert 0 < (found - x).abs().max() <= 0.1 + 1e-12


def test_settings_reach_the_loss():
    z = torch.randn(2, 6, 5, dtype=torch.float64)
    for tau in (0.1, 0.5): assert torch.equal(make(temperature=tau)[0].loss(*z), nt_xent(z, tau))


# the contract of the attack


@examples
@given(seeds, forms, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 8 / 255, 0.3]), st.integers(0, 3), signs, st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.booleans())
def test_contract(seed, form, norm, eps, steps, sign, training, dtype, upstream, dual):
    how = {"form": form, "norm": norm, "eps": eps, "steps": max(steps, upstream), "sign": sign, "upstream": upstream, "dual": dual}
    method, x1, x2 = make(seed=seed, dtype=dtype, **how)
    method.train(training)
    method.encoder[2].train(not training)  # a mixed state must come back too
    method.projector[0].weight.requires_grad_(False)
    with untouched(method, x1, x2): found = method.attack(x1, x2)
    for x_adv, x, moves in zip(found, (x1, x2), (form != "s2s", form in ("ds", "a2a")), strict=True):
        assert ((x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
        assert x_adv.dtype == dtype and x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad
        assert moves or x_adv is x
        assert not moves or not torch.equal(x_adv, x)
    method.generator = seeded(seed)
    assert all(map(torch.equal, method.attack(x1, x2), found))


@pytest.mark.parametrize(("trace", "words"), [
    (lambda m, x: m.encoder[2].branches["adv"].running_mean.add_(1), "weights or buffers"), (lambda m, x: m.eval(), "modes"),
    (lambda m, x: m.encoder[1].weight.requires_grad_(False), "flags"), (lambda m, x: setattr(m.encoder[2], "active", "none"), "branches"),
    (lambda m, x: x.add_(0.1), "inputs"), (lambda m, x: torch.rand(1), "random numbers"),
    (lambda m, x: m.projector[0].weight.sum().backward(), "a gradient"),
])
def test_an_attack_that_leaves_a_trace_is_seen(trace, words):
    class Careless(ACL):
        def attack(self, x1, x2):
            found = super().attack(x1, x2)
            trace(self, x1)
            return found

    method, x1, x2 = make(Careless, eps=0.1, steps=1)
    with pytest.raises(AssertionError, match=words), untouched(method, x1, x2): method.attack(x1, x2)


@examples
@given(seeds, st.sampled_from(["ds", "a2a", "a2s"]))
def test_the_sign_chooses_the_direction(seed, form):
    "Small steps from the views themselves: up raises the loss of the attacked stream, down lowers it."
    how = {"form": form, "eps": 1e-5, "steps": 1, "step_size": 1e-5}
    (up, x1, x2), (down, _, _) = make(seed=seed, sign=1, **how), make(seed=seed, sign=-1, **how)
    x1, x2 = 0.1 + 0.8 * x1, 0.1 + 0.8 * x2
    higher, lower = (start_zero(m).attack(x1, x2) for m in (up, down))
    up.eval()
    loss = lambda pair: up.loss(*up.pair(*pair, up.streams[-1])).item()
    assert loss(lower) < loss((x1, x2)) < loss(higher)


def test_the_attack_does_not_depend_on_the_batch_statistics():
    "In evaluation mode an image's embedding is its own: whatever the mode before."
    method, x1, x2 = make(eps=0.1, steps=3)
    start_zero(method)
    assert all(map(torch.equal, method.train().attack(x1, x2), method.eval().attack(x1, x2)))


def test_the_whole_network_holds_still_on_the_adversarial_branch():
    method, x1, x2 = make(eps=0.1, steps=2)
    looks = []
    for part in (method.encoder, method.projector):
        part.register_forward_hook(lambda m, *_: looks.append(m.training or any(p.requires_grad for p in m.parameters())))
        for b in (m for m in part.modules() if isinstance(m, BranchedBatchNorm)):
            b.branches["clean"].register_forward_hook(lambda *_: looks.append("clean"))
    method.attack(x1, x2)
    assert looks == [False] * 4


@pytest.mark.parametrize(("form", "outer"), [("ds", 12), ("a2a", 6), ("a2s", 7), ("s2s", 6)])
def test_passes(form, outer):
    for steps in (0, 5):
        method, x1, x2 = make(form=form, eps=0.1, steps=steps)
        search = {"s2s": 0, "a2s": 2}.get(form, 4) * steps
        with count_passes(method.encoder) as passes: method.attack(x1, x2)
        assert passes.backward_weight == 0 and passes.units(6) == search + (form == "a2s")
        with count_passes(method.encoder) as passes:
            play(method, Views(strong1=x1, strong2=x2), {"network": torch.optim.SGD(method.parameters(), 0.1)})
        assert passes.units(6) == search + outer <= 32


def test_each_branch_sees_its_own_images_once():
    method, x1, x2 = make(eps=0.1, steps=2)
    layers = method.encoder[2].branches
    for layer in layers.values(): layer.reset_running_stats()
    start_zero(method)
    moved = method.attack(x1, x2)
    turn(method, x1, x2)
    for name, views in (("clean", (x1, x2)), ("adv", moved)):
        seen = method.encoder[1](torch.cat(views).flatten(1))
        assert layers[name].num_batches_tracked == 1
        assert torch.allclose(layers[name].running_mean, 0.1 * seen.mean(0), rtol=1e-9)


def test_convolutions_are_shared_and_branches_are_not():
    method = make()[0]
    names = [k for k, _ in method.named_parameters()]
    assert [k for k in names if "branches" not in k] == ["encoder.1.weight", "encoder.1.bias", "projector.0.weight", "projector.3.weight"]
    for k in names:
        if "branches.clean" in k: assert k.replace("clean", "adv") in names
    assert {type(m) for m in (method.encoder[2], method.projector[1], method.projector[4])} == {BranchedBatchNorm}


def test_without_branches_a_stream_keeps_its_own_batch_statistics():
    "`dual=False`: in training the streams share scale and shift, and the running averages take one after the other; no batch is joint."
    method, x1, x2 = make(dual=False, eps=0.2, steps=3)
    start_zero(method)
    layer, pairs = method.encoder[2], [(x1, x2), method.attack(x1, x2)]
    assert type(layer) is nn.BatchNorm1d and not any(isinstance(m, BranchedBatchNorm) for m in method.modules())
    apart = make(dual=False)[0]
    embeddings = [apart.projector(apart.encoder(torch.cat(views))).chunk(2) for views in pairs]
    value, _ = turn(method, x1, x2)
    assert torch.allclose(value, sum(written_nt_xent(z, 0.5) for z in embeddings) / 2, rtol=1e-9)
    for key, ours in method.state_dict().items(): assert torch.allclose(ours, apart.state_dict()[key], rtol=1e-9), key
    assert layer.num_batches_tracked == 2
    joint = make(dual=False)[0]
    rows = joint.projector(joint.encoder(torch.cat([view for views in pairs for view in views]))).chunk(4)
    assert not torch.allclose(value, (written_nt_xent(rows[:2], 0.5) + written_nt_xent(rows[2:], 0.5)) / 2, rtol=1e-4)


def test_autocast_trains_every_weight():
    method, x1, x2 = make(dtype=torch.float32, eps=0.1, steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16): value, _ = turn(method, x1, x2)
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters())


def test_the_log_says_what_the_player_did():
    method, x1, x2 = make(equal=True, eps=0.2, steps=5)
    turn(method, x1, x2)
    assert set(method.logs) == {"pair_similarity", "attacked_similarity"}
    assert method.logs["attacked_similarity"] < method.logs["pair_similarity"]
    assert not any(v.requires_grad for v in method.logs.values())


# the evaluated branch


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, "adv"), ({"form": "a2s"}, "adv"), ({"form": "a2a"}, "adv"), ({"form": "s2s"}, "clean"), ({"eval_branch": "clean"}, "clean"),
])
def test_evaluated_branch_survives_a_restart(options, wanted, tmp_path):
    config = Config("acl", images=64, epochs=1, batch_size=32, threads=1, settings={"steps": 1, **options})
    trained = Run(config, tmp_path).train()
    restored, _ = restore(tmp_path)
    x = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(trained.evaluated()(x), restored.evaluated()(x))
        other = {b for m in restored.modules() if isinstance(m, BranchedBatchNorm) for b in m.branches} - {wanted}
        for name in other:
            for m in restored.modules():
                if isinstance(m, BranchedBatchNorm): m.active = name
            assert not torch.equal(trained.evaluated()(x), restored.evaluated()(x))
    assert {m.active for m in trained.evaluated().modules() if isinstance(m, BranchedBatchNorm)} == {wanted}


# the official code


def official_cases():
    path = Path(__file__).parent / "parity" / "attack_acl.json"
    yield from json.loads(path.read_text())["cases"]


@pytest.mark.parametrize("case", official_cases(), ids=lambda case: case["label"])
def test_the_method_itself_finds_the_official_perturbation(case):
    "One moved view is A2S on a network without BatchNorm."
    given, expected = case["inputs"], case["outputs"]
    array = lambda value: torch.tensor(value, dtype=torch.float64)
    encoder = TanhEncoder({k: array(v) for k, v in given["encoder"].items()})
    encoder.out_dim = 8
    how = {"eps": given["epsilon"], "steps": given["steps"], "step_size": given["alpha"], "temperature": given["temperature"]}
    method = ACL(encoder, "a2s" if given["single_image"] else "a2a", upstream=True, **how)
    method.projector = nn.Identity()
    x, delta = array(given["x"]), array(given["delta0"])
    start = delta[::2] if given["single_image"] else torch.cat([delta[::2], delta[1::2]])
    method.player = replace(method.player, start=start)
    found = torch.stack(method.attack(x[::2], x[1::2]), 1).flatten(0, 1)
    assert torch.allclose(found, array(expected["x_adv_after_each_step"][-1]), rtol=0, atol=1e-12)


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"form": "a2b"}, "unknown form"), ({"form": "s2s", "eval_branch": "adv"}, "trains no branch"),
    ({"eval_branch": "pgd"}, "adv or clean"), ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"steps": -1}, "steps must be a whole number"),
    ({"norm": "l3"}, "unknown norm"), ({"eps": -0.1}, "eps"), ({"layers": 0}, "layers of at least 1"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("ACL") is methods()["acl"] is ACL
    card = ACL.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("memory-free", "CL", "input", "yes", 1, (1, 2))
    known = settings_of(ACL)
    assert (known["form"], known["norm"], known["eps"], known["steps"], known["sign"], known["dual"]) == ("ds", "linf", 8 / 255, 5, 1, True)
