"AdvMIM: limits, the contract of its attack, its step written out a second time, and mutants that the same checks must reject."
from dataclasses import replace

import pytest
import torch
from common import ORDER, seeded, seeds, signs, snapshot, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from advssl.attack import Perturbation
from advssl.encoders import Encoder
from advssl.masked import normalise_patches, patchify, random_masks, unpatchify
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.adv_mim import AdvMIM
from advssl.methods.mae import MAE
from advssl.threat import Linf

examples = settings(max_examples=12, deadline=None)
PLACES = [("pixels", "visible"), ("pixels", "all"), ("pixels", "target"), ("embeddings", "visible"), ("embeddings", "all")]
places, norms = st.sampled_from(PLACES), st.sampled_from(["linf", "l2", "l1"])
X = 0.2 + 0.6 * torch.rand(3, 1, 6, 8, generator=seeded(9), dtype=torch.float64)


def make(cls=AdvMIM, seed=0, dtype=torch.float64, **options):
    "Images of 6 x 8 pixels in 3 x 4 patches; lively weights."
    torch.manual_seed(seed)
    vit = VisionTransformer((6, 8), 2, 1, 0, "avg", 16, 1, 2, fc_norm=False)
    method = cls(Encoder(vit, 16, 1), decoder_dim=16, **options).to(dtype)
    for p in vit.parameters():
        if p.ndim == 2: p.data *= 2
    method.generator = seeded(seed)
    return method.train()


def free_patches(where, mask): return {"visible": ~mask, "all": torch.ones_like(mask), "target": mask}[where]


def part(move): return move[0] if move[1] is None else move[1]


# a second implementation, with loops


def written_error(method, x, mask, delta):
    "Eq. (1): predictions image by image from visible patches, one at a time; targets patch by patch."
    vit, total, count = method.encoder.backbone, 0.0, 0
    for n in range(len(x)):
        pixels = (x[n : n + 1] - 0.5) / 0.5
        tokens, patches = vit.patch_embed(pixels)[0], patchify(pixels, 2)[0]
        if delta is not None: tokens = tokens + delta[n]
        rows = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
        for i in range(12):
            if not mask[n, i]: rows.append(tokens[i] + vit.pos_embed[0, 1 + i])
            elif method.masked.insert: rows.append(method.masked.mask_token[0, 0] + vit.pos_embed[0, 1 + i])
        p = method.decoder(vit.norm(vit.blocks(torch.stack(rows)[None])), mask[n : n + 1])[0]
        for i in range(12):
            if not mask[n, i]: continue
            y = (patches[i] - patches[i].mean()) / (patches[i].var() + 1e-6).sqrt() if method.normalise else patches[i]
            total, count = total + (p[i] - y).square().sum(), count + 4
    return total / count


def written_step(method, x, mask, level, where, eps, alpha, steps, sign, weight):
    "The player from a zero start, on whole tensors with a mask over its gradient, and the objective."
    free = free_patches(where, mask)
    allowed = unpatchify(free[..., None].double().expand(-1, -1, 4), 2, 1, (3, 4))
    delta, image, move = None, x, None
    if level == "embeddings":
        e = method.encoder.backbone.patch_embed((x - 0.5) / 0.5).detach()
        kappa = (e.square().sum() / e.numel()).sqrt()
        move = torch.zeros_like(e)
        for _ in range(steps):
            leaf = move.clone().requires_grad_()
            (g,) = torch.autograd.grad(written_error(method, x, mask, kappa * leaf), leaf)
            move = ((move + sign * alpha * g.sign()) * free[..., None]).clamp(-eps, eps)
        delta = kappa * move
    else:
        for _ in range(steps):
            leaf = image.clone().requires_grad_()
            (g,) = torch.autograd.grad(written_error(method, leaf, mask, None), leaf)
            image = torch.maximum(torch.minimum(image + sign * alpha * g.sign() * allowed, x + eps), x - eps).clamp(0, 1)
    objective = (1 - weight) * written_error(method, x, mask, None) + weight * written_error(method, image, mask, delta)
    weights = [p for p in method.parameters() if p.requires_grad]
    return (image if delta is None else delta), objective, torch.autograd.grad(objective, weights, allow_unused=True)


HOW = {"eps": 0.1, "steps": 2, "step_size": 0.06, "weight": 0.3, "start": "zero"}


def same(a, b):
    "Equal up to rounding, or both absent."
    if a is None or b is None: return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def agrees(cls, level="pixels", where="visible", sign=1, **more):
    "Whether the attack, its traces, the objective and the gradients are those of `written_step`."
    how = HOW | {"level": level, "where": where, "sign": sign} | more
    ours, theirs = make(cls, **how), make(**how)
    mask = random_masks(3, 12, 0.75, seeded())
    found, objective, grads = written_step(theirs, X, mask, level, where, how["eps"], how["step_size"], how["steps"], sign, how["weight"])
    before = snapshot(ours)
    mine = part(ours.attack(X, mask))
    traces = (
        not mine.requires_grad and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None for p in ours.parameters()) and all(m.training for m in ours.modules())
        and [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    )
    ((value, player),) = ours.turns(Views(weak=X))
    gradients = torch.autograd.grad(value, [p for p in ours.parameters() if p.requires_grad], allow_unused=True)
    return traces and player.sign == -1 and same(mine, found) and same(value, objective) and all(map(same, gradients, grads))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("level", "where"), PLACES)
def test_the_step_is_the_written_one(level, where, sign):
    assert agrees(AdvMIM, level, where, sign)


@pytest.mark.parametrize("more", [{"insert": True}, {"normalise": False}, {"weight": 1.0}, {"insert": True, "normalise": False}])
@pytest.mark.parametrize(("level", "where"), [("pixels", "all"), ("embeddings", "visible")])
def test_the_variants_are_the_written_ones(level, where, more):
    assert agrees(AdvMIM, level, where, **more)


class FlippedSign(AdvMIM):
    def __init__(self, *args, sign=1, **how): super().__init__(*args, sign=-sign, **how)


class NoAttack(AdvMIM):
    def attack(self, x, mask): return x, None


class NoCleanHalf(AdvMIM):
    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.weight = 1.0


class HalvesSwapped(AdvMIM):
    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.weight = 1 - self.weight


class ComplementMoves(AdvMIM):
    def movable(self, mask): return super().movable(~mask) if self.where == "all" else torch.stack([
        (m if self.where == "visible" else ~m).nonzero().flatten() for m in mask])


class EverythingMoves(AdvMIM):
    def movable(self, mask): return torch.arange(12).expand(len(mask), -1)


class InputStays(AdvMIM):
    "The moved image is the target only."
    def turns(self, views):
        x, mask = views.weak, self.hide(views.weak)
        moved, _ = self.attack(x, mask)
        clean = self.error(self.reconstruct(x, mask), x, mask)
        yield (1 - self.weight) * clean + self.weight * self.error(self.reconstruct(x, mask), moved, mask), self.network


class TargetStays(AdvMIM):
    "The moved image is the input only."
    def turns(self, views):
        x, mask = views.weak, self.hide(views.weak)
        moved, delta = self.attack(x, mask)
        clean = self.error(self.reconstruct(x, mask), x, mask)
        yield (1 - self.weight) * clean + self.weight * self.error(self.reconstruct(moved, mask, delta), x, mask), self.network


class GraphKept(AdvMIM):
    def attack(self, x, mask):
        moved, delta = super().attack(x, mask)
        return (moved.requires_grad_(), None) if delta is None else (moved, delta.requires_grad_())


class OtherTargets(AdvMIM):
    def error(self, prediction, x, mask):
        self.normalise = not self.normalise
        try: return super().error(prediction, x, mask)
        finally: self.normalise = not self.normalise


class AttackOnPixelTargets(AdvMIM):
    def attack(self, x, mask):
        self.normalise = not self.normalise
        try: return super().attack(x, mask)
        finally: self.normalise = not self.normalise


class HalfTheBall(AdvMIM):
    def __init__(self, *args, eps=0.1, **how): super().__init__(*args, eps=eps / 2, **how)


class AbsoluteUnits(AdvMIM):
    "The embeddings' ball without its unit."
    def attack(self, x, mask):
        moved, delta = super().attack(x, mask)
        e = self.masked.vit.patch_embed(self.encoder.normalise(x)).detach()
        return moved, delta / e.square().mean().sqrt()


class StillTraining(AdvMIM):
    "Weights that ask for a gradient while the player looks, and keep one."
    def attack(self, x, mask):
        out = super().attack(x, mask)
        self.error(self.reconstruct(x, mask), x, mask).backward()
        return out


EVERYWHERE = [FlippedSign, NoAttack, NoCleanHalf, HalvesSwapped, GraphKept, OtherTargets, AttackOnPixelTargets, HalfTheBall, StillTraining]
PIXELS = [(m, "pixels", w) for m in EVERYWHERE for w in ("visible", "all", "target") if (m, w) != (AttackOnPixelTargets, "target")]


@pytest.mark.parametrize(("mutant", "level", "where"), [
    *PIXELS, *((m, "embeddings", "visible") for m in EVERYWHERE),
    (ComplementMoves, "pixels", "visible"), (ComplementMoves, "pixels", "target"), (ComplementMoves, "embeddings", "visible"),
    (EverythingMoves, "pixels", "visible"),
    (InputStays, "pixels", "visible"), (InputStays, "pixels", "all"), (TargetStays, "pixels", "all"), (TargetStays, "pixels", "target"),
    (InputStays, "embeddings", "visible"), (AbsoluteUnits, "embeddings", "visible"),
])
def test_mutants_are_rejected(mutant, level, where):
    assert not agrees(mutant, level, where)


# what is vacuous


@examples
@given(seeds, st.booleans(), st.booleans())
def test_an_attack_on_the_target_never_reaches_the_network(seed, insert, normalise):
    method = make(seed=seed, eps=0.3, steps=3, where="target", insert=insert, normalise=normalise)
    mask = random_masks(3, 12, 0.75, seeded(seed))
    moved, delta = method.attack(X, mask)
    assert delta is None and not torch.equal(moved, X) and torch.equal(method.reconstruct(moved, mask), method.reconstruct(X, mask))
    through_input = torch.autograd.grad(method.error(method.reconstruct(leaf := X.clone().requires_grad_(), mask), X, mask), leaf)[0]
    assert (patchify(through_input, 2)[mask] == 0).all()


@examples
@given(seeds, st.booleans(), st.sampled_from([0.01, 0.1]))
def test_raw_targets_have_the_closed_form(seed, insert, eps):
    "The player's move, the attacked loss and its gradient in the weights are those of a loss without a player."
    method = make(seed=seed, eps=eps, steps=4, start="zero", where="target", insert=insert, normalise=False)
    mask = random_masks(3, 12, 0.75, seeded(seed))
    moved, _ = method.attack(X, mask)
    r = (method.reconstruct(X, mask) - patchify((X - 0.5) / 0.5, 2))[mask]
    assert torch.allclose(patchify(moved - X, 2)[mask], -eps * r.detach().sign(), atol=1e-12)
    attacked = method.error(method.reconstruct(X, mask), moved, mask)
    other = r.square().mean() + 4 * eps * r.abs().mean() + 4 * eps**2
    weights = [p for p in method.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(value, weights, allow_unused=True, retain_graph=True) for value in (attacked, other)]
    assert torch.allclose(attacked, other, rtol=1e-10)
    assert all(map(same, *grads))


def test_a_flat_patch_takes_any_target():
    "Eq. (7): inside the ball the player turns a target against the prediction."
    flat = torch.full((1, 1, 6, 8), 0.5, dtype=torch.float64) + 1e-4 * X[:1]
    method = make(eps=0.05, steps=10, start="zero", where="target")
    mask = random_masks(1, 12, 0.75, seeded())
    moved, _ = method.attack(flat, mask)
    p = method.reconstruct(flat, mask)[mask]
    y = normalise_patches(patchify((moved - 0.5) / 0.5, 2)[mask])
    assert (torch.cosine_similarity(p - p.mean(-1, keepdim=True), y) < -0.7).all()


def test_all_embeddings_are_worth_the_visible_ones():
    mask = random_masks(3, 12, 0.75, seeded())
    every, some = (make(eps=0.1, steps=3, start="zero", level="embeddings", where=where).attack(X, mask)[1] for where in ("all", "visible"))
    assert torch.equal(every, some) and not every[mask].any()


# limits


@examples
@given(seeds, places, signs, st.sampled_from([{"eps": 0.0}, {"steps": 0}, {"weight": 0.0}]), st.booleans(), norms)
def test_without_a_player_it_is_mae_to_the_bit(seed, place, sign, nobody, insert, norm):
    how = {"eps": 0.1, "steps": 2, "weight": 0.5, "norm": norm, "level": place[0], "where": place[1], "sign": sign} | nobody
    ours, base = make(seed=seed, insert=insert, **how), make(MAE, seed, insert=insert)
    values = []
    for method in (ours, base):
        optimizers = {p.name: torch.optim.AdamW(p.parameters(), 1e-2) for p in method.players()}
        values.append(torch.stack([play(method, Views(weak=X), optimizers) for _ in range(2)]))
    assert torch.equal(*values) and all(torch.equal(v, base.state_dict()[k]) for k, v in ours.state_dict().items())
    assert torch.equal(ours.generator.get_state(), base.generator.get_state()) and not ours.logs


@examples
@given(seeds, places, signs)
def test_a_ball_without_radius_moves_nothing(seed, place, sign):
    method = make(seed=seed, eps=0.0, steps=2, level=place[0], where=place[1], sign=sign)
    mask = random_masks(3, 12, 0.75, seeded(seed))
    moved, delta = method.attack(X, mask)
    assert torch.equal(moved, X) and (delta is None or not delta.any())
    assert torch.equal(method.reconstruct(moved, mask, delta), method.reconstruct(X, mask))


# the contract of the attack


@examples
@given(seeds, places, norms, st.sampled_from([1e-3, 0.1, 0.5]), st.integers(0, 3), signs, st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.sampled_from(["random", "zero"]))
def test_contract(seed, place, norm, eps, steps, sign, training, dtype, start):
    level, where = place
    method = make(seed=seed, dtype=dtype, norm=norm, eps=eps, steps=steps, sign=sign, level=level, where=where, start=start).train(training)
    method.decoder.norm.train(not training)  # a mixed state must come back too
    method.decoder.head.bias.requires_grad_(False)
    x = X.to(dtype).clone()
    x[0] = x[0].round()  # some pixels at the ends of their range
    mask = random_masks(3, 12, 0.75, seeded(seed))
    with untouched(method, x, mask): moved, delta = method.attack(x, mask)
    e = method.masked.vit.patch_embed(method.encoder.normalise(x)).detach()
    change = moved - x if level == "pixels" else delta / e.square().mean().sqrt()
    assert (change.flatten(1).norm(ORDER[norm], dim=1) <= eps * (1 + 1e-4) + 1e-6).all()
    by_patch = patchify(change, 2) if level == "pixels" else change
    assert (by_patch[~free_patches(where, mask)] == 0).all()
    assert moved.dtype == dtype and moved.min() >= 0 and moved.max() <= 1 and not moved.requires_grad
    assert (level == "embeddings") == torch.equal(moved, x) or steps == 0 and start == "zero" or torch.equal(moved, x) == (not change.any())
    method.generator = seeded(seed)
    again = method.attack(x, mask)
    method.generator = seeded(seed)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, method.attack(x, mask), strict=True))


@examples
@given(seeds, places)
def test_the_sign_chooses_the_direction(seed, place):
    "Small steps: up raises the error, down lowers it, by the same amount to first order."
    how = {"eps": 1e-5, "steps": 1, "step_size": 1e-5, "start": "zero", "level": place[0], "where": place[1]}
    mask = random_masks(3, 12, 0.75, seeded(seed))
    values = []
    for sign in (-1, 1):
        method = make(seed=seed, sign=sign, **how)
        moved, delta = method.attack(X, mask)
        values.append(method.error(method.reconstruct(moved, mask, delta), moved, mask).item())
    clean = method.error(method.reconstruct(X, mask), X, mask).item()
    assert values[0] < clean < values[1]


def test_fgsm_is_one_full_step_and_more_steps_are_stronger():
    mask = random_masks(3, 12, 0.75, seeded())
    def reached(steps, **how):
        method = make(eps=0.1, steps=steps, start="zero", **how)
        moved, _ = method.attack(X, mask)
        return method.error(method.reconstruct(moved, mask), X, mask), moved
    one, moved = reached(1, step_size=0.1)
    visible = (~mask)[..., None].expand(-1, -1, 4)
    assert torch.allclose(patchify((moved - X).abs(), 2)[visible], torch.tensor(0.1).double())
    assert reached(0)[0] < one < reached(10)[0]


def test_the_ball_belongs_to_the_patches_that_move():
    "A random start in the Euclidean ball spends nothing on patches that stay: its radius has the law of the smaller dimension."
    method = make(norm="l2", eps=1.0, steps=0, where="visible")
    method.player = replace(method.player, pixels=None)
    x, mask = X[:1].expand(4000, -1, -1, -1), random_masks(4000, 12, 0.75, seeded())
    radius = (method.attack(x, mask)[0] - x).flatten(1).norm(dim=1)
    assert abs(radius.mean() - 12 / 13) < 0.01  # 3 patches of 4 pixels: the mean of u^(1/12)


@pytest.mark.parametrize(("how", "units"), [
    ({}, 9), ({"weight": 0.5}, 12), ({"where": "all"}, 9), ({"where": "target"}, 4), ({"level": "embeddings"}, 9), ({"eps": 0.0}, 3),
    ({"steps": 0}, 3), ({"weight": 0.0}, 3),
])
def test_passes(how, units):
    method = make(**{"eps": 0.1, "steps": 3} | how)
    with count_passes(method.masked) as passes: play(method, Views(weak=X), {"network": torch.optim.SGD(method.network.parameters(), 0.1)})
    assert passes.units(3) == units


def test_the_whole_network_holds_still():
    for level, where in PLACES:
        method = make(eps=0.1, steps=2, level=level, where=where)
        looks = []
        for part in (method.masked, method.decoder):
            part.register_forward_hook(lambda m, *_, seen=looks: seen.append(m.training or any(p.requires_grad for p in m.parameters())))
        method.attack(X, random_masks(3, 12, 0.75, seeded()))
        assert looks and not any(looks)


@pytest.mark.parametrize(("level", "where"), PLACES)
def test_autocast_trains_every_weight(level, where):
    method = make(dtype=torch.float32, eps=0.1, steps=2, level=level, where=where, weight=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16): ((value, player),) = method.turns(Views(weak=X.float()))
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in player.parameters())
    assert set(method.logs) == {"clean", "attacked"} and not any(v.requires_grad for v in method.logs.values())


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"steps": -1}, "steps must be a whole number"), ({"norm": "l3"}, "unknown norm"),
    ({"eps": -0.1}, "eps"), ({"step_size": -0.1}, "sign chooses the direction"), ({"start": "far"}, "start is"),
    ({"level": "logits"}, "level must be one of"), ({"where": "hidden"}, "where must be one of"),
    ({"weight": -0.1}, "share of the attacked half"),
    ({"level": "embeddings", "where": "target"}, "made of pixels"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("AdvMIM") is methods()["advmim"] is AdvMIM
    card = AdvMIM.card
    assert (card.type, card.base, card.level, card.sign, card.tables) == ("memory-free", "MIM", "input", 1, ())
    known = settings_of(AdvMIM)
    assert (known["norm"], known["eps"], known["steps"], known["sign"]) == ("linf", 8 / 255, 5, 1)
    assert (known["where"], known["level"]) == ("visible", "pixels")
    assert card.combined == ("yes" if known["weight"] < 1 else "no")
    assert make().player == Perturbation(Linf(8 / 255), 5)
