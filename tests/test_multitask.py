"Three tasks on one encoder: limits, the contract of the attack, the step written out with loops, the sign of the diversity, mutants."

import copy
from dataclasses import replace

import pytest
import torch
from common import seeded, seeds, signs, snapshot, untouched, written_cross_entropy, written_logits, written_question
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from advssl.encoders import make_encoder
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.jigsaw import AdvJigsaw, shuffle
from advssl.methods.multitask import TASKS, MultiTask
from advssl.methods.rotation import AdvRotation, rotate
from advssl.pretext import Pretext

SIZES = {"grid": 3, "masked": 3, "dim": 8, "heads": 2, "classes": 6}
HOW = {"eps": 0.1, "steps": 2, "step_size": 0.04}


def make(cls=MultiTask, seed=0, dtype=torch.float64, n=2, **options):
    "A method with BatchNorm statistics unlike those of any batch, in training mode, and images."
    torch.manual_seed(seed)
    method = cls(make_encoder("small_convnet"), **SIZES | options).to(dtype)
    with torch.no_grad():
        for module in method.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    method.generator = seeded(seed)
    return method, torch.rand(n, 1, 12, 12, dtype=dtype)


def from_zero(method):
    for task in method.tasks.values(): task.player = replace(task.player, start="zero")
    return method


def turn(method, x):
    (one,) = list(method.turns(Views(weak=x)))
    return one


def optimizers(method, lr=0.1): return {"network": torch.optim.SGD(method.network.parameters(), lr)}


def draw(method, x):
    "What each task draws, with the random numbers that its attack takes in between left out."
    asked = []
    for task in method.tasks.values():
        task.generator = method.generator
        _, labels, *choices = task.task(x)
        asked.append((task, labels, choices))
    return asked


# a second implementation, with loops


def undone(task, labels, g):
    "The inverse of what a task did to the pixels, image by image."
    if isinstance(task, AdvRotation): one = lambda image, r: torch.rot90(image, -int(r), (1, 2))
    elif isinstance(task, AdvJigsaw): one = lambda image, c: shuffle(image[None], task.orders[int(c)].argsort()[None], task.grid)[0]
    else: return g
    return torch.stack([one(image, label) for image, label in zip(g, labels, strict=True)])


def written_diversity(gradients):
    "Mean over images of log det of the Gram matrix, by the formula of Sarrus."
    total = 0.0
    for rows in zip(*gradients, strict=True):
        u = [g.flatten() / g.norm() for g in rows]
        (a, b, c), (d, e, f), (p, q, r) = [[ui @ uj + 1e-5 * (i == j) for j, uj in enumerate(u)] for i, ui in enumerate(u)]
        total = total + (a * e * r + b * f * p + c * d * q - c * e * p - b * d * r - a * f * q).log()
    return total / len(gradients[0])


def written_value(asked, x, moved, frame):
    "Losses of the tasks and their diversity at given places."
    loss = lambda task, labels, choices, t: written_cross_entropy(written_logits(task, t, *(choices or [None])), labels)
    losses = [loss(*one, t) for one, t in zip(asked, moved, strict=True)]
    grads = [torch.autograd.grad(loss, t, create_graph=True)[0] for loss, t in zip(losses, moved, strict=True)]
    if frame == "image": grads = [undone(task, labels, g) for (task, labels, _), g in zip(asked, grads, strict=True)]
    return losses, written_diversity(grads)


def written_step(method, x, asked, weight, sigma, frame, kappa):
    "Questions, attack from a zero start and objective."
    with sdpa_kernel(SDPBackend.MATH):
        questions = [
            torch.stack([written_question(task, image, label if label.ndim == 0 else 0) for image, label in zip(x, labels, strict=True)])
            for task, labels, _ in asked
        ]
        method.eval()
        moved = questions
        for _ in range(HOW["steps"]):
            leaves = [t.detach().clone().requires_grad_() for t in moved]
            losses, D = written_value(asked, x, leaves, frame)
            grads = torch.autograd.grad(sum(losses) + sigma * kappa * D, leaves)  # means over images: the same direction
            moved = [
                torch.maximum(torch.minimum(t + HOW["step_size"] * g.sign(), q + HOW["eps"]), q - HOW["eps"]).clamp(0, 1).detach()
                for t, g, q in zip(leaves, grads, questions, strict=True)
            ]
        method.train()
        moved, total = [t.requires_grad_() for t in moved], 0.0
        attacked = []
        for (task, labels, choices), q, t in zip(asked, questions, moved, strict=True):  # in this order, for BatchNorm's averages
            total = total + written_cross_entropy(written_logits(task, q, *(choices or [None])), labels) / 6
            attacked.append(written_cross_entropy(written_logits(task, t, *(choices or [None])), labels))
        grads = [torch.autograd.grad(loss, t, create_graph=True)[0] for loss, t in zip(attacked, moved, strict=True)]
        if frame == "image": grads = [undone(task, labels, g) for (task, labels, _), g in zip(asked, grads, strict=True)]
        D = written_diversity(grads)
        return moved, total + sum(attacked) / 6 + sigma * weight * D, D


def agrees(cls, term="diverse", frame="image", seen=0.0, weight=0.7):
    "Whether a method's move, objective, gradients, traces and statistics are those of `written_step`."
    options = {"term": term, "frame": frame, "seen": seen, "weight": weight} | HOW
    ours, x = make(cls, **options)
    theirs = make(MultiTask, **options)[0]
    from_zero(ours)
    drawn = draw(theirs, x)
    moved, objective, D = written_step(theirs, x, drawn, weight, {"diverse": -1, "upstream": 1}[term], frame, seen)
    grads = torch.autograd.grad(objective, theirs.network.parameters(), allow_unused=True)
    before = snapshot(ours)
    state = ours.generator.get_state()
    found = ours.questions(x.clone().requires_grad_())
    traces = (
        all(not one.moved.requires_grad for one in found)
        and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None and p.requires_grad for p in ours.parameters()) and all(m.training for m in ours.modules())
    )
    ours.generator.set_state(state)
    value, player = turn(ours, x)
    own = torch.autograd.grad(value, player.parameters(), allow_unused=True)
    close = lambda a, b: torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    same = lambda a, b: a is b if a is None or b is None else close(a, b)
    return (
        traces and player.sign == -1 and same(value, objective)
        and all(same(one.moved, t) for one, t in zip(found, moved, strict=True))
        and all(same(a, b) for a, b in zip(own, grads, strict=True)) and same(ours.logs["diversity"], D)
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("seen", [0.0, 0.6])
@pytest.mark.parametrize("term", ["diverse", "upstream"])
@pytest.mark.parametrize("frame", ["image", "question"])
def test_the_step_is_the_written_one(term, frame, seen): assert agrees(MultiTask, term, frame, seen)


class WrongSign(MultiTask):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sigma = -self.sigma


class WrongFrame(MultiTask):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.frame = {"image": "question", "question": "image"}[self.frame]


class TurnedTwice(MultiTask):
    def diversity(self, losses, moved, asked, x):
        asked = [one._replace(x=rotate(one.x, one.labels)) if isinstance(one.task, AdvRotation) else one for one in asked]
        return super().diversity(losses, moved, asked, x)


class CleanGradients(MultiTask):
    def diversity(self, losses, moved, asked, x):
        clean = [one.x.detach().requires_grad_() for one in asked]
        losses = [one.task.losses(one.task.logits(t, *one.choices), one.labels).sum() for one, t in zip(asked, clean, strict=True)]
        return super().diversity(losses, clean, asked, x)


class NoSecondDerivative(MultiTask):
    def diversity(self, *args):
        D, G = super().diversity(*args)
        return D.detach().requires_grad_(), G


class ForgottenTask(MultiTask):
    def turns(self, views):
        whole = self.tasks
        self.tasks = nn.ModuleDict({k: whole[k] for k in ("selfie", "rotation")})
        yield from super().turns(views)
        self.tasks = whole


class SumOfTasks(MultiTask):
    def loss(self, one): return 3 * super().loss(one)


class AttackedOnly(MultiTask):
    def loss(self, one): return one.task.ask("attacked_accuracy", one.moved, one.labels, *one.choices)


class CleanOnly(MultiTask):
    def loss(self, one):
        super().loss(one)  # for BatchNorm's averages
        return Pretext.objective(one.task, one.moved, one.labels, *one.choices)


class Unmoved(MultiTask):
    def questions(self, x): return [one._replace(moved=one.x.detach()) for one in super().questions(x)]


class SelfieTwice(MultiTask):
    def loss(self, one): return (2 if one.task is self.tasks["selfie"] else 1) * super().loss(one)


class Leaky(MultiTask):
    def questions(self, x):
        self.eval()
        return super().questions(x)


FAULTS = [
    WrongSign, WrongFrame, TurnedTwice, CleanGradients, NoSecondDerivative, ForgottenTask, SumOfTasks, AttackedOnly, CleanOnly, Unmoved,
    SelfieTwice, Leaky,
]


def rejected(*args):
    try: return not agrees(*args)
    except (RuntimeError, ValueError): return True


@pytest.mark.parametrize("fault", FAULTS)
def test_mutants_of_the_step_are_rejected(fault): assert rejected(fault)


class Blind(MultiTask):
    def joint_attack(self, asked, x): return [one.task.attack(one.x.detach(), one.labels, *one.choices) for one in asked]


class PlayerLikesDiversity(MultiTask):
    def joint_attack(self, asked, x):
        self.sigma = -self.sigma
        found = super().joint_attack(asked, x)
        self.sigma = -self.sigma
        return found


class OneBall(MultiTask):
    def joint_attack(self, asked, x): return [super().joint_attack(asked, x)[0]] * 3


class HalfSeen(MultiTask):
    def joint_attack(self, asked, x):
        self.seen, kept = self.seen * 1e-6, self.seen
        found = super().joint_attack(asked, x)
        self.seen = kept
        return found


@pytest.mark.parametrize("fault", [Blind, PlayerLikesDiversity, OneBall, HalfSeen])
def test_mutants_of_the_seeing_player_are_rejected(fault): assert rejected(fault, "diverse", "image", 5.0)


def test_a_player_who_sees_much(): assert agrees(MultiTask, "diverse", "image", 5.0)


# limits


@settings(max_examples=4, deadline=None)
@given(seeds, signs, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from(["half", "minmax"]), st.booleans())
def test_without_weight_it_is_the_mean_of_three_methods(seed, sign, norm, form, batch_statistics):
    how = {"sign": sign, "norm": norm, "form": form, "batch_statistics": batch_statistics, "steps": 1, "eps": 0.1}
    (game, x), (apart, _) = (make(seed=seed, weight=0.0, **how) for _ in range(2))
    questions = []
    for task in apart.tasks.values():
        task.generator = apart.generator
        questions.append(question := task.task(x))
        found = task.attack(*question)  # all players move before the first step shifts a BatchNorm statistic
        task.attack = lambda *_, found=found: found
    expected = sum(task.objective(*question) for task, question in zip(apart.tasks.values(), questions, strict=True)) / 3
    value, player = turn(game, x)
    assert torch.equal(value, expected) and torch.equal(game.generator.get_state(), apart.generator.get_state())
    grads = [torch.autograd.grad(value, player.parameters()), torch.autograd.grad(expected, apart.network.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert all(torch.equal(v, apart.state_dict()[k]) for k, v in game.state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_one_task_alone_is_that_method(name):
    "The same weights from the same seed, and the same bits after two steps, whatever weight the diversity has."
    own = {k: v for k, v in SIZES.items() if k in settings_of(TASKS[name])}
    game, x = make(tasks=name, seen=0.5, **HOW)
    torch.manual_seed(0)
    alone = TASKS[name](make_encoder("small_convnet"), **own, **HOW).double()
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), game.parameters(), strict=True))
    alone.load_state_dict(game.tasks[name].state_dict())
    alone.generator = seeded(0)
    for _ in range(2): values = [play(method, Views(weak=x), optimizers(method)) for method in (game, alone)]
    assert torch.equal(*values) and torch.equal(game.generator.get_state(), alone.generator.get_state())
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in game.tasks[name].state_dict().items())


@pytest.mark.parametrize("how", [{"eps": 0.0}, {"steps": 0}])
@pytest.mark.parametrize("seen", [0.0, 0.6])
def test_without_a_ball_the_tasks_are_as_they_are(how, seen):
    method, x = make(seen=seen, **HOW | how)
    from_zero(method)
    asked = method.questions(x.clone().requires_grad_())
    assert all(torch.equal(one.moved, one.x) for one in asked)
    method.form = "half"
    assert all(torch.equal(method.loss(one), method.loss(one)) for one in asked[:1])
    pure = make(weight=0.0, form="minmax", **HOW | how)[0]
    half = make(weight=0.0, **HOW | how)[0]
    assert torch.allclose(turn(from_zero(half), x)[0], turn(from_zero(pure), x)[0], rtol=1e-12)


# the contract of the attack


@settings(max_examples=8, deadline=None)
@given(
    seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([8 / 255, 0.3]), st.integers(0, 1), signs, st.booleans(), st.booleans(),
    st.sampled_from([0.0, 0.6]),
)
def test_contract(seed, norm, eps, steps, sign, training, batch_statistics, seen):
    method, x = make(seed=seed, n=2, norm=norm, eps=eps, steps=steps, sign=sign, batch_statistics=batch_statistics, seen=seen)
    method.train(training)
    method.tasks["rotation"].head.train(not training)  # a mixed state must come back too
    image = x.clone().requires_grad_()
    state = method.generator.get_state()
    with untouched(method, image): asked = method.questions(image)
    threat = method.tasks["selfie"].player.threat
    for one in asked:
        delta = one.moved - one.x.detach()
        assert not one.moved.requires_grad and one.moved.min() >= 0 and one.moved.max() <= 1 and one.moved.shape == x.shape
        assert torch.allclose(threat.project(delta), delta, atol=1e-9)
    assert image.grad is None and all(p.requires_grad for p in method.parameters())
    method.generator.set_state(state)
    assert all(torch.equal(one.moved, again.moved) for one, again in zip(asked, method.questions(image), strict=True))


def test_the_balls_of_a_seeing_player_are_one_for_each_question():
    method, x = make(norm="l2", eps=0.3, steps=2, seen=0.6)
    asked = method.questions(x.clone().requires_grad_())
    lengths = torch.stack([(one.moved - one.x).flatten(1).norm(dim=1) for one in asked])
    assert (lengths <= 0.3 + 1e-9).all() and (lengths > 0.15).all()


# diversity


def test_the_sign_moves_the_diversity_in_the_derived_direction():
    "From the same weights, on questions that stay as they are."
    found = {}
    for term in ("diverse", "upstream"):
        method, x = make(n=6, term=term, weight=10.0, steps=0, eps=0.1)
        path = []
        for _ in range(8):
            method.generator.manual_seed(0)
            play(method, Views(weak=x), optimizers(method, 2e-3))
            path.append(method.logs["diversity"].item())
        found[term] = path
    assert found["diverse"][0] == found["upstream"][0]
    assert found["upstream"][-1] < found["upstream"][0] - 0.1 < found["diverse"][-1]
    assert found["diverse"][-1] > found["diverse"][0] - 0.02


def test_equal_gradients_are_seen_as_equal_in_the_image_only():
    "The same loss on the image, asked as it is and asked of the turned image: parallel gradients in one frame, not in the other."
    method, x = make(tasks="rotation jigsaw", n=3)
    x.requires_grad_()
    w = torch.randn(1, 1, 12, 12, dtype=torch.float64, generator=seeded(1))
    method.tasks["rotation"].generator = seeded(0)
    for frame, parallel in (("image", True), ("question", False)):
        method.frame = frame
        asked, moved, losses = [], [], []
        for q in (rotate(x, torch.tensor([1, 2, 3])), x * 1.0):
            place = q.detach().requires_grad_()
            back = rotate(place, torch.tensor([3, 2, 1])) if not moved else place
            asked.append(type("", (), {"x": q})()), moved.append(place), losses.append((w * back).sum())
        _, G = method.diversity(losses, moved, asked, x)
        cosine = (G[:, 0] * G[:, 1]).sum(1)
        assert (cosine > 1 - 1e-6).all() if parallel else (cosine.abs() < 0.6).all()


def test_logs_and_single_precision():
    method, x = make(dtype=torch.float32, seen=0.1, **HOW)
    value, _ = turn(method, x)
    assert torch.isfinite(value) and 0 <= method.logs["cosine"] < 1 and method.logs["diversity"] <= 3e-5
    assert {f"{name}_{which}" for name in TASKS for which in ("accuracy", "attacked_accuracy")} <= set(method.logs)


# settings, cards, passes


@pytest.mark.parametrize(("wrong", "message"), [
    ({"tasks": ""}, "tasks must name some of"), ({"tasks": "rotation rotation"}, "each once"), ({"tasks": "colour"}, "tasks must name"),
    ({"term": "minus"}, "term must be one of"), ({"frame": "patch"}, "frame must be one of"), ({"weight": -0.1}, "must be >= 0"),
    ({"seen": -1.0}, "must be >= 0"), ({"form": "both"}, "form must be 'half'"), ({"sign": 0}, r"\+1 \(adversary\) or -1"),
    ({"norm": "l3"}, "unknown norm"), ({"steps": -1}, "steps must be a whole number"), ({"masked": 1}, "from 2 to 8"),
])
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message): make(**wrong)


def test_card():
    card = MultiTask.card
    assert get_method("Multi-Task") is methods()["multi-task"] is MultiTask
    assert (card.sign, card.type, card.level, card.combined, card.tables) == (1, "memory-free", "input", "yes", ())
    for cls in TASKS.values():  # the tasks' settings have their defaults
        shared = set(settings_of(cls)) & set(settings_of(MultiTask))
        assert {k: settings_of(MultiTask)[k] for k in shared} == {k: settings_of(cls)[k] for k in shared}


def test_official_tasks():
    method, _ = make(upstream_tasks=True)
    assert method.tasks["selfie"].upstream and method.tasks["jigsaw"].bias == 0.9 and not make()[0].tasks["selfie"].upstream


def test_one_encoder():
    method, _ = make()
    assert all(task.encoder is method.encoder for task in method.tasks.values()) and method.evaluated() is method.encoder
    parameters = method.network.parameters()
    assert len({id(p) for p in parameters}) == len(parameters) == len(list(method.parameters()))
    twin = copy.deepcopy(method)
    assert twin.tasks["jigsaw"].encoder is twin.encoder
    selfie = make(tasks="selfie")[0]
    assert len(selfie.network.parameters()) < len(list(selfie.parameters()))  # the last stage stays as drawn


@pytest.mark.parametrize(("options", "units"), [
    ({"weight": 0.0}, 2 * 2 + 6), ({}, 2 * 2 + 6 + 2), ({"weight": 0.0, "form": "minmax"}, 2 * 2 + 3),
])
def test_passes(options, units):
    "Of Rotation and Jigsaw, by hooks; these take the first gradient of the term for a whole backward pass and do not see the second."
    method, x = make(tasks="rotation jigsaw", **HOW | options)
    with count_passes(method.encoder) as passes: play(method, Views(weak=x), optimizers(method))
    assert passes.units(2 * len(x)) == units
