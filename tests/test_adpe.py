"AdPE: its step written out with loops in all four forms, mutants, limits, the search, passes, several processes."
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from common import ORDER, seeded, seeds, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from advssl.config import Config, make_optimizer
from advssl.encoders import Encoder
from advssl.masked import mae_loss, patchify, random_masks
from advssl.method import Player, Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.adpe import AdPE, RelativeBlocks, Shift, interpolation

examples = settings(max_examples=15, deadline=None)
FORMS = [(position, mode) for position in ("absolute", "relative") for mode in ("coordinate", "embedding")]
forms = st.sampled_from(FORMS)
X = torch.rand(2, 1, 6, 8, generator=seeded(9), dtype=torch.float64)


def make(cls=AdPE, seed=0, dtype=torch.float64, **options):
    "On 6 x 8 pixels: a grid of 3 rows and 4 columns, one block of two heads, with lively weights."
    torch.manual_seed(seed)
    vit = VisionTransformer((6, 8), 2, 1, 0, "avg", 16, 1, 2, fc_norm=False)
    encoder = Encoder(vit, 16, 1)
    method = cls(encoder, decoder_dim=16, **options).to(dtype)
    if isinstance(vit.blocks, RelativeBlocks): vit.blocks.table.data.normal_()
    for p in vit.parameters():
        if p.ndim == 2: p.data *= 2
    method.generator = seeded(seed)
    return method.train()


def some_shift(method, length, seed=3):
    "A shift of this length."
    value = torch.randn(method.shift.value.shape, generator=seeded(seed), dtype=method.shift.value.dtype)
    return value * length / value.norm()


# a second implementation, with loops


def written_place(c, r, width):
    "Sines and cosines of column and row, entry by entry."
    quarter = width // 4
    return torch.stack([f(u * 10000.0 ** (-k / quarter)) for u in (c, r) for f in (torch.sin, torch.cos) for k in range(quarter)])


def written_bias(table, dx, dy):
    "Bilinear interpolation at a real offset of 4 columns and 3 rows, by the four entries around it."
    x, y = (dx + 3).clamp(0, 6), (dy + 2).clamp(0, 4)
    left, top = min(int(x), 5), min(int(y), 3)
    return sum((1 - (x - b).abs()) * (1 - (y - a).abs()) * table[:, a, b] for a in (top, top + 1) for b in (left, left + 1))


def written_reconstruct(method, x, mask, delta):
    position, mode, vit = method.position, method.mode, method.encoder.backbone
    relative = position == "relative"
    tokens, table = vit.patch_embed((x - 0.5) / 0.5), vit.pos_embed[0]
    out = []
    for n in range(len(x)):
        rows = [vit.cls_token[0, 0] + table[0]]
        for i in range(12):
            token, place = tokens[n, i], table[1 + i]
            if mask[n, i]:
                token = method.masked.mask_token[0, 0]
                if position == "absolute" and mode == "coordinate": place = written_place(i % 4 + delta[0], i // 4 + delta[1], 16)
                if position == "absolute" and mode == "embedding": place = place + delta
            rows.append(token + place)
        h, bias, blocks = torch.stack(rows)[None], None, vit.blocks
        if relative:
            blocks, entries = vit.blocks.blocks, []
            for i in range(12):
                for j in range(12):
                    dx, dy = i % 4 - j % 4, i // 4 - j // 4
                    value = vit.blocks.table[:, dy + 2, dx + 3]
                    if mask[n, i] and mode == "coordinate": value = written_bias(vit.blocks.table, dx + delta[0], dy + delta[1])
                    if mask[n, i] and mode == "embedding": value = value + delta
                    entries.append(value)
            bias = F.pad(torch.stack(entries, -1).view(2, 12, 12), (1, 0, 1, 0))
        for block in blocks: h = block(h, attn_mask=bias)
        out.append(vit.norm(h))
    return method.decoder(torch.cat(out))


@functools.cache
def written_step(position, mode, sign, ball):
    "Objective and state after one step from a shift of length 0.4; the step of the shift has length 2 and leaves the ball."
    method = make(position=position, mode=mode)
    delta, mask = some_shift(method, 0.4).requires_grad_(), random_masks(2, 12, 0.75, seeded())
    loss = mae_loss(written_reconstruct(method, X, mask, delta), patchify((X - 0.5) / 0.5, 2), mask)
    weights = method.network.parameters()
    *grads, up = torch.autograd.grad(loss, [*weights, delta])
    moved = (delta + sign * 2 * up / up.norm()).detach()
    with torch.no_grad():
        for p, g in zip(weights, grads, strict=True): p -= 0.1 * g
    method.shift.value.data = moved.clamp(-0.45, 0.45) if ball == "linf" else moved * 0.45 / moved.norm()
    return loss.detach(), method.state_dict(), 2 / up.norm().item()


def agrees(cls, position, mode, sign=1, ball="l2"):
    "Whether one step of a method is the written one: objective, every parameter after it, and the shift in its ball."
    loss, state, rate = written_step(position, mode, sign, ball)
    method = make(cls, position=position, mode=mode, sign=sign, radius=0.45, ball=ball)
    method.shift.value.data = some_shift(method, 0.4)
    rates = {"network": 0.1, "shift": rate}
    value = play(method, Views(weak=X), {p.name: torch.optim.SGD(p.parameters(), rates[p.name]) for p in method.players()})
    own, same = method.state_dict(), lambda a, b: torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    return same(value, loss[None]) and all(same(own[k], v) for k, v in state.items())


@pytest.mark.parametrize(("sign", "ball"), [(1, "l2"), (-1, "linf")])
@pytest.mark.parametrize(("position", "mode"), FORMS)
def test_the_step_is_the_written_one(position, mode, sign, ball):
    assert agrees(AdPE, position, mode, sign, ball)


class FlippedSign(AdPE):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class NotProjected(AdPE):
    @property
    def adversary(self): return Player("shift", (self.shift,), self.sign)


class HiddenStay(AdPE):
    def reconstruct(self, x, mask, shift=None): return super().reconstruct(x, mask, 0 * shift)


class TwiceAsFar(AdPE):
    def reconstruct(self, x, mask, shift=None): return super().reconstruct(x, mask, 2 * shift)


class OtherWay(AdPE):
    def reconstruct(self, x, mask, shift=None): return super().reconstruct(x, mask, -shift)


class AxesSwapped(AdPE):
    def reconstruct(self, x, mask, shift=None): return super().reconstruct(x, mask, shift.flip(-1))


class NetworkOwnsTheShift(AdPE):
    @property
    def network(self): return Player("network", (self,))


class PixelTarget(AdPE):
    def __init__(self, *args, **options): super().__init__(*args, normalise=False, **options)


class VisibleMove(AdPE):
    def reconstruct(self, x, mask, shift=None):
        if self.position == "relative":
            blocks, everybody = self.encoder.backbone.blocks, torch.ones_like(mask)
            with blocks.moved(everybody, shift, False if self.mode == "embedding" else None):
                return self.decoder(self.masked(self.encoder.normalise(x), mask))
        kept = self.masked.vit.pos_embed
        self.masked.vit.pos_embed = nn.Parameter(kept.roll(1, -1), requires_grad=False)
        try: return super().reconstruct(x, mask, shift)
        finally: self.masked.vit.pos_embed = kept


class KeysMove(AdPE):
    "The bias of hidden keys, not queries."
    def reconstruct(self, x, mask, shift=None):
        blocks = self.encoder.backbone.blocks
        if self.position == "relative": blocks.index = blocks.index.T
        try: return super().reconstruct(x, mask, shift)
        finally:
            if self.position == "relative": blocks.index = blocks.index.T


class ClassTokenToo(AdPE):
    def __init__(self, *args, **options): super().__init__(*args, upstream=True, **options)


@pytest.mark.parametrize(("mutant", "position", "mode"), [
    *((mutant, *form) for form in FORMS for mutant in (
        FlippedSign, NotProjected, HiddenStay, TwiceAsFar, OtherWay, AxesSwapped, NetworkOwnsTheShift, PixelTarget, VisibleMove)),
    *((KeysMove, "relative", mode) for mode in ("coordinate", "embedding")),
    *((ClassTokenToo, position, "embedding") for position in ("absolute", "relative")),
])
def test_mutants_are_rejected(mutant, position, mode):
    assert not agrees(mutant, position, mode)


# limits


@examples
@given(seeds, forms, st.booleans())
def test_no_shift_is_mae_plus_to_the_bit(seed, form, each):
    method = make(seed=seed, dtype=torch.float32, position=form[0], mode=form[1])
    mask, zero = random_masks(2, 12, 0.75, seeded(seed)), torch.zeros_like(method.shift.value)
    zero = zero.expand(2, -1) if each else zero
    assert torch.equal(method.reconstruct(X.float(), mask, zero), method.reconstruct(X.float(), mask))


@examples
@given(seeds, forms, st.booleans(), st.sampled_from([1, -1]))
def test_nobody_moves_in_a_ball_of_radius_zero(seed, form, memory, sign):
    method = make(seed=seed, position=form[0], mode=form[1], memory=memory, sign=sign, radius=0.0)
    ((value, movers),) = method.turns(Views(weak=X))
    assert [p.name for p in movers] == ["network"] == [p.name for p in method.players()] and not method.logs
    mask = random_masks(2, 12, 0.75, seeded(seed))
    assert torch.equal(value, mae_loss(method.reconstruct(X, mask), patchify((X - 0.5) / 0.5, 2), mask))


@pytest.mark.parametrize(("position", "mode"), FORMS)
def test_one_shift_for_all_is_the_same_shift_for_each(position, mode):
    method = make(position=position, mode=mode)
    mask, delta = random_masks(2, 12, 0.75, seeded()), some_shift(method, 0.7)
    assert torch.allclose(method.reconstruct(X, mask, delta), method.reconstruct(X, mask, delta.expand(2, -1)), rtol=1e-12)
    alone = torch.cat([method.reconstruct(X[n : n + 1], mask[n : n + 1], some_shift(method, 0.7, n)) for n in range(2)])
    assert torch.allclose(alone, method.reconstruct(X, mask, torch.stack([some_shift(method, 0.7, n) for n in range(2)])), rtol=1e-10)


@pytest.mark.parametrize(("position", "mode"), FORMS)
def test_the_evaluated_encoder_never_sees_the_player(position, mode):
    method = make(position=position, mode=mode).eval()
    before = method.encoder(X)
    method.shift.value.data += 0.5
    assert torch.equal(method.evaluated()(X), before) and before.shape == (2, 16)
    mask = torch.zeros(2, 12, dtype=torch.bool)  # nothing hidden, nobody to move
    assert torch.equal(method.reconstruct(X, mask, method.shift.value), method.reconstruct(X, mask))


def test_a_vector_for_all_keys_does_nothing():
    method = make(position="relative", mode="embedding", upstream=True)
    mask, vector = random_masks(2, 12, 0.75, seeded()), torch.randn(2, dtype=torch.float64, requires_grad=True)
    prediction = method.reconstruct(X, mask, vector)
    assert torch.allclose(prediction, method.reconstruct(X, mask), rtol=0, atol=1e-12)
    assert torch.autograd.grad(prediction.square().sum(), vector)[0].abs().max() < 1e-12


def test_upstream_gives_the_mask_token_to_the_adversary():
    method = make(mode="embedding", upstream=True)
    assert not method.masked.mask_token.any() and 0 < method.shift.value.std() < 0.05
    assert all(p is not method.masked.mask_token for p in method.network.parameters())


# the shift and its ball


@examples
@given(seeds, st.sampled_from(["l2", "linf"]), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([0.0, 1e-30, 0.05, 7.0]))
def test_projection(seed, ball, radius, length):
    shift = Shift(5, radius, ball).double()
    value = torch.randn(5, generator=seeded(seed), dtype=torch.float64)
    shift.value.data = value * length / value.norm()
    inside, before = shift.value.norm(p=2 if ball == "l2" else math.inf) <= radius, shift.value.clone()
    shift.project()
    assert shift.value.norm(p=2 if ball == "l2" else math.inf) <= radius * (1 + 1e-12) and shift.value.isfinite().all()
    if inside: assert torch.allclose(shift.value, before, rtol=1e-15, atol=0)
    elif ball == "l2": assert torch.allclose(shift.value / radius if radius else value, before / before.norm() if radius else value)


@pytest.mark.parametrize("ball", ["l2", "linf"])
@pytest.mark.parametrize(("position", "mode"), FORMS)
def test_a_token_exactly_at_zero_gives_no_nan(position, mode, ball):
    "Neither in the projection, nor in a step whose gradient is zero too, nor in a search that starts there."
    shift = Shift(4, 1.0, ball)
    for _ in range(2): shift.project()
    assert torch.equal(shift.value.detach(), torch.zeros(4))
    method = make(dtype=torch.float32, position=position, mode=mode, ball=ball)
    assert not method.shift.value.any()
    optimizers = {p.name: make_optimizer(p, Config("adpe", lr=1e-2)) for p in method.players()}
    for group in optimizers["shift"].param_groups: group["lr"] = 0.0  # as in the first step of a warm-up: the token stays where it is
    value = play(method, Views(weak=X.float()), optimizers)
    assert value.isfinite().all() and all(v.isfinite().all() for v in method.state_dict().values()) and not method.shift.value.any()
    assert method.logs["shift"] == 0
    still = method.search(lambda shift: (0 * shift).sum(), 2)  # no slope anywhere
    assert still.isfinite().all() and still.shape == (2, *method.shift.value.shape)
    zero = torch.zeros(2, *method.shift.value.shape, requires_grad=True)
    mask = random_masks(2, 12, 0.75, seeded())
    assert torch.autograd.grad(method.reconstruct(X.float(), mask, zero).square().sum(), zero)[0].isfinite().all()


# several crops


def crops(method, count):
    "Crops of 2 x 2 patches of the whole 3 x 4."
    return Views(**{name: torch.rand(count, 1, 4, 4, generator=seeded(i), dtype=torch.float64) for i, name in enumerate(method.views)})


@pytest.mark.parametrize(("position", "mode"), FORMS)
def test_crops_are_read_as_by_a_network_made_for_them(position, mode):
    "A step on crops of 2 x 2 patches, against a twin whose grid is 2 x 2: the same weights, the part of the bias table that it has."
    torch.manual_seed(0)
    options = {"position": position, "mode": mode, "decoder_dim": 16, "mask_ratio": 0.5}
    vit = lambda side: VisionTransformer(side, 2, 1, 0, "avg", 16, 1, 2, fc_norm=False)
    build = lambda side, **how: AdPE(Encoder(vit(side), 16, 1), **options, **how).double()
    ours, theirs = build(8, crops=3, crop_scale=0.5), build(4)
    state = {k: v for k, v in ours.state_dict().items() if "pos_embed" not in k}
    if position == "relative":
        ours.encoder.backbone.blocks.table.data.normal_()
        state = {k: v[..., 2:5, 2:5] if k.endswith("blocks.table") else v for k, v in ours.state_dict().items() if "pos_embed" not in k}
    theirs.load_state_dict(state, strict=False)
    views = crops(ours, 2)
    whole = torch.cat([views.crop1, views.crop2, views.crop3])
    delta = some_shift(ours, 0.1, 7) if mode == "embedding" else torch.tensor([0.2, -0.1]).double()
    for method in (ours, theirs): method.shift.value.data = delta.clone()
    ours.generator, theirs.generator = seeded(4), seeded(4)
    ((a, movers),), ((b, _),) = ours.turns(views), theirs.turns(Views(weak=whole))
    if position == "relative" and mode == "coordinate":  # the smaller table ends sooner: compare where no shift leaves it
        for method in (ours, theirs):
            method.shift.value.data.zero_()
            method.generator = seeded(4)
        ((a, movers),), ((b, _),) = ours.turns(views), theirs.turns(Views(weak=whole))
    assert torch.allclose(a, b, rtol=1e-10) and len(movers) == 2
    grads = [torch.autograd.grad(value, method.shift.value)[0] for value, method in ((a, ours), (b, theirs))]
    if (position, mode) != ("relative", "coordinate"): assert torch.allclose(*grads, rtol=1e-8, atol=1e-12)
    ours.memory = False
    ours.generator = seeded(4)
    ((value, movers),) = ours.turns(views)
    assert value.isfinite() and ours.search(lambda shift: shift.square().sum(), 6).shape[0] == 6


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="choose k/"): make(crops=2, crop_scale=0.6)
    with pytest.raises(ValueError, match="no square"): make(position="relative").encoder.backbone.blocks.pairs(6)
    with pytest.raises(ValueError, match="make it smaller"): make().masked(torch.zeros(1, 1, 8, 8, dtype=torch.float64))


@examples
@given(st.floats(-9, 9), st.integers(2, 7))
def test_interpolation(shift, size):
    a = interpolation(torch.tensor(shift, dtype=torch.float64), size)
    assert torch.allclose(a.sum(-1), torch.ones(size).double()) and (a >= 0).all()
    where = (torch.arange(size).double() + shift).clamp(0, size - 1)
    assert torch.allclose(a @ torch.arange(size).double(), where, atol=1e-12)  # a straight line is kept


def test_the_shift_has_no_decay_and_its_own_rate():
    player = make(shift_lr=0.02).adversary
    (group,) = make_optimizer(player, Config("adpe", weight_decay=0.5, decay_all=True)).param_groups
    assert (group["lr"], group["weight_decay"], player.sign) == (0.02, 0.0, 1)
    with torch.no_grad(): (parameter,) = player.parameters()
    names = {name for name, p in make().named_parameters() if any(p is q for q in make().network.parameters())}
    assert parameter.shape == (2,) and "shift.value" not in names


# the search


@examples
@given(seeds, forms, st.sampled_from(["l2", "linf"]), st.sampled_from([1, -1]), st.integers(0, 3), st.booleans())
def test_contract_of_the_search(seed, form, ball, sign, searches, training):
    how = {"position": form[0], "mode": form[1], "ball": ball, "sign": sign, "searches": searches, "memory": False, "radius": 0.5}
    method = make(seed=seed, **how).train(training)
    mask, target = random_masks(2, 12, 0.75, seeded(seed)), patchify((X - 0.5) / 0.5, 2)
    loss = lambda shift: mae_loss(method.reconstruct(X, mask, shift), target, mask)
    with untouched(method, X): found = method.search(loss, 2)
    assert found.shape == (2, *method.shift.value.shape) and not found.requires_grad
    assert (found.norm(ORDER[ball], dim=1) <= 0.5 + 1e-9).all()
    method.generator = seeded(seed)
    assert torch.equal(method.search(loss, 2), found)
    ((_, movers),) = method.turns(Views(weak=X))
    assert [p.name for p in movers] == ["network"] and not method.shift.value.any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("position", "mode"), FORMS)
def test_the_search_goes_where_its_sign_says(position, mode, sign):
    method = make(position=position, mode=mode, sign=sign, radius=0.02, searches=8)
    method.eval()
    mask, target = random_masks(2, 12, 0.75, seeded()), patchify((X - 0.5) / 0.5, 2)
    around = torch.stack([some_shift(method, 0.5)] * 2)  # away from the table's kinks
    loss = lambda shift: mae_loss(method.reconstruct(X, mask, around + shift), target, mask)
    found, other = method.search(loss, 2), torch.zeros_like(around)
    assert sign * (loss(found) - loss(other)) > 0


@pytest.mark.parametrize(("memory", "searches", "units"), [(True, 3, 3), (False, 0, 3), (False, 3, 9)])
def test_passes(memory, searches, units):
    method = make(memory=memory, searches=searches)
    optimizers = {p.name: torch.optim.SGD(p.parameters(), 0.1) for p in method.players()}
    with count_passes(method.masked) as passes: play(method, Views(weak=X), optimizers)
    assert passes.units(2) == units


# precision, checkpoints


@pytest.mark.parametrize(("position", "mode"), FORMS)
def test_autocast_and_a_checkpoint(position, mode):
    method = make(dtype=torch.float32, position=position, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16): ((value, movers),) = method.turns(Views(weak=X.float()))
    value.backward()
    assert value.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for mover in movers for p in mover.parameters())
    other = make(seed=1, dtype=torch.float32, position=position, mode=mode)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.eval().evaluated()(X.float()), method.eval().evaluated()(X.float()))
    assert torch.equal(other.encoder.backbone.blocks.index, method.encoder.backbone.blocks.index) if position == "relative" else True


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sign": 0}, r"\+1 \(adversary\) or -1"), ({"position": "none"}, "position must be one of"), ({"mode": "both"}, "mode must be one of"),
    ({"radius": -0.1}, "0 is plain"), ({"radius": math.inf}, "finite"), ({"ball": "l1"}, "'l2' or 'linf'"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("AdPE") is methods()["adpe"] is AdPE
    card = AdPE.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("memory-based", "MIM", "feature", "no", 1, (1,))
    known = settings_of(AdPE)
    assert not {"eps", "norm", "steps"} & known.keys()  # its ball is not one of pixels
