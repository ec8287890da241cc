"ADIOS: its step written out a second time for all bases and modes, mutants that the same check must reject, limits, masks and prices."
import math
from contextlib import nullcontext

import pytest
import torch
from common import examples, seeded, seeds, snapshot, untouched, written_nt_xent
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import advssl.methods.adios as module
from advssl.attack import frozen
from advssl.encoders import Encoder
from advssl.method import Views, cards, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.adios import ADIOS, MaskNet, area_penalty, mask_gauges, occlude
from advssl.methods.byol import BYOL
from advssl.methods.simclr import SimCLR

SHAPE = (6, 3, 4, 4)
sizes, counts = st.integers(4, 19), st.integers(2, 5)


def make(cls=ADIOS, seed=0, dtype=torch.float64, batch_norm=True, **options):
    "A method on 48 pixels in training mode, its target apart from it and all statistics unlike those of any batch, and two views."
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(48, 16), norm, nn.Tanh()), 16, in_channels=3)
    method = cls(encoder, **{"masks": 3, "hidden_dim": 16, "embedding_dim": 8, "mask_levels": 1, "mask_width": 4, "weight": 0.3} | options)
    method = method.to(dtype)
    heads = [method.projector, method.predictor] + ([method.target.module[1]] if method.target else [])
    for head in heads if not batch_norm else []:
        for i, layer in enumerate(head.children()):
            if isinstance(layer, nn.BatchNorm1d): head[i] = nn.Identity()
    with torch.no_grad():
        method.predictor(method.embed(2 * torch.randn(32, *SHAPE[1:], dtype=dtype) + 1))
        for weight in method.target.parameters() if method.target else (): weight += 0.2 * torch.randn_like(weight)
    method.generator = seeded(seed)
    return method, Views(**dict(zip(("strong1", "strong2"), torch.rand(2, *SHAPE, dtype=dtype), strict=True)))


def optimizers(method, network=0.1, masks=0.2):
    return {p.name: torch.optim.SGD(p.parameters(), lr) for p, lr in zip(method.players(), (network, masks), strict=True)}


# a second implementation: image by image and mask by mask, nothing shared between the turns


def written_hidden(masks, x, chosen=None):
    "Hidden views, pixel values by the formula; with `chosen` one for each image."
    colour = torch.tensor([0.485, 0.456, 0.406]).to(x)[:, None, None]
    dim = lambda i, n: x[i] * (1 - masks[i, n]) + masks[i, n] * colour
    if chosen is not None: return [torch.stack([dim(i, n) for i, n in enumerate(chosen.tolist())])]
    return [torch.stack([dim(i, n) for i in range(len(x))]) for n in range(masks.shape[1])]


def written_price(masks):
    "Mean over masks and images of 1 / sin(pi area); no area of these masks is near its end."
    areas = [masks[i, n].mean() for i in range(masks.shape[0]) for n in range(masks.shape[1])]
    assert all(0.02 < a < 0.98 for a in areas)
    return sum(1 / (math.pi * a).sin() for a in areas) / len(areas)


def distance(q, z): return sum((a / a.norm() - b / b.norm()).square().sum() for a, b in zip(q, z, strict=True)) / len(q)


def written_base(method, base, x1, hidden, through):
    "Mean over hidden views; `through`: derivatives pass the constant side too."
    f, total = lambda t: method.projector(method.encoder(t)), 0.0
    h1, hs = f(x1), [f(v) for v in hidden]
    if base == "simclr": return sum(written_nt_xent((h1, h), 0.2) for h in hs) / len(hs)
    slow = [method.target.module(v) for v in (x1, *hidden)] if base == "byol" else [h1, *hs]
    if not through: slow = [z.detach() for z in slow]
    q1, qs = method.predictor(h1), [method.predictor(h) for h in hs]
    for q, z in zip(qs, slow[1:], strict=True): total = total + distance(q, slow[0]) + distance(q1, z)
    return total / len(hs) if base == "byol" else total / len(hs) / 4 - 1


def written_step(method, views, base, sign, single, simultaneous, symmetric, weight=0.3, network=0.1, masks=0.2):
    "Losses and the state behind one step, by plain gradients; the target follows last."
    x1, x2 = views.strong1, views.strong2
    theta = [p for part in (method.encoder, method.projector, method.predictor) for p in part.parameters()]
    phi = list(method.mask_net.parameters())
    chosen = torch.randint(3, (len(x1),), generator=seeded(0)) if single else None
    paint = lambda: method.mask_net(x2)
    move = lambda weights, grads, rate: [w.data.add_(rate * g) for w, g in zip(weights, grads, strict=True)]
    loss = lambda through: written_base(method, base, x1, written_hidden(paint(), x2, chosen), through)
    if not simultaneous:
        first = loss(False)
        move(theta, torch.autograd.grad(first, theta), -network)
    state = snapshot(method)
    through = symmetric and not (simultaneous and base == "simsiam")
    both, price = loss(through), written_price(paint())
    up = [sign * g - weight * p for g, p in zip(torch.autograd.grad(both, phi), torch.autograd.grad(price, phi), strict=True)]
    if simultaneous: move(theta, torch.autograd.grad(loss(False), theta), -network)
    else: method.load_state_dict(state)  # whatever the masks' turn did to the statistics
    move(phi, up, masks)
    objective = both - sign * weight * price
    if simultaneous:  # the second look at the encoder's gradient moved the statistics once more
        now, once = snapshot(method), make(base=base)[0]
        written_base(once, base, x1, written_hidden(once.mask_net(x2), x2, chosen), False)
        method.load_state_dict({k: once.state_dict()[k] if "running" in k or "batches" in k else v for k, v in now.items()})
    if base == "byol":
        m = 1 - 0.004 * 0.5 * (1 + math.cos(math.pi * method.progress))
        for mine, theirs in zip(method.target.module.parameters(), method.embed.parameters(), strict=True):
            mine.data.mul_(m).add_((1 - m) * theirs.data)
        for mine, theirs in zip(method.target.module.buffers(), method.embed.buffers(), strict=True): mine.copy_(theirs)
    return [objective] if simultaneous else [first, objective]


def agrees(cls=ADIOS, base="simclr", sign=1, single=False, simultaneous=False, symmetric=True):
    "Whether a step has the written objectives and leads to the written state, and leaves nothing behind."
    how = {"base": base, "sign": sign, "single": single, "simultaneous": simultaneous, "symmetric": symmetric}
    ours, views = make(cls, **how)
    theirs, _ = make(base=base)
    ours.progress = theirs.progress = 0.25
    expected = written_step(theirs, views, **how)
    values = play(ours, views, optimizers(ours))
    state = theirs.state_dict()
    return (
        len(values) == len(expected) and torch.allclose(values, torch.stack(expected).detach(), rtol=1e-9)
        and all(torch.allclose(v.double(), state[k].double(), rtol=1e-8, atol=1e-10) for k, v in ours.state_dict().items())
        and all(p.grad is None for p in ours.parameters()) and all(m.training for m in ours.modules())
        and all(p.requires_grad != k.startswith("target") for k, p in ours.named_parameters())
    )


CASES = [
    {"base": base, "simultaneous": one} | more
    for base in ("simclr", "byol", "simsiam") for one in (False, True)
    for more in ({}, {"sign": -1}, {"single": True}, {"symmetric": False})
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{v}" if k == "base" else f"{k}={v}" for k, v in case.items()))
def test_the_step_is_the_written_one(case): assert agrees(**case)


class FlippedSign(ADIOS):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class PriceWithTheWrongSign(ADIOS):
    def price(self, masks): return -super().price(masks)


class NoPrice(ADIOS):
    def price(self, masks): return 0 * super().price(masks)


class PriceOfTheFirstMask(ADIOS):
    def price(self, masks): return super().price(masks[:, :1])


class PriceOfTheMeanArea(ADIOS):
    def price(self, masks): return super().price(masks.mean(0, keepdim=True))


class SumOfMasks(ADIOS):
    def __init__(self, *args, **options): super().__init__(*args, reduction="sum", **options)


class BlackBehindMasks(ADIOS):
    def __init__(self, *args, **options): super().__init__(*args, fill="black", **options)


class OtherTemperature(ADIOS):
    def __init__(self, *args, **options): super().__init__(*args, temperature=0.5, **options)


class ViewsChangePlaces(ADIOS):
    def turns(self, views): return super().turns(Views(strong1=views.strong2, strong2=views.strong1))


class FirstMaskOnly(ADIOS):
    def choose(self, masks): return masks[:, :1]


class OneMaskForTheBatch(ADIOS):
    def choose(self, masks): return super().choose(masks)[:1].expand(len(masks), -1, -1, -1) if self.single else masks


class AnotherModeOfTurns(ADIOS):
    def turns(self, views):
        self.simultaneous = not self.simultaneous
        return super().turns(views)


class AlwaysStopped(ADIOS):
    def loss(self, views, known=None, stop=True): return super().loss(views, known, True)


class NeverStopped(ADIOS):
    def loss(self, views, known=None, stop=True): return super().loss(views, known, False)


class ViewsShareAPass(ADIOS):
    def loss(self, views, known=None, stop=True):
        together, whole = iter(self.embed(torch.cat(list(views))).chunk(len(views))), self.__class__.embed
        self.__class__.embed = property(lambda _: lambda v: next(together))
        try: return super().loss(views, known, stop)
        finally: self.__class__.embed = whole


class MasksMoveWithTheNetwork(ADIOS):
    @property
    def network(self):
        network = super().network
        network.modules += (self.mask_net,)
        return network


class HeadsStandStill(ADIOS):
    @property
    def network(self):
        network = super().network
        network.modules = network.modules[:1]
        return network


CLASSES = [
    FlippedSign, PriceWithTheWrongSign, NoPrice, PriceOfTheFirstMask, PriceOfTheMeanArea, SumOfMasks, BlackBehindMasks, OtherTemperature,
    ViewsChangePlaces, FirstMaskOnly, OneMaskForTheBatch, AnotherModeOfTurns, AlwaysStopped, NeverStopped, ViewsShareAPass,
    MasksMoveWithTheNetwork, HeadsStandStill,
]


@pytest.mark.parametrize("mutant", CLASSES)
def test_mutants_are_rejected(mutant): assert not all(agrees(mutant, **case) for case in CASES)


PATCHES = {
    "masks show instead of hide": ("occlude", lambda x, m, c: occlude(x, 1 - m, c)),
    "masks held in their own turn": ("occlude", lambda x, m, c: occlude(x, m.detach(), c)),
    "the masks' turn moves the statistics": ("frozen", lambda *modules, train: nullcontext()),
    "evaluation mode in the masks' turn": ("frozen", lambda *modules, train: frozen(*modules)),
    "half of the loss": ("bootstrap_loss", lambda q, z: module.unit_loss(q, z) / 2),
    "a target that never follows": ("cosine_momentum", lambda base, progress: 1.0),
    "a target of constant momentum": ("cosine_momentum", lambda base, progress: base),
}


@pytest.mark.parametrize("name", PATCHES)
def test_changed_parts_are_rejected(name, monkeypatch):
    monkeypatch.setattr(module, "unit_loss", module.bootstrap_loss, raising=False)
    monkeypatch.setattr(module, *PATCHES[name])
    assert not all(agrees(**case) for case in CASES)


# masks and hidden views


@examples
@given(seeds, st.integers(1, 3), counts, st.integers(0, 3), sizes, sizes)
def test_masks_share_every_pixel(seed, channels, masks, levels, height, width):
    torch.manual_seed(seed)
    net, x = MaskNet(channels, masks, 4, levels), torch.rand(3, channels, height, width)
    m = net(x)
    assert m.shape == (3, masks, height, width) and m.min() >= 0 and torch.allclose(m.sum(1), torch.ones(()))
    assert torch.allclose(net(x[1:2]), m[1:2], atol=1e-5)  # an image's masks are its own affair
    m[:, 0].sum().backward()
    if levels < 3: assert all(p.grad is not None for p in net.parameters())


@examples
@given(seeds, counts)
def test_hiding(seed, count):
    g = seeded(seed)
    x, masks, colour = torch.rand(4, 3, 5, 5, generator=g), torch.rand(4, count, 5, 5, generator=g), torch.rand(1, 3, 1, 1, generator=g)
    hidden = occlude(x, masks, colour)
    assert len(hidden) == count and all(v.shape == x.shape and v.min() >= 0 and v.max() <= 1 for v in hidden)
    assert all(torch.equal(v, x) for v in occlude(x, torch.zeros_like(masks), colour))
    assert torch.allclose(occlude(x, 1 - masks, colour)[0] - colour, masks[:, :1] * (x - colour), atol=1e-6)


def test_the_size_of_the_mask_network():
    "About 17,000 parameters for grey images; a demo must stay small."
    assert 15_000 < sum(p.numel() for p in MaskNet(1, 3).parameters()) < 25_000


# the price


@examples
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([1e-3, 0.01, 0.1]), st.sampled_from([torch.float32, torch.float64]))
def test_the_price_is_finite_convex_and_symmetric(a, b, margin, dtype):
    areas = torch.tensor([a, b, (a + b) / 2, 1 - a, 0.5], dtype=dtype)
    price = area_penalty(areas, margin)
    assert price.isfinite().all() and price.min() >= 1 - 1e-6 and price.max() <= 2 / math.sin(math.pi * margin) * (1 + 1e-4)
    assert price[2] <= (price[0] + price[1]) / 2 * (1 + 1e-5) and torch.allclose(price[0], price[3], rtol=1e-2)
    assert torch.allclose(price[4], torch.ones((), dtype=dtype))


@examples
@given(st.floats(0, 1))
def test_the_price_pulls_towards_one_half_from_everywhere(a):
    area = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(area_penalty(area), area)
    assert slope.isfinite() and (slope * (area - 0.5) > 0 or abs(a - 0.5) < 1e-6)
    border = math.pi * math.cos(0.01 * math.pi) / math.sin(0.01 * math.pi) ** 2
    assert 0.01 <= a <= 0.99 or math.isclose(abs(slope.item()), border, rel_tol=1e-9)


def test_a_full_mask_is_rewarded_without_the_clamp():
    full = torch.ones(())
    assert area_penalty(full, 0.0) < -1e7 and area_penalty(full) > 60
    with pytest.raises(ValueError, match="margin must be in"): area_penalty(full, 0.5)


# gauges


@examples
@given(seeds, counts, st.floats(0, 30))
def test_gauges_stay_between_their_ends(seed, count, scale):
    masks = (scale * torch.randn(4, count, 6, 6, generator=seeded(seed))).softmax(1)
    gauges = mask_gauges(masks)
    assert all(-1e-6 <= v <= 1 + 1e-6 for v in gauges.values())
    assert gauges["area_smallest"] <= 1 / count + 1e-6 <= gauges["area_largest"] + 2e-6
    assert gauges["entropy"] * math.log(count) >= gauges["overlap"] * (count - 1) / count - 1e-5  # as -log m >= 1 - m


@pytest.mark.parametrize("count", [2, 5])
def test_a_collapse_shows_in_the_log(count):
    method, views = make(masks=count)
    for image in (0, 1):  # one mask takes all, or none decides; and a decision about every image
        play(method, views, optimizers(method))
        assert set(method.logs) == {"area_smallest", "area_largest", "entropy", "overlap", "collapsed", "spread"}
        assert method.logs["collapsed"] == 0
        with torch.no_grad():
            method.mask_net.head.weight.zero_()
            method.mask_net.head.bias.copy_(100.0 * image * torch.eye(count)[0])
        play(method, views, optimizers(method, masks=0.0))
        assert method.logs["collapsed"] == 1 and not any(v.requires_grad for v in method.logs.values())
        assert torch.allclose(method.logs["entropy"], torch.tensor(1.0 - image, dtype=torch.float64), atol=1e-6)
        method = make(masks=count)[0]


# limits


def test_masks_that_hide_nothing_leave_the_base():
    method, views = make(batch_norm=False)
    x1, x2, nothing = views.strong1, views.strong2, torch.zeros(6, 3, 4, 4)
    base = SimCLR(method.encoder, temperature=0.2)
    base.projector = method.projector
    ((expected, _),) = base.turns(views)
    assert torch.allclose(method.loss([x1, *occlude(x2, nothing, method.colour)]), expected, rtol=1e-12)
    method, _ = make(base="byol")
    base = BYOL(method.encoder, hidden_dim=16, embedding_dim=8).double()
    base.projector, base.predictor, base.target = method.projector, method.predictor, method.target
    known = [method.target(v) for v in (x1, x2, x2, x2)]
    assert torch.allclose(method.loss([x1, *occlude(x2, nothing, method.colour)], known), base.objective([x1, x2]), rtol=1e-12)


def test_one_mask_is_no_game():
    with pytest.raises(ValueError, match="hide the whole image"): make(masks=1)


@pytest.mark.parametrize("base", ["simclr", "byol", "simsiam"])
def test_a_player_without_a_rate_stands_still(base):
    method, views = make(base=base)
    before = snapshot(method)
    play(method, views, optimizers(method, network=0.0, masks=0.0))
    assert all(torch.allclose(p, before[k], rtol=1e-12) or k.startswith("target") for k, p in method.named_parameters())


def test_adios_s_is_an_unbiased_estimate():
    "Without BatchNorm the mean gradient by the masks over all choices is that of the mean over masks."
    method, views = make(base="simsiam", batch_norm=False, masks=2)
    x1, x2, m = views.strong1[:2], views.strong2[:2], method.mask_net(views.strong2[:2]).detach().requires_grad_()
    of = lambda chosen: torch.autograd.grad(method.loss([x1, *occlude(x2, chosen, method.colour)], stop=False), m)[0]
    draws = [of(m[torch.arange(2), torch.tensor(r)][:, None]) for r in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert torch.allclose(sum(draws) / 4, of(m), rtol=1e-10)


def test_the_price_acts_alone_when_hiding_changes_nothing():
    "On images of the masks' own colour the masks have no effect, and areas go to equal shares, whatever the sign."
    for sign in (1, -1):
        method, views = make(sign=sign, weight=1.0)
        views.strong2 = method.colour.expand(SHAPE).contiguous() + 0 * views.strong2
        with torch.no_grad(): method.mask_net.head.bias.add_(torch.tensor([1.5, 0.0, -1.5]))
        unequal = lambda method=method, views=views: method.mask_net(views.strong2).mean((2, 3)).std(1).mean()
        before, steps = unequal(), optimizers(method, network=0.0, masks=0.05)
        for _ in range(30): play(method, views, steps)
        assert unequal() < 0.2 * before


# the contract


@examples
@given(seeds, st.sampled_from(["simclr", "byol", "simsiam"]), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_contract(seed, base, single, simultaneous, dtype):
    how = {"seed": seed, "base": base, "single": single, "simultaneous": simultaneous, "dtype": dtype}
    method, views = make(**how)
    kept, stream = (views.strong1.clone(), views.strong2.clone()), torch.get_rng_state()
    turns = method.turns(views)
    first, _ = next(turns)
    if not simultaneous:
        with untouched(method, views.strong1, views.strong2): objective, player = next(turns)
        assert player.sign == 1
        assert all(g is None for g in torch.autograd.grad(objective, method.network.parameters(), allow_unused=True, retain_graph=True))
        assert first.isfinite() and torch.autograd.grad(first, method.mask_net.head.weight, allow_unused=True)[0] is None
    assert torch.equal(views.strong1, kept[0]) and torch.equal(views.strong2, kept[1]) and torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in method.parameters()) and all(m.training for m in method.modules())
    again, _ = make(**how)
    assert torch.equal(next(again.turns(views))[0], first)


@pytest.mark.parametrize("N", [2, 3, 6])
def test_passes(N):
    for how, online, slow in (
        ({}, (2 * N + 2, 2 * N + 1, N + 1), (0, 0)), ({"simultaneous": True}, (N + 1, N + 1, N + 1), (0, 0)),
        ({"single": True}, (4, 3, 2), (0, 0)),
        ({"base": "byol"}, (2 * N + 2, 2 * N + 1, N + 1), (N + 1, N)), ({"base": "simsiam"}, (2 * N + 2, 2 * N + 1, N + 1), (0, 0)),
        ({"base": "byol", "symmetric": False}, (2 * N + 2, 2 * N + 1, N + 1), (N + 1, 0)),
        ({"base": "byol", "single": True}, (4, 3, 2), (2, 1)),
    ):
        method, views = make(masks=N, **how)
        target = [method.target.module[0]] if method.target else []
        with count_passes(method.encoder) as passes, count_passes(*target) as others, count_passes(method.mask_net) as painter:
            play(method, views, optimizers(method))
        assert (passes.forward, passes.backward_input, passes.backward_weight) == tuple(6 * n for n in online) and online[0] <= 2 * N + 3
        assert painter.forward == 6 and (others.forward, others.backward_input, others.backward_weight) == (6 * slow[0], 6 * slow[1], 0)


def test_autocast_trains_every_weight():
    for base in ("simclr", "byol", "simsiam"):
        method, views = make(base=base, dtype=torch.float32, simultaneous=True)
        with torch.autocast("cpu", dtype=torch.bfloat16): loss, movers = next(method.turns(views))
        parameters = [p for m in movers for p in m.parameters()]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert loss.dtype == torch.float32 and all(g is not None and g.isfinite().all() for g in grads)


def test_in_two_turns_the_masks_see_the_network_behind_its_step():
    "Under autocast too, which keeps half-precision copies of weights as long as a step lasts."
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        seen = []
        for rate in (0.0, 3.0):
            method, views = make(dtype=torch.float32)
            with context: seen.append(play(method, views, optimizers(method, network=rate)))
        assert seen[0][0] == seen[1][0] and abs(seen[0][1] - seen[1][1]) > 1e-3


# settings, card


@pytest.mark.parametrize(("wrong", "message"), [
    ({"base": "moco"}, "base must be one of"), ({"reduction": "max"}, "reduction must be one of"), ({"fill": "red"}, "fill must be one of"),
    ({"sign": 0}, r"sign is \+1"), ({"mask_lr": -1.0}, "sign chooses the direction"), ({"mask_width": 6}, "multiple of 4"),
    ({"mask_levels": -1}, "levels must be >= 0"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    assert get_method("adios") is methods()["adios"] is ADIOS and "adios" in [c["key"] for c in cards()]
    card = ADIOS.card
    assert (card.type, card.base, card.level, card.combined, card.sign, card.tables) == ("memory-free", "MIM", "input", "no", 1, (1, 2))
    assert "M_\\phi" in card.adversary and card.source and ADIOS.backbone == "convnet"
    known = settings_of(ADIOS)
    wanted = {"base": "simclr", "masks": 4, "single": False, "simultaneous": False, "reduction": "mean", "symmetric": True, "sign": 1}
    assert known | wanted == known
