"Paired comparison: scipy as oracle, enumeration for small n, symmetries by hypothesis, and mutants that the same checks must reject."

import json
import math
import sys
import types
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advssl.evaluate import compare
from advssl.evaluate.compare import Effect, difference, holm, interaction, pack, score_interval, unpack
from advssl.evaluate.statistics import t_interval, wilson

stats = pytest.importorskip("scipy.stats")
examples = settings(max_examples=40, deadline=None)
Z = 1.959963984540054

bits = lambda low=1, high=40: st.lists(st.booleans(), min_size=low, max_size=high)
pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
mask = lambda values: torch.tensor(values, dtype=torch.bool)
signs = lambda n10, n01, n: torch.tensor([1] * n10 + [-1] * n01 + [0] * (n - n10 - n01))
both = lambda found: (mask([a for a, _ in found]), mask([b for _, b in found]))


def runs(seeds, n, p, seed=0):
    "Masks of `seeds` runs that share how hard an image is."
    torch.manual_seed(seed)
    hard = torch.rand(n)
    return [0.5 * hard + 0.5 * torch.rand(n) < p for _ in range(seeds)]


def record(m): return {"right": pack(m), "total": len(m), "correct": int(m.sum())}
def row(seed, m, test="t", key="linear.clean"): return {"seed": seed, "evaluation": {"data_sha256": {"test": test}, key: record(m)}}


# masks


@examples
@given(bits())
def test_pack_and_unpack(values):
    m = mask(values)
    assert torch.equal(unpack(pack(m), len(m)), m) and len(pack(m)) == 2 * math.ceil(len(m) / 8)
    assert json.loads(json.dumps(pack(m))) == pack(m)


@pytest.mark.parametrize("text, n", [("b180", 17), ("b180", 8), ("b1", 9), ("zz", 8), ("b", 4), ("01", 7)])
def test_unpack_refuses(text, n):
    with pytest.raises(ValueError): unpack(text, n)


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(3, dtype=torch.uint8), torch.ones(3, 1, dtype=torch.bool)])
def test_pack_refuses(wrong):
    with pytest.raises(ValueError, match="bool"): pack(wrong)


# the checks that mutants have to fail; `m` is the module or a mutant of it


def agrees_with_binomtest(m):
    for n10, n01 in ((0, 0), (5, 0), (0, 6), (3, 4), (60, 40), (900, 1100), (4000, 4001)):
        expected = stats.binomtest(n10, n10 + n01, 0.5).pvalue if n10 + n01 else 1.0
        assert m.sign_flip_test(signs(n10, n01, 10_000)) == pytest.approx(expected, rel=1e-8)


def agrees_with_enumeration(m):
    torch.manual_seed(0)
    for n in range(1, 10):
        x = torch.randint(-3, 4, (n,))
        flips = torch.tensor(list(product((-1, 1), repeat=n)))
        assert m.sign_flip_test(x) == pytest.approx(((flips * x).sum(1).abs() >= x.sum().abs()).double().mean().item(), rel=1e-10)


def agrees_with_ttest(m):
    for s in range(4):
        a, b = runs(3 + s, 300, 0.5, seed=s), runs(3 + s, 300, 0.45, seed=s + 10)
        effect = m.difference(a, b)
        accuracies = [[x.double().mean().item() for x in side] for side in (a, b)]
        found = stats.ttest_rel(*accuracies)
        interval = found.confidence_interval(0.95)
        assert (effect.p, effect.low, effect.high) == pytest.approx((found.pvalue, interval.low, interval.high), rel=1e-6)
        assert effect.over == "seeds" and effect.value == pytest.approx(sum(accuracies[0]) / len(a) - sum(accuracies[1]) / len(a))


def solves_its_equation(m):
    "The interval against a grid of candidates, each with the likelihood maximised by Newton's method in the multiplier."
    torch.manual_seed(1)
    some = [(torch.randint(-2, 3, (25,)), 2), (torch.randint(0, 3, (12,)), 2)]
    for values, bound in [(signs(3, 1, 20), 1), (signs(0, 4, 15), 1), (signs(0, 0, 9), 1), *some]:
        v = torch.arange(-bound, bound + 1).double()
        counts = (values[:, None] == v).sum(0).double()
        n, mean = counts.sum(), values.double().mean()
        low, high = m.score_interval(values, (-bound, bound))
        for delta in torch.linspace(-bound + 0.01, bound - 0.01, 60).double():
            c, u = counts + 1e-9 * torch.tensor([1.0] + [0.0] * (len(v) - 2) + [1.0]), v - delta  # ends that no image has may take weight
            below, above = -1 / u.max(), -1 / u.min()  # 1 + t u > 0
            for _ in range(200):
                t = (below + above) / 2
                below, above = (t, above) if (c * u / (1 + t * u)).sum() > 0 else (below, t)
            p = c / (1 + t * u)
            p = p / p.sum()
            kept = n * (mean - delta) ** 2 <= Z**2 * (p * u**2).sum()
            if min(abs(delta - low), abs(delta - high)) > 1e-4: assert bool(kept) == (low < delta < high), (values, delta, low, high)


def is_wilson_and_tango(m):
    for k, n in ((0, 7), (3, 7), (7, 7), (450, 1000)):
        assert m.score_interval(torch.arange(n) < k, (0, 1)) == pytest.approx(wilson(k, n), abs=1e-9)
    for n10, n01, n in ((3, 1, 20), (12, 5, 200), (0, 4, 30), (40, 0, 60)):
        for delta in m.score_interval(signs(n10, n01, n)):
            b, c = (2 * n - n10 + n01) * delta - n10 - n01, -n01 * delta * (1 - delta)
            q = (-b + math.sqrt(b * b - 8 * n * c)) / (4 * n)
            assert n * ((n10 - n01) / n - delta) ** 2 == pytest.approx(Z**2 * (2 * q + delta - delta**2), rel=1e-6)


def follows_the_rule(m):
    a, b = runs(3, 200, 0.5), runs(3, 200, 0.4, seed=1)
    assert [m.difference(a[:k], b[:k]).over for k in (1, 2, 3)] == ["images", "images", "seeds"]
    assert m.difference([a[0]] * 4, [b[0]] * 4).over == "images"  # no spread: the same as one run
    assert m.difference([a[0]] * 4, [b[0]] * 4).high == pytest.approx(m.difference(a[:1], b[:1]).high)
    two = m.difference(a[:2], b[:2])
    sums = sum(x.long() - y.long() for x, y in zip(a[:2], b[:2]))
    assert (two.low, two.high) == pytest.approx([end / 2 for end in m.score_interval(sums, (-2, 2))])
    assert (m.screening(2, 10_000), m.screening(3, 999), m.screening(3, 1000)) == (True, True, False)
    wide = m.interaction(a[:1], [~x for x in a[:1]], [~x for x in a[:1]], a[:1])
    assert -2 <= wide.low <= wide.value <= wide.high <= 2 and wide.value == pytest.approx(2 * (2 * a[0].double().mean().item() - 1))


def averages_over_states(m):
    "Every image asked five times gives the effect of one question where all five answers agree, over images and over seeds."
    a, b = runs(3, 60, 0.5), runs(3, 60, 0.4, seed=1)
    five = lambda side: [m.repeated(x.repeat(5, 1)) for x in side]
    for k in (1, 2, 3):
        one, many = m.difference(a[:k], b[:k]), m.difference(five(a[:k]), five(b[:k]))
        assert (one.value, one.low, one.high, one.p) == pytest.approx((many.value, many.low, many.high, many.p))
        assert one.images == many.images
    mixed = m.repeated(torch.stack([a[0], ~a[0]]))  # every image right once of two times
    assert mixed["value"] == 0.5 and mixed["total"] == 120 and mixed["high"] - mixed["low"] < 0.1
    assert m.bold([five([torch.arange(60) < k]) for k in (9, 50)]) == [False, True]
    for wrong in (five(b[:1])[0] | {"correct": 1}, b[0]):
        with pytest.raises(ValueError): m.difference(five(a[:1]), [wrong])


def holds_the_family(m):
    first, second, third, none, last = m.holm([0.01, 0.04, 0.03, None, 0.005])
    assert none is None and (first, second, third, last) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert m.holm([0.9, 0.8, 0.001]) == [1.0, 1.0, pytest.approx(0.003)] and m.holm([]) == []


def reads_rows(m):
    a, b = runs(3, 50, 0.5), runs(3, 50, 0.4, seed=1)
    rows_a, rows_b = [row(s, x) for s, x in enumerate(a)], [row(s, x) for s, x in reversed(list(enumerate(b)))]
    assert m.difference_rows(rows_a, rows_b, "linear.clean") == m.difference(a, b)
    assert m.difference_rows(rows_a[1:], rows_b, "linear.clean") == m.difference(a[1:], b[1:])
    assert m.difference_rows(rows_a, rows_b, "linear.clean", "knn.clean") is None
    assert m.difference_rows([], rows_b, "linear.clean") is None and m.difference_rows(rows_a, [row(9, b[0])], "linear.clean") is None
    bare = [{"seed": 0, "evaluation": {"linear.clean": {"correct": 3, "total": 9}, "data_sha256": {"test": "t"}}}]
    assert m.difference_rows(bare, rows_b, "linear.clean") is None
    sides = [(r, "linear.clean") for r in (rows_a, rows_b, rows_b, rows_a)]
    assert m.interaction_rows(sides).value == pytest.approx(2 * m.difference(a, b).value)
    for wrong in ([row(0, b[0], "u")], [row(0, b[0][:9])], rows_b + rows_b[:1]):
        with pytest.raises(ValueError): m.difference_rows(rows_a, wrong, "linear.clean")


def prints_in_bold(m):
    torch.manual_seed(2)
    best = torch.rand(1000) < 0.6
    near, far = best.clone(), best & (torch.rand(1000) < 0.8)
    near[:30] = ~near[:30]
    assert m.bold([[best], None, [near], [far]]) == [True, False, True, False]
    assert m.bold([[far], [best]]) == [False, True] and m.bold([]) == []
    six = torch.ones(40, dtype=torch.bool)
    worse = [torch.arange(40) >= 6] * 3  # p = 2 / 64 each: alone below 5 %, in a family of three not
    assert m.bold([[six], worse[:1]]) == [True, False] and m.bold([[six], *([w] for w in worse)]) == [True] * 4


def judges(m):
    assert m.Effect(0.1, 0.01, 0.2, 0.03, 1, 100).sign == 1 and m.Effect(-0.1, -0.2, -0.01, 0.03, 1, 100).sign == -1
    assert m.Effect(0.1, 0.01, 0.2, 0.06, 1, 100).sign == 0 and m.Effect(0.1, -0.01, 0.2, 0.03, 1, 100).sign == 0
    assert m.Effect(0.1, 0.01, 0.2, 0.03, 1, 100, level=0.99).sign == 0


CHECKS = [agrees_with_binomtest, agrees_with_enumeration, agrees_with_ttest, solves_its_equation, is_wilson_and_tango,
          follows_the_rule, averages_over_states, holds_the_family, reads_rows, prints_in_bold, judges]


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_check(check): check(compare)


MUTANTS = [
    (">= abs(int(values.sum()))", "> abs(int(values.sum()))", agrees_with_binomtest),
    ("- m * math.log(2))", ")", agrees_with_binomtest),
    ("spaced[::size]", "spaced[:count + 1]", agrees_with_enumeration),
    ("heads = np.convolve(heads, spaced)", "heads = spaced", agrees_with_enumeration),
    ("2 * np.arange(len(heads)) - (len(heads) - 1)", "2 * np.arange(len(heads)) - len(heads)", agrees_with_binomtest),
    ("p @ (w - delta) ** 2", "p @ (w - mean) ** 2", is_wilson_and_tango),
    ("counts + EMPTY * n * (w == 1)", "counts", solves_its_equation),
    ("p /= p.sum()", "p /= n", is_wilson_and_tango),
    ("1 - _reach(1 - w[::-1], counts[::-1], z2)", "1 - _reach(w, counts, z2)", solves_its_equation),
    ("counts[[0, -1]] -= 1", "pass", is_wilson_and_tango),
    ("df - 1) / _cosine_integral", "df) / _cosine_integral", agrees_with_ttest),
    ("/ math.sqrt(len(values)))", ")", agrees_with_ttest),
    ("_effect(a - b, repeats, 1, level)", "_effect(b - a, repeats, 1, level)", agrees_with_ttest),
    ("_effect((a - b) - (c - d), ", "_effect((a - b) + (c - d), ", follows_the_rule),
    ("(c - d), repeats, 2, level)", "(c - d), repeats, 1, level)", follows_the_rule),
    ("seeds >= SEEDS and len(sums.unique()) > 1", "seeds >= SEEDS - 1 and len(sums.unique()) > 1", follows_the_rule),
    ("seeds >= SEEDS and len(sums.unique()) > 1", "seeds >= SEEDS", follows_the_rule),
    ("(end / parts for end in", "(end for end in", follows_the_rule),
    ("parts = values.sum(0), seeds * repeats", "parts = values.sum(0), seeds", averages_over_states),
    ("/ (seeds * images * repeats)", "/ (seeds * images)", averages_over_states),
    ("(sums.double() / (images * repeats))", "(sums.double() / images)", averages_over_states),
    ("seeds < SEEDS or images < IMAGES", "seeds < SEEDS and images < IMAGES", follows_the_rule),
    ("(len(known) - k) * p", "len(known) * p", holds_the_family),
    ("max(largest, min(1.0, (len(known) - k) * p))", "min(1.0, (len(known) - k) * p)", holds_the_family),
    ("sorted(set.intersection(*map(set, found)))", "sorted(set.union(*map(set, found)))", reads_rows),
    ('len({e.get("data_sha256", {}).get("test") for e in used}) > 1', "False", reads_rows),
    ("if len(found[-1]) < len(rows): raise", "if False: raise", reads_rows),
    ("e.low > 0 and p <= 1 - level", "p <= 1 - level and e.low > 0 and False", prints_in_bold),
    ("holm([e.p for e in effects.values()])", "[e.p for e in effects.values()]", prints_in_bold),
    ("(self.p <= 1 - self.level) * (", "(", judges),
    ("(self.low > 0) - (self.high < 0)", "(self.value > 0) - (self.value < 0)", judges),
]


@pytest.mark.parametrize("old, new, check", MUTANTS, ids=[m[1][:40] for m in MUTANTS])
def test_mutants_die(old, new, check):
    source = Path(compare.__file__).read_text()
    assert source.count(old) == 1, old
    mutant = types.ModuleType("advssl.evaluate.mutant")
    mutant.__package__ = "advssl.evaluate"
    sys.modules[mutant.__name__] = mutant  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
        with pytest.raises((Exception, pytest.fail.Exception)): check(mutant)  # the latter: an error that was not raised
    finally: del sys.modules[mutant.__name__]


# properties


@examples
@given(pairs)
def test_difference_is_antisymmetric(found):
    a, b = both(found)
    there, back = difference([a], [b]), difference([b], [a])
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-9)
    assert there.p == back.p and -1 <= there.low <= there.value + 1e-9 and there.value - 1e-9 <= there.high <= 1


@examples
@given(pairs, st.randoms(use_true_random=False))
def test_agreement_and_order_do_not_matter(found, random):
    "Only discordant images and the number of images count: turning both-right into both-wrong changes nothing, nor does a shuffle."
    a, b = both(found)
    turned = [(not x, not y) if x == y else (x, y) for x, y in found]
    random.shuffle(turned)
    one, other = difference([a], [b]), difference(*([m] for m in both(turned)))
    assert (one.value, one.low, one.high, one.p) == pytest.approx((other.value, other.low, other.high, other.p), abs=1e-12)


@examples
@given(bits(), st.integers(1, 4))
def test_a_method_does_not_differ_from_itself(values, seeds):
    m = mask(values)
    e = difference([m] * seeds, [m] * seeds)
    assert (e.value, e.p, e.sign, e.over) == (0, 1, 0, "images") and e.high == pytest.approx(-e.low) and e.high > 0


@examples
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_ordered_and_larger(p):
    adjusted = holm(p)
    assert all(a >= b and a <= 1 for a, b in zip(adjusted, p))
    order = sorted(range(len(p)), key=p.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)


@examples
@given(st.integers(1, 60), st.data())
def test_interval_narrows(n, data):
    "Within the bounds, around the mean, and narrower for a lower level and for the same shares of more images."
    n10 = data.draw(st.integers(0, n))
    x = signs(n10, data.draw(st.integers(0, n - n10)), n)
    low, high = score_interval(x)
    inner, more = score_interval(x, level=0.8), score_interval(x.repeat(4))
    eps = 1e-9
    for a, b in (inner, more): assert low - eps <= a <= x.double().mean() + eps and x.double().mean() - eps <= b <= high + eps
    assert -1 <= low <= high <= 1


def test_no_rounding_leads_below_zero():
    values = [1.000000040220021, 1.000226346577811, 1.0000000000051898, 1.0000000096522454, 1.0000002909319057, 1.000006222330476]
    assert compare.t_test(values) == 0.0 and holm([compare.t_test(values), 0.5]) == [0.0, 0.5]
    assert compare.sign_flip_test(torch.ones(1200).long()) == 0.0  # it underflows


def test_shift_of_all_seeds():
    "The same change of every seed of A moves the interval over seeds and leaves its width."
    a, b = runs(4, 400, 0.4), runs(4, 400, 0.4, seed=3)
    up = []
    for m in a:  # twenty more right answers in each seed
        m = m.clone()
        m[(~m).nonzero()[:20, 0]] = True
        up.append(m)
    one, other = difference(a, b), difference(up, b)
    assert (other.value - one.value, other.low - one.low, other.high - one.high) == pytest.approx((0.05,) * 3, abs=1e-9)


def test_coverage_over_seeds_with_real_masks():
    "Runs of equal accuracy: about 5 % of the intervals over seeds exclude 0."
    torch.manual_seed(0)
    outside = 0
    for _ in range(400):
        skill = 0.5 + 0.05 * torch.randn(6)
        masks = [torch.rand(120) < s for s in skill]
        e = difference(masks[:3], masks[3:])
        outside += e.low > 0 or e.high < 0
    assert outside / 400 == pytest.approx(0.05, abs=0.03)


def test_effect_as_text_and_json():
    e = difference(runs(3, 1000, 0.5), runs(3, 1000, 0.4, seed=1))
    assert Effect(**json.loads(json.dumps(e.to_json()))) == e and "screening" not in str(e) and "3 seeds, 1000 images" in str(e)
    assert "1 seed, 40 images, screening" in str(difference(runs(1, 40, 0.5), runs(1, 40, 0.5, seed=1)))
    values = [x.double().mean().item() - y.double().mean().item() for x, y in zip(runs(3, 1000, 0.5), runs(3, 1000, 0.4, seed=1))]
    assert (e.low, e.high) == pytest.approx(t_interval(values))


@pytest.mark.parametrize("a, b", [
    (mask([1, 0]), [mask([1, 0])]), ([], []), ([mask([1])], [mask([1, 0])]), ([mask([1])] * 2, [mask([1])]),
    ([torch.ones(3)], [torch.ones(3)]), ([mask([])], [mask([])]), ([record(mask([1, 0])) | {"correct": 2}], [mask([1, 0])]),
])
def test_difference_refuses(a, b):
    with pytest.raises(ValueError): difference(a, b)


def test_interaction_is_a_difference_of_differences():
    a, b, c, d = (runs(3, 300, p, seed=s) for s, p in enumerate((0.6, 0.4, 0.5, 0.45)))
    e = interaction(a, b, c, d)
    assert e.value == pytest.approx(difference(a, b).value - difference(c, d).value) and e.over == "seeds"
    assert interaction(a[:1], b[:1], c[:1], c[:1]).value == pytest.approx(difference(a[:1], b[:1]).value)
    wider, plain = interaction(a[:1], b[:1], c[:1], c[:1]), difference(a[:1], b[:1])
    assert wider.low == pytest.approx(plain.low, abs=2e-3) and wider.p == pytest.approx(plain.p)
