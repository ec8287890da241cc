"Common corruptions: the contract of every kind, official files, records and their means, and mutants that the same checks must reject."

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.evaluate import corruptions as module
from advssl.evaluate.compare import difference, difference_rows, pack, unpack
from advssl.evaluate.corruptions import (
    EXTRA,
    KINDS,
    SEVERITIES,
    Draws,
    corrupt,
    corruption_accuracy,
    corruption_mask,
    corruptions,
    displace,
    load_corrupted,
    quick_corruptions,
)
from advssl.evaluate.robust import clean_mask
from advssl.features import Noisy
from advssl.images import stream
from advssl.threat import Linf

HENDRYCKS = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness contrast "
    "elastic_transform pixelate jpeg_compression"
).split()


def pictures(n=12, channels=3, side=32, seed=0):
    "Smooth random images with edges, in [0, 1]."
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, channels, 6, 6, generator=g), side, mode="bilinear")
    x = x + 0.3 * F.interpolate((torch.rand(n, 1, 5, 5, generator=g) > 0.7).float(), side, mode="nearest")
    return x.clamp(0, 1)


class Grey(nn.Module):
    "Ten classes by the mean of the image: an answer that damage can change."
    def forward(self, x): return -(x.mean((1, 2, 3))[:, None] - torch.arange(10).to(x) / 10).abs()


def labelled(n=30, seed=3):
    x = pictures(n, seed=seed)
    return x, Grey()(x).argmax(1)


# the contract


def test_the_fifteen_kinds():
    assert list(KINDS)[:15] == HENDRYCKS and all(len(k.strengths) == 5 for k in KINDS.values()) and not set(EXTRA) & set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32), (3, 17), (1, 96)])
def test_contract(kind, channels, side):
    "Range, shape, type; seeded; the same in any batch; severity 0 is the image; more damage at each severity."
    x = pictures(24, channels, side)
    before, distance = x.clone(), []
    for s in range(6):
        y = corrupt(x, kind, s)
        assert y.shape == x.shape and y.dtype == x.dtype and 0 <= y.min() <= y.max() <= 1 and y.isfinite().all()
        distance.append((y - x).pow(2).mean().item())
    assert torch.equal(x, before), "the input was changed in place"
    assert distance[0] == 0 and all(a < b for a, b in zip(distance, distance[1:])), distance
    y = corrupt(x, kind, 4)
    assert torch.equal(y, corrupt(x, kind, 4))
    torch.manual_seed(99)
    assert torch.equal(y, corrupt(x, kind, 4)), "torch's global source was used"
    some = torch.tensor([7, 2, 20])
    torch.testing.assert_close(corrupt(x[some], kind, 4, index=some), y[some], atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_types(kind):
    x = (pictures(4) * 255).byte()
    assert torch.equal(corrupt(x, kind, 0), x / 255)
    double = corrupt(x.double() / 255, kind, 3)
    assert corrupt(x, kind, 3).dtype == torch.float32 and double.dtype == torch.float64
    torch.testing.assert_close(corrupt(x, kind, 3), double.float(), atol=1e-4, rtol=0)


RANDOM = [k for k in HENDRYCKS if k not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")]


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_seeds(kind):
    "Another name or seed, another damage; and no damage at all to learn from one image about another."
    x = pictures(1).repeat(2, 1, 1, 1)
    y = corrupt(x, kind, 3)
    assert torch.equal(y[0], y[1]) != (kind in RANDOM)
    assert torch.equal(y, corrupt(x, kind, 3, seed=1)) != (kind in RANDOM)
    assert torch.equal(y[0], corrupt(x, kind, 3, index=torch.tensor([5, 5]))[0]) != (kind in RANDOM)


def test_kinds_have_streams_of_their_own():
    flat = torch.full((1, 1, 32, 32), 0.5)
    a, b = (corrupt(flat, k, 5) for k in ("fog", "frost"))
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.7


@pytest.mark.parametrize("wrong", [dict(kind="rain"), dict(severity=6), dict(severity=-1), dict(severity=2.5), dict(index=torch.arange(3))])
def test_corrupt_refuses(wrong):
    with pytest.raises(ValueError): corrupt(**{"images": pictures(2), "kind": "fog", "severity": 2} | wrong)


@settings(max_examples=20, deadline=None)
@given(st.integers(-6, 6), st.integers(-6, 6))
def test_displace_by_whole_pixels(down, right):
    x = pictures(2, 3, 20).double()
    y = displace(x, torch.tensor(float(down)).view(1, 1, 1).double(), torch.tensor(float(right)).view(1, 1, 1).double())
    i, j = torch.arange(6, 14), torch.arange(6, 14)
    torch.testing.assert_close(y[..., 6:14, 6:14], x[..., i[:, None] + down, j + right], atol=1e-9, rtol=0)


# the checks that mutants have to fail


def draws(like, n=None): return Draws([stream(7, i) for i in range(n or len(like))], like)


def noise_has_its_moments(m):
    flat = torch.full((6, 1, 96, 96), 0.25, dtype=torch.float64)
    assert m.gaussian_noise(flat, 0.1, draws(flat)).std() == pytest.approx(0.1, rel=0.03)
    shot = m.shot_noise(flat, 60, draws(flat))
    assert (shot.mean().item(), shot.var().item()) == pytest.approx((0.25, 0.25 / 60), rel=0.05)
    salt = m.impulse_noise(flat, 0.1, draws(flat))
    assert ((salt == 0).double().mean().item(), (salt == 1).double().mean().item()) == pytest.approx((0.05, 0.05), rel=0.1)


def blur_keeps_light(m):
    for kind in HENDRYCKS[3:7]:
        for strength in m.KINDS[kind].strengths:
            flat = torch.full((2, 1, 40, 40), 0.6, dtype=torch.float64)
            torch.testing.assert_close(m.KINDS[kind].damage(flat, strength, draws(flat)), flat, atol=1e-6, rtol=0)
    dot = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    dot[..., 32, 32] = 1
    where = (torch.arange(65) - 32).double()
    spread = lambda y: ((y[0, 0] * (where[:, None] ** 2 + where**2)).sum() / y.sum()).sqrt().item()
    unit = 32 / 65
    assert spread(m.motion_blur(dot, 20 * unit, draws(dot))) == pytest.approx(10 * math.sqrt(5 / 12), abs=0.3)
    disc = m.defocus_blur(dot, 7.5 * unit, draws(dot))
    assert spread(disc) == pytest.approx(8 / math.sqrt(2), abs=0.3) and disc.sum() == pytest.approx(1)
    ramp = (torch.arange(65) - 32).double().expand(1, 1, 65, 65)
    zoomed = m.zoom_blur(ramp, 1.4, draws(ramp))  # of x: the mean of x / t
    factor = sum(1 / t for t in torch.linspace(1, 1.4, 9).tolist()) / 9
    torch.testing.assert_close(zoomed, factor * ramp, atol=1e-9, rtol=0)


def sizes_scale(m):
    "A larger copy of an image is blurred by as many more pixels."
    small = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    small[..., 8:24, 8:24] = 1
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for kind in ("defocus_blur", "motion_blur", "zoom_blur", "elastic_transform"):
        a, b = (m.KINDS[kind].damage(x, m.KINDS[kind].strengths[3], draws(x)) for x in (small, large))
        assert (F.avg_pool2d(b, 4) - a).abs().mean() < 0.02, kind


def weather_is_bounded(m):
    t = m.texture(draws(torch.zeros(8, 1)), 40, 0.5)
    assert t.shape == (8, 1, 40, 40) and (t.amin((1, 2, 3)) == 0).all() and (t.amax((1, 2, 3)) == 1).all()
    rough = [m.texture(draws(torch.zeros(8, 1)), 40, rho).diff(dim=-1).pow(2).mean().item() for rho in (0.3, 0.5, 0.9)]
    assert rough[0] < rough[1] < rough[2]
    black, white = torch.zeros(8, 1, 40, 40), torch.ones(8, 1, 40, 40)
    torch.testing.assert_close(m.fog(black, 0.8, draws(black)), 0.4 * (1 + t))
    torch.testing.assert_close(m.fog(white, 0.8, draws(white)), white)
    ice = m.frost(torch.zeros(8, 3, 40, 40), 1.0, draws(torch.zeros(8, 1)))
    assert (ice[:, 0] <= ice[:, 2]).all() and ice.max() <= 1 and ice.std() > 0.1
    flakes = [(m.snow(black, (0.0, threshold), draws(black)) > 0.1).float().mean().item() for threshold in (2.5, 1.5, 0.5)]
    assert 0 < flakes[0] < flakes[1] < flakes[2] < 0.9
    assert m.snow(black, (0.4, 9.0), draws(black)).mean() == pytest.approx(0.2)


def light_obeys_its_equations(m):
    x = pictures(6).double().clamp(0.02, 1)
    b = m.brightness(x, 0.1, None)
    torch.testing.assert_close(b[:, 0] * x[:, 1], b[:, 1] * x[:, 0])
    torch.testing.assert_close(b.amax(1), (x.amax(1) + 0.1).clamp(max=1))
    torch.testing.assert_close(m.brightness(0 * x, 0.3, None), 0 * x + 0.3)
    c = m.contrast(x, 0.35, None)
    torch.testing.assert_close(c.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(c.std((2, 3)), 0.35 * x.std((2, 3)))
    torch.testing.assert_close(m.pixelate(x, 0.25, None)[..., 1::4, 2::4], F.avg_pool2d(x, 4))
    torch.testing.assert_close(m.pixelate(x, 0.65, None).mean((2, 3)), x.mean((2, 3)), atol=0.02, rtol=0)
    torch.testing.assert_close(m.pixelate(torch.ones_like(x), 0.65, None), torch.ones_like(x))
    right = torch.linspace(0, 1, 64).double().expand(6, 1, 64, 64)
    moved = [(63 * (m.elastic_transform(y, 0.65, draws(y)) - y))[..., 6:-6, 6:-6] for y in (right, right.mT)]
    assert sum(v.pow(2) for v in moved).mean().sqrt() == pytest.approx(1.3, abs=0.2)  # 0.65 at side 32
    smooth = F.interpolate(x[:, :1, :3, :3], 32, mode="bilinear")
    error = [(m.jpeg_compression(smooth, q, None) - smooth).abs().mean().item() for q in (98, 50, 5)]
    assert error[0] < 0.01 and error == sorted(error)


def accuracies_are_counted(m):
    x, y = labelled()
    found = m.corruptions(Grey(), x, y, (Linf(0.1),), seed=2, index=torch.arange(30) + 5, clean=None, batch_size=7, severities=(1, 3))
    assert set(found) == {"corruptions"} | {f"corruptions.{k}{s}" for k in KINDS for s in ("", "-1", "-3")}
    for k in KINDS:
        by_hand = clean_mask(Grey(), m.corrupt(x, k, 3, seed=2, index=torch.arange(30) + 5), y)
        cell = found[f"corruptions.{k}-3"]
        assert torch.equal(unpack(cell["right"], 30), by_hand) and cell["correct"] == int(by_hand.sum()) and cell["total"] == 30
    assert (cell["kind"], cell["severity"], cell["seed"], cell["source"]) == ("jpeg_compression", 3, 2, "made here")
    masks = {key: unpack(r["right"], 30) for key, r in found.items() if "right" in r}
    everything = torch.stack(list(masks.values()))
    mean = found["corruptions"]
    assert mean["value"] == pytest.approx(everything.double().mean().item()) and mean["repeats"] == 30 and mean["images"] == 30
    assert list(bytes.fromhex(mean["hits"])) == everything.sum(0).tolist()
    fog = found["corruptions.fog"]
    assert list(bytes.fromhex(fog["hits"])) == (masks["corruptions.fog-1"].long() + masks["corruptions.fog-3"]).tolist()
    assert json.loads(json.dumps(found)) == found
    two = m.corruptions(Grey(), x, y, limit=10, kinds=("fog",), severities=(3,))
    assert two["corruptions.fog-3"]["total"] == 10 and set(two) == {"corruptions", "corruptions.fog", "corruptions.fog-3"}


def severity_is_strength(m):
    "What `corrupt` does beyond calling a kind."
    x = pictures(6)
    for s in SEVERITIES: torch.testing.assert_close(m.corrupt(x, "contrast", s), m.contrast(x, KINDS["contrast"].strengths[s - 1], None))
    assert m.corrupt(x, "gaussian_noise", 5).max() <= 1
    kept = [m.corrupt(torch.full((1, 1, 32, 32), 0.5), k, 1) for k in ("gaussian_noise", "shot_noise")]
    m.KINDS["again"] = m.KINDS["gaussian_noise"]
    assert not torch.equal(kept[0], m.corrupt(torch.full((1, 1, 32, 32), 0.5), "again", 1)), "two kinds share their numbers"
    del m.KINDS["again"]


CHECKS = [severity_is_strength, noise_has_its_moments, blur_keeps_light, sizes_scale, weather_is_bounded, light_obeys_its_equations,
          accuracies_are_counted]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_check(check): check(module)


MUTANTS = [
    ("x + sigma * draws.normal", "x + sigma**2 * draws.normal", noise_has_its_moments),
    ("draws.poisson(x * photons) / photons", "draws.poisson(x / photons) * photons", noise_has_its_moments),
    ("(u < share / 2)", "(u < share)", noise_has_its_moments),
    ("/ disc.sum()", "", blur_keeps_light),
    ("(2 * place + 1) / side - 1", "2 * place / side - 1", blur_keeps_light),
    ("t * length * _pixels(x) / 2", "t * length * _pixels(x)", blur_keeps_light),
    ("sum(displace(x, m * angle.sin(), m", "sum(displace(x, m * angle.cos() ** 3, m", blur_keeps_light),
    ("1 / t - 1 for t", "t - 1 for t", blur_keeps_light),
    ("radius * _pixels(x), x.shape[-1]", "radius, x.shape[-1]", sizes_scale),
    ("field * pixels * _pixels(x)", "field * pixels", sizes_scale),
    ("decay**o * F.interpolate", "F.interpolate", weather_is_bounded),
    ("(total - low) / (high - low)", "total / high", weather_is_bounded),
    ("x * (1 - tau) + tau", "x + tau", weather_is_bounded),
    ("(1 + texture(draws, x.shape[-1], 0.5)) / 2", "texture(draws, x.shape[-1], 0.5)", weather_is_bounded),
    ("(grid - threshold).clamp(min=0)", "(grid + threshold).clamp(min=0)", weather_is_bounded),
    ("white * (0.5 + 0.5 * luminance(x))", "white * luminance(x)", weather_is_bounded),
    ("ICE = (0.85, 0.95, 1.0)", "ICE = (1.0, 0.95, 0.85)", weather_is_bounded),
    ("(value + more).clamp(max=1)", "(value + more)", light_obeys_its_equations),
    ("x.amax(1, keepdim=True)", "x.mean(1, keepdim=True)", light_obeys_its_equations),
    ("mean + factor * (x - mean)", "factor * x", light_obeys_its_equations),
    ("overlap.T @ overlap * blocks / side", "overlap.T @ overlap", light_obeys_its_equations),
    (".pow(2).sum(1).mean((1, 2)).sqrt()", ".pow(2).sum(1).mean((1, 2))", light_obeys_its_equations),
    ("encode_jpeg(list((x * 255)", "encode_jpeg(list((x * 128)", light_obeys_its_equations),
    ("seed=seed, index=names)\n", "seed=seed)\n", accuracies_are_counted),
    ("clean_mask(classifier, x, y,", "clean_mask(classifier, 1 - x, y,", accuracies_are_counted),
    ("k: mean([k]) for k in kinds", "k: mean(kinds) for k in kinds", accuracies_are_counted),
    ("strengths[severity - 1]", "strengths[-severity]", severity_is_strength),
    ("damage(x, ", "damage(x.flip(0), ", severity_is_strength),
    ("severity - 1], draws).clamp(0, 1)", "severity - 1], draws)", severity_is_strength),
    ("stream(seed, STREAM, i, list(KINDS).index(kind))", "stream(seed, STREAM, i)", severity_is_strength),
]


@pytest.mark.parametrize("old, new, check", MUTANTS, ids=[m[1][:40].strip() or "no sum" for m in MUTANTS])
def test_mutants_die(old, new, check):
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, old
    mutant = types.ModuleType("advssl.evaluate.mutant")
    mutant.__package__ = "advssl.evaluate"
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
        with pytest.raises((Exception, pytest.fail.Exception)): check(mutant)
    finally: del sys.modules[mutant.__name__]


# accuracies


def test_a_stochastic_classifier_votes_and_nothing_is_moved():
    x, y = labelled(10)
    noisy = Noisy(Grey(), 0.1).train()
    a, b = (corruption_mask(noisy, x, y, "fog", 1, batch_size=size) for size in (3, 10))
    assert torch.equal(a, b) and noisy.training
    assert torch.equal(corruption_mask(Grey(), x, y, "fog", 0), clean_mask(Grey(), x, y))


def test_means_compare_in_pairs():
    "The mean record of two classifiers, by rows as the store keeps them."
    x, y = labelled(60)
    class Worse(Grey):
        def forward(self, x): return super().forward((x + 0.07).clamp(0, 1))
    a, b = (quick_corruptions(c, x, y) for c in (Grey(), Worse()))
    e = difference([a["corruptions"]], [b["corruptions"]])
    assert e.value == pytest.approx(a["corruptions"]["value"] - b["corruptions"]["value"]) and e.images == 60
    row = lambda found: [{"seed": 0, "evaluation": {f"linear.{k}": r for k, r in found.items()} | {"data_sha256": {"test": "t"}}}]
    assert difference_rows(row(a), row(b), "linear.corruptions") == e
    assert difference_rows(row(a), row(b), "linear.corruptions.fog-3").images == 60
    assert quick_corruptions(Grey(), *labelled(210))["corruptions"]["images"] == 200


def test_nothing_to_do_is_an_error():
    x, y = labelled(3)
    for wrong in (dict(kinds=()), dict(severities=())):
        with pytest.raises(ValueError, match="at least one"): corruption_accuracy(Grey(), x, y, **wrong)


# official files


@pytest.fixture
def official(tmp_path):
    "CIFAR-10-C in miniature: six images at five severities."
    images = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(np.array([3, 8, 8, 0, 6, 6], np.uint8), 5)
    for kind in ("fog", "saturate"): np.save(tmp_path / f"{kind}.npy", images if kind == "fog" else images[::-1])
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path, torch.from_numpy(images), torch.from_numpy(labels).long()


def test_load_corrupted(official):
    root, images, labels = official
    for s in SEVERITIES:
        part = load_corrupted(root, "fog", s)
        assert torch.equal(part.images, images[6 * (s - 1) : 6 * s].permute(0, 3, 1, 2)) and torch.equal(part.labels, labels[:6])
    assert part.name == f"{root.name}/fog-5" and load_corrupted(root, "saturate", 1, tuple("abcdefghij")).classes[8] == "i"
    assert torch.equal(load_corrupted(root, "saturate", 1).images[0], images[29].permute(2, 0, 1))


REFUSED = [("rain", 1, ValueError), ("fog", 0, ValueError), ("fog", 6, ValueError), ("snow", 1, FileNotFoundError)]
ODD = [((29, 32, 32, 3), np.uint8), ((30, 3, 32, 32), np.uint8), ((30, 32, 32, 3), np.float32), ((25, 32, 32, 3), np.uint8)]


@pytest.mark.parametrize("kind, severity, error", REFUSED)
def test_load_corrupted_refuses(official, kind, severity, error):
    with pytest.raises(error): load_corrupted(official[0], kind, severity)


@pytest.mark.parametrize("shape, dtype", ODD)
def test_other_formats_are_refused(official, shape, dtype):
    np.save(official[0] / "fog.npy", np.zeros(shape, dtype))
    with pytest.raises(ValueError, match="official format"): load_corrupted(official[0], "fog", 1)


def test_measured_on_official_files(official):
    root, images, labels = official
    index = torch.tensor([1, 3, 4])
    clean, y = torch.zeros(3, 3, 32, 32), labels[index]
    found = corruptions(Grey(), clean, y, index=index, kinds=("fog", "saturate"), root=root)
    part = images[12:18][index].permute(0, 3, 1, 2)
    assert found["corruptions.fog-3"]["right"] == pack(clean_mask(Grey(), part, y)) and found["corruptions"]["source"] == root.name
    with pytest.raises(ValueError, match="another test set"): corruption_mask(Grey(), clean, 9 - y, "fog", 1, index=index, root=root)
    with pytest.raises(ValueError, match="another test set"): corruption_mask(Grey(), clean, y, "fog", 1, index=index + 9, root=root)
