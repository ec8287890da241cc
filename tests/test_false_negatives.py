"ARoCL and AACL: limits, the detection, both steps written out a second time, and mutants that the same checks must reject."
import math

import pytest
import torch
from common import ORDER, make_contrastive, seeded, seeds, signs, start_zero, untouched
from hypothesis import given, settings
from hypothesis import strategies as st

from advssl.contrast import nt_xent
from advssl.encoders import branch
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.method import settings as settings_of
from advssl.methods.acl import ACL
from advssl.methods.false_negatives import AACL, ARoCL, FalseNegatives, most_similar, precision_recall, same_class
from advssl.methods.rocl import RoCL
from advssl.pretrain import Run
from advssl.suite.scales import resolve

examples = settings(max_examples=25, deadline=None)
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
both = pytest.mark.parametrize("cls", [ARoCL, AACL])


def make(cls=ARoCL, seed=0, dtype=torch.float64, **options):
    "A method past its warm-up, in training mode, and a batch of six images of three kinds."
    method, x1, x2 = make_contrastive(cls, seed, dtype, **options)
    method.progress = 1.0
    if isinstance(method, ACL):  # branches that differ in everything
        with torch.no_grad():
            for p in method.encoder[2].branches["adv"].parameters(): p.add_(torch.randn(16, dtype=dtype))
    clean = torch.rand(x1.shape, dtype=dtype, generator=seeded(seed + 1))
    return start_zero(method), Views(strong1=x1, strong2=x2, clean=clean, labels=LABELS)


def turn(method, views):
    (one,) = list(method.turns(views))
    return one


# a second implementation, with loops

HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04}
SHARE = 0.2  # three of the fifteen pairs


def written_loss(z, removed, tau=0.5):
    "Sum of -log p over ordered pairs of different views of an image, divided by the queries; removed pairs stay out of the denominators."
    u, n, total = [row / row.norm() for row in torch.cat(list(z))], len(z[0]), 0.0
    for i, a in enumerate(u):
        others = sum((a @ b / tau).exp() for j, b in enumerate(u) if j != i and (i % n, j % n) not in removed)
        total = total - sum(((a @ b / tau).exp() / others).log() for j, b in enumerate(u) if j != i and j % n == i % n)
    return total / len(u)


def written_pairs(z):
    "The three most similar pairs, in both orders."
    u = [row / row.norm() for row in z]
    pairs = sorted(((u[i] @ u[j]).item(), i, j) for i in range(6) for j in range(i))[-3:]
    return {(i, j) for _, i, j in pairs} | {(j, i) for _, i, j in pairs}


def climb(objective, x, start):
    for _ in range(HOW["steps"]):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(leaf), leaf)
        x = torch.maximum(torch.minimum(x + HOW["step_size"] * g.sign(), start + HOW["eps"]), start - HOW["eps"]).clamp(0, 1)
    return x


def written_arocl(method, views):
    f = lambda t: method.projector(method.encoder(t))
    x1, x2 = views.strong1, views.strong2
    method.eval()
    removed = written_pairs(f(views.clean))
    x = climb(lambda t: written_loss((f(t), f(x2)), removed), x1, x1)
    method.train()
    z1, z2, z_adv = f(torch.cat([x1, x2, x])).chunk(3)
    return x, written_loss((z1, z2, z_adv), removed) + method.weight * written_loss((z_adv, z2), removed)


def written_aacl(method, views):
    def f(t, name):
        with branch(method, name): return method.projector(method.encoder(t))

    x = torch.cat([views.strong1, views.strong2])
    method.eval()
    removed = written_pairs(f(views.clean, "clean"))
    x_adv = climb(lambda t: written_loss(f(t, "adv").chunk(2), removed), x, x)
    method.train()
    loss = lambda t, name: written_loss(f(t, name).chunk(2), removed)
    return x_adv, (loss(x, "clean") + loss(x_adv, "adv")) / 2


def agrees(cls):
    "Whether objective, gradients, statistics and traces of a step are those that are written above."
    ours, views = make(cls, share=SHARE, **HOW)
    theirs, _ = make(ARoCL if issubclass(cls, ARoCL) else AACL, share=SHARE, **HOW)
    _, objective = (written_arocl if issubclass(cls, ARoCL) else written_aacl)(theirs, views)
    grads = torch.autograd.grad(objective, list(theirs.parameters()), allow_unused=True)
    value, player = turn(ours, views)
    own = torch.autograd.grad(value, list(ours.parameters()), allow_unused=True)
    same = lambda a, b: (a is b is None) or (a is not None and b is not None and torch.allclose(a, b, rtol=1e-8, atol=1e-10))
    return (
        ours.keep is None and player.sign == -1 and same(value, objective) and all(same(a, b) for a, b in zip(own, grads, strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
        and all(p.grad is None for p in ours.parameters()) and all(m.training for m in ours.modules())
    )


@both
def test_the_step_is_the_written_one(cls):
    assert agrees(cls)


def masked(attack, outer):
    "Mixin: whether the mask is used in the attack and in the outer loss."
    class Masked:
        def attack(self, *x):
            keep, self.keep = self.keep, self.keep if attack else None
            try: return super().attack(*x)
            finally: self.keep = keep if outer else None
    return Masked


class Inverted:
    def flagged(self, views): return ~super().flagged(views)


class LeastSimilar:
    def flagged(self, views): return most_similar(-self.look(views.clean), 1 - self.share).logical_not() & ~torch.eye(6, dtype=torch.bool)


class OneOrderOnly:
    def flagged(self, views): return super().flagged(views).triu()


class TwiceAsMany:
    def detector(self, detect, share, warmup): super().detector(detect, 2 * share, warmup)


class ByLabels:
    def flagged(self, views): return same_class(views.labels)


class FromTheAttackedView:
    def turns(self, views):
        moved = self.attack(views.strong1, views.strong2)
        yield from super().turns(Views(**vars(views) | {"clean": moved if isinstance(moved, torch.Tensor) else moved[0]}))


class FromTheDrawnView:
    def turns(self, views): yield from super().turns(Views(**vars(views) | {"clean": views.strong1}))


class InTrainingMode:
    @torch.no_grad()
    def flagged(self, views): return most_similar(self.look(views.clean), self.share)


class NeverPastTheWarmUp:
    def detector(self, detect, share, warmup):
        super().detector(detect, share, warmup)
        self.warmup = 2.0


class MaskStays:
    def turns(self, views):
        yield from super().turns(views)
        self.keep = torch.ones(6, 6, dtype=torch.bool)


class ByTheAttackedBranch:
    def look(self, x): return self.embed(x, "adv")


CASES = [(cls, mutant) for cls in (ARoCL, AACL) for mutant in (
    masked(False, True), masked(True, False), Inverted, LeastSimilar, OneOrderOnly, TwiceAsMany, ByLabels, FromTheAttackedView,
    FromTheDrawnView, InTrainingMode, NeverPastTheWarmUp, MaskStays,
)] + [(AACL, ByTheAttackedBranch)]


@pytest.mark.parametrize(("cls", "mutant"), CASES, ids=lambda c: c.__name__)
def test_mutants_are_rejected(cls, mutant):
    assert not agrees(type("Mutant", (mutant, cls), {}))


# the loss


@examples
@given(seeds, st.integers(2, 3), st.sampled_from([0.1, 0.5, 2.0]), st.integers(3, 8))
def test_what_removal_takes_from_the_loss(seed, views, tau, n):
    "Eq. (2): it is the logarithm of the probability that the rest keeps; the loss never grows."
    g = seeded(seed)
    z, labels = torch.randn(views, n, 4, dtype=torch.float64, generator=g), torch.randint(0, 3, (n,), generator=g)
    same = same_class(labels)
    whole, kept = (nt_xent(z, tau, keep=k, positives="sum", reduction="none") for k in (None, ~same))
    u = torch.nn.functional.normalize(z, dim=-1).flatten(0, 1)
    P = ((u @ u.T) / tau).masked_fill(torch.eye(views * n, dtype=torch.bool), -math.inf).softmax(1)
    lost = (P * same.repeat(views, views)).sum(1).view(views, n)
    assert torch.allclose(kept, whole + (views - 1) * torch.log1p(-lost), rtol=1e-7, atol=1e-7) and (kept <= whole + 1e-12).all()


# detection


@examples
@given(seeds, st.integers(2, 12), st.floats(0, 0.99))
def test_most_similar(seed, n, share):
    g = seeded(seed)
    z = torch.randn(n, 4, dtype=torch.float64, generator=g)
    flagged, pairs = most_similar(z, share), n * (n - 1) // 2
    assert flagged.sum() == 2 * round(share * pairs) and torch.equal(flagged, flagged.T) and not flagged.diagonal().any()
    u = torch.nn.functional.normalize(z, dim=1)
    s, off = u @ u.T, ~torch.eye(n, dtype=torch.bool)
    if flagged.any() and (off & ~flagged).any(): assert s[flagged].min() >= s[off & ~flagged].max() - 1e-12
    order = torch.randperm(n, generator=g)
    assert torch.equal(most_similar(z[order] * 7, share), flagged[order][:, order])


def test_ties_do_not_remove_everything():
    for z in (torch.ones(20, 3), torch.zeros(20, 3)): assert most_similar(z, 0.05).sum() == 2 * round(0.05 * 190)


def test_labels_that_are_unknown_are_no_class():
    same = same_class(torch.tensor([-1, -1, 3, 3]))
    assert same.sum() == 2 and same[2, 3] and same[3, 2]
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    assert [r.item() for r in precision_recall(nothing, same)] == [0, 0] == [r.item() for r in precision_recall(same, nothing)]


@both
@examples
@given(seed=seeds, training=st.booleans())
def test_detection_looks_at_clean_images_alone_and_leaves_no_trace(cls, seed, training):
    method, views = make(cls, seed=seed, share=SHARE)
    method.train(training)
    method.encoder[1].train(not training)
    own = method.generator.get_state()
    with untouched(method, *vars(views).values()): flagged = method.flagged(views)
    assert all(p.requires_grad for p in method.parameters()) and not flagged.requires_grad
    assert torch.equal(method.generator.get_state(), own)
    alone = method.train().flagged(Views(clean=views.clean))
    assert torch.equal(alone, flagged)


@both
def test_labels_reach_the_log_and_nothing_else(cls):
    method, views = make(cls, share=SHARE, **HOW)
    value, _ = turn(method, views)
    logged = {k: method.logs[k].item() for k in ("precision", "recall")}
    wanted = precision_recall(make(cls, share=SHARE, **HOW)[0].flagged(views), same_class(LABELS))
    assert list(logged.values()) == [w.item() for w in wanted]
    other, views = make(cls, share=SHARE, **HOW)
    views.labels = torch.zeros_like(LABELS)
    assert torch.equal(turn(other, views)[0], value) and other.logs["precision"] == 1
    none, views = make(cls, share=SHARE, **HOW)
    del views.labels
    assert torch.equal(turn(none, views)[0], value) and "precision" not in none.logs


@both
def test_the_oracle_removes_the_class(cls):
    method, views = make(cls, detect="oracle", **HOW)
    assert method.views == cls.views and torch.equal(method.flagged(views), same_class(LABELS))
    value, _ = turn(method, views)
    assert method.logs["precision"] == method.logs["recall"] == 1
    assert value < turn(make(cls, detect="none", **HOW)[0], views)[0]


@both
def test_the_mask_lives_for_one_step_even_a_broken_one(cls):
    method, views = make(cls, share=SHARE, **HOW)
    for _ in method.turns(views): assert method.keep is not None
    assert method.keep is None
    views.strong2 = views.strong2[:, :, :1]
    with pytest.raises(RuntimeError): turn(method, views)
    assert method.keep is None


# limits


@both
def test_without_detection_it_is_the_base_to_the_bit(cls, tmp_path):
    "A whole run: the same draws, the same log, the same weights."
    key, base = cls.card.name.lower(), {ARoCL: "rocl", AACL: "acl"}[cls]
    runs = []
    for name, own in ((key, {"detect": "none"}), (base, {})):
        run = Run(resolve(name, "smoke", 1, {"images": 64, "batch_size": 32, "epochs": 2} | own), tmp_path / name)
        runs.append((run.train().state_dict(), {k: v for k, v in run.method.logs.items()}))
    assert all(runs[0][i].keys() == runs[1][i].keys() and all(torch.equal(v, runs[1][i][k]) for k, v in runs[0][i].items()) for i in (0, 1))


@both
@examples
@given(seed=seeds, sign=signs)
def test_nothing_removed_is_the_base(cls, seed, sign):
    "No share, or no warm-up passed, or no two images of one kind for the oracle."
    base = make({ARoCL: RoCL, AACL: ACL}[cls], seed=seed, sign=sign, **HOW)
    expected, _ = turn(*base)
    strangers = torch.arange(6)
    for how, progress, labels in (({"share": 0.0}, 1.0, LABELS), ({"warmup": 0.5}, 0.49, LABELS), ({"detect": "oracle"}, 1.0, strangers)):
        method, views = make(cls, seed=seed, sign=sign, **HOW, **how)
        method.progress, views.labels = progress, labels
        assert torch.allclose(turn(method, views)[0], expected, rtol=1e-10)


# the contract of the attack


@both
@examples
@given(seed=seeds, norm=st.sampled_from(["linf", "l2", "l1"]), eps=st.sampled_from([1e-3, 8 / 255, 0.3]), sign=signs)
def test_contract(cls, seed, norm, eps, sign):
    method, views = make(cls, seed=seed, norm=norm, eps=eps, steps=2, sign=sign, detect="oracle")
    method.keep = ~same_class(LABELS)
    with untouched(method, *vars(views).values()): moved = method.attack(views.strong1, views.strong2)
    for x_adv, x in zip(moved if cls is AACL else [moved], (views.strong1, views.strong2), strict=False):
        assert ((x_adv - x).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all()
        assert x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad
    assert all(m.training for m in method.modules()) and all(p.requires_grad for p in method.parameters())


@examples
@given(seeds, signs)
def test_the_player_climbs_the_kept_loss(seed, sign):
    "A small step up, or down, of the loss with the mask; the removed terms do not count."
    method, views = make(seed=seed, eps=1e-5, steps=1, step_size=1e-5, sign=sign, detect="oracle")
    x, keep = 0.1 + 0.8 * views.strong1, ~same_class(LABELS)
    method.keep = keep
    moved = method.attack(x, views.strong2)
    method.eval()
    loss = lambda t: nt_xent(torch.stack([method.embed(t), method.embed(views.strong2)]), keep=keep).item()
    assert sign * (loss(moved) - loss(x)) > 0


# passes


@both
def test_passes(cls):
    units = {}
    for detect in ("similarity", "oracle", "none"):
        method, views = make(cls, detect=detect, **HOW)
        with count_passes(method.encoder) as passes: play(method, views, {"network": torch.optim.SGD(method.parameters(), 0.1)})
        units[detect] = passes.units(6)
    base = 2 * 3 + 1 + 9 if cls is ARoCL else 4 * 3 + 12
    assert units == {"similarity": base + 1, "oracle": base, "none": base}


# settings, cards, recipes


@both
@pytest.mark.parametrize(("wrong", "message"), [
    ({"detect": "labels"}, "choose one of similarity, oracle, none"), ({"share": 1.0}, "share of all pairs"),
    ({"warmup": -0.1}, "share of the run"), ({"steps": -1}, "steps must be a whole number"), ({"norm": "l3"}, "unknown norm"),
])
def test_wrong_settings(cls, wrong, message):
    with pytest.raises(ValueError, match=message): make_contrastive(cls, **wrong)


@both
def test_cards_and_settings(cls):
    base = {ARoCL: RoCL, AACL: ACL}[cls]
    assert get_method(cls.card.name) is methods()[cls.card.name.lower()] is cls
    card = cls.card
    assert (card.type, card.base, card.level, card.combined, card.tables, card.source) == ("memory-free", "CL", "input", "yes", (1,), "")
    assert card.adversary == "false negative removal"
    own = {"detect": "similarity", "share": 0.05, "warmup": 0.1}
    assert settings_of(cls) == own | settings_of(base) and issubclass(cls, FalseNegatives) and issubclass(cls, base)
    with pytest.raises(TypeError, match="unexpected"): make_contrastive(cls, weights=1.0)
    assert base.views == cls.views == {"strong1": "simclr", "strong2": "simclr"}  # only an object asks for the clean view
    assert make(cls)[0].views == {**base.views, "clean": "none"}
