"""advssl.augment against torchvision's operators and its distributions, and the properties a run relies on."""

from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as TF
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from advssl.augment import (
    RECIPES,
    TRIES,
    Augment,
    Recipe,
    blend,
    blur_matrix,
    luminance,
    random_box,
    resize_matrix,
    sample,
    shift_hue,
    shift_matrix,
    take,
    warp,
)

FULL = replace(RECIPES["simclr"], blur_from=0)
SHIFTY = replace(FULL, crop=None, pad=4)
MINI = replace(FULL, crop=(0.05, 0.14), scale=3 / 7)  # a small view beside the full ones


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, channels: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=seeded(seed))


def reference(recipe: Recipe, size: int, image: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    "One image through torchvision's operators, with the parameters of our draw."
    side, rgb = image.shape[-1], image.shape[0] == 3
    x = image / 255
    if recipe.pad:
        dy, dx = p["shift"].int().tolist()
        x = TF.crop(TF.pad(x, [recipe.pad] * 4), recipe.pad + dy, recipe.pad + dx, side, side)
    top, left, height, width = (p["box"] * side).round().int().tolist()
    x = TF.resized_crop(x, top, left, height, width, [size, size], antialias=True)
    if p["flip"]: x = TF.horizontal_flip(x)
    b, c, s, h = p["jitter"].tolist()
    x = TF.adjust_contrast(TF.adjust_brightness(x, b), c)
    if rgb: x = TF.adjust_hue(TF.adjust_saturation(x, s), h)
    if rgb and p["gray"]: x = TF.rgb_to_grayscale(x, 3)
    if p["sigma"] > 0 and size >= recipe.blur_from:
        taps = 2 * max(1, size // 20) + 1
        x = TF.gaussian_blur(x, [taps, taps], [p["sigma"].item()] * 2)
    return x


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side, size", [(28, 28), (32, 32), (40, 24), (24, 64)])
@pytest.mark.parametrize("name", [*RECIPES, "full", "shifty", "mini"])
def test_recipe_equals_torchvision(name, side, size, channels):
    recipe = {"full": FULL, "shifty": SHIFTY, "mini": MINI, **RECIPES}[name]
    aug, x = Augment(recipe, size), pictures(24, channels, side)
    p = aug.sample(24, seeded(1), side)
    out = aug.apply(x, p)
    for i in range(24):
        torch.testing.assert_close(out[i], reference(recipe, round(recipe.scale * size), x[i], take(p, i)), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.05, 1), st.integers(8, 64), st.integers(20, 40))
def test_a_scaled_view_is_the_same_view_at_another_size(scale, size, side):
    "Whole pixels, the same draws, and the same values as a plain recipe at that size."
    assume(round(scale * size) >= 1)
    x, recipe = pictures(4, 1, side), RECIPES["mae"]
    small, plain = Augment(replace(recipe, scale=scale), size), Augment(recipe, round(scale * size))
    assert torch.equal(small(x, seeded(1)), plain(x, seeded(1))) and small.size == plain.size
    assert [round(share * size) for size in (224, 28) for share in (6 / 7, 5 / 7, 4 / 7, 3 / 7)] == [192, 160, 128, 96, 24, 20, 16, 12]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_crop_equals_torchvision_for_any_box(data):
    side, size = data.draw(st.integers(4, 40)), data.draw(st.integers(1, 40))
    height, width = data.draw(st.integers(1, side)), data.draw(st.integers(1, side))
    top, left = data.draw(st.integers(0, side - height)), data.draw(st.integers(0, side - width))
    x = torch.rand(1, 3, side, side, generator=seeded(side * size))
    one = lambda v: torch.tensor([v])
    ours = warp(x, resize_matrix(one(top), one(height), side, size), resize_matrix(one(left), one(width), side, size))
    crop = lambda antialias: TF.resized_crop(x, top, left, height, width, [size, size], antialias=antialias)
    torch.testing.assert_close(ours, crop(True), atol=3e-6, rtol=0)
    if min(height, width) >= size or max(height, width) > size: return
    torch.testing.assert_close(ours, crop(False), atol=3e-6, rtol=0)  # antialiasing acts on shrinking only


def test_rows_sum_to_one_and_whole_image_is_identity():
    start, length = torch.tensor([0, 3, 31]), torch.tensor([32, 17, 1])
    torch.testing.assert_close(resize_matrix(start, length, 32, 20).sum(-1), torch.ones(3, 20))
    torch.testing.assert_close(resize_matrix(start, length, 32, 32)[0], torch.eye(32), atol=0, rtol=0)
    torch.testing.assert_close(shift_matrix(torch.zeros(1), 32)[0], torch.eye(32), atol=0, rtol=0)
    torch.testing.assert_close(blur_matrix(torch.zeros(1), 3, 32)[0], torch.eye(32), atol=0, rtol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0, 3), st.floats(-0.5, 0.5))
def test_colour_equals_torchvision_on_eight_bit_colours(seed, factor, turns):
    "On bytes divided by 255 ties between channels, grey, black and white are common."
    x = torch.randint(4, (2, 3, 8, 8), generator=seeded(seed)) / 3
    f, t = torch.tensor([factor] * 2), torch.tensor([turns] * 2)
    close = lambda a, b, tol=1e-6: torch.testing.assert_close(a, b, atol=tol, rtol=0)
    close(luminance(x), TF.rgb_to_grayscale(x))
    close(blend(x, 0, f), TF.adjust_brightness(x, factor))
    close(blend(x, luminance(x).mean((1, 2, 3), keepdim=True), f), TF.adjust_contrast(x, factor))
    close(blend(x, luminance(x), f), TF.adjust_saturation(x, factor))
    close(shift_hue(x, t), TF.adjust_hue(x, turns), 3e-6)


LIMIT = 2.15  # of the Kolmogorov-Smirnov statistic


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    "Largest distance of two empirical distribution functions; LIMIT sqrt(2 / n) is exceeded once in 5,000 times."
    points = torch.cat([a, b]).sort().values
    cdf = lambda s: torch.searchsorted(s.sort().values, points, right=True) / len(s)
    return (cdf(a) - cdf(b)).abs().max().item()


@pytest.mark.parametrize("side", [28, 224])
@pytest.mark.parametrize("low", [0.08, 0.2, 0.9])
def test_boxes_have_torchvisions_distribution(low, side):
    torch.manual_seed(side)
    n, blank = 3000, torch.empty(3, side, side)
    draw = T.RandomResizedCrop(side, scale=(low, 1))
    theirs = [draw.make_params([blank]) for _ in range(n)]
    theirs = torch.tensor([[p[k] for k in ("top", "left", "height", "width")] for p in theirs], dtype=torch.float)
    ours = random_box(torch.rand(n, 2 * TRIES + 2), (low, 1), side)
    assert (ours == ours.round()).all() and (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, :2] + ours[:, 2:] <= side).all()
    views = {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3] / side**2,
        "ratio": lambda b: b[:, 3] / b[:, 2],
    }
    for name, view in views.items(): assert distance(view(ours), view(theirs)) < LIMIT * (2 / n) ** 0.5, name


def test_boxes_at_the_ends_of_the_draw_stay_inside():
    last = 1 - 2**-24  # the largest float32 below one; times k it must not round up to k
    assert (torch.full((4096,), last) * torch.arange(1.0, 4097) < torch.arange(1.0, 4097)).all()
    for u in (0.0, last):
        for side in (1, 28, 33, 224):
            box = random_box(torch.full((1, 2 * TRIES + 2), u), (0.08, 1), side)[0]
            assert (box[:2] >= 0).all() and (box[2:] >= 1).all() and (box[:2] + box[2:] <= side).all(), (u, side, box)


def test_jitter_has_torchvisions_distribution():
    torch.manual_seed(0)
    n, j = 5000, (0.8, 0.4, 1.2, 0.2)
    draw = T.ColorJitter(*j)
    theirs = [draw.make_params([torch.empty(3, 2, 2)]) for _ in range(n)]
    p = sample(Recipe(jitter=j, jitter_p=1), n, 32, seeded(0))
    for i, key in enumerate(("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")):
        assert distance(p["jitter"][:, i], torch.tensor([t[key] for t in theirs])) < LIMIT * (2 / n) ** 0.5, key


def test_probabilities_and_ranges():
    n = 20000
    p = sample(replace(FULL, jitter_p=0.8, blur=0.3), n, 32, seeded(3))
    still = (p["jitter"] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(1)
    for got, want in ((p["flip"], 0.5), (~still, 0.8), (p["gray"], 0.2), (p["sigma"] > 0, 0.3)):
        assert abs(got.float().mean().item() - want) < 4 * (want * (1 - want) / n) ** 0.5
    blurred = p["sigma"][p["sigma"] > 0]
    assert 0.1 <= blurred.min() and blurred.max() <= 2 and abs(blurred.mean().item() - 1.05) < 0.03
    shift = sample(RECIPES["weak"], n, 32, seeded(4))["shift"]
    counts = (shift[:, 0] * 9 + shift[:, 1] + 40).long().bincount(minlength=81)
    assert len(counts) == 81 and (counts - n / 81).abs().max() < 5 * (n / 81) ** 0.5  # 9 by 9 places, all alike


def test_recipes_share_their_draws():
    "One width of draw for all recipes: what two recipes have in common comes out the same."
    p = {name: sample(r, 50, 32, seeded(5)) for name, r in RECIPES.items()}
    assert torch.equal(p["mae"]["box"], p["moco-v2"]["box"]) and torch.equal(p["mae"]["flip"], p["simclr"]["flip"])
    assert torch.equal(p["weak"]["flip"], p["simclr"]["flip"])
    assert not torch.equal(p["mae"]["box"], p["simclr"]["box"])


def test_strength_scales_the_jitter_only():
    a, b = Augment("simclr", 32), Augment("simclr", 32, strength=0.5)
    assert b.recipe == replace(a.recipe, jitter=(0.4, 0.4, 0.4, 0.1))


@pytest.mark.parametrize("name", [*RECIPES, "full"])
def test_one_seed_one_result_and_slices(name):
    aug, x = Augment(FULL if name == "full" else name, 32), pictures(16, 3, 32)
    whole = aug(x, seeded(1))
    assert torch.equal(whole, aug(x, seeded(1)))
    p = aug.sample(16, seeded(1))
    index = torch.tensor([3, 15, 0])
    for part in (slice(0, 5), slice(5, 16), index):
        assert torch.equal(aug.apply(x[part], take(p, part)), whole[part])
    if name != "none": assert not torch.equal(whole, aug(x, seeded(2)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_and_range(dtype):
    x = pictures(8, 3, 32) if dtype == torch.uint8 else torch.rand(8, 3, 32, 32, generator=seeded(0)).to(dtype)
    kept = x.clone()
    for name in (*RECIPES, FULL):
        out = Augment(name, 32)(x, seeded(0))
        assert out.dtype == torch.float32 and out.shape == (8, 3, 32, 32)
        assert out.min() >= 0 and out.max() <= 1 and torch.equal(x, kept)


def test_white_stays_white():
    "Rows of Eq. (2) and Eq. (8) sum to one up to rounding: nothing may leave the range."
    recipe = replace(FULL, jitter_p=0, blur=1)
    out = Augment(recipe, 41)(torch.ones(300, 1, 28, 28), seeded(0))
    assert out.max() <= 1 and out.min() > 1 - 1e-5


def test_bytes_and_their_floats_agree():
    x = pictures(8, 3, 32)
    for name in (*RECIPES, FULL):
        torch.testing.assert_close(
            Augment(name, 32)(x, seeded(0)), Augment(name, 32)(x / 255, seeded(0)), atol=1e-5, rtol=0
        )


def test_shifts_and_flips_keep_exact_values():
    x = pictures(64, 3, 32)
    out = Augment("weak", 32)(x, seeded(0))
    assert torch.isin(out, torch.arange(256) / 255).all()


def test_autocast_does_not_round_pixels():
    x, aug = pictures(8, 3, 32), Augment(FULL, 32)
    plain = aug(x, seeded(0))
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(aug(x, seeded(0)), plain)


def test_apply_never_looks_at_a_value():
    "A fake tensor has no values: reading one, or a shape that depends on one, is an error. So nothing waits for a GPU."
    for recipe in (*RECIPES.values(), FULL, SHIFTY, MINI):
        aug = Augment(recipe, 24)
        with FakeTensorMode():
            p = sample(recipe, 6, 32)
            x = torch.empty(6, 3, 32, 32, dtype=torch.uint8)
            assert aug.apply(x, p).shape == (6, 3, aug.size, aug.size)


def test_gradient_reaches_a_float_image():
    x = torch.rand(4, 3, 16, 16, generator=seeded(0)).requires_grad_()
    Augment(FULL, 16)(x, seeded(1)).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu_without_synchronising():
    x, aug = pictures(32, 3, 32), Augment(FULL, 32)
    p = aug.sample(32, seeded(0))
    xg, pg = x.cuda(), {k: v.cuda() for k, v in p.items()}
    aug.apply(xg, pg)
    torch.cuda.set_sync_debug_mode("error")
    try: out = aug.apply(xg, pg)
    finally: torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), aug.apply(x, p), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Augment("simcrl", 32), "known: simclr"),
        (lambda: Augment("simclr", 0), "at least 1"),
        (lambda: Augment("simclr", 32, strength=3), "lower the strength"),
        (lambda: Recipe(crop=(0.5, 1.2)), "0 < low <= high <= 1"),
        (lambda: Recipe(crop=(0.0, 1.0)), "0 < low <= high <= 1"),
        (lambda: Recipe(crop=(0.2, 1), pad=4), "crop or pad"),
        (lambda: Recipe(pad=1.5), "whole number of pixels"),
        (lambda: Recipe(pad=-1), "whole number of pixels"),
        (lambda: Recipe(jitter=(0.4, 0.4)), "four ranges"),
        (lambda: Augment("simclr", 32, strength=float("nan")), "four ranges"),
        (lambda: Recipe(flip=1.5), "flip is a probability"),
        (lambda: Recipe(scale=0.0), "share of the image's side"),
        (lambda: Recipe(scale=1.1), "share of the image's side"),
        (lambda: Augment(Recipe(scale=0.01), 28), "at least 1 pixel"),
        (lambda: Augment("weak", 8)(torch.zeros(2, 2, 8, 8)), "1 or 3"),
        (lambda: Augment("weak", 8)(torch.zeros(2, 3, 8, 9)), "squares"),
        (lambda: Augment("weak", 8)(torch.zeros(3, 8, 8)), "add an axis"),
        (lambda: Augment("weak", 8)(torch.zeros(2, 3, 8, 8, dtype=torch.int64)), "int64"),
        (lambda: Augment("weak", 8).apply(torch.zeros(2, 3, 8, 8), Augment("weak", 8).sample(3)), "3 parameters for 2"),
    ],
)
def test_bad_input_is_refused_with_a_cure(make, message):
    with pytest.raises(ValueError, match=message): make()
