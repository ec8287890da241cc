"SimMIM: masks in squares, its step written out with loops, mutants, limits."

import pytest
import torch
from common import seeded, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import advssl.methods.simmim
from advssl.encoders import Encoder
from advssl.masked import random_masks
from advssl.method import Views, count_passes, get_method, methods, play
from advssl.methods.simmim import SimMIM, block_masks

examples = settings(max_examples=30, deadline=None)
X = torch.rand(3, 3, 8, 8, generator=seeded(9), dtype=torch.float64)


def make(cls=SimMIM, dtype=torch.float64, **options):
    torch.manual_seed(0)
    method = cls(Encoder(VisionTransformer(8, 2, 3, 0, "avg", 16, 1, 2, fc_norm=False), 16, 3), **options).to(dtype)
    method.generator = seeded()
    return method.train()


def agrees(cls):
    "Whether objective and gradients are those of loops over images, tokens and pixels."
    ours, theirs = make(cls), make()
    mask = block_masks(3, (4, 4), 2, 0.6, seeded())
    vit, pixels, total, count = theirs.encoder.backbone, theirs.encoder.normalise(X), 0.0, 0
    for n in range(3):
        tokens = vit.patch_embed(pixels[n : n + 1])[0]
        rows = [theirs.masked.mask_token[0, 0] if mask[n, i] else tokens[i] for i in range(16)]
        h = torch.stack([vit.cls_token[0, 0], *rows]) + vit.pos_embed[0]
        h = vit.norm(vit.blocks(h[None]))[0, 1:]
        for i in range(16):
            if not mask[n, i]: continue
            r, c = 2 * (i // 4), 2 * (i % 4)
            patch = torch.stack([pixels[n, k, r + a, c + b] for a in range(2) for b in range(2) for k in range(3)])
            total, count = total + (h[i] @ theirs.head.weight.T + theirs.head.bias - patch).abs().sum(), count + 12
    grads = torch.autograd.grad(total / count, [p for p in theirs.parameters() if p.requires_grad])
    ((value, player),) = ours.turns(Views(weak=X))
    own = torch.autograd.grad(value, player.parameters(), allow_unused=True)
    same = lambda a, b: a is not None and torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    return same(value, total / count) and player.sign == -1 and all(same(a, b) for a, b in zip(own, grads, strict=True))


def test_the_step_is_the_written_one():
    assert agrees(SimMIM)


def mutated(name, replacement):
    "The step with one function of the module replaced."
    class Mutant(SimMIM):
        def turns(self, views):
            kept = getattr(advssl.methods.simmim, name)
            setattr(advssl.methods.simmim, name, lambda *args, **how: replacement(kept, *args, **how))
            try: yield from super().turns(views)
            finally: setattr(advssl.methods.simmim, name, kept)
    return Mutant


@pytest.mark.parametrize("mutant", [
    mutated("mae_loss", lambda f, p, t, m, **how: f(p, t, m, normalise=False, norm="l2")),
    mutated("mae_loss", lambda f, p, t, m, **how: f(p, t, m, norm="l1")),
    mutated("mae_loss", lambda f, p, t, m, **how: f(p, t, torch.ones_like(m), **how)),
    mutated("mae_loss", lambda f, p, t, m, **how: f(p, t, ~m, **how)),
    mutated("mae_loss", lambda f, p, t, m, **how: f(p.detach(), t, m, **how) + 0 * p.sum()),
    mutated("block_masks", lambda f, n, grid, block, *how: f(n, grid, 1, *how)),
    mutated("patchify", lambda f, x, patch: f(0.5 * x, patch)),
])
def test_mutants_are_rejected(mutant):
    assert not agrees(mutant)


@examples
@given(seeds, st.sampled_from([(1, 3), (2, 3), (3, 2), (4, 4)]), st.integers(1, 3), st.sampled_from([0.4, 0.6]))
def test_masks_are_whole_squares(seed, coarse, block, ratio):
    rows, cols = coarse
    masks = block_masks(5, (rows * block, cols * block), block, ratio, seeded(seed))
    plain = random_masks(5, rows * cols, ratio, seeded(seed))
    for n in range(5):
        for r in range(rows * block):
            for c in range(cols * block): assert masks[n, r * cols * block + c] == plain[n, (r // block) * cols + c // block]
    assert torch.equal(block_masks(5, coarse, 1, ratio, seeded(seed)), plain)
    assert torch.equal(block_masks(5, coarse, 1, ratio, seeded(seed)), block_masks(5, coarse, 1, ratio, seeded(seed)))


def test_wrong_squares():
    for block in (0, 3):
        with pytest.raises(ValueError, match="choose a divisor"): block_masks(1, (4, 4), block, 0.5)
    method = make(mask_ratio=0.01)
    with pytest.raises(ValueError, match="take a ratio"): list(method.turns(Views(weak=X)))


def test_passes_and_autocast():
    method = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16): ((value, player),) = method.turns(Views(weak=X.float()))
    value.backward()
    assert value.dtype == torch.float32 and all(p.grad is not None and p.grad.abs().sum() > 0 for p in player.parameters())
    with count_passes(method.masked) as passes: play(method, Views(weak=X.float()), {"network": torch.optim.SGD(player.parameters(), 0.1)})
    assert passes.units(3) == 3


def test_card():
    assert get_method("SimMIM") is methods()["simmim"] is SimMIM
    card = SimMIM.card
    assert (card.base, card.sign, card.tables, card.type) == ("MIM", 0, (), "")
