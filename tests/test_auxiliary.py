"Adversarial training with a rotation loss beside it: limits, the attack's contract, the step written out with loops, passes, mutants."

from dataclasses import replace

import pytest
import torch
from common import seeded, seeds, signs, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.attack import Perturbation, frozen
from advssl.config import Config
from advssl.evaluate.auxiliary import Auxiliary, one_shot, same_passes, units
from advssl.evaluate.finetune import FineTune, Tuning, find_mode, finetune
from advssl.images import ImageSet
from advssl.method import Views, count_passes, methods, play
from advssl.methods.rotation import rotate
from advssl.threat import Linf, make_threat

QUICK = Tuning(epochs=2, lr=0.01, batch_size=16, augmentation="none", steps=1, heldout=0.25, judge_steps=1)
EPS, ALPHA, STEPS = 0.1, 0.04, 3


def make(cls=Auxiliary, seed=0, dtype=torch.float64, n=5, norm="linf", eps=EPS, steps=STEPS, start="zero", sign=1, **options):
    "A game with BatchNorm statistics unlike those of any batch, in training mode, images and labels."
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh())
    encoder.out_dim = 12
    player = Perturbation(make_threat(norm, eps), steps, ALPHA, start=start, sign=sign)
    game = cls(encoder, nn.Linear(12, 4), player, **options).to(dtype)
    with torch.no_grad(): encoder(2 * torch.randn(32, 16, dtype=dtype) + 1)
    game.stream = seeded(seed)
    return game, torch.rand(n, 1, 4, 4, dtype=dtype), torch.arange(n) % 4


def turn(game, x, y):
    (one,) = list(game.turns(Views(image=x, labels=y)))
    return one


def drawn(game, x):
    game.rotation.generator = seeded(0)
    return game.rotation.task(x)[1]


# a second implementation, with loops


def nll(logits, answer): return -(logits[answer].exp() / sum(v.exp() for v in logits)).log()


def written_turned(image, r):
    size = image.shape[-1]
    for _ in range(int(r)):
        image = torch.stack([torch.stack([image[:, j, size - 1 - i] for j in range(size)], -1) for i in range(size)], 1)
    return image


def written_losses(game, x, q, y, r):
    "The label's and the turn's mean loss, all copies in one batch."
    h = game.encoder(torch.cat([x, q]))
    label = sum(nll(game.head(f), int(c)) for f, c in zip(h, y, strict=False)) / len(x)
    return label, sum(nll(game.rotation.head(f), int(c)) for f, c in zip(h[len(x) :], r, strict=True)) / len(r)


def written_step(game, x, y, r, weight, separate, sign):
    "The adversary from a zero start and the objective."
    copies = len(r) // len(x)
    turned = lambda t: torch.stack([written_turned(t[i // copies], k) for i, k in enumerate(r)])
    clip = lambda t, center: torch.maximum(torch.minimum(t, center + EPS), center - EPS).clamp(0, 1)
    game.eval()
    a, b = x, turned(x)
    for _ in range(STEPS):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        label, turns = written_losses(game, a, b if separate else turned(a), y, r)
        if separate:
            ga, gb = torch.autograd.grad(label + weight * turns, (a, b))
            a, b = clip(a + sign * ALPHA * ga.sign(), x), clip(b + sign * ALPHA * gb.sign(), turned(x))
        else:
            (ga,) = torch.autograd.grad(label + weight * turns, a)
            a = clip(a + sign * ALPHA * ga.sign(), x)
            b = turned(a)
    game.train()
    label, turns = written_losses(game, a.detach(), b.detach(), y, r)
    return a.detach(), b.detach(), label + weight * turns


def agrees(cls=Auxiliary, draw="all", separate=False, weight=0.5, sign=1):
    "Whether a game's move, objective, gradients, traces and statistics are those of `written_step`."
    options = {"draw": draw, "separate": separate, "weight": weight, "sign": sign}
    ours, x, y = make(cls, **options)
    theirs = make(Auxiliary, **options)[0]
    r = drawn(theirs, x)
    a, b, objective = written_step(theirs, x, y, r, weight, separate, sign)
    parts = lambda game: list(game.encoder.parameters()) + list(game.head.parameters()) + list(game.rotation.head.parameters())
    grads = torch.autograd.grad(objective, parts(theirs))
    before, modes = snapshot(ours), [m.training for m in ours.modules()]
    moved, turned = ours.attack(x, y, r)
    traces = (
        not moved.requires_grad and not turned.requires_grad and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and modes == [m.training for m in ours.modules()] and all(p.grad is None and p.requires_grad for p in parts(ours))
    )
    value, player = turn(ours, x, y)
    same = lambda p, q: torch.allclose(p, q, rtol=1e-9, atol=1e-10)
    return (
        traces and player.sign == -1 and {id(p) for p in player.parameters()} == {id(p) for p in parts(ours)}
        and same(moved, a) and same(turned, b)
        and same(value, objective) and all(same(p, q) for p, q in zip(torch.autograd.grad(value, parts(ours)), grads, strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.encoder.state_dict(prefix="encoder.").items())
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("draw", ["all", "balanced"])
def test_the_step_is_the_written_one(draw, separate, sign): assert agrees(draw=draw, separate=separate, sign=sign)


class LabelAlone(Auxiliary):
    def attack(self, x, y, r):
        with frozen(self): moved = self.player.find(lambda t: self.losses(t, t, y, y)[0], x)
        return moved, rotate(moved.repeat_interleave(len(r) // len(x), 0), r)


class TurnAlone(Auxiliary):
    def attack(self, x, y, r):
        self.weight, kept = 1e9, self.weight
        found = super().attack(x, y, r)
        self.weight = kept
        return found


class Unfrozen(Auxiliary):
    def attack(self, x, y, r):
        self.eval()
        return super().attack(x, y, r)


class CleanTurns(Auxiliary):
    def attack(self, x, y, r): return super().attack(x, y, r)[0], rotate(x.repeat_interleave(len(r) // len(x), 0), r)


class CleanLabels(Auxiliary):
    def attack(self, x, y, r): return x, super().attack(x, y, r)[1]


class Clockwise(Auxiliary):
    def attack(self, x, y, r): return super().attack(x, y, (4 - r) % 4)


class SumOfTurns(Auxiliary):
    def losses(self, *batch):
        label, turns = super().losses(*batch)
        return label, 4 * turns


class TwoBatches(Auxiliary):
    def losses(self, x, q, y, r):
        label = super().losses(x, q[:0], y, r[:0])[0]
        return label, super().losses(x[:0], q, y[:0], r)[1]


class ForgottenHead(Auxiliary):
    @property
    def network(self): return FineTune.network.fget(self)


class NoRotationLoss(Auxiliary):
    def turns(self, views):
        x, y = views.image, views.labels
        yield self.losses(*self.attack(x, y, r := drawn(self, x)), y, r)[0].mean(), self.network


class WrongAnswers(Auxiliary):
    def losses(self, x, q, y, r): return super().losses(x, q, y, (r + 1) % 4)


class CopiesMixed(Auxiliary):
    def attack(self, x, y, r):
        a, b = super().attack(x, y, r)
        return a, rotate(a.repeat(len(r) // len(x), 1, 1, 1), r)


@pytest.mark.parametrize("fault", [
    LabelAlone, TurnAlone, Unfrozen, CleanTurns, CleanLabels, Clockwise, SumOfTurns, TwoBatches, ForgottenHead, NoRotationLoss,
    WrongAnswers, CopiesMixed,
])
def test_mutants_are_rejected(fault): assert not agrees(fault)


# limits


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from(["linf", "l2"]), st.integers(0, 2), st.sampled_from(["balanced", "all"]), st.booleans())
def test_weight_zero_is_adversarial_training(seed, norm, steps, draw, separate):
    game, x, y = make(seed=seed, norm=norm, steps=steps, weight=0.0, draw=draw, separate=separate, start="random")
    torch.manual_seed(seed)
    plain = FineTune(game.encoder, game.head, find_mode("aff"), game.player)
    plain.stream = seeded(seed)
    state = snapshot(game)
    value = turn(game, x, y)[0]
    game.load_state_dict(state)
    assert torch.equal(value, turn(plain, x, y)[0]) and torch.equal(game.stream.get_state(), plain.stream.get_state())


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([{"eps": 0.0}, {"steps": 0}]), st.sampled_from(["balanced", "all"]), st.booleans())
def test_without_a_ball_nothing_moves(seed, how, draw, separate):
    game, x, y = make(seed=seed, draw=draw, separate=separate, **how)
    r = drawn(game, x)
    moved, turned = game.attack(x, y, r)
    assert torch.equal(moved, x) and torch.equal(turned, rotate(x.repeat_interleave(len(r) // len(x), 0), r))
    nobody = make(seed=seed, draw=draw, separate=separate)[0]
    nobody.player = None
    assert torch.equal(turn(game, x, y)[0], turn(nobody, x, y)[0])


@settings(max_examples=5, deadline=None)
@given(seeds, st.sampled_from([0.1, 0.5, 3.0]))
def test_the_chain_of_players(seed, weight):
    "Adversarial training <= the sum's player <= five players, at the places that long searches find."
    found = {}
    for name, separate in (("one", False), ("five", True)):
        game, x, y = make(seed=seed, weight=weight, draw="all", separate=separate)
        game.eval().player = replace(game.player, steps=40, step_size=0.005)
        r = drawn(game, x)
        label, turns = game.losses(*game.attack(x, y, r), y, r)
        found[name] = label + weight * turns.view(5, 4).mean(1)
    with frozen(game): at = game.losses(game.player.find(lambda t: game.losses(t, t, y, y)[0], x), x, y, y)[0]
    assert (at <= found["one"] + 1e-3).all() and (found["one"] <= found["five"] + 1e-3).all()


@settings(max_examples=25, deadline=None)
@given(
    seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 0.3]), st.integers(0, 2), signs, st.booleans(),
    st.booleans(), st.sampled_from([torch.float32, torch.float64]),
)
def test_contract(seed, norm, eps, steps, sign, training, separate, dtype):
    player = {"norm": norm, "eps": eps, "steps": steps, "sign": sign, "start": "random"}
    game, x, y = make(seed=seed, dtype=dtype, n=3, draw="all", separate=separate, **player)
    game.train(training)
    game.rotation.head.train(not training)  # a mixed state must come back too
    before, modes, r = snapshot(game), [m.training for m in game.modules()], drawn(game, x)
    state = game.stream.get_state()
    moved, turned = game.attack(x, y, r)
    for t, center in ((moved, x), (turned, rotate(x.repeat_interleave(4, 0), r))):
        assert not t.requires_grad and t.min() >= 0 and t.max() <= 1 and t.dtype == dtype
        assert torch.allclose(game.player.threat.project(t - center), t - center, atol=1e-6)
    assert torch.equal(turned, rotate(moved.repeat_interleave(4, 0), r)) or separate
    assert all(torch.equal(v, before[k]) for k, v in game.state_dict().items()) and modes == [m.training for m in game.modules()]
    assert all(p.grad is None and p.requires_grad for p in [*game.encoder.parameters(), *game.rotation.head.parameters()])
    game.stream.set_state(state)
    assert all(torch.equal(p, q) for p, q in zip((moved, turned), game.attack(x, y, r), strict=True))


# a whole training


def toys(n=64):
    torch.manual_seed(0)
    labels = torch.arange(n) % 4
    x = 0.25 * torch.rand(n, 1, 6, 6)
    for i, c in enumerate(labels.tolist()): x[i, 0, 3 * (c // 2) : 3 * (c // 2) + 3, 3 * (c % 2) : 3 * (c % 2) + 3] += 0.5
    return ImageSet.from_float(x, labels, tuple("abcd"), "toys")


def net():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.BatchNorm1d(16), nn.ReLU())
    encoder.out_dim = 16
    return encoder


def weights(tuned): return list(tuned.classifier.state_dict().values())


def equal(a, b): return all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def test_weight_zero_is_f4_over_a_whole_training():
    how = {"threat": Linf(0.1), "tuning": QUICK}
    plain = finetune(net(), toys(), "F4", **how)
    none = one_shot(net(), toys(), weight=0.0, **how)
    assert equal(none, plain)
    without_time = lambda tuned: [{k: v for k, v in h.items() if k != "seconds"} for h in tuned.history]
    assert without_time(none) == without_time(plain) and none.epoch == plain.epoch
    half = one_shot(net(), toys(), **how)
    assert not equal(half, plain) and equal(half, one_shot(net(), toys(), **how))  # a function of the seed
    assert not equal(half, one_shot(net(), toys(), draw="all", **how)) and half.settings["weight"] == 0.5


def test_the_given_encoder_stays_and_a_run_is_resumed(tmp_path):
    encoder = net().train()
    before = snapshot(encoder)
    how = {"threat": Linf(0.1), "tuning": QUICK}
    whole = one_shot(encoder, toys(), **how)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()) and all(m.training for m in encoder.modules())
    left = [None] * 12
    mortal = net()
    mortal.register_forward_pre_hook(lambda *_: left.pop())
    with pytest.raises(IndexError): one_shot(mortal, toys(), folder=tmp_path, checkpoint_seconds=0, **how)
    assert equal(one_shot(net(), toys(), folder=tmp_path, **how), whole)
    with pytest.raises(ValueError, match="holds another run"): one_shot(net(), toys(), folder=tmp_path, weight=0.1, **how)


def test_unlabelled_images_are_refused():
    unlabelled = replace(toys(), labels=torch.full((64,), -1))
    with pytest.raises(ValueError, match="toys has no labels: fine-tune"): one_shot(net(), unlabelled, threat=Linf(0.1), tuning=QUICK)


# passes, settings


@pytest.mark.parametrize(("draw", "separate", "weight", "copies"), [
    ("balanced", False, 0.5, 2), ("all", False, 0.5, 5), ("all", True, 0.5, 5), ("all", True, 0.0, 1),
])
def test_passes(draw, separate, weight, copies):
    game, x, y = make(draw=draw, separate=separate, weight=weight)
    optimizers = {"network": torch.optim.SGD(game.network.parameters(), 0.1)}
    with count_passes(game.encoder) as passes: play(game, Views(image=x, labels=y), optimizers)
    assert passes.units(len(x)) == units(Tuning(steps=STEPS), weight, draw) == copies * (2 * STEPS + 3)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 9), st.integers(0, 10), st.integers(1, 9), st.integers(0, 10), st.sampled_from(["half", "minmax"]),
    st.sampled_from([0.1, 0.25, 1.0]),
)
def test_same_passes_are_never_more(pre_epochs, pre_steps, epochs, steps, form, labels):
    run = Config("adv-rotation", epochs=pre_epochs, settings={"steps": pre_steps, "form": form})
    recipe = Tuning(epochs=epochs, steps=steps, heldout=0.2, labels=labels)
    fit = 1000 * labels * 0.8
    budget = 1000 * pre_epochs * (2 * pre_steps + (6 if form == "half" else 3)) + fit * epochs * (2 * steps + 3)
    for weight, draw, copies in ((0.5, "balanced", 2), (0.5, "all", 5), (0.0, "all", 1)):
        each = fit * copies * (2 * steps + 3)
        if each > budget: continue
        found, share = same_passes(run, recipe, 1000, weight=weight, draw=draw)
        assert replace(found, epochs=epochs) == recipe and found.epochs * each <= budget + 1e-6 < (found.epochs + 1) * each + 2e-6
        assert share == pytest.approx(found.epochs * each / budget)
    assert same_passes(None, recipe, 1000, weight=0.0)[0] == recipe


def test_it_is_no_method_of_the_suite():
    assert not any(issubclass(cls, FineTune) or "auxiliary" in key for key, cls in methods().items())


@pytest.mark.parametrize(("wrong", "message"), [
    ({"weight": -0.1}, "must be >= 0"), ({"tuning": Tuning(loss="trades")}, "use loss='ce'"), ({"draw": "some"}, "draw must be one of"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)
    with pytest.raises(ValueError, match="adversarial pretext task"): same_passes(Config("simclr"), QUICK, 100)
    with pytest.raises(ValueError, match="less than one epoch"): same_passes(None, replace(QUICK, epochs=1), 100)
