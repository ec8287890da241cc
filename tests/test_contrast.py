"The contrastive core against formulas written out in linear space, its invariances, its memory and its messages."
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from advssl import contrast as C

TAUS = (0.02, 0.07, 0.2, 0.5, 1.0)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def features(seed, *shape, spread=1.0):
    "Views that resemble each other more the smaller the spread, of any length."
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    return torch.randn(shape[-2:], generator=g, dtype=torch.float64) + spread * noise


def directions(seed, *shape):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True)


def same(ours, theirs, leaves, rtol=1e-9):
    "Equal values and gradients, by the parity files' measure |a - b| <= atol + rtol * max|b|."
    pairs = [(ours, theirs), *zip(grads(ours, *leaves), grads(theirs, *leaves), strict=True)]
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None: assert (a - b).abs().max() <= 1e-11 + rtol * b.abs().max()


# Formulas in linear space: slow, unsafe at small temperatures, obvious.


def plain_nt_xent(z, tau, keep=None, positives="mean", guard=0.0, stop_columns=False):
    V, n, _ = z.shape
    u = (z / (z.norm(dim=-1, keepdim=True) + guard)).flatten(0, 1)
    e = (u @ (u.detach() if stop_columns else u).T / tau).exp()
    sample, itself = torch.arange(n).repeat(V), torch.eye(V * n, dtype=torch.bool)
    pos = (sample[:, None] == sample) & ~itself
    neg = ~(pos | itself)
    if keep is not None: neg &= keep.repeat(V, V) if keep.ndim == 2 else keep.reshape(V * n, V * n)
    total = (e * (pos | neg)).sum(1) + guard
    if positives == "inside": return -((e * pos).sum(1) / total).log().mean()
    log = -(e / total[:, None] + guard).log()
    return (log * pos).sum(1).mean() / (1 if positives == "sum" else V - 1)


def plain_hcl(u, tau, beta, tau_plus):
    V, n, _ = u.shape
    flat = u.flatten(0, 1)
    e, sample = (flat @ flat.T / tau).exp(), torch.arange(n).repeat(V)
    neg = sample[:, None] != sample
    e_pos, count = (u * u.flip(0)).sum(-1).flatten().div(tau).exp(), V * (n - 1)
    R = (e ** (1 + beta) * neg).sum(1) / ((e**beta * neg).sum(1) / count)
    Ng = ((R - tau_plus * count * e_pos) / (1 - tau_plus)).clamp(min=count * math.exp(-1 / tau))
    return -(e_pos / (e_pos + Ng)).log().mean()


# Values and gradients


@quick
@given(seeds, st.integers(2, 4), st.integers(2, 5), st.sampled_from(TAUS), st.sampled_from(("mean", "sum", "inside")), st.booleans())
def test_nt_xent_is_the_formula(seed, views, n, tau, positives, stop):
    z = features(seed, views, n, 6).requires_grad_()
    kw = dict(positives=positives, stop_columns=stop)
    same(C.nt_xent(z, tau, **kw), plain_nt_xent(z, tau, **kw), [z])


@quick
@given(seeds, st.integers(2, 3), st.integers(2, 4), st.sampled_from((0.02, 0.04, 0.1, 0.5)))
def test_rocl_with_its_guards(seed, views, n, tau):
    "Opposite views at a small temperature bring the loss to its end, -log g, where the gradient vanishes."
    z = features(seed, views, n, 4)
    z[0, 0] = -z[1, 0]
    z.requires_grad_()
    kw = dict(positives="sum", stop_columns=True, guard=1e-8)
    same(C.nt_xent(z, tau, **kw), plain_nt_xent(z, tau, **kw), [z])


def test_the_guard_ends_the_loss():
    z = torch.tensor([[[1.0, 0.0], [0.9, 0.1]], [[-1.0, 0.0], [-0.9, -0.1]]], dtype=torch.float64, requires_grad=True)
    guarded, free = C.nt_xent(z, 0.02, guard=1e-8), C.nt_xent(z, 0.02)
    assert abs(guarded + math.log(1e-8)) < 1e-6 and free > 90
    assert grads(guarded, z)[0].norm() < 1e-12 < grads(free, z)[0].norm()


@quick
@given(seeds, st.integers(2, 3), st.integers(2, 5), st.sampled_from(TAUS), st.booleans())
def test_masks_remove_candidates(seed, views, n, tau, by_view):
    z = features(seed, views, n, 6).requires_grad_()
    shape = (views, n, views, n) if by_view else (n, n)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    ours = C.nt_xent(z, tau, keep=keep)
    same(ours, plain_nt_xent(z, tau, keep=keep), [z])
    assert ours <= C.nt_xent(z, tau) + 1e-12
    none_removed = torch.ones(shape, dtype=torch.bool)
    assert C.nt_xent(z, tau, keep=none_removed) == C.nt_xent(z, tau)


def test_all_negatives_removed_is_no_loss():
    z = features(0, 2, 3, 4).requires_grad_()
    loss = C.nt_xent(z, keep=torch.zeros(3, 3, dtype=torch.bool))
    assert loss == 0 and (grads(loss, z)[0] == 0).all()


@quick
@given(seeds, st.integers(2, 5), st.sampled_from((0.05, 0.2, 0.5)), st.sampled_from((-0.5, 0.0, 0.5, 1.0, 2.0)),
       st.sampled_from((0.0, 0.1, 0.5)), st.sampled_from((0.1, 0.5, 2.0)))
def test_hcl_is_the_formula(seed, n, tau, beta, tau_plus, spread):
    u = C.unit(features(seed, 2, n, 5, spread=spread)).requires_grad_()
    pos, neg = C.view_pairs(u)
    log_neg, clamped = C.hard_log_sum(pos, neg, temperature=tau, beta=beta, tau_plus=tau_plus)
    same(C.contrast(pos, log_neg, tau).mean(), plain_hcl(u, tau, beta, tau_plus), [u], rtol=1e-8)
    assert torch.equal(log_neg[clamped], torch.full_like(log_neg[clamped], math.log(2 * (n - 1)) - 1 / tau))


def test_hcl_reports_clamped_queries():
    "Close views among far negatives: debiasing subtracts more than there is, and the negatives get no gradient."
    angles = torch.tensor([[0.0, 2.0, 4.0], [0.02, 2.02, 4.02]], dtype=torch.float64)
    u = torch.stack([angles.cos(), angles.sin()], -1)
    pos, (sim, mask) = C.view_pairs(u)
    sim.requires_grad_()
    log_neg, clamped = C.hard_log_sum(pos, (sim, mask), temperature=0.5, beta=1.0, tau_plus=0.1)
    assert clamped.all() and (grads(log_neg.sum(), sim)[0] == 0).all()
    log_neg, clamped = C.hard_log_sum(pos, (sim, mask), temperature=0.5, beta=1.0, tau_plus=0.01)
    assert not clamped.any() and (grads(log_neg.sum(), sim)[0][mask.expand_as(sim)] != 0).any()


@quick
@given(seeds, st.sampled_from(TAUS))
def test_hcl_limits(seed, tau):
    z = features(seed, 3, 4, 6).requires_grad_()
    pos, neg = C.view_pairs(C.unit(z))
    log_neg, clamped = C.hard_log_sum(pos, neg, temperature=tau, beta=0.0, tau_plus=0.0)
    assert not clamped.any()
    same(C.contrast(pos, log_neg, tau).mean(), C.nt_xent(z, tau), [z])
    harder = [C.hard_log_sum(pos, neg, temperature=tau, beta=b, tau_plus=0.0)[0] for b in (-0.9, 0.0, 1.0, 4.0)]
    assert all((a <= b + 1e-12).all() for a, b in zip(harder, harder[1:], strict=False))


@pytest.mark.parametrize("beta", [-0.5, 0.0, 1.0])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1])
@pytest.mark.parametrize("detach", [False, True])
def test_hcl_without_negatives_is_no_loss(beta, tau_plus, detach):
    "A query whose negatives are all removed costs nothing and moves nothing; the others are as without it, to the bit."
    pos, sim, keep = directions(0, 3, 1).requires_grad_(), directions(1, 3, 5).requires_grad_(), torch.ones(3, 5, dtype=torch.bool)
    keep[1] = False
    how = {"temperature": 0.5, "beta": beta, "tau_plus": tau_plus, "detach_weights": detach}
    log_neg, clamped = C.hard_log_sum(pos, (sim, keep), **how)
    loss = C.contrast(pos, log_neg, 0.5)
    assert log_neg[1] == -math.inf and not clamped[1] and loss[1] == 0
    others, rest = [0, 2], C.hard_log_sum(pos, (sim, torch.ones_like(keep)), **how)
    assert torch.equal(log_neg[others], rest[0][others]) and torch.equal(clamped[others], rest[1][others])
    for g, full in zip(grads(loss.sum(), pos, sim), grads(C.contrast(pos, rest[0], 0.5).sum(), pos, sim), strict=True):
        assert (g[1] == 0).all() and torch.equal(g[others], full[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cosine_is_the_product_of_directions(dtype):
    "To the bit, values and gradients."
    a, b = (features(s, 7, 5).to(dtype).requires_grad_() for s in (0, 1))
    ours, written = C.cosine(a, b), (C.unit(a) * C.unit(b)).sum(-1)
    assert ours.dtype == dtype and torch.equal(ours, written)
    assert all(map(torch.equal, grads(ours.sum(), a, b), grads(written.sum(), a, b)))


def test_the_cosine_is_no_half_precision():
    "In bfloat16 inputs a cosine near one would have steps of 1/256; autocast changes nothing either."
    a = features(0, 64, 128).bfloat16()
    b = (a + 0.02 * features(1, 64, 128)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16): ours = C.cosine(a, b)
    assert ours.dtype == torch.float32 and torch.equal(ours, C.cosine(a.float(), b.float()))
    assert (ours - C.cosine(a.double(), b.double())).abs().max() < 1e-6 and ours.min() < 1 - 1e-4


def test_hcl_with_several_positives_takes_their_mean():
    pos, sim = directions(0, 5, 3), directions(1, 5, 9)
    mean = (pos / 0.5).exp().mean(1, keepdim=True).log() * 0.5
    several, _ = C.hard_log_sum(pos, sim, temperature=0.5)
    torch.testing.assert_close(several, C.hard_log_sum(mean, sim, temperature=0.5)[0])


def test_hcl_with_constant_weights():
    "The weights computed first and given as a constant bias are the same loss with the same gradient."
    s = directions(0, 5, 9).requires_grad_()
    tau, beta, pos = 0.3, 1.5, torch.full((5, 1), 0.4, dtype=torch.float64)
    log_w = (beta * s / tau).log_softmax(1).detach() + math.log(9)
    constant, _ = C.hard_log_sum(pos, s, temperature=tau, beta=beta, tau_plus=0.0, detach_weights=True)
    same(constant.sum(), C.log_sum((s, log_w), temperature=tau).sum(), [s])
    official, _ = C.hard_log_sum(pos, s, temperature=tau, beta=beta, tau_plus=0.0)
    assert torch.allclose(official, constant) and not torch.allclose(grads(official.sum(), s)[0], grads(constant.sum(), s)[0], rtol=0.1)


@quick
@given(seeds, st.sampled_from(TAUS), st.sampled_from((-0.1, 0.0, 0.1, 0.4)), st.sampled_from((0.0, 1.0, 3.0)))
def test_ifm_is_two_cross_entropies(seed, tau, eps, alpha):
    q, k, bank = directions(seed, 4, 6).requires_grad_(), directions(seed + 1, 4, 6), directions(seed + 2, 9, 6)
    pos, neg, zero = (q * k).sum(1, keepdim=True), q @ bank.T, torch.zeros(4, dtype=torch.long)
    plain = F.cross_entropy(torch.cat([pos, neg], 1) / tau, zero)
    moved = F.cross_entropy(torch.cat([pos - eps, neg + eps], 1) / tau, zero)
    same(C.info_nce(q, k, neg, temperature=tau, margin=(eps, eps)), moved, [q])
    same(C.info_nce(q, k, neg, temperature=tau, margin=(eps, eps), alpha=alpha), (plain + alpha * moved) / (1 + alpha), [q])
    assert (moved - plain) * eps >= 0


@quick
@given(seeds, st.sampled_from(TAUS), st.integers(0, 4), st.integers(0, 3))
def test_mochi_is_made_of_vectors(seed, tau, s, s2):
    g = torch.Generator().manual_seed(seed)
    q, k, bank = directions(seed, 3, 5).requires_grad_(), directions(seed + 1, 3, 5), directions(seed + 2, 20, 5)
    bank[3] = -bank[2]  # an opposite pair
    i, j, j2 = (torch.randint(20, (3, size), generator=g) for size in (s, s, s2))
    a, b = torch.rand(3, s, generator=g, dtype=torch.float64), torch.rand(3, s2, generator=g, dtype=torch.float64) / 2
    h = F.normalize(a[..., None] * bank[i] + (1 - a[..., None]) * bank[j], dim=-1)
    h2 = F.normalize(b[..., None] * q.detach()[:, None] + (1 - b[..., None]) * bank[j2], dim=-1)
    sim = q @ bank.T
    ours = C.info_nce(q, k, sim, C.mix_pairs(sim, bank, i, j, a), C.mix_query(q, sim, j2, b), temperature=tau)
    all_logits = [(q * k).sum(1, keepdim=True), sim, (q[:, None] * h).sum(-1), (q[:, None] * h2).sum(-1)]
    same(ours, F.cross_entropy(torch.cat(all_logits, 1) / tau, torch.zeros(3, dtype=torch.long)), [q])
    assert (ours > C.info_nce(q, k, sim, temperature=tau)) == (s + s2 > 0)


def test_an_opposite_pair_mixed_in_halves_is_the_zero_vector():
    q, bank = directions(0, 1, 4).requires_grad_(), torch.eye(4, dtype=torch.float64)[:1]
    bank, zero, one = torch.cat([bank, -bank]), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)
    mixed = C.mix_pairs(q @ bank.T, bank, zero, one, torch.full((1, 1), 0.5, dtype=torch.float64))
    assert mixed.item() == 0 and (grads(mixed.sum(), q)[0] == 0).all()


@quick
@given(seeds, st.integers(2, 3), st.integers(2, 6), st.sampled_from(TAUS), st.booleans(), st.booleans())
def test_supcon_is_the_mean_over_pairs(seed, views, n, tau, normalise, labelled):
    z = features(seed, views, n, 5).requires_grad_()
    y = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed)) if labelled else None
    f, label = (F.normalize(z, dim=-1) if normalise else z).flatten(0, 1), (torch.arange(n) if y is None else y).repeat(views)
    itself = torch.eye(views * n, dtype=torch.bool)
    pos = (label[:, None] == label) & ~itself
    log_p = (f @ f.T / tau).masked_fill(itself, -math.inf).log_softmax(1).masked_fill(~pos, 0)
    theirs = tau / 0.07 * -(log_p.sum(1) / pos.sum(1)).mean()
    same(C.supcon(z, y, tau, base_temperature=0.07, normalise=normalise), theirs, [z])


@quick
@given(seeds, st.sampled_from(TAUS), st.integers(0, 3))
def test_in_batch_negatives_and_offset(seed, tau, offset):
    q, k, bank = directions(seed, 3, 6).requires_grad_(), directions(seed + 1, 6, 6), directions(seed + 2, 7, 6)
    theirs = F.cross_entropy(torch.cat([q @ k.T, q @ bank.T], 1) / tau, torch.arange(3) + offset)
    same(C.info_nce(q, k, q @ bank.T, temperature=tau, in_batch=True, offset=offset), theirs, [q])
    clip = F.cross_entropy(q @ k.T / tau, torch.arange(3) + offset)
    same(C.info_nce(q, k, temperature=tau, in_batch=True, offset=offset), clip, [q])


@quick
@given(seeds, st.sampled_from(TAUS))
def test_log_sum_is_the_formula(seed, tau):
    s, b = directions(seed, 3, 6).requires_grad_(), directions(seed + 1, 6).requires_grad_()
    keep = torch.rand(3, 6, generator=torch.Generator().manual_seed(seed)) > 0.3
    theirs = torch.logsumexp(torch.cat([s / tau + b, (s / tau).masked_fill(~keep, -math.inf)], 1), 1)
    ours = C.log_sum((s, b), (s, keep), temperature=tau)
    same(ours.sum(), theirs.sum(), [s, b])
    assert torch.allclose(C.log_sum(s, (s, keep), temperature=tau, power=0.0), (6.0 + keep.sum(1)).log().double())


def test_log_sum_twice_differentiated():
    s, b, keep = directions(0, 2, 3).requires_grad_(), directions(1, 3).requires_grad_(), torch.tensor([True, False, True])
    f = lambda s, b: C.log_sum((s, b), (s, keep), temperature=0.5)
    assert torch.autograd.gradcheck(f, (s, b)) and torch.autograd.gradgradcheck(f, (s, b))


def test_half_of_the_gradient():
    "RoCL's and ACL's losses are equal, their gradients are not; detached columns are constants."
    z = features(0, 2, 8, 32).requires_grad_()
    acl, rocl = C.nt_xent(z), C.nt_xent(z, stop_columns=True)
    (g_acl,), (g_rocl,) = grads(acl, z), grads(rocl, z)
    assert abs(acl - rocl) < 1e-14
    assert 0.4 < g_rocl.norm() / g_acl.norm() < 0.6 and not torch.allclose(g_acl, 2 * g_rocl, rtol=1e-3)


# Invariances


@quick
@given(seeds, st.integers(2, 4), st.integers(2, 6), st.sampled_from(TAUS), st.sampled_from(("mean", "sum", "inside")))
def test_order_and_length_do_not_matter(seed, views, n, tau, positives):
    g = torch.Generator().manual_seed(seed)
    z = features(seed, views, n, 7)
    loss = C.nt_xent(z, tau, positives=positives)
    for other in (
        z[torch.randperm(views, generator=g)],
        z[:, torch.randperm(n, generator=g)],
        z * torch.empty(views, n, 1, dtype=torch.float64).uniform_(0.01, 100, generator=g),
    ):
        torch.testing.assert_close(C.nt_xent(other, tau, positives=positives), loss, rtol=1e-11, atol=1e-11)


@quick
@given(seeds, st.integers(1, 4), st.floats(-20, 20), st.sampled_from(("mean", "sum", "inside")), st.sampled_from((0.05, 0.5)))
def test_a_shift_of_all_logits_changes_nothing(seed, P, shift, positives, tau):
    pos, sim = directions(seed, 5, P), directions(seed + 1, 5, 8)
    loss = C.contrast(pos, C.log_sum(sim, temperature=tau), tau, positives=positives)
    other = C.contrast(pos + shift, C.log_sum(sim + shift, temperature=tau), tau, positives=positives)
    torch.testing.assert_close(loss, other, rtol=1e-9, atol=1e-9)
    assert (loss >= 0).all()
    for up, down in ((0.1, 0.0), (0.0, 0.1)):
        assert (C.contrast(pos, C.log_sum(sim, temperature=tau), tau, positives=positives, margin=(up, down)) > loss).all()


@quick
@given(seeds, st.integers(2, 4), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)), st.sampled_from((0.01, *TAUS)))
def test_half_precision(seed, views, dtype, tau):
    "The error of a similarity is three roundings; the loss moves by at most twice that over tau."
    low = features(seed, views, 6, 16).to(dtype).requires_grad_()
    loss = C.nt_xent(low, tau)
    bound = 2 * 3 * torch.finfo(dtype).eps / tau + 1e-5
    assert loss.dtype == torch.float32 and (loss - C.nt_xent(low.double(), tau)).abs() <= bound
    (g,) = grads(loss, low)
    assert g.dtype == dtype and g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.005, 0.5])
@pytest.mark.parametrize("options", [{}, {"stop_columns": True, "guard": 1e-8}, {"positives": "inside"}])
def test_zero_vectors_duplicates_and_opposites(dtype, tau, options):
    z = torch.stack([torch.eye(5), -torch.eye(5), torch.eye(5)])
    z[:, 1], z[1, 2], z[0, 0] = z[:, 2], z[0, 2], 0
    z = z.to(dtype).requires_grad_()
    if "guard" in options and dtype == torch.float16: pytest.skip("z / (|z| + 1e-8) has the gradient 1e8 at zero")
    for loss in (C.nt_xent(z, tau, **options), C.supcon(z, temperature=tau)):
        assert loss.isfinite() and grads(loss, z)[0].isfinite().all()
    all_zero = torch.zeros(2, 3, 4, dtype=dtype, requires_grad=True)
    loss = C.nt_xent(all_zero, tau, **options)
    assert abs(loss - math.log(5)) < 1e-3 and grads(loss, all_zero)[0].isfinite().all()


def test_random_features_give_the_log_of_the_candidates():
    z = torch.randn(3, 128, 8192, generator=torch.Generator().manual_seed(0))
    assert abs(C.nt_xent(z, 0.5) - math.log(3 * 128 - 1)) < 0.02
    assert abs(C.info_nce(C.unit(z[0]), C.unit(z[1]), C.unit(z[0]) @ C.unit(z[2]).T, temperature=0.5) - math.log(129)) < 0.02


def test_reduction():
    z = features(0, 3, 4, 5)
    each = C.nt_xent(z, reduction="none")
    assert each.shape == (3, 4)
    torch.testing.assert_close(each.mean(), C.nt_xent(z))


# Memory


def kept(forward, size):
    seen = {}

    def pack(t):
        if t.is_floating_point() and t.numel() >= size: seen[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): forward()
    return list(seen.values())


n, K, d = 16, 512, 8
MEMORY = {
    "info_nce": lambda q, k, W: C.info_nce(q, k, q @ W.T),
    "info_nce_in_batch": lambda q, k, W: C.info_nce(q, k, q @ W.T, in_batch=True),
    "ifm": lambda q, k, W: C.info_nce(q, k, q @ W.T, margin=(0.1, 0.1), alpha=1.0),
    "hcl": lambda q, k, W: C.hard_log_sum(q[:, :1], q @ W.T, temperature=0.5)[0].sum(),
    "hcl_constant": lambda q, k, W: C.hard_log_sum(q[:, :1], q @ W.T, temperature=0.5, detach_weights=True)[0].sum(),
    "caco": lambda q, k, W: C.log_sum(C.select(q @ W.T, torch.arange(n))[1], temperature=0.5).sum(),
    "two_temperatures": lambda q, k, W: (lambda s: C.log_sum(s, temperature=0.1) + C.log_sum(s, temperature=0.02))(q @ W.T).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MEMORY)
def test_one_matrix_is_kept(name, dtype):
    q, k, W = (C.unit(torch.randn(m, d)).to(dtype).requires_grad_() for m in (n, n, K))
    tensors = kept(lambda: MEMORY[name](q, k, W), n * K)
    assert [(t.shape, t.dtype) for t in tensors] == [((n, K), dtype)]


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("loss", [C.nt_xent, C.supcon])
def test_one_matrix_is_kept_of_a_batch(loss, views):
    z = torch.randn(views, 32, 4, requires_grad=True)
    tensors = kept(lambda: loss(z), 32 * 32 + 1)
    assert [t.numel() for t in tensors] == [(views * 32) ** 2]


def test_mochi_keeps_one_matrix_and_builds_no_vectors():
    q, k, W = (C.unit(torch.randn(m, d)).requires_grad_() for m in (n, n, K))
    i, j, share = torch.randint(K, (n, 100)), torch.randint(K, (n, 100)), torch.rand(n, 100)

    def loss():
        sim = q @ W.detach().T
        return C.info_nce(q, k, sim, C.mix_pairs(sim, W, i, j, share), C.mix_query(q, sim, j, share / 2))

    assert [t.shape for t in kept(loss, n * K)] == [(n, K)]


# Oracle


def test_lightly_agrees():
    lightly = pytest.importorskip("lightly.loss")
    z = features(0, 2, 6, 8).float().requires_grad_()
    for tau in (0.1, 0.5):
        theirs = lightly.NTXentLoss(temperature=tau)(z[0], z[1])
        torch.testing.assert_close(C.nt_xent(z, tau), theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads(C.nt_xent(z, tau), z), grads(theirs, z), rtol=1e-4, atol=1e-6)


# Messages

z, q, bank = torch.randn(2, 4, 8), torch.randn(4, 8), torch.randn(9, 8)
one = torch.zeros(4, 1)
WRONG = [
    (lambda: C.nt_xent(z, 0.0), "temperature must be a finite number > 0, got 0.0"),
    (lambda: C.nt_xent(z, -0.1), "temperature"),
    (lambda: C.log_sum(q, temperature=math.nan), "temperature"),
    (lambda: C.contrast(one, one[:, 0], math.inf), "temperature"),
    (lambda: C.logits(one, temperature=0), "temperature"),
    (lambda: C.supcon(z, temperature=0), "temperature"),
    (lambda: C.nt_xent(z[0]), r"\(4, 8\); torch.stack"),
    (lambda: C.nt_xent(z[:1]), "views >= 2"),
    (lambda: C.nt_xent(z[:, :1]), "n >= 2"),
    (lambda: C.nt_xent(z.long()), "floating point"),
    (lambda: C.nt_xent(z[..., :0]), r"\(2, 4, 0\)"),
    (lambda: C.supcon(z[:1]), "views >= 2"),
    (lambda: C.supcon(z, torch.zeros(8)), r"labels must have shape \(4,\)"),
    (lambda: C.nt_xent(z, keep=torch.ones(4, 4)), "keep must be boolean"),
    (lambda: C.nt_xent(z, keep=torch.ones(8, 8, dtype=torch.bool)), r"\(2, 4, 2, 4\)"),
    (lambda: C.nt_xent(z, positives="all"), "'inside', got 'all'"),
    (lambda: C.nt_xent(z, reduction="sum"), "'none', got 'sum'"),
    (lambda: C.info_nce(q, q), "in_batch=True"),
    (lambda: C.info_nce(q, q, bank), "q @ vectors.T"),
    (lambda: C.info_nce(q, q[:2], q @ bank.T), "k must hold the key"),
    (lambda: C.info_nce(q, q[:, :2], q @ bank.T), "k must hold the key"),
    (lambda: C.info_nce(q, q, in_batch=True, offset=1), "offset 1"),
    (lambda: C.select(q, torch.zeros(3, dtype=torch.long)), "one column for each row"),
    (lambda: C.log_sum(torch.ones(3, 4, dtype=torch.bool), temperature=1.0), "pair"),
    (lambda: C.log_sum(temperature=1.0), "no negative"),
    (lambda: C.log_sum((q, torch.ones(4, 4, dtype=torch.int64)), temperature=1.0), "a mask of 0 and 1 wants .bool()"),
    (lambda: C.hard_log_sum(one[:, 0], q, temperature=0.5), r"pos\[..., None\]"),
    (lambda: C.info_nce(q, q, q @ bank.T, alpha=-1.0), "alpha is a finite weight >= 0"),
    (lambda: C.contrast(one[:, 0], one[:, 0], 0.5), r"pos\[..., None\]"),
    (lambda: C.contrast(torch.zeros(()), torch.zeros(()), 0.5), r"pos\[..., None\]"),
    (lambda: C.hard_log_sum(one, q, temperature=0.5, beta=-1.0), "beta must be > -1"),
    (lambda: C.hard_log_sum(one, q, temperature=0.5, tau_plus=1.0), "tau_plus"),
    (lambda: C.mix_query(q, q @ bank.T, torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 3)), "shares and indices"),
    (lambda: C.mix_pairs(q @ bank.T, bank, torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2, dtype=torch.long), one), "shares"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_input_says_what_to_do(case):
    call, message = WRONG[case]
    with pytest.raises(ValueError, match=message): call()
