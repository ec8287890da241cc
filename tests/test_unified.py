"Contrast and reconstruction under one player: limits, the contract of the attack, the step written out with loops, and mutants."


import pytest
import torch
from common import ORDER, seeded, snapshot, start_zero, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from advssl.encoders import Encoder, make_encoder
from advssl.masked import fix_position
from advssl.method import Views, count_passes, get_method, play
from advssl.methods.acl import ACL
from advssl.methods.mae import MAE
from advssl.methods.unified import Unified
from advssl.suite.scales import resolve

TINY = {"mask_ratio": 0.5, "decoder_dim": 8}
SIZES = {"hidden_dim": 8, "embedding_dim": 5}


def make(cls=Unified, seed=0, dtype=torch.float64, **options):
    "A method on nine patches of 2x2 pixels with BatchNorm statistics unlike those of any batch, in training mode, and two views."
    torch.manual_seed(seed)
    vit = VisionTransformer(6, 2, 1, 0, "avg", 8, 1, 2, fc_norm=False)
    own = SIZES if cls is ACL else TINY if issubclass(cls, MAE) else TINY | SIZES
    method = cls(Encoder(fix_position(vit), 8, 1, 6), **own | options).to(dtype)
    x1, x2 = torch.rand(2, 6, 1, 6, 6, generator=seeded(seed)).to(dtype)
    with torch.no_grad():
        for p in method.parameters(): p += 0.05 * torch.randn_like(p)
        if hasattr(method, "projector"): method.projector(3 * torch.randn(32, 8, dtype=dtype) + 1)
    method.generator = seeded(seed)
    return method, x1, x2


def step(method, x1, x2):
    return play(method, Views(strong1=x1, strong2=x2), {"network": torch.optim.SGD(method.parameters(), 0.1)})[0]


# a second implementation, with loops


def written_contrast(z1, z2, tau=0.5):
    u, total = [row / row.norm() for row in torch.cat([z1, z2])], 0.0
    for i, a in enumerate(u):
        others = sum((a @ b / tau).exp() for j, b in enumerate(u) if j != i)
        total = total - ((a @ u[(i + len(z1)) % len(u)] / tau).exp() / others).log()
    return total / len(u)


def written_reconstruction(method, x, clean, mask):
    "Patch by patch; the decoder is MAE's own, the target and the mean are not."
    predicted, total = method.mae.reconstruct(x, mask), 0.0
    pixels = (clean - 0.5) / 0.5
    for i, hidden in enumerate(mask):
        for token in hidden.nonzero()[:, 0].tolist():
            row, col = divmod(token, 3)
            patch = pixels[i, 0, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].flatten()
            y = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            total = total + (predicted[i, token] - y).square().mean()
    return total / mask.sum()


def written_step(method, x1, x2, weight, eps, alpha, steps, sign):
    "The player from a zero start and the objective, everything forwarded in every step."
    mask = method.mae.hide(x1) if weight else None
    f = lambda t: method.projector(method.encoder(t))

    def objective(x):
        first, second = f(x), f(x2)
        total = (1 - weight) * written_contrast(first, second)
        return total + weight * written_reconstruction(method, x, x1, mask) if weight else total

    x = x1
    method.eval()
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(objective(leaf), leaf)
        x = (x1 + (x + sign * alpha * g.sign() - x1).clamp(-eps, eps)).clamp(0, 1)
    method.train()
    return x, objective(x)


HOW = {"eps": 0.1, "steps": 3, "step_size": 0.04}


def agrees(cls=Unified, weight=0.4, sign=1):
    "Whether attack, objective, gradients, statistics and traces are those of `written_step`."
    (ours, x1, x2), (theirs, _, _) = (make(c, weight=weight, sign=sign, **HOW) for c in (cls, Unified))
    theirs.mae.generator = seeded(0)
    x_adv, objective = written_step(theirs, x1, x2, weight, HOW["eps"], HOW["step_size"], HOW["steps"], sign)
    weights = lambda method: [p for p in method.parameters() if p.requires_grad]
    expected = torch.autograd.grad(objective, weights(theirs), allow_unused=True)
    start_zero(ours)
    before = snapshot(ours)
    found = ours.attack(x1, x2, ours.question(x1))
    kept = (
        not found.requires_grad and all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
        and all(p.grad is None for p in ours.parameters()) and all(m.training for m in ours.modules())
    )
    ours.generator = seeded(0)
    ((value, player),) = ours.turns(Views(strong1=x1, strong2=x2))
    grads = torch.autograd.grad(value, weights(ours), allow_unused=True)
    same = lambda a, b: torch.allclose(a if a is not None else torch.zeros_like(b), b, rtol=1e-8, atol=1e-10)
    return (
        kept and player.sign == -1 and same(found, x_adv) and same(value, objective)
        and all(same(a, b if b is not None else torch.zeros_like(p)) for a, b, p in zip(grads, expected, weights(theirs), strict=True))
        and all(same(v.double(), theirs.state_dict()[k].double()) for k, v in ours.state_dict().items())
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_step_is_the_written_one(weight, sign):
    assert agrees(weight=weight, sign=sign)


class FlippedSign(Unified):
    def __init__(self, *args, sign=1, **options): super().__init__(*args, sign=-sign, **options)


class WeightTurnedRound(Unified):
    def joint(self, terms): return self.weight * terms["contrast"] + (1 - self.weight) * terms["reconstruction"]


class ContrastAlone(Unified):
    def joint(self, terms): return (1 - self.weight) * terms["contrast"]


class ReconstructionAlone(Unified):
    def joint(self, terms): return self.weight * terms["reconstruction"]


class PlayerSeesContrastAlone(Unified):
    def attack(self, x1, x2, mask=None):
        self.weight, kept = 0.0, self.weight
        try: return super().attack(x1, x2, mask)
        finally: self.weight = kept


class PlayerSeesReconstructionAlone(Unified):
    def attack(self, x1, x2, mask=None):
        self.weight, kept = 1.0, self.weight
        try: return super().attack(x1, x2, mask)
        finally: self.weight = kept


class OtherMaskInTheOuterStep(Unified):
    def attack(self, x1, x2, mask=None): return super().attack(x1, x2, mask.roll(1, 1))


class MovedTarget(Unified):
    def terms(self, x, x1, mask, partner): return super().terms(x, x, mask, partner)


class CleanReconstruction(Unified):
    def turns(self, views):
        x1, x2 = views.strong1, views.strong2
        mask = self.question(x1)
        terms = self.terms(self.attack(x1, x2, mask), x1, mask, lambda: self.embed(x2, "clean"))
        terms["reconstruction"] = self.mae.error(self.mae.reconstruct(x1, mask), x1, mask)
        yield self.joint(terms), self.network


class OtherView(Unified):
    def attack(self, x1, x2, mask=None): return super().attack(x2, x1, mask)


class NoAttack(Unified):
    def attack(self, x1, x2, mask=None): return x1


class PartnerWithoutGradient(Unified):
    def loss(self, z1, z2): return super().loss(z1, z2.detach())


class AttackInTrainMode(Unified):
    def attack(self, x1, x2, mask=None):
        z2 = self.embed(x2, "clean").detach()
        return self.player.find(lambda x: self.joint(self.terms(x, x1, mask, lambda: z2)), x1)


@pytest.mark.parametrize("mutant", [
    FlippedSign, WeightTurnedRound, ContrastAlone, ReconstructionAlone, PlayerSeesContrastAlone, PlayerSeesReconstructionAlone,
    OtherMaskInTheOuterStep, MovedTarget, CleanReconstruction, OtherView, NoAttack, PartnerWithoutGradient, AttackInTrainMode,
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


# limits


class AdversarialMAE(MAE):
    "MAE on an image that a player moved against its loss."

    def turns(self, views):
        x, mask = views.strong1, self.hide(views.strong1)
        x_adv = self.player.find(lambda t: self.error(self.reconstruct(t, mask), x, mask), x, model=self, generator=self.generator)
        yield self.error(self.reconstruct(x_adv, mask), x, mask), self.network


@pytest.mark.parametrize("ball", [
    {"eps": 0.1, "steps": 3}, {"eps": 0.1, "steps": 2, "sign": -1}, {"eps": 0.3, "steps": 1, "norm": "l2"}, {"steps": 0},
])
def test_the_ends_are_the_pure_forms_to_the_bit(ball):
    (ours, x1, x2), (base, _, _) = make(weight=0.0, **ball), make(ACL, form="a2s", dual=False, **ball)
    base.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("mae")})
    for _ in range(2): assert torch.equal(step(ours, x1, x2), step(base, x1, x2))
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in base.state_dict().items())
    (ours, x1, x2), (base, _, _) = make(weight=1.0, **ball), make(AdversarialMAE)
    base.load_state_dict(ours.mae.state_dict())
    base.player, before = ours.player, snapshot(ours.projector)
    for _ in range(2): assert torch.equal(step(ours, x1, x2), step(base, x1, x2))
    assert all(torch.equal(v, ours.mae.state_dict()[k]) for k, v in base.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in ours.projector.state_dict().items())  # nor its statistics


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("still", [{"eps": 0.0}, {"eps": 0.1, "steps": 0}])
def test_without_a_move_it_is_the_clean_sum_to_the_bit(weight, still):
    (ours, x1, x2), (base, _, _) = make(weight=weight, **still), make(weight=weight)
    start_zero(ours)
    mask, clean = base.question(x1), 0.0
    if weight < 1: clean = clean + (1 - weight) * base.loss(base.embed(x1, "adv"), base.embed(x2, "clean"))
    if weight > 0: clean = clean + weight * base.mae.error(base.mae.reconstruct(x1, mask), x1, mask)
    assert torch.equal(step(ours, x1, x2), clean.detach())


def test_equal_signs_on_hidden_patches_for_every_weight_below_one():
    moves = []
    for weight in (0.0, 0.2, 0.999):
        method, x1, x2 = make(weight=0.5, eps=0.1, steps=1, step_size=0.1)
        mask = start_zero(method).question(x1)
        method.weight = weight
        moved = (method.attack(x1, x2, mask) - x1).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 3)[:, 0]
        moves.append((moved[mask], moved[~mask]))
    assert all(torch.equal(hidden, moves[0][0]) for hidden, _ in moves)
    assert not torch.equal(moves[0][1], moves[2][1])


def test_a_term_of_weight_zero_is_neither_forwarded_nor_backed_up():
    for weight, contrast, masked in ((0.0, 7, 0), (0.4, 7, 3), (1.0, 0, 3)):
        for steps in (0, 2):
            method, x1, x2 = make(weight=weight, eps=0.1, steps=steps)
            with count_passes(method.encoder) as whole, count_passes(method.mae.masked) as part: step(method, x1, x2)
            assert whole.units(6) == (contrast + 2 * steps) * bool(contrast) and part.units(6) == (masked + 2 * steps) * bool(masked)


# the contract of the attack


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([1e-3, 8 / 255, 0.3]), st.integers(0, 3),
       st.sampled_from([1, -1]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_contract(seed, norm, eps, steps, sign, weight, training, dtype):
    method, x1, x2 = make(seed=seed, dtype=dtype, norm=norm, eps=eps, steps=steps, sign=sign, weight=weight)
    mask = method.question(x1)
    method.train(training)
    method.projector[1].train(not training)  # a mixed state must come back too
    method.projector[0].weight.requires_grad_(False)
    method.generator = seeded(seed)
    with untouched(method, x1, x2): found = method.attack(x1, x2, mask)
    assert ((found - x1).flatten(1).norm(ORDER[norm], dim=1) <= eps + 1e-6).all() and found.min() >= 0 and found.max() <= 1
    assert found.dtype == dtype and not found.requires_grad
    method.generator = seeded(seed)
    assert torch.equal(method.attack(x1, x2, mask), found)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_an_attack_without_a_mask_draws_its_own(weight):
    (ours, x1, x2), (twin, _, _) = make(weight=weight, **HOW), make(weight=weight, **HOW)
    assert torch.equal(ours.attack(x1, x2), twin.attack(x1, x2, twin.question(x1)))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_sign_chooses_the_direction_of_the_sum(weight):
    values = {}
    for sign in (1, -1):
        method, x1, x2 = make(weight=weight, sign=sign, eps=1e-5, steps=1, step_size=1e-5)
        x1 = 0.1 + 0.8 * x1
        mask = start_zero(method).question(x1)
        moved = method.attack(x1, x2, mask)
        method.eval()
        values[sign] = [method.joint(method.terms(x, x1, mask, lambda m=method, x2=x2: m.embed(x2, "clean"))).item() for x in (x1, moved)]
    assert values[1][1] > values[1][0] and values[-1][1] < values[-1][0]


def test_it_is_registered_with_one_weight_and_refuses_others():
    assert get_method("unified") is Unified and Unified.backbone == "vit" and Unified.card.tables == ()
    assert resolve("unified", "demo").settings["weight"] == 0.5
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight must be in"): make(weight=weight)
    with pytest.raises(ValueError, match="needs a vision transformer"): Unified(make_encoder("small_convnet"))


def test_autocast_trains_every_weight():
    method, x1, x2 = make(dtype=torch.float32, weight=0.5, steps=2)
    with torch.autocast("cpu", dtype=torch.bfloat16): ((value, _),) = method.turns(Views(strong1=x1, strong2=x2))
    value.backward()
    frozen_table = {id(method.encoder.backbone.pos_embed)}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.parameters() if id(p) not in frozen_table)


def test_reconstruction_alone_is_the_adversarial_masked_method():
    "AdvMIM moves visible patches only; ours moves hidden ones too, which nobody reads: the same step, from a start at the image."
    AdvMIM = get_method("advmim")
    (ours, x1, x2), (base, _, _) = make(weight=1.0, **HOW), make(AdvMIM, **HOW)
    base.load_state_dict(ours.mae.state_dict())
    start_zero(ours), start_zero(base)
    a = step(ours, x1, x2)
    b = play(base, Views(weak=x1), {"network": torch.optim.SGD(base.parameters(), 0.1)})[0]
    assert torch.allclose(a, b, rtol=1e-12)
    for name, value in base.state_dict().items(): assert torch.allclose(value, ours.mae.state_dict()[name], rtol=1e-10, atol=1e-12), name
