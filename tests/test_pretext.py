"Rotation, Jigsaw and Selfie with and without their adversary: limits, the attack's contract, the step written out a second time, mutants."
import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from common import ORDER, seeded, seeds, signs, snapshot, start_zero, untouched, written_cross_entropy, written_logits, written_question
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advssl.attack import frozen
from advssl.encoders import make_encoder
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.jigsaw import AdvJigsaw, Jigsaw, far_orders, force_identity, hamming, random_orders, shuffle
from advssl.methods.rotation import AdvRotation, Rotation, rotate
from advssl.methods.selfie import AdvSelfie, Selfie, early_stages
from advssl.pretext import Adversarial, Pretext, patch_side

examples = settings(max_examples=25, deadline=None)
TASKS = {"rotation": (Rotation, AdvRotation), "jigsaw": (Jigsaw, AdvJigsaw), "selfie": (Selfie, AdvSelfie)}
ADVERSARIAL = [adversarial for _, adversarial in TASKS.values()]
SIZES = {Rotation: {}, Jigsaw: {"grid": 2, "classes": 6}, Selfie: {"grid": 3, "masked": 3, "dim": 8, "heads": 2}}
sides = {Rotation: 4, Jigsaw: 4, Selfie: 12}
tasks = st.sampled_from(ADVERSARIAL)


def base_of(cls): return next(base for base in SIZES if issubclass(cls, base))


def make(cls, seed=0, dtype=torch.float64, n=5, **options):
    "A method with BatchNorm statistics unlike those of any batch, in training mode, and images."
    torch.manual_seed(seed)
    base = base_of(cls)
    if base is Selfie: encoder = make_encoder("small_convnet")
    else:
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Tanh())
        encoder.out_dim = 12
    method = cls(encoder, **SIZES[base] | options).to(dtype)
    side = sides[base]
    with torch.no_grad():
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    method.generator = seeded(seed)
    return method, torch.rand(n, 1, side, side, dtype=dtype)


def optimizers(method, lr=0.1): return {"network": torch.optim.SGD(method.network.parameters(), lr)}


def turn(method, x):
    (one,) = list(method.turns(Views(weak=x)))
    return one


def watched(method):
    "What is counted: the encoder, or of Selfie its first convolution; and how many patches an image is for it."
    return (method.encoder.backbone.layers[0], method.grid**2) if isinstance(method, Selfie) else (method.encoder, 1)


# a second implementation, with loops


def written_step(method, x, labels, order, eps, alpha, steps, sign):
    "The adversary from a zero start and the half-half objective, image by image."
    q = torch.stack([written_question(method, image, label if label.ndim == 0 else 0) for image, label in zip(x, labels, strict=True)])
    method.eval()
    moved = q
    for _ in range(steps):
        leaf = moved.clone().requires_grad_()
        (g,) = torch.autograd.grad(written_cross_entropy(written_logits(method, leaf, order), labels), leaf)
        moved = torch.maximum(torch.minimum(moved + sign * alpha * g.sign(), q + eps), q - eps).clamp(0, 1)
    method.train()
    clean, attacked = (written_cross_entropy(written_logits(method, t, order), labels) for t in (q, moved))
    objective = (clean + attacked) / 2
    return q, moved, objective, torch.autograd.grad(objective, list(method.parameters()), allow_unused=True)


HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04}


def agrees(cls, sign=1, **options):
    "Whether a method's question, attack, objective, gradients, traces and statistics are those of `written_step`."
    ours, x = make(cls, sign=sign, **HOW | options)
    theirs = make(next(a for a in ADVERSARIAL if issubclass(cls, a)), sign=sign, **HOW | options)[0]
    start_zero(ours)
    drawn = copy.deepcopy(ours.generator.get_state())
    questions, labels, *choices = ours.task(x)
    order = choices[0] if choices else None
    q, moved, objective, grads = written_step(theirs, x, labels, order, HOW["eps"], HOW["step_size"], HOW["steps"], sign)
    before = snapshot(ours)
    found = ours.attack(questions, labels, *choices)
    traces = (
        not found.requires_grad and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None and p.requires_grad for p in ours.parameters()) and all(m.training for m in ours.modules())
    )
    ours.generator.set_state(drawn)
    value, player = turn(ours, x)
    own = torch.autograd.grad(value, list(ours.parameters()), allow_unused=True)
    same = lambda a, b: (a is None and b is None) or (a is not None and b is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-10))
    return (
        traces and player.sign == -1 and torch.equal(questions, q) and same(found, moved) and same(value, objective)
        and all(same(a, b) for a, b in zip(own, grads, strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cls", ADVERSARIAL)
def test_the_step_is_the_written_one(cls, sign): assert agrees(cls, sign)


class FlippedSign(Adversarial):
    def oppose(self, norm, eps, steps, step_size, sign, *rest): super().oppose(norm, eps, steps, step_size, -sign, *rest)


class AttackInTrainMode(Adversarial):
    def oppose(self, *args): super().oppose(*args[:-1], True)


class AttackWithoutFreezing(Adversarial):
    def attack(self, x, labels, *choices):
        self.eval()
        return self.player.find(lambda t: self.losses(self.logits(t, *choices), labels), x)


class GraphKept(Adversarial):
    def attack(self, *question): return super().attack(*question).requires_grad_()


class NoAttack(Adversarial):
    def attack(self, x, *rest): return x


class AttackedOnly(Adversarial):
    def oppose(self, *args): super().oppose(*args[:-2], "minmax", args[-1])


class CleanOnly(Adversarial):
    def objective(self, *question): return Pretext.objective(self, *question)


class SumOfBoth(Adversarial):
    def objective(self, *question): return 2 * super().objective(*question)


class OneBatch(Adversarial):
    def objective(self, x, labels, *choices):
        x_adv = self.attack(x, labels, *choices)
        return self.ask("accuracy", torch.cat([x, x_adv]), torch.cat([labels, labels]), *[torch.cat([c, c]) for c in choices])


class WrongAnswerAttacked(Adversarial):
    def attack(self, x, labels, *choices): return super().attack(x, labels.roll(1, -1), *choices)


class TermTooMany(Adversarial):
    def objective(self, x, labels, *choices):
        half = super().objective(x, labels, *choices)
        return half + 0.1 * self.ask("again", x, labels.roll(1, 0) if labels.ndim == 1 else labels.roll(1, 1), *choices)


@pytest.mark.parametrize("cls", [AdvRotation, AdvSelfie])
@pytest.mark.parametrize("fault", [
    FlippedSign, AttackInTrainMode, AttackWithoutFreezing, GraphKept, NoAttack, AttackedOnly, CleanOnly, SumOfBoth, OneBatch,
    WrongAnswerAttacked, TermTooMany,
])
def test_mutants_of_the_game_are_rejected(cls, fault):
    assert not agrees(type(fault.__name__, (fault, cls), {}))


class Clockwise(AdvRotation):
    def task(self, x):
        _, r = super().task(x)
        return rotate(x, (4 - r) % 4), r


class LabelOfTheNext(AdvRotation):
    def losses(self, logits, labels): return super().losses(logits, (labels + 1) % 4)


class Scattered(AdvJigsaw):
    def task(self, x):
        _, c = super().task(x)
        return shuffle(x, self.orders.argsort(1)[c], self.grid), c


class WithoutTheIdentity(AdvJigsaw):
    def task(self, x):
        _, c = super().task(x)
        return shuffle(x, self.orders[c.clamp(min=1)], self.grid), c


class DoubleSoftmax(AdvSelfie):
    def __init__(self, *args, **options): super().__init__(*args, **options | {"upstream": True})


class BlindToThePlace(AdvSelfie):
    def logits(self, x, order):
        choice, position = self.choice, self.choice.position
        query = choice(self.features(x), order[:, : self.masked], order[:, self.masked :])
        h = choice.embed(self.features(x)).take_along_dim(order[:, : self.masked, None], 1)
        return query - position[order[:, : self.masked]] @ h.transpose(1, 2) / 8**0.5

    def features(self, x):
        kept = {}
        hook = self.choice.register_forward_pre_hook(lambda _, args: kept.update(f=args[0]))
        AdvSelfie.logits(self, x, torch.arange(9).expand(len(x), -1))
        hook.remove()
        return kept["f"]


class SeesTheHidden(AdvSelfie):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.choice.register_forward_pre_hook(lambda _, args: (args[0], args[1], torch.cat([args[1], args[2]], 1)))


class NoScale(AdvSelfie):
    def logits(self, *question): return super().logits(*question) * 8**0.5


class AllStages(AdvSelfie):
    @property
    def stages(self): return nn.Sequential(*super().stages, nn.ReLU(), nn.Hardtanh(0, 0.2))


@pytest.mark.parametrize("mutant", [
    Clockwise, LabelOfTheNext, Scattered, WithoutTheIdentity, DoubleSoftmax, BlindToThePlace, SeesTheHidden, NoScale, AllStages,
])
def test_mutants_of_the_tasks_are_rejected(mutant): assert not agrees(mutant)


def test_each_order_of_a_jigsaw_is_another():
    "Random ones may coincide, and then two labels would name one question."
    for cls in (Jigsaw, AdvJigsaw):
        with pytest.raises(ValueError, match="two of the 24 orders are equal"): make(cls, grid=2, classes=24, upstream=True)
        assert len(make(cls, grid=4, classes=31, upstream=True)[0].orders.unique(dim=0)) == 31


# limits


@examples
@given(tasks, seeds, st.integers(0, 2), signs, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from(["half", "minmax"]), st.booleans())
def test_without_a_ball_it_is_the_standard_form(cls, seed, steps, sign, norm, form, batch_statistics):
    how = {"norm": norm, "steps": steps, "sign": sign, "form": form, "batch_statistics": batch_statistics}
    game, x = make(cls, seed, eps=0.0, **how)
    plain, _ = make(base_of(cls), seed)
    question = plain.task(x)
    assert torch.equal(game.attack(*question), question[0])
    assert torch.equal(game.objective(*question), plain.objective(*question))
    stopped = start_zero(make(cls, seed, eps=0.1, **how | {"steps": 0})[0])
    assert torch.equal(stopped.objective(*question), plain.objective(*question))


@pytest.mark.parametrize(("plain", "adversarial"), TASKS.values(), ids=TASKS)
def test_a_run_without_steps_is_the_standard_run(plain, adversarial):
    "The same questions, the same weights after three steps; only the running statistics have moved twice as often."
    one, x = make(plain)
    two = start_zero(make(adversarial, steps=0)[0])
    for _ in range(3):
        for method in (one, two): play(method, Views(weak=x), optimizers(method))
    for a, b in zip(one.parameters(), two.parameters(), strict=True): assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_no_steps_leave_random_noise():
    method, x = make(AdvRotation, eps=0.1, steps=0)
    question = method.task(x)
    assert 0 < (method.attack(*question) - question[0]).abs().max() <= 0.1 + 1e-12


@examples
@given(tasks, seeds, st.sampled_from([0.01, 0.1]))
def test_half_lies_between(cls, seed, eps):
    "Clean <= half-half <= min-max <= twice half-half, with what one small step finds."
    method, x = make(cls, seed, eps=eps, steps=2, step_size=eps / 20)
    start_zero(method).eval()
    question = method.task(x)
    clean = method.losses(method.logits(question[0], *question[2:]), question[1]).mean()
    half = method.objective(*question)
    method.form = "minmax"
    worst = method.objective(*question)
    assert clean <= half <= worst <= 2 * half


@examples
@given(seeds, st.sampled_from(["linf", "l2"]), st.sampled_from([AdvRotation, AdvJigsaw]))
def test_the_attack_may_come_first(seed, norm, cls):
    "An attack on the image, then the turn or the shuffling, is the attack on the question."
    method, x = make(cls, seed, norm=norm, eps=0.2, steps=3)
    start_zero(method)
    questions, labels = method.task(x)
    act = lambda t: rotate(t, labels) if cls is AdvRotation else shuffle(t, method.orders[labels], method.grid)
    first = method.player.find(lambda t: method.losses(method.logits(act(t)), labels), x, method)
    assert torch.allclose(act(first), method.attack(questions, labels), atol=1e-12)


# the contract of the attack


@examples
@given(tasks, seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 8 / 255, 0.3]), st.integers(0, 2), signs, st.booleans(),
       st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_contract(cls, seed, norm, eps, steps, sign, training, batch_statistics, dtype):
    method, x = make(cls, seed, dtype, n=3, norm=norm, eps=eps, steps=steps, sign=sign, batch_statistics=batch_statistics)
    method.train(training)
    part = method.choice if isinstance(method, Selfie) else method.head
    part.train(not training)  # a mixed state must come back too
    next(part.parameters()).requires_grad_(False)
    with untouched(method, x): question = method.task(x)
    method.generator = seeded(seed)
    with untouched(method, *question): found = method.attack(*question)
    assert ((found - question[0]).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
    assert found.dtype == dtype and found.min() >= 0 and found.max() <= 1 and not found.requires_grad
    method.generator = seeded(seed)
    assert torch.equal(method.attack(*question), found)


@pytest.mark.parametrize("cls", ADVERSARIAL)
def test_the_sign_chooses_the_direction(cls):
    how = {"eps": 1e-5, "steps": 1, "step_size": 1e-5}
    (up, x), (down, _) = (make(cls, sign=s, **how) for s in (1, -1))
    question = up.task(0.1 + 0.8 * x)
    higher, lower = (start_zero(m).attack(*question) for m in (up, down))
    assert torch.allclose(higher - question[0], question[0] - lower, atol=1e-12)
    up.eval()
    loss = lambda t: up.losses(up.logits(t, *question[2:]), question[1]).sum().item()
    assert loss(lower) < loss(question[0]) < loss(higher)


@pytest.mark.parametrize("cls", ADVERSARIAL)
def test_each_question_is_attacked_on_its_own(cls):
    "In evaluation mode, whoever sits beside it; with batch statistics the neighbours matter."
    method, x = make(cls, eps=0.1, steps=2)
    question = start_zero(method).task(x)
    alone = [t[:2] for t in question]
    assert torch.allclose(method.attack(*question)[:2], method.attack(*alone), atol=1e-12)
    method.batch_statistics = True
    assert not torch.allclose(method.attack(*question)[:2], method.attack(*alone), atol=1e-12)


@pytest.mark.parametrize("form", ["half", "minmax"])
@pytest.mark.parametrize("cls", ADVERSARIAL)
def test_passes(cls, form):
    for steps in (0, 2):
        method, x = make(cls, eps=0.1, steps=steps, form=form)
        where, share = watched(method)
        with count_passes(where) as passes: play(method, Views(weak=x), optimizers(method))
        assert passes.units(share * len(x)) == 2 * steps + (6 if form == "half" else 3)
        question = method.task(x)
        with count_passes(where) as passes: method.attack(*question)
        assert (passes.forward, passes.backward_input, passes.backward_weight) == (steps * share * len(x), steps * share * len(x), 0)
    plain, x = make(base_of(cls))
    where, share = watched(plain)
    with count_passes(where) as passes: play(plain, Views(weak=x), optimizers(plain))
    assert passes.units(share * len(x)) == 3


@pytest.mark.parametrize("cls", [*ADVERSARIAL, Rotation, Jigsaw, Selfie])
def test_autocast_trains_every_weight_of_the_network(cls):
    method, x = make(cls, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16): value, player = turn(method, x)
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.isfinite().all() for p in player.parameters())
    assert set(method.logs) == ({"accuracy", "attacked_accuracy"} if issubclass(cls, Adversarial) else {"accuracy"})
    assert all(0 <= v <= 1 and not v.requires_grad for v in method.logs.values())
    assert method.evaluated() is method.encoder


# Rotation


@examples
@given(st.integers(1, 40), seeds)
def test_turns(n, seed):
    for draw in ("balanced", "independent"):
        method, _ = make(Rotation, draw=draw)
        method.generator = seeded(seed)
        r = method.turns_of(n, torch.device("cpu"))
        assert r.shape == (n,) and r.min() >= 0 and r.max() <= 3
        if draw == "balanced": assert r.bincount(minlength=4).max() <= n // 4 + 1
    method, x = make(Rotation, n=3, draw="all")
    questions, r = method.task(x)
    assert r.tolist() == [0, 1, 2, 3] * 3 and torch.equal(questions[::4], x)
    for i, question in enumerate(questions): assert torch.equal(question, torch.rot90(x[i // 4], i % 4, (1, 2)))


def test_turns_follow_the_generator():
    (a, x), (b, _) = make(Rotation, seed=4), make(Rotation, seed=4)
    torch.manual_seed(1)
    first = a.task(x)
    torch.manual_seed(2)
    assert all(torch.equal(s, t) for s, t in zip(first, b.task(x), strict=True))


# Jigsaw


def written_orders(count, patches, seed, pool):
    "The greedy choice with loops and a lexicographic comparison."
    generator, chosen = seeded(seed), [list(range(patches))]
    while len(chosen) < count:
        best = None
        for candidate in random_orders(pool, patches, generator).tolist():
            distances = [sum(a != b for a, b in zip(candidate, other, strict=True)) for other in chosen]
            if best is None or (min(distances), sum(distances)) > best[0]: best = (min(distances), sum(distances)), candidate
        chosen.append(best[1])
    return torch.tensor(chosen)


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 6), st.sampled_from([9, 16]), seeds)
def test_far_orders(count, patches, seed):
    orders = far_orders(count, patches, seed, pool=30)
    assert torch.equal(orders, written_orders(count, patches, seed, pool=30))
    assert torch.equal(orders, far_orders(count, patches, seed, pool=30))
    assert (orders.sort(1).values == torch.arange(patches)).all()
    apart = hamming(orders, orders)
    assert (apart.diagonal() == 0).all() and torch.equal(apart, apart.T)
    assert (apart[~torch.eye(count, dtype=bool)] >= 2).all()  # never 0, never 1


def test_far_orders_are_farther_than_random_ones():
    smallest = lambda orders: hamming(orders, orders)[~torch.eye(31, dtype=bool)].min()
    for seed in (0, 1):
        rival = torch.cat([torch.arange(16)[None], random_orders(30, 16, seeded(seed))])
        assert smallest(far_orders(31, 16, seed)) == 14 > smallest(rival)


def test_orders_are_part_of_the_checkpoint():
    one, two = make(Jigsaw, order_seed=0, grid=4, classes=9)[0], make(Jigsaw, order_seed=1, grid=4, classes=9)[0]
    assert not torch.equal(one.orders, two.orders)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.orders, two.orders) and two.orders.dtype == torch.int64
    again = make(Jigsaw, seed=5, order_seed=0, grid=4, classes=9)[0]
    assert torch.equal(one.orders, again.orders)  # the run's seed has no say


def test_official_labels():
    assert force_identity(torch.tensor([1, 2, 3]), torch.tensor([0.89, 0.9, 0.91]), 0.9).tolist() == [1, 2, 0]
    for upstream, share in ((False, 1 / 6), (True, 0.1 + 0.9 / 6)):
        method, _ = make(Jigsaw, upstream=upstream)
        drawn = method.task(torch.zeros(20000, 1, 4, 4))[1].bincount(minlength=6) / 20000
        assert abs(drawn[0] - share) < 0.015 and (drawn[1:] - (1 - share) / 5).abs().max() < 0.015


# Selfie


def test_the_last_stage_stays_as_drawn():
    method, x = make(AdvSelfie)
    before = snapshot(method)
    rates = {"network": torch.optim.AdamW(method.network.parameters(), 1e-2, weight_decay=0.5)}
    for _ in range(2): play(method, Views(weak=x), rates)
    moved = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    last = {k for k in before if k.startswith(("encoder.backbone.layers.12", "encoder.backbone.layers.13"))}
    assert last and not moved & last and {k for k in before if "layers" in k and k not in last} <= moved
    assert {"choice.ask", "choice.position"} <= moved


def test_stages_are_the_encoders_own():
    encoder = make_encoder("resnet18", 3, 32)
    assert {id(p) for p in early_stages(encoder).parameters()} <= {id(p) for p in encoder.parameters()}
    keys = Selfie(encoder).state_dict()
    assert not any(k.startswith("stages") for k in keys)
    with torch.no_grad(), frozen(encoder):
        x = torch.rand(2, 3, 32, 32)
        whole = encoder.backbone.layer4(early_stages(encoder)(x)).mean((2, 3))
        assert torch.allclose(whole, encoder(x), atol=1e-5)
    small = make_encoder("small_convnet")
    with torch.no_grad(), frozen(small):
        x = torch.rand(2, 1, 28, 28)
        h = small.backbone.layers[-4:](early_stages(small)(x))
        assert torch.equal(h.mean((2, 3)) + h.amax((2, 3)), small(x))


@examples
@given(seeds)
def test_sets_have_no_order(seed):
    method, x = make(Selfie, seed)
    method.eval()
    _, _, order = method.task(x)
    a = method.logits(x, order)
    swap, rest = torch.randperm(3, generator=seeded(seed)), 3 + torch.randperm(6, generator=seeded(seed))
    assert torch.allclose(method.logits(x, order[:, torch.cat([swap, rest])]), a[:, swap][:, :, swap], atol=1e-12)
    assert (order.sort(1).values == torch.arange(9)).all()


@examples
@given(seeds, st.integers(2, 9), st.sampled_from([0.1, 1.0, 30.0]))
def test_double_softmax(seed, m, scale):
    "Its value, its bounds, and a gradient that is never larger than the single one's."
    method, _ = make(Selfie, upstream=True)
    a = (scale * torch.randn(4, 3, m, generator=seeded(seed), dtype=torch.float64)).requires_grad_()
    labels = torch.randint(m, (4, 3), generator=seeded(seed))
    value = method.losses(a, labels)
    expected = torch.stack([F.cross_entropy(rows.softmax(1), y) for rows, y in zip(a, labels, strict=True)])
    top = math.log(math.e + m - 1)
    assert torch.allclose(value, expected) and (value <= top + 1e-12).all() and (value >= top - 1 - 1e-12).all()
    double, single = (torch.autograd.grad(net.losses(a, labels).sum(), a)[0].norm(dim=-1) for net in (method, make(Selfie)[0]))
    assert (double <= single + 1e-12).all()


# settings, cards, recipes


@pytest.mark.parametrize(("cls", "wrong", "message"), [
    *[(cls, wrong, message) for cls in ADVERSARIAL for wrong, message in (
        ({"form": "both"}, "form must be 'half'"), ({"sign": 0}, r"\+1 \(adversary\) or -1"),
        ({"steps": -1}, "steps must be a whole number"), ({"norm": "l3"}, "unknown norm"), ({"eps": -0.1}, "eps"),
    )],
    (Rotation, {"draw": "some"}, "draw must be one of"), (Jigsaw, {"classes": 1}, "at least 2"), (Jigsaw, {"grid": 1}, "at least 2"),
    (Jigsaw, {"classes": 30}, "fewer classes"), (Selfie, {"masked": 1}, "from 2 to 8"), (Selfie, {"masked": 9}, "from 2 to 8"),
    (Selfie, {"dim": 6}, "multiple of 4"), (Selfie, {"dim": 8, "heads": 3}, "multiple of 4"),
])
def test_wrong_settings(cls, wrong, message):
    with pytest.raises(ValueError, match=message): make(cls, **wrong)


def test_images_that_do_not_fit():
    with pytest.raises(ValueError, match="choose grid among 2, 4, 7, 14"): patch_side(torch.rand(1, 1, 28, 28), 3)
    with pytest.raises(ValueError, match="choose grid among none"): patch_side(torch.rand(1, 1, 7, 7), 3)
    with pytest.raises(ValueError, match="square images"): rotate(torch.rand(1, 1, 4, 6), torch.tensor([1]))
    images = lambda side: torch.rand(5, 1, side, side, dtype=torch.float64)
    for cls in (Jigsaw, Selfie):
        with pytest.raises(ValueError, match="does not fit images of 13 pixels"): turn(make(cls)[0], images(13))
    with pytest.raises(ValueError, match="coarser grid than 3"): turn(make(Selfie)[0], images(9))
    with pytest.raises(ValueError, match="use small_convnet or a timm ResNet"): Selfie(make_encoder("vit_demo"))


@pytest.mark.parametrize(("plain", "adversarial"), TASKS.values(), ids=TASKS)
def test_cards(plain, adversarial):
    name = plain.card.name
    assert get_method(name) is methods()[name.lower()] is plain
    assert get_method(f"Adv-{name}") is methods()[f"adv-{name.lower()}"] is adversarial
    for cls, sign, kind, level in ((plain, 0, "", ""), (adversarial, 1, "memory-free", "input")):
        assert (cls.card.sign, cls.card.type, cls.card.level, cls.card.tables) == (sign, kind, level, ())
    player = {"norm": "linf", "eps": 8 / 255, "steps": 10, "step_size": 0.0, "sign": 1, "form": "half", "batch_statistics": False}
    assert settings_of(adversarial) == player | settings_of(plain)  # nothing but the player


def test_the_player_is_the_librarys():
    method, _ = make(AdvRotation, step_size=0.01)
    assert (method.player.steps, method.player.step_size, method.player.start, method.player.threat.eps) == (10, 0.01, "random", 8 / 255)
    assert replace(method.player, start="zero").find(lambda t: t.sum((1, 2, 3)), torch.zeros(1, 1, 2, 2)).max() > 0
