"The norm balls: properties over random shapes, scales, ties and zeros, in float32 and float64."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advssl.threat import L1, L2, Linf, make_threat

NORM = {Linf: math.inf, L2: 2, L1: 1}
KINDS = ("normal", "sparse", "ties", "zero", "one sample zero")
radii = st.sampled_from([0.0, 1e-3, 8 / 255, 0.5, 3.0, 12.0])
balls = st.builds(lambda kind, eps: kind(eps), st.sampled_from([Linf, L2, L1]), radii)
examples = settings(max_examples=200, deadline=None)


@st.composite
def rows(draw, dtypes=(torch.float32, torch.float64)):
    "A batch (n, c, h) of ordinary and awkward values."
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 7)))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    t, kind = torch.randn(shape, dtype=draw(st.sampled_from(dtypes)), generator=gen), draw(st.sampled_from(KINDS))
    if kind == "sparse": t = t * (torch.rand(shape, generator=gen) < 0.3)
    if kind == "ties": t = t.round()
    if kind == "zero": t = t * 0
    if kind == "one sample zero": t[0] = 0
    return t * draw(st.sampled_from([1e-4, 0.1, 1.0, 30.0]))


def length(ball, t): return t.flatten(1).norm(NORM[type(ball)], dim=1)
def dot(a, b): return (a * b).flatten(1).sum(1)
def seeded(seed=0): return torch.Generator().manual_seed(seed)


@examples
@given(balls, rows())
def test_projection_is_in_the_ball_and_idempotent(ball, v):
    p = ball.project(v)
    assert p.shape == v.shape and p.dtype == v.dtype
    assert (length(ball, p) <= ball.eps + 1e-6).all()
    again = ball.project(p)
    assert (again - p).abs().max() <= 1e-6 * max(1.0, ball.eps)
    inside = length(ball, v) <= ball.eps * (1 - 1e-5)
    assert torch.equal(p[inside], v[inside])  # nothing inside is touched, to the last bit


@examples
@given(balls, rows((torch.float64,)), st.integers(0, 2**31))
def test_projection_is_the_nearest_point(ball, v, seed):
    "No point of the ball is nearer, and, for a convex set the same: no direction into it leads nearer."
    p = ball.project(v)
    for i in range(5):
        q = ball.random_start(v, seeded(seed + i))
        if i % 2: q = ball.eps * ball.step(q)  # a corner, or another extreme point
        assert (dot(v - p, q - p) <= 1e-9 * (1 + ball.eps) * (1 + v.abs().max())).all()
        assert (dot(v - p, v - p) <= dot(v - q, v - q) + 1e-9).all()


@examples
@given(radii, rows())
def test_l1_projection_is_that_of_bisection(eps, v):
    a = v.double().flatten(1).abs()
    low, high = torch.zeros(len(v), 1, dtype=torch.float64), a.amax(1, keepdim=True)
    for _ in range(60):
        theta = (low + high) / 2
        over = (a - theta).clamp(min=0).sum(1, keepdim=True) > eps
        low, high = torch.where(over, theta, low), torch.where(over, high, theta)
    expected = v.sign() * (a - high).clamp(min=0).reshape(v.shape)
    tolerance = 1e-9 if v.dtype == torch.float64 else 1e-5 * max(1.0, eps)
    assert (L1(eps).project(v) - expected).abs().max() <= tolerance


@pytest.mark.parametrize("d", [3 * 32 * 32, 3 * 224 * 224])
@pytest.mark.parametrize("v", [lambda d: torch.full((1, d), 5.0), lambda d: torch.rand(1, d, generator=seeded()) + 1])
def test_l1_projection_spends_the_budget_in_single_precision(v, d):
    "The threshold of a large image is rounded; the sum of what is left must not show it."
    for eps in (1.0, 12.0):
        p = L1(eps).project(v(d))
        assert abs(p.double().abs().sum() - eps) <= 1e-6 * eps


@examples
@given(st.sampled_from([Linf, L2]), rows((torch.float64,)), st.integers(0, 2**31))
def test_step_is_the_best_direction(kind, g, seed):
    ball = kind(1.0)
    s = ball.step(g)
    gain, dual = dot(g, s), g.flatten(1).norm(1 if kind is Linf else 2, dim=1)
    assert torch.allclose(gain, dual, rtol=1e-12, atol=1e-12)  # Hölder, with equality
    nonzero = dual > 0
    assert torch.allclose(length(ball, s)[nonzero], torch.ones_like(dual)[nonzero], atol=1e-12)
    assert (s[~nonzero] == 0).all()
    for i in range(5): assert (dot(g, ball.random_start(g, seeded(seed + i))) <= gain + 1e-9).all()


@examples
@given(rows(), st.floats(0.01, 1.0))
def test_l1_step_shares_among_the_largest(g, top):
    flat, s = g.flatten(1), L1(1.0, top=top).step(g).flatten(1)
    k = math.ceil(top * flat.shape[1])
    for gi, si in zip(flat, s, strict=True):
        taken = si != 0
        if not gi.any():
            assert not taken.any()
            continue
        kth = gi.abs().sort(descending=True).values[k - 1]
        assert torch.equal(taken, (gi.abs() >= kth) & (gi != 0))  # ties are all taken, zeros never
        assert torch.equal(si[taken].sign(), gi[taken].sign())
        assert torch.allclose(si[taken].abs(), 1 / taken.sum().to(si.dtype))


@examples
@given(rows())
def test_l1_step_of_one_pixel_is_steepest(g):
    gain = dot(g, L1(1.0, top=1e-9).step(g))
    assert torch.allclose(gain, g.flatten(1).abs().amax(1), rtol=1e-5)


@examples
@given(balls, rows(), st.sampled_from([1e-25, 1e-12, 1e12, 1e25]))
def test_step_has_no_scale_and_is_odd(ball, g, scale):
    "The two facts an attack relies on: any positive multiple of the objective, or its negative, will do."
    g = g / g.abs().max().clamp(min=1e-30)
    g = torch.where(g.abs() < 1e-6, 0, g)  # so that nothing is lost at the smallest scale
    assert torch.allclose(ball.step(g * scale), ball.step(g), atol=1e-6)
    assert torch.equal(ball.step(-g), -ball.step(g))


@examples
@given(balls, rows(), st.integers(0, 2**31))
def test_random_start(ball, x, seed):
    before = torch.get_rng_state()
    delta = ball.random_start(x, seeded(seed))
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is not touched
    assert torch.equal(delta, ball.random_start(x, seeded(seed)))
    assert delta.shape == x.shape and delta.dtype == x.dtype
    assert (length(ball, delta) <= ball.eps + 1e-6).all()
    if ball.eps and x[0].numel() > 3: assert not torch.equal(delta, ball.random_start(x, seeded(seed + 1)))


@pytest.mark.parametrize("d", [1, 2, 20])
@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_random_start_is_uniform(kind, d):
    "The level (r / eps)^d is uniform, each sign is as likely as the other, and the second moment is that of the ball."
    n, ball = 20_000, kind(0.7)
    delta = ball.random_start(torch.zeros(n, d, dtype=torch.float64), seeded(d))
    level = (length(ball, delta) / ball.eps).pow(d).sort().values
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (level - uniform).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at about 0.1 per cent
    square = {Linf: 1 / 3, L2: 1 / (d + 2), L1: 2 / ((d + 1) * (d + 2))}[kind] * ball.eps**2
    assert torch.allclose(delta.square().mean(0), torch.tensor(square, dtype=torch.float64), rtol=0.08)
    assert ((delta > 0).double().mean(0) - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ball", [Linf(8 / 255), L2(0.5), L1(12.0)])
def test_half_precision(ball, dtype):
    "Sums over an image are taken in float32: the length is right to the rounding of the entries."
    v = torch.randn(2, 3, 32, 32, generator=seeded()).to(dtype)
    p, s, r = ball.project(v), ball.step(v), ball.random_start(v, seeded())
    assert {t.dtype for t in (p, s, r)} == {dtype}
    unit = type(ball)(1.0)
    for t, size in ((p, ball.eps), (s, 1.0)):
        assert torch.allclose(length(unit, t.float()), torch.full((2,), size), rtol=4 * torch.finfo(dtype).eps)
    assert (length(ball, r.float()) <= ball.eps * (1 + 4 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(1.0)])
def test_nan_stays_in_its_sample(ball):
    v = torch.randn(3, 5)
    v[1, 2] = math.nan
    for answer in (ball.project(v), ball.step(v)): assert answer.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(1.0)])
def test_an_empty_batch(ball):
    empty = torch.zeros(0, 3, 4)
    for answer in (ball.project(empty), ball.step(empty), ball.random_start(empty)): assert answer.shape == empty.shape


def test_the_same_start_whatever_the_precision_of_the_images():
    a, b = (L1(1.0).random_start(torch.zeros(2, 3, dtype=t), seeded()) for t in (torch.float32, torch.bfloat16))
    assert torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf, "0.1", None, torch.tensor(0.1), 1j])
@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_bad_radius(kind, eps):
    with pytest.raises(ValueError, match="eps must be a finite number >= 0"): kind(eps)


@pytest.mark.parametrize("top", [0, -0.1, 1.1, math.nan])
def test_bad_fraction(top):
    with pytest.raises(ValueError, match="fraction"): L1(1.0, top=top)


def test_names():
    assert (make_threat("LINF", 0.1), make_threat("l2", 1), make_threat("l1", 2)) == (Linf(0.1), L2(1), L1(2))
    for name in ("l0", "", None, 2):
        with pytest.raises(ValueError, match="linf, l2, l1"): make_threat(name, 0.1)
    with pytest.raises(ValueError, match="uint8"): L2(0.1).random_start(torch.zeros(1, 2, dtype=torch.uint8))
