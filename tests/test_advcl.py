"AdvCL: limits, the contract of its two attacks, its step written out a second time, and mutants that the same checks must reject."
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from common import ORDER, examples, seeded, seeds, signs, snapshot, start_zero, untouched, written_nt_xent
from hypothesis import given
from hypothesis import strategies as st
from parity_models import TanhEncoder
from torch import nn

from advssl.attack import frozen
from advssl.clusters import pseudo_labels
from advssl.config import Config
from advssl.contrast import nt_xent
from advssl.encoders import BranchedBatchNorm, branch
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.advcl import BRANCHES, AdvCL, high_pass
from advssl.pretrain import build

SHAPE, CLUSTERS = (6, 1, 4, 4), (2, 3, 4)


def make(cls=AdvCL, seed=0, dtype=torch.float64, **options):
    "A method on 16 pixels whose BatchNorm statistics differ from branch to branch, in training mode, and a batch of views."
    torch.manual_seed(seed)

    def encoder():
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh())
        net.out_dim = 12
        return net

    method = cls(encoder(), encoder(), hidden_dim=16, embedding_dim=5, **{"clusters": "2 3 4"} | options).to(dtype)
    with torch.no_grad():
        for i, name in enumerate(BRANCHES):
            with branch(method.encoder, name): method.projector(method.encoder((1 + i) * torch.randn(32, 16, dtype=dtype) + i))
    method.labels = torch.randint(0, 2, (9, len(method.clusters)))
    method.generator = seeded(seed)
    t1, t2, x = torch.rand(3, *SHAPE, dtype=dtype)
    return method, Views(strong1=t1, strong2=t2, weak=x, index=torch.arange(6) + 2)


def move(method, views):
    return method.attack(views.weak, method.clean_views(views), method.labels[views.index])


def turn(method, views):
    (one,) = list(method.turns(views))
    return one


# a second implementation, with loops


def written_pseudo(method, h, labels):
    "Mean over images of the mean over clusterings of -log p."
    total = 0.0
    for i in range(len(h)):
        start = 0
        for j, k in enumerate(CLUSTERS):
            s = h[i] @ method.heads.weight[start : start + k].T + method.heads.bias[start : start + k]
            total = total - (s[labels[i, j]] - s.exp().sum().log()) / len(CLUSTERS)
            start += k
    return total / len(h)


def written_high(x, r):
    "Sum over the kept frequencies of coefficient times wave, one at a time."
    N = x.shape[-1]
    freqs = [f - N if f > (N - 1) // 2 else f for f in range(N)]
    down, across = torch.meshgrid(*[torch.arange(N, dtype=x.dtype)] * 2, indexing="ij")
    out = torch.zeros_like(x)
    for a in freqs:
        for b in freqs:
            if (a * a + b * b) ** 0.5 < r: continue
            wave = torch.exp(2j * torch.pi * (a * down + b * across) / N)
            out = out + ((x * wave.conj()).sum((-2, -1), keepdim=True) * wave / N**2).real
    return out


def written_step(method, views, eps, alpha, steps, sign, weight, radius=1.0, tau=0.5):
    "Both adversaries from a zero start as one objective with everything forwarded in every step, and the objective."

    def f(x, name):
        with branch(method.encoder, name): return method.encoder(x)

    labels, high = method.labels[views.index], written_high(views.weak, radius)
    both = [views.weak, views.weak]
    method.eval()
    for _ in range(steps):
        a, b = (t.clone().requires_grad_() for t in both)
        z = method.projector(torch.cat([f(a, "adv"), *(f(t, "clean") for t in (views.strong1, views.strong2, high))])).chunk(4)
        J = written_nt_xent(z, tau) / 3 + weight * written_pseudo(method, f(b, "pseudo"), labels)
        moved = [t.detach() + sign * alpha * g.sign() for t, g in zip((a, b), torch.autograd.grad(J, (a, b)), strict=True)]
        both = [torch.maximum(torch.minimum(t, views.weak + eps), views.weak - eps).clamp(0, 1) for t in moved]
    method.train()
    clean = f(torch.cat([views.strong1, views.strong2, high]), "clean")
    z = method.projector(torch.cat([clean, f(both[0], "adv")])).chunk(4)
    objective = written_nt_xent(z, tau) / 3 + weight * written_pseudo(method, f(both[1], "pseudo"), labels)
    trained = [p for p in method.parameters() if p.requires_grad]
    return both, objective, torch.autograd.grad(objective, trained)


HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04, "weight": 0.25}


def agrees(cls, sign=1):
    "Whether a method's attacks, its objective, its gradients, its traces and its statistics are those of `written_step`."
    (ours, views), (theirs, _) = (make(c, sign=sign, **HOW) for c in (cls, AdvCL))
    moved, objective, grads = written_step(theirs, views, HOW["eps"], HOW["step_size"], HOW["steps"], sign, HOW["weight"])
    start_zero(ours)
    before = snapshot(ours)
    found = move(ours, views)
    if any(t is None for t in found): return False
    traces = (
        not any(t.requires_grad for t in found) and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None for p in ours.parameters()) and all(m.training for m in ours.modules())
    )
    value, player = turn(ours, views)
    own = torch.autograd.grad(value, [p for p in ours.parameters() if p.requires_grad], allow_unused=True)
    same = lambda a, b: a is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-10)
    return (
        traces and player.sign == -1 and all(map(same, found, moved)) and same(value, objective)
        and all(same(a, b) for a, b in zip(own, grads, strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_the_step_is_the_written_one(sign):
    assert agrees(AdvCL, sign)


class FlippedSign(AdvCL):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class NoPseudoLabels(AdvCL):
    def pseudo_loss(self, h, labels): return 0 * super().pseudo_loss(h, labels)


class PseudoLabelsOfTheContrastiveAdversary(AdvCL):
    def attack(self, *args): return (super().attack(*args)[0],) * 2


class Swapped(AdvCL):
    def attack(self, *args): return super().attack(*args)[::-1]


class SwappedBranches(AdvCL):
    def features(self, x, name): return super().features(x, {"adv": "pseudo", "pseudo": "adv"}.get(name, name))


class CleanBranchForTheAttacked(AdvCL):
    def features(self, x, name): return super().features(x, "clean" if name == "adv" else name)


class LowFrequencies(AdvCL):
    def clean_views(self, views):
        high = high_pass(views.weak, 1.0)
        return torch.cat([views.strong1, views.strong2, views.weak - high])


class HighFrequenciesOfACrop(AdvCL):
    def clean_views(self, views): return torch.cat([views.strong1, views.strong2, high_pass(views.strong1, 1.0)])


class ThreeViews(AdvCL):
    def loss(self, z): return super().loss(z[:2] if len(z) == 2 else z[[0, 1, 3]])


class CleanViewsOnly(AdvCL):
    def loss(self, z): return super().loss(z[:3]) if z.requires_grad and self.encoder.training else super().loss(z)


class LabelsOfTheWrongImages(AdvCL):
    def turns(self, views): yield from super().turns(Views(**vars(views) | {"index": views.index - 2}))


class OneCluster(AdvCL):
    def pseudo_loss(self, h, labels): return F.cross_entropy(self.heads(h)[:, :2], labels[:, 0], reduction="none")


class SumOfClusterings(AdvCL):
    def pseudo_loss(self, h, labels): return 3 * super().pseudo_loss(h, labels)


class OfficialFactor(AdvCL):
    def __init__(self, *args, **options): super().__init__(*args, upstream=True, **options)


class AttackInTrainMode(AdvCL):
    def attack(self, x, clean, labels):
        with frozen(self.encoder, self.projector, train=True):
            fixed = self.stacked(self.features(clean, "clean"), len(x)).detach()
            look = lambda t: self.loss(torch.cat([self.stacked(self.features(t, "adv"), len(x)), fixed]))
            return self.player.find(look, x), super().attack(x, clean, labels)[1]


class AttackWithoutFreezing(AdvCL):
    def attack(self, x, clean, labels):
        self.eval()
        return super().attack(x, clean, labels)


class GraphOfTheAttackKept(AdvCL):
    def attack(self, *args): return tuple(t.requires_grad_() for t in super().attack(*args))


class NoAttack(AdvCL):
    def attack(self, x, clean, labels): return x, x


class OnePassForEachCleanView(AdvCL):
    def features(self, x, name):
        parts = x.chunk(3) if name == "clean" else [x]
        return torch.cat([super(OnePassForEachCleanView, self).features(t, name) for t in parts])


@pytest.mark.parametrize("mutant", [
    FlippedSign, NoPseudoLabels, PseudoLabelsOfTheContrastiveAdversary, Swapped, SwappedBranches, CleanBranchForTheAttacked, LowFrequencies,
    HighFrequenciesOfACrop, ThreeViews, CleanViewsOnly, LabelsOfTheWrongImages, OneCluster, SumOfClusterings, OfficialFactor,
    AttackInTrainMode, AttackWithoutFreezing, GraphOfTheAttackKept, NoAttack, OnePassForEachCleanView,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# limits


@examples
@given(seeds, st.integers(0, 4), signs, st.sampled_from(["linf", "l2", "l1"]), st.booleans())
def test_without_a_ball_both_are_the_weak_view(seed, steps, sign, norm, upstream):
    method, views = make(seed=seed, eps=0.0, steps=steps, sign=sign, norm=norm, upstream=upstream)
    assert all(torch.equal(t, views.weak) for t in move(method, views))


@examples
@given(seeds)
def test_without_its_parts_it_is_simclr(seed):
    "Two clean views in one branch: NT-Xent, to the bit, and nothing else of the network is trained."
    method, views = make(seed=seed, weight=0.0, high_view=False, attacked_view=False, evaluated_branch="clean")
    value, _ = turn(method, views)
    with torch.no_grad(): z = method.projector(method.features(torch.cat([views.strong1, views.strong2]), "clean")).chunk(2)
    assert torch.allclose(value, nt_xent(torch.stack(z)), rtol=1e-10)
    idle = [*method.heads.parameters(), *method.encoder[2].branches["adv"].parameters()]
    grads = torch.autograd.grad(value, idle, allow_unused=True)
    assert all(g is None for g in grads)


def test_a_part_that_is_left_out_costs_nothing_and_changes_nothing_else():
    whole, views = make(**HOW)
    start_zero(whole)
    x_con, x_pse = move(whole, views)
    no_pseudo = start_zero(make(**HOW | {"weight": 0.0})[0])
    assert torch.equal(move(no_pseudo, views)[0], x_con) and move(no_pseudo, views)[1] is None
    no_attack = start_zero(make(attacked_view=False, evaluated_branch="pseudo", **HOW)[0])
    no_attack.labels = whole.labels
    assert torch.equal(move(no_attack, views)[1], x_pse) and move(no_attack, views)[0] is None
    cost, without_attack = {}, {"attacked_view": False, "evaluated_branch": "pseudo"}
    for name, how in {"all": {}, "high": {"high_view": False}, "pseudo": {"weight": 0.0}, "attacked": without_attack}.items():
        method, views = make(**HOW | {"steps": 5} | how)
        with count_passes(method.encoder) as passes: play(method, views, {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
        cost[name] = passes.units(6)
    assert cost == {"all": 38, "high": 34, "pseudo": 25, "attacked": 22}


def test_no_steps_leave_two_different_noises():
    method, views = make(eps=0.1, steps=0)
    x_con, x_pse = move(method, views)
    for t in (x_con, x_pse): assert 0 < (t - views.weak).abs().max() <= 0.1 + 1e-12
    assert not torch.equal(x_con, x_pse)


# the contract of the attack


@examples
@given(seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 8 / 255, 0.3]), st.integers(0, 3), signs, st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.sampled_from([0.0, 0.01, 1.0]))
def test_contract(seed, norm, eps, steps, sign, training, dtype, step_size):
    how = {"norm": norm, "eps": eps, "steps": steps, "sign": sign, "step_size": step_size}
    method, views = make(seed=seed, dtype=dtype, **how)
    method.train(training)
    method.encoder[3].train(not training)  # a mixed state must come back too
    method.projector[0].weight.requires_grad_(False)
    kept = dict(vars(views))
    with untouched(method, *kept.values()): found = move(method, views)
    for t in found:
        assert ((t - views.weak).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
        assert t.dtype == dtype and t.min() >= 0 and t.max() <= 1 and not t.requires_grad
    assert all(v is kept[k] for k, v in vars(views).items())
    method.generator = seeded(seed)
    assert all(map(torch.equal, move(method, views), found))


@examples
@given(seeds, st.floats(1e-3, 1e3), st.integers(1, 4))
def test_the_attack_does_not_see_the_weight(seed, weight, steps):
    (one, views), (other, _) = (make(seed=seed, eps=0.1, steps=steps, weight=w) for w in (0.2, weight))
    assert all(map(torch.equal, move(one, views), move(other, views)))


@examples
@given(seeds)
def test_neither_perturbation_depends_on_the_other(seed):
    "Other labels leave the contrastive one, other clean views that of the labels."
    method, views = make(seed=seed, eps=0.1, steps=3)
    start_zero(method)
    labels, clean = method.labels[views.index], method.clean_views(views)
    x_con, x_pse = method.attack(views.weak, clean, labels)
    assert torch.equal(method.attack(views.weak, clean, 1 - labels)[0], x_con)
    assert torch.equal(method.attack(views.weak, clean.flip(0), labels)[1], x_pse)
    alone = method.attack(views.weak[:2], method.clean_views(Views(**{k: v[:2] for k, v in vars(views).items()})), labels[:2])[1]
    assert torch.allclose(alone, x_pse[:2], atol=1e-12)  # of the labels, each image for itself


def test_the_sign_chooses_the_direction():
    how = {"eps": 1e-5, "steps": 1, "step_size": 1e-5}
    (up, views), (down, _) = make(sign=1, **how), make(sign=-1, **how)
    views.weak = 0.1 + 0.8 * views.weak
    higher, lower = (move(start_zero(m), views) for m in (up, down))
    for a, b in zip(higher, lower, strict=True): assert torch.allclose(a - views.weak, views.weak - b, atol=1e-12)
    up.eval()
    labels, clean = up.labels[views.index], up.features(up.clean_views(views), "clean")
    contrast = lambda t: up.loss(up.stacked(torch.cat([clean, up.features(t, "adv")]), 6)).item()
    pseudo = lambda t: up.pseudo_loss(up.features(t, "pseudo"), labels).mean().item()
    assert contrast(lower[0]) < contrast(views.weak) < contrast(higher[0])
    assert pseudo(lower[1]) < pseudo(views.weak) < pseudo(higher[1])


def test_everything_holds_still_and_the_clean_views_are_forwarded_once():
    method, views = make(eps=0.1, steps=2)
    looks, used = [], []
    for part in (method.encoder, method.projector, method.heads):
        part.register_forward_hook(lambda m, *_: looks.append(m.training or any(p.requires_grad for p in m.parameters())))
    layer = method.encoder[2]
    layer.register_forward_hook(lambda m, args, _: used.append((m.active, len(args[0]))))
    method.labeler.register_forward_hook(lambda *_: pytest.fail("the labeler is not part of a step"))
    move(method, views)
    assert not any(looks) and used == [("clean", 18)] + [("adv", 6)] * 2 + [("pseudo", 6)] * 2
    used.clear()
    turn(method, views)
    assert used[5:] == [("clean", 18), ("adv", 6), ("pseudo", 6)]


def test_each_branch_sees_its_images_once():
    method, views = make(eps=0.1, steps=2)
    for m in method.modules():
        if isinstance(m, nn.BatchNorm1d): m.reset_running_stats()
    start_zero(method)
    x_con, x_pse = move(method, views)
    turn(method, views)
    images = {"clean": method.clean_views(views), "adv": x_con, "pseudo": x_pse}
    for name, layer in method.encoder[2].branches.items():
        assert layer.num_batches_tracked == 1
        assert torch.allclose(layer.running_mean, 0.1 * method.encoder[1](images[name].flatten(1)).mean(0), rtol=1e-9)
    assert method.projector[1].num_batches_tracked == 1 and method.labeler[2].num_batches_tracked == 0


def test_autocast_trains_every_weight():
    method, views = make(dtype=torch.float32, eps=0.1, steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16): value, player = turn(method, views)
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in player.parameters())
    assert all(p.grad is None for p in method.labeler.parameters())


# pseudo-labels


def test_labels_come_from_the_labeler_and_survive_a_checkpoint():
    method, views = make(clusters="2 5", dtype=torch.float32)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=seeded())
    before = snapshot(method.labeler)
    method.prepare(iter(()), images)
    assert torch.equal(method.labels, pseudo_labels(method.labeler, images, (2, 5)))
    assert method.labels.shape == (40, 2) and not torch.equal(method.labels, pseudo_labels(method.encoder.eval(), images, (2, 5)))
    assert all(torch.equal(v, before[k]) for k, v in method.labeler.state_dict().items())
    other = make(clusters="2 5", seed=1, dtype=torch.float32)[0]
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.labels, method.labels) and other.labels.data_ptr() != method.labels.data_ptr()
    with pytest.raises(RuntimeError, match="labels"): other.load_state_dict({k: v for k, v in method.state_dict().items() if k != "labels"})
    unlabelled = make(weight=0.0)[0]
    unlabelled.prepare(iter(()), images)
    assert len(unlabelled.labels) == 9  # as it was: nothing is clustered


def test_only_the_network_moves():
    method, _ = make()
    ours = {id(p) for p in method.network.parameters()}
    assert not ours & {id(p) for p in method.labeler.parameters()}
    assert ours == {id(p) for part in (method.encoder, method.projector, method.heads) for p in part.parameters()}


@pytest.mark.parametrize("name", BRANCHES)
def test_the_evaluated_branch_is_the_one_that_was_asked_for(name):
    method, views = make(evaluated_branch=name)
    turn(method, views)
    method.eval()
    assert torch.equal(method.evaluated()(views.weak), method.features(views.weak, name))
    assert not any(torch.equal(method.evaluated()(views.weak), method.features(views.weak, other)) for other in BRANCHES if other != name)


def test_built_from_a_record():
    config = Config("advcl", images=64, settings={"clusters": "2 3", "evaluated_branch": "pseudo"})
    method = build(Config(**json.loads(json.dumps(config.to_json()))), 1, 28)
    assert config.parents["labeler"]["method"] == "simclr" and "labeler" not in config.settings
    layers = [m for m in method.evaluated().modules() if isinstance(m, BranchedBatchNorm)]
    assert layers and {m.active for m in layers} == {"pseudo"} and method.heads.out_features == 5
    assert not any(isinstance(m, BranchedBatchNorm) for m in method.labeler.modules())


# the filter


@examples
@given(seeds, st.integers(1, 9), st.integers(0, 32).map(lambda quarters: quarters / 4))
def test_high_pass_is_written_out(seed, N, r):
    x, y = torch.rand(2, 2, 1, N, N, dtype=torch.float64, generator=seeded(seed))
    high = high_pass(x, r)
    assert torch.allclose(high, written_high(x, r), atol=1e-12)
    assert torch.allclose(high_pass(high, r), high, atol=1e-12)
    assert torch.allclose((high * y).sum(), (x * high_pass(y, r)).sum(), atol=1e-10)
    assert high.shape == x.shape and high.dtype == x.dtype


def test_a_wave_is_kept_from_its_own_frequency_on():
    down, across = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = torch.cos(2 * torch.pi * (3 * down + 4 * across) / 16)[None, None]  # 5 cycles per side
    assert torch.allclose(high_pass(wave, 5.0), wave, atol=1e-5) and high_pass(wave, 5.01).abs().max() < 1e-5
    x = wave.clone().requires_grad_()
    assert torch.allclose(torch.autograd.grad(high_pass(x, 3.0).square().sum(), x)[0], 2 * wave, atol=1e-4)


# the official code


def official_cases():
    yield from json.loads((Path(__file__).parent / "parity" / "attack_advcl.json").read_text())["cases"]


@pytest.mark.parametrize("case", official_cases(), ids=lambda case: case["label"])
def test_the_method_itself_finds_the_official_perturbations(case):
    "With `upstream` and the official settings, both starts as recorded."
    given, expected = case["inputs"], case["outputs"]
    array = lambda value: torch.tensor(value, dtype=torch.float64)
    encoder = TanhEncoder({k: array(v) for k, v in given["encoder"].items()})
    encoder.out_dim = len(given["encoder"]["b2"])
    heads, side = given["heads"], len(given["org"][0][0])
    how = {"eps": given["epsilon"], "steps": given["steps"], "step_size": given["alpha"], "temperature": given["temperature"]}
    clusters = " ".join(str(len(head["b"])) for head in heads)
    how |= {"weight": given["ce_weight"], "cutoff": given["radius"] / side, "clusters": clusters}
    method = AdvCL(encoder, nn.Identity(), upstream=True, **how)
    method.double().projector = nn.Identity()
    with torch.no_grad():
        method.heads.weight.copy_(torch.cat([array(head["W"]) for head in heads]))
        method.heads.bias.copy_(torch.cat([array(head["b"]) for head in heads]))
    views = Views(strong1=array(given["t1"]), strong2=array(given["t2"]), weak=array(given["org"]))
    labels = torch.tensor(given["targets"]).T
    player, clean = method.player, method.clean_views(views)
    assert not player.clip_start and torch.allclose(clean[-len(labels):], array(expected["high_pass"]), atol=1e-12)
    for i, name in enumerate(("cl", "ce")):
        method.player = replace(player, start=array(given[f"delta0_{name}"]))
        assert torch.allclose(method.attack(views.weak, clean, labels)[i], array(expected[f"x_{name}_after_each_step"])[-1], atol=1e-12)


def test_upstream_is_a_factor_of_the_contrast():
    z, (plain, _), (official, _) = torch.randn(4, 6, 5, dtype=torch.float64), make(), make(upstream=True)
    assert torch.allclose(official.loss(z), plain.loss(z) * 0.5 / 0.07)
    assert torch.allclose(make(temperature=0.1, upstream=True)[0].loss(z), make(temperature=0.1)[0].loss(z) * 0.1 / 0.07)


def test_a_label_of_minus_one_counts_as_nothing():
    method, _ = make()
    h, labels = torch.randn(6, 12, dtype=torch.float64), torch.randint(0, 2, (6, 3))
    every = [F.cross_entropy(s, y, reduction="none") for s, y in zip(method.heads(h).split([2, 3, 4], 1), labels.T, strict=True)]
    labels[:, 1] = -1
    assert torch.allclose(method.pseudo_loss(h, labels), (every[0] + every[2]) / 3)


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"steps": -1}, "steps must be a whole number"), ({"norm": "l3"}, "unknown norm"),
    ({"eps": -0.1}, "eps"), ({"step_size": -0.1}, "sign chooses the direction"), ({"weight": -0.2}, "weight must be >= 0"),
    ({"evaluated_branch": "normal"}, "clean or adv or pseudo"), ({"attacked_view": False}, "clean or pseudo, got 'adv'"),
    ({"weight": 0.0, "evaluated_branch": "pseudo"}, "clean or adv, got 'pseudo'"), ({"clusters": "2, ten"}, "numbers of clusters"),
    ({"clusters": ""}, "numbers of clusters"), ({"clusters": "0 10"}, "numbers of clusters"), ({"cutoff": -0.25}, "cycles >= 0"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): move(*make(**wrong))


def test_card():
    assert get_method("AdvCL") is methods()["advcl"] is AdvCL
    card = AdvCL.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("memory-free", "CL", "input", "yes", 1, (1, 2))
    known = settings_of(AdvCL)
    assert (known["eps"], known["steps"], known["weight"], known["clusters"]) == (8 / 255, 5, 0.2, "2 10 50 100 500")
