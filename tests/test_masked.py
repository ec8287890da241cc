"Masked image modelling: what is too dull or too slow for its page."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from advssl.masked import (
    MaskedDecoder,
    MaskedEncoder,
    fix_position,
    grid_coordinates,
    mae_loss,
    normalise_patches,
    patchify,
    random_masks,
    sincos_position_embedding,
    unpatchify,
    visible_indices,
)

PREFIXES = [{}, {"reg_tokens": 2}, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg"}]
NORMS = [{"pre_norm": True}, {"global_pool": "avg", "fc_norm": False}]
fast = settings(max_examples=40, deadline=None, derandomize=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small_vit(seed=0, **options):
    "12 tokens on a grid of 3 x 4, so that rows and columns cannot be mixed up unseen."
    torch.manual_seed(seed)
    sizes = dict(img_size=(6, 8), patch_size=2, in_chans=3, num_classes=0, embed_dim=16, depth=2, num_heads=2)
    return VisionTransformer(**(sizes | options)).eval()


# patches


@fast
@given(n=st.integers(1, 3), channels=st.integers(1, 4), rows=st.integers(1, 4), cols=st.integers(1, 4), patch=st.integers(1, 5))
def test_patchify_and_unpatchify_are_exact_inverses(n, channels, rows, cols, patch):
    x = torch.rand(n, channels, rows * patch, cols * patch, generator=rng())
    tokens = patchify(x, patch)
    assert tokens.shape == (n, rows * cols, patch * patch * channels)
    assert torch.equal(unpatchify(tokens, patch, channels, grid=(rows, cols)), x)
    assert torch.equal(tokens.flatten().sort().values, x.flatten().sort().values)


def test_the_layout_is_the_written_one():
    n, channels, rows, cols, p = 2, 3, 2, 3, 4
    x = torch.rand(n, channels, rows * p, cols * p, generator=rng())
    tokens = patchify(x, p)
    for r in range(rows):
        for c in range(cols):
            patch = x[:, :, r * p : r * p + p, c * p : c * p + p]  # (n, C, p, p)
            assert torch.equal(tokens[:, r * cols + c], torch.stack(patch.unbind(1), -1).flatten(1))


def test_a_square_needs_no_grid_and_a_rectangle_does():
    x = torch.rand(1, 1, 28, 28, generator=rng())
    assert torch.equal(unpatchify(patchify(x, 7), 7, 1), x)
    for shape, grid in (((1, 12, 4), None), ((1, 4, 5), None), ((1, 6, 4), (4, 2))):
        with pytest.raises(ValueError, match=r"pass grid=\(rows, cols\)"):
            unpatchify(torch.zeros(shape), 2, 1, grid)


@pytest.mark.parametrize("size, patch", [((7, 8), 2), ((8, 7), 2), ((8, 8), 3), ((4, 4), 5), ((4, 4), 0)])
def test_patches_that_do_not_tile_are_refused(size, patch):
    with pytest.raises(ValueError, match="crop or resize the images to a multiple"):
        patchify(torch.zeros(1, 1, *size), patch)


# masks


@fast
@given(n=st.integers(1, 20), tokens=st.integers(2, 200), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_masks_hide_exactly_the_rounded_share(n, tokens, ratio, seed):
    hidden = round(ratio * tokens)
    if hidden in (0, tokens):
        with pytest.raises(ValueError, match="take a ratio from"):
            random_masks(n, tokens, ratio)
        return
    mask = random_masks(n, tokens, ratio, rng(seed))
    assert mask.dtype == torch.bool and mask.shape == (n, tokens)
    assert (mask.sum(1) == hidden).all()
    assert torch.equal(mask, random_masks(n, tokens, ratio, rng(seed)))
    index = visible_indices(mask)
    assert torch.equal(index, visible_indices(mask, tokens - hidden))
    assert [row.tolist() for row in index] == [(~row).nonzero().flatten().tolist() for row in mask]


@pytest.mark.parametrize("ratio", [-0.5, 0.0, 0.01, 0.99, 1.0, 1.5])
def test_ratios_that_leave_nothing_to_do_are_refused(ratio):
    with pytest.raises(ValueError, match="take a ratio from 0.0625 to 0.938"):
        random_masks(2, 16, ratio)


def test_images_are_masked_independently_and_every_set_is_equally_likely():
    masks = random_masks(60_000, 5, 0.4, rng())  # 10 sets of two
    code = (masks * 2 ** torch.arange(5)).sum(1)
    counts = code.bincount()[code.unique()].double()
    assert len(counts) == 10
    chi2 = ((counts - 6000) ** 2 / 6000).sum()
    assert chi2 < 27.9  # 0.1 % point with 9 degrees of freedom
    same = (masks[1:] == masks[:-1]).all(1).double().mean()  # neighbours in the batch
    assert abs(same - 0.1) < 0.005


def test_uneven_masks_are_refused_where_tokens_are_dropped_and_taken_where_not():
    vit, x = small_vit(), torch.rand(2, 3, 6, 8, generator=rng())
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3] = True
    with pytest.raises(ValueError, match="insert=True"):
        MaskedEncoder(vit)(x, mask)
    with pytest.raises(ValueError, match="not 7"):
        visible_indices(mask[:1], 7)
    z = MaskedEncoder(vit, insert=True)(x, mask)
    full = vit.forward_features(x)
    assert torch.allclose(z[1], full[1], atol=1e-6) and not torch.allclose(z[0], full[0])


@pytest.mark.parametrize("visible", [None, 5])
def test_an_empty_batch_has_no_visible_tokens(visible):
    nothing = torch.zeros(0, 12, dtype=torch.bool)
    assert visible_indices(nothing, visible).shape == (0, visible or 0)
    z = MaskedEncoder(small_vit())(torch.zeros(0, 3, 6, 8), nothing, visible=visible)
    assert z.shape == (0, 1 + (visible or 0), 16)


# loss


@fast
@given(ratio=st.sampled_from([0.25, 0.5, 0.75]), norm=st.sampled_from(["l1", "l2"]), normalise=st.booleans(), seed=st.integers(0, 20))
def test_loss_is_the_mean_over_hidden_values(ratio, norm, normalise, seed):
    g = rng(seed)
    pred, target = torch.randn(3, 8, 6, generator=g, dtype=torch.float64), torch.rand(3, 8, 6, generator=g, dtype=torch.float64)
    mask = random_masks(3, 8, ratio, g)
    wanted = target
    if normalise:
        wanted = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True, unbiased=True) + 1e-6).sqrt()
    difference = (pred - wanted)[mask]
    expected = difference.abs().mean() if norm == "l1" else difference.square().mean()
    assert torch.isclose(mae_loss(pred, target, mask, normalise, norm), expected, rtol=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_limits_nothing_hidden_everything_hidden_perfect_prediction(norm):
    pred, target = torch.randn(2, 8, 6, generator=rng()), torch.rand(2, 8, 6, generator=rng())
    everything = torch.ones(2, 8, dtype=torch.bool)
    difference = pred - normalise_patches(target)
    whole = difference.abs().mean() if norm == "l1" else difference.square().mean()
    assert mae_loss(pred, target, ~everything, norm=norm) == 0
    assert torch.isclose(mae_loss(pred, target, everything, norm=norm), whole)
    assert mae_loss(normalise_patches(target), target, everything, norm=norm) == 0
    assert mae_loss(target, target, everything, normalise=False, norm=norm) == 0


def test_visible_predictions_do_not_count_even_when_broken():
    mask = random_masks(2, 8, 0.5, rng())
    target = torch.rand(2, 8, 6, generator=rng())
    pred = torch.zeros(2, 8, 6)
    pred[~mask] = float("nan")
    pred.requires_grad_()
    loss = mae_loss(pred, target, mask)
    loss.backward()
    assert loss.isfinite() and (pred.grad[mask].abs().amax(-1) > 0).all()
    clean = torch.zeros(2, 8, 6)
    assert loss == mae_loss(clean, target, mask) and loss != mae_loss(clean, target, ~mask)


@fast
@given(a=st.floats(0.05, 20), b=st.floats(-5, 5))
def test_targets_ignore_light_and_contrast(a, b):
    t = torch.rand(4, 12, generator=rng(), dtype=torch.float64)
    assert torch.allclose(normalise_patches(a * t + b, eps=0.0), normalise_patches(t, eps=0.0), atol=1e-8)
    assert torch.allclose(normalise_patches(-a * t + b, eps=0.0), -normalise_patches(t, eps=0.0), atol=1e-8)
    hat = normalise_patches(t, eps=0.0)
    assert torch.allclose(hat.mean(-1), torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(hat.var(-1), torch.ones(4).double())


def test_flat_patches_have_a_zero_target_and_finite_gradients():
    target = torch.full((1, 4, 9), 0.3, requires_grad=True)
    mae_loss(torch.ones(1, 4, 9), target, torch.ones(1, 4, dtype=torch.bool)).backward()
    assert (normalise_patches(target.detach()).abs() < 1e-3).all() and target.grad.isfinite().all()


def test_wrong_losses_are_refused():
    pred, mask = torch.zeros(2, 4, 6), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="'l1' or 'l2'"):
        mae_loss(pred, pred, mask, norm="l3")
    with pytest.raises(ValueError, match="patchify the images"):
        mae_loss(pred, torch.zeros(2, 1, 4, 6), mask)
    for wrong in (mask.float(), mask[:1], mask[:, :3]):
        with pytest.raises(ValueError, match=r"boolean, True where hidden, of shape \(2, 4\)"):
            mae_loss(pred, pred, wrong)


def test_loss_in_bfloat16_stays_close():
    g = rng()
    pred, target, mask = torch.randn(4, 16, 48, generator=g), torch.rand(4, 16, 48, generator=g), random_masks(4, 16, 0.75, g)
    assert torch.isclose(mae_loss(pred.bfloat16(), target, mask), mae_loss(pred, target, mask), rtol=1e-2)


# positions


@fast
@given(dim=st.sampled_from([4, 8, 32, 96]), dx=st.floats(-3, 3), dy=st.floats(-3, 3))
def test_a_shift_is_a_rotation_that_keeps_norms_and_angles(dim, dx, dy):
    coords, delta = grid_coordinates(3, 4).double(), torch.tensor([dx, dy], dtype=torch.float64)
    a, b = sincos_position_embedding(coords, dim), sincos_position_embedding(coords + delta, dim)
    assert torch.allclose(a @ a.T, b @ b.T, atol=1e-9)
    omega = 10000.0 ** -(torch.arange(dim // 4).double() / (dim // 4))
    overlap = (omega * dx).cos().sum() + (omega * dy).cos().sum()
    assert torch.allclose((a * b).sum(-1), overlap.expand(12), atol=1e-9)


def test_columns_come_first():
    right, down = (sincos_position_embedding(torch.tensor([[x, y]]), 16)[0] for x, y in ((2.0, 0.0), (0.0, 2.0)))
    still = sincos_position_embedding(torch.zeros(1, 2), 16)[0]
    assert torch.equal(right[8:], still[8:]) and not torch.equal(right[:8], still[:8])
    assert torch.equal(down[:8], still[:8]) and not torch.equal(down[8:], still[8:])
    assert grid_coordinates(2, 3).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
    assert right[0] == torch.tensor(2.0).sin() and right[4] == torch.tensor(2.0).cos()


def test_coordinates_have_gradients_of_first_and_second_order():
    coords = (grid_coordinates(2, 3).double() + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sincos_position_embedding(c, 8), coords)
    assert torch.autograd.gradgradcheck(lambda c: sincos_position_embedding(c, 8), coords)


def test_positions_that_make_no_sense_are_refused():
    for dim in (0, 2, 6, 98):
        with pytest.raises(ValueError, match="multiple of 4"):
            sincos_position_embedding(grid_coordinates(2, 2), dim)
    for coords in (torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.long)):
        with pytest.raises(ValueError, match="grid_coordinates"):
            sincos_position_embedding(coords, 8)


@pytest.mark.parametrize("options", PREFIXES)
def test_a_fixed_table_holds_the_grid_after_the_prefix_and_no_gradient(options):
    vit = small_vit(**options)
    assert fix_position(vit) is vit and not vit.pos_embed.requires_grad
    table = sincos_position_embedding(grid_coordinates(3, 4), 16)
    assert torch.equal(vit.pos_embed[0, -12:], table)
    assert (vit.pos_embed[0, :-12] == 0).all()


# encoder


@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("options", PREFIXES + NORMS)
def test_without_a_mask_it_is_timm(options, insert):
    vit, x = small_vit(**options), torch.rand(2, 3, 6, 8, generator=rng())
    encoder = MaskedEncoder(vit, insert)
    assert encoder.tokens == 12
    for mask in (None, torch.zeros(2, 12, dtype=torch.bool)):
        assert torch.equal(encoder(x, mask), vit.forward_features(x))


def test_positions_are_added_before_tokens_are_dropped():
    "Against timm's attention mask, which keeps hidden tokens but shuts them out; learnable positions, all different."
    vit, x = small_vit(), torch.rand(5, 3, 6, 8, generator=rng())
    torch.nn.init.normal_(vit.pos_embed, generator=rng())
    mask = random_masks(5, 12, 0.5, rng())
    seen = torch.cat([torch.ones(5, 1, dtype=torch.bool), ~mask], 1)
    shut = vit.forward_features(x, attn_mask=seen[:, None, None, :])
    z = MaskedEncoder(vit)(x, mask)
    assert torch.allclose(z, shut[seen].view(5, 7, 16), atol=1e-5)
    assert torch.equal(z, MaskedEncoder(vit)(x, mask, visible=6))


@pytest.mark.parametrize("insert", [False, True])
def test_hidden_pixels_cannot_matter(insert):
    vit, x = small_vit(), torch.rand(4, 3, 6, 8, generator=rng())
    encoder, mask = MaskedEncoder(vit, insert), random_masks(4, 12, 0.5, rng())
    inside = unpatchify(mask[..., None].expand(-1, -1, 12).float(), 2, 3, grid=(3, 4)).bool()
    for other in (x.masked_fill(inside, 100.0), x.masked_fill(inside, -1.0)):
        assert torch.equal(encoder(other, mask), encoder(x, mask))
    assert not torch.equal(encoder(x.masked_fill(~inside, 0.0), mask), encoder(x, mask))
    decoder = MaskedDecoder(vit, 8, 1, 2).eval()
    assert torch.equal(decoder(encoder(x.masked_fill(inside, 9.0), mask), mask), decoder(encoder(x, mask), mask))


def test_inserted_tokens_carry_the_mask_token_and_their_own_position():
    vit, x = small_vit(depth=1), torch.rand(2, 3, 6, 8, generator=rng())
    encoder, mask = MaskedEncoder(vit, insert=True), random_masks(2, 12, 0.5, rng())
    before = []
    handle = vit.blocks.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    moved = torch.randn(12, 16, generator=rng())
    encoder(x, mask)
    encoder(x, mask, masked_position=moved)
    encoder(x, mask, masked_position=moved.expand(2, -1, -1))
    handle.remove()
    plain, shifted, each = (tokens[:, 1:] for tokens in before)
    place = vit.pos_embed[:, 1:].expand(2, -1, -1)
    assert torch.equal(plain[mask], (encoder.mask_token + place)[mask])
    assert torch.equal(plain[~mask], (vit.patch_embed(x) + place)[~mask])
    assert torch.equal(shifted[mask], (encoder.mask_token + moved).expand(2, -1, -1)[mask])
    assert torch.equal(shifted[~mask], plain[~mask]) and torch.equal(shifted, each)


@pytest.mark.parametrize("insert", [False, True])
def test_a_perturbation_moves_visible_patches_only(insert):
    vit, x = small_vit(), torch.rand(2, 3, 6, 8, generator=rng())
    encoder, mask = MaskedEncoder(vit, insert), random_masks(2, 12, 0.5, rng())
    delta = torch.randn(2, 12, 16, generator=rng())
    assert torch.equal(encoder(x, mask, perturbation=delta * mask[..., None]), encoder(x, mask))
    assert not torch.allclose(encoder(x, mask, perturbation=delta * ~mask[..., None]), encoder(x, mask))
    conv = vit.patch_embed.proj  # its linear part turns a change of pixels into one of embeddings
    pixels = torch.randn(2, 3, 6, 8, generator=rng(1)) / 10
    same = torch.nn.functional.conv2d(pixels, conv.weight, stride=2).flatten(2).mT
    assert torch.allclose(encoder(x + pixels, mask), encoder(x, mask, perturbation=same), atol=1e-5)
    assert torch.allclose(encoder(x, perturbation=same), vit.forward_features(x + pixels), atol=1e-5)


def test_encoders_and_masks_that_do_not_fit_are_refused():
    x, mask = torch.zeros(2, 3, 6, 8), random_masks(2, 12, 0.5, rng())
    for options in ({"pos_embed": "none"}, {"patch_drop_rate": 0.5}, {"dynamic_img_size": True}):
        with pytest.raises(ValueError, match="patch_drop_rate=0"):
            MaskedEncoder(small_vit(**options))
    for insert in (False, True):
        encoder = MaskedEncoder(small_vit(), insert)
        for wrong in (mask.long(), mask[:1], mask[:, :11]):
            with pytest.raises(ValueError, match=r"of shape \(2, 12\)"):
                encoder(x, wrong)
    position = torch.zeros(12, 16)
    for encoder, used in ((MaskedEncoder(small_vit()), mask), (MaskedEncoder(small_vit(), insert=True), None)):
        with pytest.raises(ValueError, match="insert=True"):
            encoder(x, used, masked_position=position)


# decoder


def test_the_decoder_puts_tokens_in_their_places():
    vit, x = small_vit(), torch.rand(3, 3, 6, 8, generator=rng())
    mask, encoder, decoder = random_masks(3, 12, 0.75, rng()), MaskedEncoder(vit), MaskedDecoder(vit, 8, 1, 2)
    z, before = encoder(x, mask), []
    decoder.blocks.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    out = decoder(z, mask)
    assert out.shape == (3, 12, 12)
    tokens = before[0][:, 1:] - sincos_position_embedding(grid_coordinates(3, 4), 8)
    assert torch.allclose(tokens[mask], decoder.mask_token[0].expand(27, -1), atol=1e-6)
    assert torch.allclose(tokens[~mask], decoder.embed(z[:, 1:]).flatten(0, 1), atol=1e-6)
    assert torch.equal(before[0][:, 0], decoder.embed(z)[:, 0])


def test_the_decoder_takes_complete_tokens_with_or_without_the_mask():
    vit, x, mask = small_vit(reg_tokens=1), torch.rand(2, 3, 6, 8, generator=rng()), random_masks(2, 12, 0.5, rng())
    z, decoder = MaskedEncoder(vit, insert=True)(x, mask), MaskedDecoder(vit, 8, 1, 2)
    assert torch.equal(decoder(z, mask), decoder(z))
    with pytest.raises(ValueError, match="pass the mask"):
        decoder(MaskedEncoder(vit)(x, mask))
    with pytest.raises(ValueError, match="multiple of heads"):
        MaskedDecoder(vit, 8, 1, 3)


@pytest.mark.parametrize("insert", [False, True])
def test_every_weight_but_the_fixed_positions_learns(insert):
    vit = fix_position(small_vit().train())
    encoder, decoder = MaskedEncoder(vit, insert), MaskedDecoder(vit, 8, 1, 2)
    x, mask = torch.rand(4, 3, 6, 8, generator=rng()), random_masks(4, 12, 0.5, rng())
    mae_loss(decoder(encoder(x, mask), mask), patchify(x, 2), mask).backward()
    named = [*encoder.named_parameters(), *decoder.named_parameters()]
    idle = {name for name, w in named if w.grad is None or not w.grad.any()}
    assert idle == {"vit.pos_embed"} | ({"mask_token"} if insert else set())  # insert: the decoder's stays unused


def test_a_few_steps_learn_to_continue_stripes():
    "Columns of constant colour: a hidden patch follows from its column, which takes positions and attention."
    vit = fix_position(small_vit(seed=1, in_chans=1, embed_dim=32, num_heads=4).train())
    encoder, decoder, g = MaskedEncoder(vit), MaskedDecoder(vit, 32, 1, 4), rng()
    weights = [w for module in (encoder, decoder) for w in module.parameters() if w.requires_grad]
    optimiser, losses = torch.optim.AdamW(weights, lr=3e-3), []
    for _ in range(150):
        x = torch.randn(32, 1, 1, 4, generator=g).repeat_interleave(2, -1).expand(-1, -1, 6, -1)
        mask = random_masks(32, 12, 0.25, g)
        loss = mae_loss(decoder(encoder(x, mask), mask), patchify(x, 2), mask, normalise=False)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.25 < 0.8 < sum(losses[:5]) / 5
