"The search over any objective: its guarantees as properties, and that it leaves no trace."
import contextlib
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.attack import Perturbation, fgsm, frozen, out_of_range, pgd, pgd_path
from advssl.threat import L1, L2, Linf

NORM = {Linf: math.inf, L2: 2, L1: 1}
SHAPE = (3, 2, 4)
examples = settings(max_examples=200, deadline=None)
threats = st.builds(lambda kind, eps: kind(eps), st.sampled_from([Linf, L2, L1]), st.sampled_from([1e-3, 8 / 255, 0.3, 2.0]))
seeds, dtypes = st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64])


def seeded(seed=0): return torch.Generator().manual_seed(seed)
def length(ball, delta): return delta.flatten(1).norm(NORM[type(ball)], dim=1)


def images(seed, dtype=torch.float64, spread=1.0):
    "Images with many pixels at the border of the range; with a spread above 1 some are outside."
    return ((torch.rand(SHAPE, generator=seeded(seed), dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1) * spread).to(dtype)


def smooth_loss(seed, dtype=torch.float64):
    "Per-sample losses of a random tanh network."
    gen = seeded(seed + 1)
    w1, w2 = (torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in ((8, 6), (6,)))
    return lambda t: torch.tanh(t.flatten(1) @ w1) @ w2


class Net(nn.Module):
    "BatchNorm, dropout, a counter that moves in every forward pass, and a layer that is frozen for good."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3), nn.BatchNorm1d(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("swapped", torch.zeros(2))
        self.register_buffer("absent", None)
        self.body[4].eval()
        self.body[3].bias.requires_grad_(False)

    def forward(self, t):
        self.calls += 1
        self.swapped = self.swapped + 1  # a new tensor under the old name
        return self.body(t.flatten(1))


def snapshot(net):
    return ({k: v.clone() for k, v in net.state_dict().items()}, {k: id(v) for k, v in net.named_buffers()},
            [(p.requires_grad, p.grad if p.grad is None else p.grad.clone()) for p in net.parameters()],
            [m.training for m in net.modules()])


def assert_untouched(net, before):
    after = snapshot(net)
    assert all(torch.equal(after[0][k], v) for k, v in before[0].items())
    assert after[1] == before[1] and after[3] == before[3]
    for (flag, grad), (old_flag, old_grad) in zip(after[2], before[2], strict=True):
        assert flag == old_flag and (grad is old_grad is None or torch.equal(grad, old_grad))


# the result is allowed


@examples
@given(threats, seeds, dtypes, st.integers(0, 4), st.sampled_from([1, -1]), st.sampled_from(["last", "best"]),
       st.sampled_from(["clip", "project"]), st.sampled_from(["random", "zero"]), st.sampled_from([None, 0.05, 5.0]))
def test_inside_the_ball_and_the_range(ball, seed, dtype, steps, sign, keep, last, start, step_size):
    x, loss = images(seed, dtype), smooth_loss(seed, dtype)
    found = pgd(loss, x, ball, steps=steps, sign=sign, keep=keep, last=last, start=start, step_size=step_size,
                generator=seeded(seed))
    assert found.dtype == dtype and found.shape == x.shape
    assert (length(ball, found - x) <= ball.eps + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1


@examples
@given(threats, seeds, st.floats(1.5, 30), st.booleans(), st.sampled_from(["last", "best"]), st.integers(1, 3))
def test_a_start_beyond_the_ball_is_brought_back(ball, seed, beyond, clip_start, keep, steps):
    x, loss = images(seed), smooth_loss(seed)
    delta0 = beyond * ball.eps * ball.step(torch.randn(SHAPE, generator=seeded(seed), dtype=x.dtype))
    found = pgd(loss, x, ball, steps=steps, start=delta0, clip_start=clip_start, keep=keep)
    assert (length(ball, found - x) <= ball.eps + 1e-6).all()
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6


@examples
@given(threats, seeds, dtypes, st.integers(0, 2), st.sampled_from(["random", "zero"]), st.sampled_from(["last", "best"]))
def test_limits(ball, seed, dtype, steps, start, keep):
    "A ball of radius 0, and a search of no steps from the image, return the image; neither x nor the start is written to."
    x, loss = images(seed, dtype), smooth_loss(seed, dtype)
    assert torch.equal(pgd(loss, x, type(ball)(0.0), steps=steps, start=start, keep=keep), x)
    assert torch.equal(pgd(loss, x, ball, steps=0, start="zero", keep=keep), x)
    delta0 = ball.random_start(x, seeded(seed))
    kept_x, kept_start = x.clone(), delta0.clone()
    found = pgd(loss, x, ball, steps=steps, start=delta0, keep=keep)
    assert torch.equal(x, kept_x) and torch.equal(delta0, kept_start)
    assert found.data_ptr() != x.data_ptr() and not found.requires_grad and found.grad_fn is None
    if steps == 0: assert torch.equal(found, (x + delta0).clamp(0, 1))


# the search itself


def written_out(loss, x, delta0, eps, alpha, steps, order):
    "Linf PGD written out for the two conventions of official codes: ACL on delta, RoCL on the image."
    out, delta, t = [], delta0.clone(), (x + delta0).clamp(0, 1)
    for _ in range(steps):
        here = (x + delta if order == "acl" else t).requires_grad_()
        (g,) = torch.autograd.grad(loss(here).mean(), here)
        if order == "acl":
            delta = (delta + alpha * g.sign()).clamp(-eps, eps)
            delta = (x + delta).clamp(0, 1) - x
            out.append(x + delta)
        else:
            t = (here.detach() + alpha * g.sign()).clamp(0, 1)
            t = torch.minimum(torch.maximum(t, x - eps), x + eps)
            out.append(t)
    return torch.stack(out)


@pytest.mark.filterwarnings("ignore:x has NaN or leaves the range")
@pytest.mark.parametrize("order", ["acl", "rocl"])
@examples
@given(seeds, st.sampled_from([0.01, 0.1, 0.5]), st.floats(0.1, 3.0), st.integers(1, 4), st.sampled_from([1.0, 1.3]))
def test_official_conventions(order, seed, eps, beyond, steps, spread):
    "Also with starts beyond the ball, and with images beyond the range, where the conventions differ."
    x, loss = images(seed, spread=spread) - (spread - 1) / 2, smooth_loss(seed)
    delta0 = beyond * Linf(eps).random_start(x, seeded(seed))
    theirs = written_out(loss, x, delta0, eps, eps / 3, steps, order)
    how = dict(clip_start=False) if order == "acl" else dict(last="project")
    path = pgd_path(lambda t: loss(t).mean(), x, Linf(eps), steps=steps, step_size=eps / 3, start=delta0, **how)
    ours = torch.stack([point for point, _ in path][1:])
    assert (ours - theirs).abs().max() <= 1e-12


@examples
@given(threats, seeds, dtypes, st.integers(0, 4), st.sampled_from([1, -1]), st.sampled_from([None, 0.7]), st.booleans())
def test_best_is_the_most_extreme_iterate(ball, seed, dtype, steps, sign, step_size, per_sample):
    x, loss = images(seed, dtype), smooth_loss(seed, dtype)
    objective = loss if per_sample else lambda t: loss(t).sum()
    how = dict(steps=steps, step_size=step_size, sign=sign)
    walk = list(pgd_path(objective, x, ball, generator=seeded(seed), **how))
    values = torch.stack([value for _, value in walk])
    best = pgd(objective, x, ball, generator=seeded(seed), keep="best", **how)
    assert torch.equal(objective(best), values.amax(0) if sign > 0 else values.amin(0))
    assert (sign * objective(best) >= sign * values[0]).all()  # never worse than the start
    last = pgd(objective, x, ball, generator=seeded(seed), **how)
    assert torch.equal(last, walk[-1][0]) and len(walk) == steps + 1


@pytest.mark.parametrize("sign", [1, -1])
def test_best_is_chosen_sample_by_sample(sign):
    "The first sample steps over its peak and is better off where it was; the second climbs towards a distant one."
    x, peaks = torch.full((2, 1), 0.5), torch.tensor([[0.52], [0.9]])
    hill = lambda t: -sign * (t - peaks).square().sum(1)
    how = dict(steps=1, step_size=0.2, start="zero", keep="best", sign=sign)
    assert torch.allclose(pgd(hill, x, Linf(0.3), **how), torch.tensor([[0.5], [0.7]]))
    assert torch.allclose(pgd(lambda t: hill(t).sum(), x, Linf(0.3), **how), torch.tensor([[0.7], [0.7]]))


@examples
@given(st.sampled_from([Linf, L2, L1]), seeds, dtypes)
def test_the_sign_chooses_the_direction(kind, seed, dtype):
    "A small step up raises the loss, the same step down lowers it; the two steps are mirror images."
    x = images(seed, dtype) * 0.8 + 0.1
    loss, ball = smooth_loss(seed, torch.float64), kind(1e-3)
    objective = lambda t: loss(t.double())
    up, down = (fgsm(objective, x, ball, sign=sign) for sign in (1, -1))
    assert torch.allclose(up + down, 2 * x, atol=1e-6)
    for i in range(len(x)):
        if torch.equal(up[i], x[i]): continue
        assert objective(down)[i] < objective(x)[i] < objective(up)[i]
    best = [pgd(objective, x, kind(0.2), steps=3, sign=sign, start="zero", keep="best") for sign in (1, -1)]
    assert (objective(best[0]) >= objective(x)).all() and (objective(best[1]) <= objective(x)).all()


@examples
@given(threats, seeds, st.integers(0, 2))
def test_the_generator_is_all_that_matters(ball, seed, steps):
    x, loss = images(seed), smooth_loss(seed)
    run = lambda s: pgd(loss, x, ball, steps=steps, generator=seeded(s))
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = run(seed)
    torch.manual_seed(2)
    assert torch.equal(first, run(seed))
    torch.set_rng_state(before)
    run(seed)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    a = pgd(loss, x, ball, steps=0)
    torch.manual_seed(3)
    assert torch.equal(a, pgd(loss, x, ball, steps=0))  # without a generator, the global stream


@examples
@given(threats, seeds, st.floats(1e-3, 1e3))
def test_samples_do_not_see_each_other(ball, seed, scale):
    "Per-sample losses, their sum and any positive multiple give one and the same attack; a permuted batch a permuted one."
    x, loss = images(seed), smooth_loss(seed)
    how = dict(steps=2, start=ball.random_start(x, seeded(seed)))
    found = pgd(loss, x, ball, **how)
    assert torch.allclose(pgd(lambda t: scale * loss(t).sum(), x, ball, **how), found, atol=1e-9)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(pgd(loss, x[order], ball, steps=2, start=how["start"][order]), found[order], atol=1e-9)


def test_restarts_find_the_global_maximum_of_a_hilly_loss():
    x = torch.full((64, 1), 0.5, dtype=torch.float64)
    hills = lambda t: torch.sin(25 * t[:, 0]) + t[:, 0]
    found = pgd(hills, x, Linf(0.4), steps=60, step_size=0.01, keep="best", generator=seeded())
    grid = torch.linspace(0.1, 0.9, 10_001, dtype=torch.float64)[:, None]
    assert abs(hills(found).max() - hills(grid).max()) < 1e-2


# no trace


@examples
@given(seeds, st.booleans(), st.sampled_from([None, 1, 2, 3]), st.sampled_from(["last", "best"]), st.booleans())
def test_no_trace(seed, training, fails_at, keep, outer_train):
    "Modes, flags, statistics, gradients: with any mode before, and whether or not the objective fails at some look."
    torch.manual_seed(seed)
    net = Net()
    net.body[1].train(training)
    net(torch.randn(5, 8)).square().sum().backward()
    before, looks = snapshot(net), 0

    def objective(t):
        nonlocal looks
        looks += 1
        if looks == fails_at: raise KeyError("on purpose")
        assert not any(p.requires_grad for p in net.parameters())
        assert all(m.training is outer_train for m in net.modules())
        return net(t).square().sum(1)

    x = images(seed, torch.float32)
    with contextlib.suppress(KeyError):
        if outer_train:
            with frozen(net, train=True): pgd(objective, x, Linf(0.1), steps=2, keep=keep)
        else: pgd(objective, x, Linf(0.1), steps=2, keep=keep, model=net)
    assert looks == min(2 + (keep == "best"), fails_at or 9)
    assert_untouched(net, before)


def test_a_graph_from_before_survives():
    "An outer loss may be built before the attack and backpropagated after it, and gradients add up as always."
    torch.manual_seed(0)
    net, x = Net(), images(0, torch.float32)
    for training in (False, True):
        net.train(training)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            expected = torch.autograd.grad(net(x).square().sum(), net.body[0].weight)[0]
        torch.manual_seed(1)
        loss = net(x).square().sum()
        pgd(lambda t: net(t).square().sum(1), x, Linf(0.1), steps=2, model=net)
        with frozen(net, train=True): pgd(lambda t: net(t).square().sum(1), x, Linf(0.1), steps=2)
        net.zero_grad()
        loss.backward()
        assert torch.allclose(net.body[0].weight.grad, expected)


def test_the_same_attack_in_eval_mode_whatever_the_mode_before():
    torch.manual_seed(0)
    net, x = Net(), images(0, torch.float32)
    net(torch.randn(32, 8))
    attack = lambda: pgd(lambda t: net(t).square().sum(1), x, Linf(0.1), steps=3, start="zero", model=net)
    assert torch.equal(net.train() and attack(), net.eval() and attack())


def test_between_two_points_the_network_belongs_to_the_caller():
    torch.manual_seed(0)
    net, x = Net().train(), images(0, torch.float32)
    before = snapshot(net)
    path = pgd_path(lambda t: net(t).square().sum(1), x, Linf(0.1), steps=3, model=net)
    for point, value in path:
        assert torch.is_grad_enabled() and not value.requires_grad and not point.requires_grad
        assert_untouched(net, before)
    path = pgd_path(lambda t: net(t).square().sum(1), x, Linf(0.1), steps=3, model=net)
    next(path)  # abandoned here
    assert_untouched(net, before)


def test_several_networks_and_nested_blocks():
    nets = nn.Linear(8, 2), nn.Sequential(nn.BatchNorm1d(2))
    objective = lambda t: nets[1](nets[0](t.flatten(1))).square().sum(1)
    pgd(objective, images(0, torch.float32), Linf(0.1), steps=1, model=nets)
    with frozen(*nets, train=True):
        with frozen(nets[1]): assert not nets[1].training and not nets[1][0].training
        assert nets[0].training and nets[1][0].training and not nets[0].weight.requires_grad
    assert all(p.requires_grad for net in nets for p in net.parameters())
    pgd(objective, images(0, torch.float32), Linf(0.1), steps=1, model=nn.Sequential(*nets))  # one module, not a sequence


@pytest.mark.parametrize(("run", "passes"), [
    (lambda *a, **k: pgd(*a, steps=4, **k), (4, 4)),
    (lambda *a, **k: pgd(*a, steps=4, keep="best", **k), (5, 4)),
    (lambda *a, **k: pgd(*a, steps=0, **k), (0, 0)),
    (lambda *a, **k: pgd(*a, steps=0, keep="best", **k), (1, 0)),
    (lambda *a, **k: list(pgd_path(*a, steps=4, **k)), (5, 4)),
    (fgsm, (1, 1)),
])
def test_passes(run, passes):
    torch.manual_seed(0)
    net, counted = Net(), [0, 0]
    hook = lambda i: lambda *_: counted.__setitem__(i, counted[i] + 1)
    net.body.register_forward_hook(hook(0))
    net.body.register_full_backward_hook(hook(1))
    run(lambda t: net(t).square().sum(1), images(0, torch.float32), Linf(0.1), model=net)
    assert tuple(counted) == passes


# surroundings


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_inside_evaluation_code(context, keep):
    torch.manual_seed(0)
    net, x, y = Net().eval(), images(0, torch.float32), torch.tensor([0, 1, 2])
    before = snapshot(net)
    attack = lambda: pgd(lambda t: F.cross_entropy(net(t), y), x, L2(0.5), steps=3, start="zero", keep=keep, model=net)
    outside = attack()
    with context(): inside = attack()
    assert torch.equal(inside, outside)
    assert_untouched(net, before)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(1.0)])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_autocast_and_half_inputs(ball, keep):
    torch.manual_seed(0)
    net, y = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.tensor([0, 1, 2])
    loss = lambda t: F.cross_entropy(net(t), y, reduction="none")
    x = images(0, torch.float32) * 0.8 + 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16): found = pgd(loss, x, ball, steps=3, keep=keep, model=net)
    assert found.dtype == torch.float32 and (length(ball, found - x) <= ball.eps + 1e-6).all()
    assert (loss(found) > loss(x)).all()
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        found = pgd(lambda t: loss(t.float()), half, ball, steps=3, keep=keep, start="zero")
        assert found.dtype == dtype and (loss(found.float()) > loss(half.float())).all()
        rounding = torch.finfo(dtype).eps * 8  # each pixel is rounded to the precision of the image
        assert (length(ball, found.float() - half.float()) <= ball.eps + rounding).all()


def test_autocast_does_not_cache_frozen_weights():
    "Weights cast inside the attack must not be reused, without their gradient, by the training pass that follows."
    net, x = nn.Linear(8, 3), images(0, torch.float32).flatten(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_adv = pgd(lambda t: net(t).square().sum(1), x, Linf(0.1), steps=2, model=net)
        net(x_adv).float().sum().backward()
    assert net.weight.grad is not None and net.weight.grad.abs().sum() > 0


def test_memory_format_is_kept():
    x = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    for ball in (Linf(0.1), L2(0.5), L1(1.0)):
        found = pgd(lambda t: t.square().flatten(1).sum(1), x, ball, steps=2)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_images_that_require_grad():
    x = images(0).requires_grad_()
    found = pgd(smooth_loss(0), x, Linf(0.1), steps=2, start=torch.zeros_like(x).requires_grad_())
    assert not found.requires_grad and x.grad is None and x.requires_grad


def test_a_bare_radius_is_refused():
    for act in (lambda: pgd(smooth_loss(0), images(0), 0.1, steps=1), lambda: Perturbation(0.1, 2)):
        with pytest.raises(ValueError, match=r"threat is a ball such as Linf\(8 / 255\), got 0.1"): act()


# values that are not refused


def test_range_is_reported_and_not_refused():
    loss, x = smooth_loss(0), images(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgd(loss, x + 5e-7, Linf(0.1), steps=1)  # rounding is forgiven
        pgd(loss, 3 * x - 1, Linf(0.1), steps=1, pixels=None)  # no range, no complaint
        pgd(loss, 3 * x - 1, Linf(0.1), steps=1, pixels=(-1.0, 2.0))
    with pytest.warns(UserWarning, match="normalise inside the model"): pgd(loss, 3 * x - 1, Linf(0.1), steps=1)
    broken = x.clone()
    broken[1, 0, 0] = math.nan
    with pytest.warns(UserWarning, match="NaN"): found = pgd(loss, broken, Linf(0.1), steps=2, start="zero")
    assert found.flatten(1).isnan().any(1).tolist() == [False, True, False]
    assert torch.equal(found[[0, 2]], pgd(loss, x, Linf(0.1), steps=2, start="zero")[[0, 2]])
    assert out_of_range(broken).item() and out_of_range(x - 1).item() and not out_of_range(x).item()


def test_a_broken_gradient_shows():
    "The derivative of the square root at 0 is infinite, and 0 * inf is NaN: the sign of that would be a quiet 0."
    x = torch.full((2, 3), 0.5)
    x[0] = 0.2
    loss = lambda t: (t - 0.5).square().sum(1).sqrt()
    assert pgd(loss, x, Linf(0.1), steps=1, start="zero").isnan().any(1).tolist() == [False, True]


def test_nan_at_the_start_does_not_win():
    x = torch.full((2, 3), 0.5)
    loss = lambda t: t.sum(1) + torch.where(t.sum(1) == 1.5, math.nan, 0.0)
    assert torch.allclose(pgd(loss, x, Linf(0.1), steps=2, start="zero", keep="best"), x + 0.1)


# errors


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(steps=-1), "steps must be a whole number"), (dict(steps=1.5), "steps must be a whole number"),
    (dict(step_size=-0.1), "sign chooses the direction"), (dict(step_size=math.nan), "step_size"),
    (dict(start="clean"), "'random', 'zero' or a tensor"), (dict(start=torch.zeros(1)), "start must have the shape of x"),
    (dict(sign=0), r"\+1 \(adversary\) or -1 \(cooperator\)"), (dict(pixels=(1, 0)), "low < high"),
    (dict(last="both"), "'clip' or 'project'"), (dict(keep="all"), "'last' or 'best'"),
])
def test_bad_settings(wrong, message):
    good = dict(steps=1) | wrong
    with pytest.raises(ValueError, match=message): pgd(smooth_loss(0), images(0), Linf(0.1), **good)
    if "start" not in wrong or isinstance(wrong["start"], str):
        with pytest.raises(ValueError, match=message): Perturbation(Linf(0.1), **good)
    if "keep" not in wrong and not isinstance(wrong.get("start"), torch.Tensor):  # at the call, not at the first point
        with pytest.raises(ValueError, match=message): pgd_path(smooth_loss(0), images(0), Linf(0.1), **good)


@pytest.mark.parametrize(("objective", "message"), [
    (lambda t: t, r"must return a scalar or shape \(3,\)"), (lambda t: t.flatten(1).sum(1)[:2], "scalar or shape"),
    (lambda t: t.detach().sum(), "does not depend on its input"), (lambda t: torch.zeros(3), "does not depend on its input"),
    (lambda t: nn.Linear(2, 3)(torch.ones(2)), "does not depend on its input"),
])
def test_bad_objectives(objective, message):
    with pytest.raises(ValueError, match=message): pgd(objective, images(0), Linf(0.1), steps=1)


def test_integer_images():
    with pytest.raises(ValueError, match="divide uint8 images by 255"):
        pgd(smooth_loss(0), torch.zeros(SHAPE, dtype=torch.uint8), Linf(0.1), steps=1, start="zero")


# the player


@examples
@given(threats, seeds, st.sampled_from([1, -1]), st.sampled_from(["last", "best"]), st.sampled_from(["random", "zero"]))
def test_the_player_plays_pgd(ball, seed, sign, keep, start):
    x, loss = images(seed), smooth_loss(seed)
    player = Perturbation(ball, 2, sign=sign, keep=keep, start=start)
    expected = pgd(loss, x, ball, steps=2, step_size=2.5 * ball.eps / 2, sign=sign, keep=keep, start=start, generator=seeded(seed))
    assert torch.equal(player.find(loss, x, generator=seeded(seed)), expected)
    other = replace(player, sign=-sign)
    expected = pgd(lambda t: -loss(t), x, ball, steps=2, sign=sign, keep=keep, start=start, generator=seeded(seed))
    assert torch.equal(other.find(loss, x, generator=seeded(seed)), expected)


@examples
@given(threats, seeds, st.sampled_from([1, -1]))
def test_fgsm_is_one_full_step(ball, seed, sign):
    x, loss = images(seed), smooth_loss(seed)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    expected = x + sign * ball.eps * ball.step(g)
    assert torch.allclose(fgsm(loss, x, ball, sign=sign, pixels=None), expected, atol=1e-12)
    assert torch.allclose(fgsm(loss, x, ball, sign=sign), expected.clamp(0, 1), atol=1e-12)
