"""The ledger: every verdict word for every kind of comparison, no number where a row is missing, and rows found where runs leave them."""

import json
from dataclasses import replace

import pytest
import torch

from advssl.evaluate.compare import pack
from advssl.evaluate.finetune import MODES
from advssl.evaluate.statistics import Accuracy
from advssl.method import methods, settings
from advssl.suite import store
from advssl.suite.claims import Found, claim_rows, ensemble_rows, forest, judge, key_of, p_value, word_of
from advssl.suite.ledger import CLAIMS, TOGETHER, Claim, Comparison, Side, needs, reported
from advssl.suite.published import published
from advssl.suite.scales import resolve, run_folder
from advssl.suite.store import CONTRADICTED, NO_DATA, SUPPORTED, UNDECIDED
from advssl.suite.targets import TARGETS

SCALE, N = "demo", 1000
METRICS = ("clean", "robust", "pgd", "eot")
A, B = Side("acl"), Side("simclr")


def answers(share, shift=0):
    mask = torch.roll(torch.arange(N) < round(share * N), shift)
    return Accuracy.of(mask).to_json() | {"right": pack(mask)}


def row(side, seed=0, history=(), **shares):
    "A result row with the named accuracies."
    found = {key_of(side, metric, SCALE): answers(share) for metric, share in shares.items()} | {"data_sha256": {"test": "x"}}
    if history:
        found[f"{side.mode}.clean"] = answers(0.5) | {
            "history": [{"epoch": i, "robust": v} for i, v in enumerate(history, 1)],
            "heldout_images": 1000,
            "epoch": len(history),
        }
    return {"seed": seed, "stale": False, "mode": side.mode, "folder": "x", "evaluation": found}


def verdict(a, b, part, seeds=1):
    "Of a claim with one part, from accuracies of its sides."
    make = lambda side, metric, share: [row(side, s, **{metric: share + 0.001 * s}) for s in range(seeds)]
    found = {part.a: make(part.a, part.metric, a)} | ({part.b: make(part.b, part.other or part.metric, b)} if part.b != part.a else {})
    if part.a == part.b:
        found[part.a] = [row(part.a, **{part.metric: a, part.other: b})]
    return judge(found, SCALE, [Claim("x", "x", "x", (part,))])[0]


@pytest.mark.parametrize(
    ("part", "cases"),
    [
        (Comparison(A, B), [(0.6, 0.4, SUPPORTED), (0.402, 0.4, UNDECIDED), (0.4, 0.402, UNDECIDED), (0.4, 0.6, CONTRADICTED)]),
        (Comparison(A, B, "clean"), [(0.6, 0.4, SUPPORTED), (0.4, 0.4, UNDECIDED), (0.4, 0.6, CONTRADICTED)]),
        (
            Comparison(A, B, bound=-0.05),
            [(0.4, 0.4, SUPPORTED), (0.39, 0.4, SUPPORTED), (0.6, 0.4, SUPPORTED), (0.35, 0.4, UNDECIDED), (0.3, 0.4, CONTRADICTED)],
        ),
        (
            Comparison(A, B, bound=0.1),
            [(0.6, 0.4, SUPPORTED), (0.5, 0.4, UNDECIDED), (0.45, 0.4, CONTRADICTED), (0.4, 0.4, CONTRADICTED)],
        ),
        (
            Comparison(A, B, how="differs", bound=0.03),
            [(0.6, 0.4, SUPPORTED), (0.4, 0.6, SUPPORTED), (0.4, 0.4, CONTRADICTED), (0.404, 0.4, CONTRADICTED)],
        ),
        (
            Comparison(Side("rush"), Side("rush"), "pgd", other="eot"),
            [(0.6, 0.4, SUPPORTED), (0.4, 0.4, UNDECIDED), (0.4, 0.6, CONTRADICTED)],
        ),
        (Comparison(Side("rush"), A, "eot", other="robust"), [(0.6, 0.4, SUPPORTED), (0.4, 0.402, UNDECIDED), (0.4, 0.6, CONTRADICTED)]),
        (
            Comparison(Side("byorl", "slf"), Side("byol", "alf")),
            [(0.6, 0.4, SUPPORTED), (0.401, 0.4, UNDECIDED), (0.1, 0.3, CONTRADICTED)],
        ),
    ],
    ids=str,
)
def test_every_word_of_every_kind(part, cases):
    for a, b, word in cases:
        assert verdict(a, b, part).word == word, (a, b, word)


def test_scattered_answers_can_leave_a_difference_undecided():
    "Two sides that differ on many images, in both directions: neither different nor the same."
    part = Comparison(A, B, how="differs", bound=0.02)
    key = key_of(A, "robust", SCALE)
    found = {A: [row(A, robust=0.5)], B: [row(B, robust=0.5)]}
    found[B][0]["evaluation"][key] = answers(0.49, shift=300)
    assert judge(found, SCALE, [Claim("x", "x", "x", (part,))])[0].word == UNDECIDED


@pytest.mark.parametrize(
    ("start", "none", "word", "epochs"),
    [
        ([0.2, 0.4, 0.5], [0.1, 0.2, 0.3], SUPPORTED, "2 against 3"),
        ([0.1, 0.1, 0.1], [0.1, 0.2, 0.3], CONTRADICTED, "never against 3"),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], UNDECIDED, "3 against 3"),
        ([0.2, 0.3, 0.3], [0.1, 0.3, 0.3], UNDECIDED, "2 against 2"),  # its own best epoch is another question
    ],
)
def test_sooner(start, none, word, epochs):
    a, b = Side("adv-rotation", "aff"), Side("untrained", "aff")
    claim = Claim("x", "x", "x", (Comparison(a, b, how="sooner"),))
    found = {a: [row(a, history=start)], b: [row(b, history=none)]}
    (made,) = judge(found, SCALE, [claim])
    assert made.word == word and made.found[0].detail == f"reached after epoch {epochs}" and made.found[0].p is None and made.screening
    for side in found:
        assert judge({**found, side: []}, SCALE, [claim])[0].word == NO_DATA
    del found[a][0]["evaluation"]["aff.clean"]["history"]
    assert judge(found, SCALE, [claim])[0].word == NO_DATA


def everything():
    "A row with every metric for every side of the ledger."
    out = {}
    for side in {side: None for claim in CLAIMS for side in claim.sides}:
        shares = {"clean": 0.7, "robust": 0.4, "eot": 0.35}
        out[side] = [row(side, **shares)]
        if side.mode == "aff":
            out[side][0]["evaluation"]["aff.clean"] |= {
                "history": [{"epoch": i, "robust": 0.1 * i} for i in (1, 2, 3)],
                "heldout_images": 300,
                "epoch": 3,
            }
    return out


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_taking_any_row_away_leaves_no_data(claim, monkeypatch):
    monkeypatch.setattr("advssl.suite.claims.p_value", lambda *_: 0.001)  # tested below, and slow
    found = everything()
    (whole,) = judge(found, SCALE, [claim])
    assert whole.word != NO_DATA and whole.screening
    for side in claim.sides:
        for how in ("row", "key", "answers"):
            less = {k: json.loads(json.dumps(v)) for k, v in found.items()}
            if how == "row":
                less[side] = []
            else:
                for key in list(less[side][0]["evaluation"]):
                    if key == "data_sha256":
                        continue
                    if how == "key":
                        del less[side][0]["evaluation"][key]
                    else:
                        less[side][0]["evaluation"][key].pop("right"), less[side][0]["evaluation"][key].pop("history", None)
            (made,) = judge(less, SCALE, [claim])
            assert made.word == NO_DATA, (side, how)
            lost = [one for one in made.found if side in (one.part.a, one.part.b)]
            assert lost and all(one.word == NO_DATA and one.effect is None and one.p is None and one.missing for one in lost)


def test_one_seed_of_three_missing_leaves_no_data():
    part = Comparison(A, B)
    claim = Claim("x", "x", "x", (part,))
    make = lambda side, share, seeds: [row(side, s, robust=share + 0.002 * s * (side == A)) for s in seeds]
    key = key_of(A, "robust", "laptop")
    rename = lambda rows: [r | {"evaluation": {key: r["evaluation"][key_of(A, "robust", SCALE)], "data_sha256": {}}} for r in rows]
    whole = {A: rename(make(A, 0.6, range(3))), B: rename(make(B, 0.4, range(3)))}
    (made,) = judge(whole, "laptop", [claim])
    assert (made.word, made.seeds, made.screening, made.found[0].effect.images) == (SUPPORTED, 3, False, N)
    for side in (A, B):
        assert judge({**whole, side: whole[side][:2]}, "laptop", [claim])[0].word == NO_DATA
    shuffled = {A: whole[A][::-1], B: whole[B]}
    assert judge(shuffled, "laptop", [claim])[0].found[0].effect == made.found[0].effect


def test_p_values_are_corrected_over_the_whole_ledger():
    "What alone is a discovery is none among many questions."
    part = Comparison(A, B)
    found = {A: [row(A, robust=0.409)], B: [row(B, robust=0.4)]}
    alone = judge(found, SCALE, [Claim("x", "x", "x", (part,))])[0]
    assert alone.word == SUPPORTED and 0.001 < alone.found[0].p < 0.05
    many = judge(found, SCALE, [Claim(str(i), "x", "x", (part,)) for i in range(20)])
    assert {v.word for v in many} == {UNDECIDED} and many[0].found[0].p == pytest.approx(min(1, 20 * alone.found[0].p))


def test_parts_are_joined_by_the_rule():
    sides = [Side(m) for m in ("acl", "rocl", "clae")]
    found = {s: [row(s, robust=share)] for s, share in zip(sides, (0.6, 0.6, 0.2))} | {B: [row(B, robust=0.4)]}
    parts = tuple(Comparison(s, B) for s in sides)
    words = lambda some, rule="all": judge(found, SCALE, [Claim("x", "x", "x", some, rule)])[0].word
    assert words(parts[:2]) == SUPPORTED and words(parts) == UNDECIDED and words(parts[2:]) == CONTRADICTED
    assert words(parts, "any") == SUPPORTED and words(parts[2:], "any") == CONTRADICTED
    found[sides[0]] = []
    assert words(parts) == words(parts, "any") == NO_DATA


def test_p_value_of_a_bound_agrees_with_its_interval():
    a, b = [row(A, robust=0.5)], [row(B, robust=0.4)]
    keys = (key_of(A, "robust", SCALE),) * 2
    effect = judge({A: a, B: b}, SCALE, [Claim("x", "x", "x", (Comparison(A, B),))])[0].found[0].effect
    for end in (effect.low, effect.high):
        assert p_value(a, b, keys, end) == pytest.approx(0.05, abs=1e-6)
    assert p_value(a, b, keys, effect.value) > 0.9
    assert p_value(a, b, keys, effect.low - 0.01) < 0.05 < p_value(a, b, keys, effect.low + 0.005)


def test_another_attack_is_another_question():
    found = {A: [row(A, robust=0.6)], B: [row(B, robust=0.4)]}
    claim = Claim("x", "x", "x", (Comparison(A, B),))
    assert judge(found, SCALE, [claim], attack="autoattack")[0].word == NO_DATA
    for side, share in ((A, 0.2), (B, 0.4)):
        found[side][0]["evaluation"][key_of(side, "robust", SCALE, "autoattack")] = answers(share)
    assert judge(found, SCALE, [claim])[0].word == SUPPORTED and judge(found, SCALE, [claim], attack="autoattack")[0].word == CONTRADICTED
    found[A][0]["evaluation"][key_of(A, "robust", SCALE)].pop("right")  # PGD lost its answers; AutoAttack's are not put in their place
    assert judge(found, SCALE, [claim])[0].word == NO_DATA


def test_stale_rows_are_marked():
    found = {A: [row(A, robust=0.6) | {"stale": True}], B: [row(B, robust=0.4)]}
    (made,) = judge(found, SCALE, [Claim("x", "x", "x", (Comparison(A, B),))])
    assert made.found[0].stale


def test_keys_are_those_of_the_rows():
    byol, aff = Side("byol", "alf"), Side("byol", "aff")
    assert key_of(A, "robust", "demo") == "linear.pgd20.linf-0.05" and key_of(A, "clean", "demo") == "linear.clean"
    assert key_of(byol, "robust", "demo") == "alf.pgd20.linf-0.05" and key_of(aff, "clean", "demo") == "aff.clean"
    assert key_of(Side("rush"), "eot", "smoke") == "linear.eot5.linf-0.05"
    assert key_of(TOGETHER, "robust", "demo", "autoattack") == "aff.autoattack.linf-0.05"


def test_damaged_or_other_images_are_refused():
    found = {A: [row(A, robust=0.6)], B: [row(B, robust=0.4)]}
    claim = Claim("x", "x", "x", (Comparison(A, B),))
    found[B][0]["evaluation"]["data_sha256"] = {"test": "y"}
    with pytest.raises(ValueError, match="different test images"):
        judge(found, SCALE, [claim])


# what the ledger says


def test_the_ledger_is_well_formed():
    assert len(CLAIMS) >= 15 and len({c.id for c in CLAIMS}) == len({c.statement for c in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.statement.endswith(".") and claim.source and claim.parts and claim.rule in ("all", "any")
        for part in claim.parts:
            assert part.how in ("exceeds", "differs", "sooner") and part.metric in METRICS and part.other in ("", *METRICS)
            assert (part.a, part.metric) != (part.b, part.other or part.metric)
            assert part.how != "differs" or part.bound > 0, "a margin is stated in advance"
            for side in (part.a, part.b):
                assert side.mode in ("", *MODES) and (side.method in methods()) != bool(side.members)
                if side.method:
                    assert set(dict(side.overrides)) <= set(settings(methods()[side.method]))
                for member in side.members:
                    assert member in methods()


DIRECTIONS = {  # claim: a pair (exceeds, is exceeded) that it has to hold, by hand: sides are not to be swapped
    "slf": ("rocl", "simclr"),
    "aff": ("adv-selfie/aff", "untrained/aff"),
    "aff-adversary": ("adv-jigsaw/aff", "jigsaw/aff"),
    "finetuning-more": ("untrained/aff", "adv-rotation/sff"),
    "aff-clean": ("adv-jigsaw/aff", "untrained/aff"),
    "sooner": ("adv-rotation/aff", "untrained/aff"),
    "tasks-together": ("multi-task/aff", "adv-selfie/aff"),
    "pretext-not-linear": ("adv-rotation/alf", "adv-rotation/slf"),
    "encoder-not-head": ("byorl/slf", "byol/alf"),
    "plain-head": ("byorl/slf", "byorl/alf"),
    "head-alone": ("byol/slf", "byol/alf"),
    "dynamic": ("dynacl", "acl"),
    "decoupled": ("deacl", "acl"),
    "false-negatives": ("aacl", "acl"),
    "robust-costs-clean": ("simclr", "dynacl"),
    "clae": ("clae", "simclr"),
    "learned-negatives": ("adco", "moco-v2"),
    "hard-negatives": ("hcl", "simclr"),
    "cooperative": ("caco", "adco"),
    "features-not-pixels": ("moco-v2", "ifm"),
    "harder-masks": ("adpe", "mae"),
    "unify": ("unified", "advmim"),
    "hybrid": ("hybrid", "caco"),
    "noise-overstates": ("rush", "rush"),
    "noise-beats": ("rush", "deacl"),
}
CLEAN = {
    "aff-clean",
    "dual-batchnorm",
    "robust-costs-clean",
    "clae",
    "learned-negatives",
    "hard-negatives",
    "cooperative",
    "harder-masks",
    "unify",
}


def test_sides_stand_where_the_sentence_puts_them():
    for claim in CLAIMS:
        pairs = {(f"{p.a.method}/{p.a.mode}".rstrip("/"), f"{p.b.method}/{p.b.mode}".rstrip("/")) for p in claim.parts}
        if claim.id in DIRECTIONS:
            assert DIRECTIONS[claim.id] in pairs, claim.id
        assert {p.metric for p in claim.parts} == (
            {"clean"}
            if claim.id in CLEAN
            else {"pgd"}
            if claim.id == "noise-overstates"
            else {"eot"}
            if claim.id == "noise-beats"
            else {"robust"}
        )
    left = {c.id for c in CLAIMS} - set(DIRECTIONS)
    assert left == {"weaknesses", "ensemble", "dual-batchnorm", "advcl-parts"}
    by = {c.id: c for c in CLAIMS}
    assert all(p.b.overrides and not p.a.overrides for name in ("dual-batchnorm", "advcl-parts") for p in by[name].parts)
    assert {p.a for p in by["ensemble"].parts} == {TOGETHER} and {p.b.method for p in by["ensemble"].parts} == set(TOGETHER.members)
    (noise,) = by["noise-overstates"].parts
    assert (noise.metric, noise.other) == ("pgd", "eot")


def test_claims_that_something_does_not_happen_have_a_margin():
    margins = {c.id: {p.bound for p in c.parts} for c in CLAIMS if any(p.bound for p in c.parts)}
    assert margins == {
        "weaknesses": {0.02},
        "pretext-not-linear": {0.10},
        "plain-head": {-0.02},
        "head-alone": {-0.05},
        "features-not-pixels": {-0.05},
    }


def test_needs_are_exactly_the_sides():
    everything, one = needs(), needs(CLAIMS[:1])
    assert not one.variants and not one.cells and one.methods == ("rocl", "simclr", "acl", "advcl", "dynacl", "deacl")
    assert everything.variants["ACL (dual=False)"] == ("acl", {"dual": False}) and len(everything.variants) == 4
    assert {("multi-task", "aff"), ("byol", "slf"), ("byol", "alf"), ("byorl", "slf"), ("byorl", "alf")} <= set(everything.cells)
    assert len(everything.cells) == 21 and {"simclr", "rush", "adpe", "untrained"} <= set(everything.methods)
    assert TARGETS["claims"].variants == everything.variants and TARGETS["claims"].cells == everything.cells  # all are made
    for method, how in everything.variants.values():
        resolve(method, "smoke", 0, how)


def test_published_differences_come_from_one_source():
    assert reported(Comparison(Side("deacl"), Side("acl"))) == "+4.10 (AutoAttack, cifar10)"
    assert reported(Comparison(Side("adco"), Side("moco-v2"), "clean")) == ""  # 68.6 and 67.5 stand in two READMEs
    assert reported(Comparison(Side("byorl", "slf"), Side("byol", "alf"))) == "+77.04 (APGD+MT+Square, cifar10)"
    assert "1 %" not in reported(Comparison(Side("byorl", "slf"), Side("byorl", "alf"))) and "-0.52" in reported(
        Comparison(Side("byorl", "slf"), Side("byorl", "alf"))
    )
    assert reported(Comparison(Side("hcl"), Side("simclr"), "clean")) == "+2.94 to +7.29 (linear, clean, stl10)"
    assert not [n for n in published(method="clae")]


# rows on disk


def write(root, scale, side, evaluation, seed=0):
    config = resolve(side.method, scale, seed, dict(side.overrides))
    folder = run_folder(root, scale, config)
    name, more = ("cell.json", {"mode": side.mode}) if side.mode else ("result.json", {})
    return store.write_result(folder / side.mode, scale, config.to_json(), evaluation, {}, name, **more)


def test_rows_are_found_where_runs_leave_them(tmp_path):
    sides = [A, B, Side("acl", overrides=(("dual", False),)), Side("byorl", "slf"), Side("untrained", "aff")]
    for i, side in enumerate(sides):
        write(tmp_path, "smoke", side, {"linear.clean": {"correct": i, "total": 200}})
    write(tmp_path, "smoke", Side("acl", overrides=(("temperature", 0.7),)), {})  # somebody's own run
    write(tmp_path, "smoke", Side("byorl", "alf"), {}, seed=5)  # not a seed of the scale
    found = claim_rows(tmp_path, "smoke")
    assert {side for side, rows in found.items() if rows} == set(sides)
    for i, side in enumerate(sides):
        assert [r["evaluation"]["linear.clean"]["correct"] for r in found[side]] == [i] and not found[side][0]["stale"]
    assert set(found) == {side for claim in CLAIMS for side in claim.sides}


def test_an_ensemble_is_read_only_if_it_was_made_from_these_cells(tmp_path):
    key = []
    for member in TOGETHER.members:
        path = write(tmp_path, "demo", Side(member, "aff"), {"data_sha256": {"test": "x"}})
        record = json.loads(path.read_text()) | {"checkpoint": {"w": member}}
        path.write_text(json.dumps(record))
        key.append([member, 0, {"w": member}])
    kept = tmp_path / "demo/targets/ensemble.json"
    kept.parent.mkdir()
    name = "Selfie + Rotation + Jigsaw"
    value = [
        ["nobody", name, answers(0.8), 0],
        ["Selfie", name, answers(0.7), 0],
        [name, name, answers(0.5), 0],
        ["Selfie", "Selfie", answers(0.3), 0],
    ]
    kept.write_text(json.dumps({"key": ["code", *key], "value": value}))
    (found,) = ensemble_rows(tmp_path, "demo", TOGETHER)
    assert found["evaluation"][key_of(TOGETHER, "robust", "demo")]["correct"] == 500 and found["seed"] == 0 and not found["stale"]
    assert [cell["method"] for cell in found["cells"]] == list(TOGETHER.members)
    assert all("code" in cell for cell in found["cells"])  # for the sidecar
    kept.write_text(json.dumps({"key": ["code", *key[:2], [key[2][0], 0, {"w": "other"}]], "value": value}))
    assert ensemble_rows(tmp_path, "demo", TOGETHER) == []
    kept.write_text(json.dumps({"key": ["code", *key], "value": [v[:3] for v in value]}))  # without seeds: of an older version
    assert ensemble_rows(tmp_path, "demo", TOGETHER) == []


def test_the_picture_has_a_line_for_each_claim(monkeypatch):
    monkeypatch.setattr("advssl.suite.claims.p_value", lambda *_: 0.001)
    verdicts = judge(everything(), SCALE)
    fig = forest(verdicts)
    (ax,) = fig.axes
    assert len(ax.get_yticklabels()) == len(CLAIMS) == len(ax.texts)
    assert [t.get_text() for t in ax.texts] == [v.word.replace(" at this scale", "") for v in verdicts[::-1]]
    forest([replace(v, found=tuple(Found(one.part) for one in v.found), word=NO_DATA) for v in verdicts])  # nothing to draw


def test_interval_and_p_value_both_have_to_exclude_the_bound():
    part = Comparison(A, B)
    effect = judge({A: [row(A, robust=0.5)], B: [row(B, robust=0.4)]}, SCALE, [Claim("x", "x", "x", (part,))])[0].found[0].effect
    assert word_of(part, effect, 0.001) == SUPPORTED and word_of(part, effect, 0.2) == UNDECIDED
    assert word_of(part, replace(effect, low=-0.01), 0.001) == UNDECIDED
    assert word_of(replace(part, bound=0.2), replace(effect, high=0.21), 0.001) == UNDECIDED
