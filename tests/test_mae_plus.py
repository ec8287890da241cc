"MAE+: its step written out with loops over crops, mutants, limits, smaller grids, refusals."

import pytest
import torch
from common import seeded, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from advssl.augment import RECIPES, Augment
from advssl.encoders import Encoder
from advssl.masked import corner, grid_coordinates, patchify, random_masks, sincos_position_embedding
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.mae import MAE
from advssl.methods.mae_plus import MAEPlus

examples = settings(max_examples=20, deadline=None)


def make(cls=MAEPlus, seed=0, dtype=torch.float64, **options):
    "Images of 8 x 8 pixels with 4 x 4 patches."
    torch.manual_seed(seed)
    method = cls(Encoder(VisionTransformer(8, 2, 3, 0, "avg", 16, 1, 2, fc_norm=False), 16, 3), decoder_dim=16, **options).to(dtype)
    method.generator = seeded(seed)
    return method.train()


def crops(method, n=2, side=6, dtype=torch.float64):
    return Views(**{name: torch.rand(n, 3, side, side, generator=seeded(i), dtype=dtype) for i, name in enumerate(method.views)})


# a second implementation, with loops


def written(method, views, seed=0):
    "Objective of three crops of 3 x 3 patches: each image alone, each token by itself."
    vit, total, count = method.encoder.backbone, 0.0, 0
    masks = random_masks(6, 9, 0.75, seeded(seed))
    place = sincos_position_embedding(torch.tensor([[c, r] for r in range(3) for c in range(3)]).float(), 16)
    for k, name in enumerate(("crop1", "crop2", "crop3")):
        for n in range(2):
            image, hidden = method.encoder.normalise(getattr(views, name)[n : n + 1]), masks[2 * k + n]
            patches = patchify(image, 2)[0]
            weight = vit.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
            rows = [vit.cls_token[0, 0] + vit.pos_embed[0, 0]]
            for i in range(9):
                token = method.masked.mask_token[0, 0] if hidden[i] else weight @ patches[i] + vit.patch_embed.proj.bias
                rows.append(token + place[i])
            encoded = vit.norm(vit.blocks(torch.stack(rows)[None]))
            h = method.decoder.embed(encoded)
            small = sincos_position_embedding(torch.tensor([[c, r] for r in range(3) for c in range(3)]).float(), 16)
            h = torch.cat([h[:, :1], h[:, 1:] + small], 1)
            out = method.decoder.head(method.decoder.norm(method.decoder.blocks(h)))[0, 1:]
            for i in range(9):
                if not hidden[i]: continue
                y = (patches[i] - patches[i].mean()) / (patches[i].var() + 1e-6).sqrt()
                total, count = total + (out[i] - y).square().sum(), count + 12
    return total / count


def agrees(cls):
    ours, theirs = make(cls, crops=3, crop_scale=0.75), make(crops=3, crop_scale=0.75)
    views = crops(theirs)
    expected = written(theirs, views)
    ((value, player),) = ours.turns(views)
    grads = torch.autograd.grad(expected, [p for p in theirs.parameters() if p.requires_grad])
    own = torch.autograd.grad(value, player.parameters(), allow_unused=True)
    same = lambda a, b: a is not None and torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    return player.sign == -1 and same(value, expected) and all(same(a, b) for a, b in zip(own, grads, strict=True))


def test_the_step_is_the_written_one():
    assert agrees(MAEPlus)


class OneCropOnly(MAEPlus):
    def crops_of(self, views): return views.crop1


class OneCropRepeated(MAEPlus):
    def crops_of(self, views): return torch.cat([views.crop1] * 3)


class OtherOrder(MAEPlus):
    def crops_of(self, views): return torch.cat([views.crop3, views.crop2, views.crop1])


class SumOfCrops(MAEPlus):
    def turns(self, views):
        for value, player in super().turns(views): yield 3 * value, player


class HiddenDropped(MAEPlus):
    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.masked.insert = False


class PixelTarget(MAEPlus):
    def __init__(self, *args, **how): super().__init__(*args, normalise=False, **how)


class OneMaskForAll(MAEPlus):
    def hide(self, x): return super().hide(x[:2]).repeat(3, 1)


class LowerRight(MAEPlus):
    "Positions of the other corner."
    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.masked.positions = lambda grid: self.encoder.backbone.pos_embed[:, 1:].view(1, 4, 4, 16)[:, 1:, 1:].reshape(1, 9, 16)


class FirstRows(MAEPlus):
    "The first nine rows of the table, which are those of another grid."
    def __init__(self, *args, **how):
        super().__init__(*args, **how)
        self.masked.positions = lambda grid: self.encoder.backbone.pos_embed[:, 1:10]


@pytest.mark.parametrize("mutant", [
    OneCropOnly, OneCropRepeated, OtherOrder, SumOfCrops, HiddenDropped, PixelTarget, OneMaskForAll, LowerRight, FirstRows,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# limits


@examples
@given(seeds)
def test_one_crop_of_the_whole_side_is_mae_with_mask_tokens_to_the_bit(seed):
    ours, base = make(seed=seed, crops=1, crop_scale=1.0), make(MAE, seed, insert=True)
    x = torch.rand(3, 3, 8, 8, generator=seeded(seed), dtype=torch.float64)
    values = []
    for method in (ours, base):
        optimizers = {"network": torch.optim.AdamW(method.network.parameters(), 1e-2)}
        values.append(torch.stack([play(method, Views(weak=x), optimizers) for _ in range(2)]))
    assert torch.equal(*values) and ours.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in ours.state_dict().items())
    assert make(crops=1, crop_scale=1.0, area=0.2).views == {"weak": RECIPES["mae"]}


@examples
@given(seeds, st.integers(1, 4), st.sampled_from([0.5, 0.75, 1.0]))
def test_views_have_the_size_that_is_declared(seed, count, scale):
    method = make(seed=seed, dtype=torch.float32, crops=count, crop_scale=scale)
    images = torch.randint(0, 256, (2, 3, 8, 8), generator=seeded(seed), dtype=torch.uint8)
    views = Views(**{name: Augment(method.augmentation(name, 0.0), 8)(images, seeded(i)) for i, name in enumerate(method.views)})
    assert len(method.views) == count and method.crops_of(views).shape == (2 * count, 3, round(8 * scale), round(8 * scale))
    ((value, _),) = method.turns(views)
    assert value.isfinite()
    assert MAEPlus.views == MAE.views  # the class's own are untouched


def test_hidden_pixels_of_crops_cannot_matter():
    method = make(crops=3, crop_scale=0.75)
    x, mask = method.crops_of(crops(method)), random_masks(6, 9, 0.75, seeded())
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(method.reconstruct(leaf, mask).square().sum(), leaf)
    g = patchify(g, 2).abs().sum(-1)
    assert (g[mask] == 0).all() and (g[~mask] > 0).all()


def test_the_evaluated_encoder_takes_whole_images():
    method = make(crops=2, crop_scale=0.5).eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(method.evaluated()(x), method.masked(method.encoder.normalise(x))[:, 1:].mean(1), rtol=1e-12)


# smaller grids


@examples
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_the_corner_of_a_table(rows, cols, more_rows, more_cols):
    whole = rows + more_rows, cols + more_cols
    coordinates = grid_coordinates(*whole)
    assert torch.equal(corner(coordinates, whole, (rows, cols)), grid_coordinates(rows, cols))
    assert corner(coordinates, whole, whole) is coordinates
    gaps = (coordinates[:, None] - coordinates).movedim(-1, 0)
    cut = lambda t: corner(t, whole, (rows, cols))
    small = grid_coordinates(rows, cols)
    assert torch.equal(cut(cut(gaps).mT).mT, (small[:, None] - small).movedim(-1, 0))
    for wrong in ((whole[0] + 1, 1), (1, whole[1] + 1)):
        with pytest.raises(ValueError, match="make it smaller"): corner(coordinates, whole, wrong)


def test_passes_autocast_and_gradients():
    method = make(dtype=torch.float32, crops=4, crop_scale=0.5, mask_ratio=0.5)
    views = crops(method, side=4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16): ((value, player),) = method.turns(views)
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in player.parameters())
    with count_passes(method.masked) as passes: play(method, views, {"network": torch.optim.SGD(player.parameters(), 0.1)})
    assert passes.units(2) == 12


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"crops": 0}, "MAE with mask tokens"), ({"crop_scale": 0.6}, "choose k/4"), ({"crop_scale": 0.01}, "choose k/4"),
    ({"area": 0.0}, "range of area"), ({"crop_scale": 1.25}, "scale is a share"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("MAE+") is methods()["mae+"] is MAEPlus
    card = MAEPlus.card
    assert (card.base, card.sign, card.tables, card.type) == ("MIM", 0, (), "")
    known = settings_of(MAEPlus)
    assert (known["crops"], known["crop_scale"], known["area"], known["mask_ratio"]) == (4, 0.5, 0.08, 0.75)
