"Cost: passes against hand counts, repeats that leave no trace, rows that are kept, the form of measurements. No time is asserted."
import importlib.util
import json
import math
from dataclasses import replace
from itertools import count as counter
from pathlib import Path

import pytest
import torch
from torch import nn

import advssl.suite.cost as cost
from advssl.encoders import BranchedBatchNorm
from advssl.method import count_passes
from advssl.suite.cost import alone, count, coverage, held_bytes, measure, measure_costs, median_interval, peak_bytes, repeat, trial
from advssl.suite.passes import Passes, Record, multiplications, record
from advssl.suite.scales import get_scale
from advssl.suite.store import markdown_table

ROOT = Path(__file__).resolve().parents[1]
B = 8  # images per step


def small(name, **overrides): return trial(name, "demo", B, 128, **overrides)


def per_image(name, **overrides): return tuple(count(small(name, **overrides)).passes.per_image(B).values())


# counts: graph, constant, to the input, to the weights

N, D, BLOCKS, PATCH, STAY = 16, 96, 4, 7, 4  # vit_demo behind MAE's masks
def masked(stay): return (N * PATCH**2 * D + 12 * BLOCKS * D**2 * (stay + 1)) / (N * PATCH**2 * D + 12 * BLOCKS * D**2 * (N + 1))


BY_HAND = [
    ("simclr", {}, (2, 0, 0, 2)),
    ("rocl", {"steps": 0}, (3, 1, 0, 3)),
    ("rocl", {"steps": 4}, (3 + 4, 1, 4, 3)),
    ("acl", {"steps": 2}, (4 + 2 * 2, 0, 2 * 2, 4)),
    ("acl", {"steps": 2, "form": "a2s"}, (2 + 2, 1, 2, 2)),
    ("advcl", {"steps": 2}, (5 + 2 * 2, 3, 2 * 2, 5)),  # three clean views, two attacks on the weak one
    ("advcl", {"steps": 2, "weight": 0.0, "high_view": False}, (3 + 2, 2, 2, 3)),
    ("byol", {}, (2, 2, 0, 2)),
    ("byorl", {"steps": 2}, (2 + 2 * 2, 2, 2 * 2, 2)),
    ("deacl", {"steps": 2}, (2 + 2, 1, 2, 2)),
    ("moco-v2", {}, (1, 1, 0, 1)),
    ("mae", {}, (masked(STAY), 0, 0, masked(STAY))),
    ("mae", {"mask_ratio": 0.5}, (masked(N // 2), 0, 0, masked(N // 2))),
    ("simmim", {}, (1, 0, 0, 1)),
    ("adios", {}, (1 + 3, 0, 0, 1 + 3)),  # one backward pass for both players
    ("adios", {"simultaneous": False}, (1 + 3 + 3, 1, 3, 1 + 3)),  # the whole view is a constant of the masks' turn
    # two tasks: an attack step, the clean and the attacked question; the latter's gradient is differentiated, so it comes back three times
    ("multi-task", {"tasks": "rotation jigsaw", "steps": 1}, (2 * 3, 0, 2 * (1 + 1), 2 * (1 + 2))),
    ("multi-task", {"tasks": "rotation jigsaw", "steps": 1, "weight": 0.0}, (2 * 3, 0, 2 * 1, 2 * 2)),
    ("untrained", {}, (0, 1, 0, 0)),
]


@pytest.mark.parametrize("name, overrides, wanted", BY_HAND, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o, _ in BY_HAND])
def test_counts_by_hand(name, overrides, wanted):
    assert per_image(name, **overrides) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("name", ["simclr", "acl", "rocl"])
def test_whole_passes_are_those_that_tests_of_methods_count(name):
    run = small(name)
    with record(run.method, torch.zeros(1, 1, 28, 28)) as found, count_passes(run.method.encoder) as known: run.whole_step()
    found = found.passes
    assert (found.graph + found.constant, found.to_weights) == pytest.approx((known.forward, known.backward_weight))
    assert found.to_input + found.to_weights == pytest.approx(known.backward_input)


def test_multiplications_of_a_grouped_convolution():
    layer = nn.Conv2d(4, 8, 3, groups=2, padding=1)
    assert multiplications(layer, torch.zeros(1, 8, 5, 5)) == 8 * 25 * 2 * 9


def test_calls_are_the_outermost_ones():
    "Encoder and projector: nothing inside them is kept a second time."
    run = small("rocl", steps=1)
    calls = count(run).calls
    assert [c.module for c in calls] == [run.method.encoder, run.method.projector] * 3
    assert [c.graph for c in calls] == [False] * 2 + [True] * 4 and [c.backward for c in calls] == [False] * 2 + [True] * 4
    assert [any(c.wanted) for c in calls] == [False] * 4 + [True] * 2 and [any(c.modes) for c in calls] == [False] * 4 + [True] * 2
    assert calls[2].args[0].requires_grad and not calls[4].args[0].requires_grad and len(calls[4].args[0]) == 3 * B


# no trace


@pytest.mark.parametrize("name", ["simclr", "acl", "adios", "moco-v2"])
def test_a_counted_step_has_the_same_bits(name):
    plain, watched = small(name), small(name)
    plain.whole_step()
    count(watched)
    for a, b in zip(plain.method.state_dict().values(), watched.method.state_dict().values(), strict=True): assert torch.equal(a, b)
    for _ in range(2): plain.whole_step(), watched.whole_step()  # the hooks are gone, and the numbers go on alike
    for a, b in zip(plain.method.state_dict().values(), watched.method.state_dict().values(), strict=True): assert torch.equal(a, b)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.method.modules())


def test_hooks_leave_with_an_exception():
    run = small("simclr")
    with pytest.raises(KeyError), record(run.method, torch.zeros(1, 1, 28, 28)): raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.method.modules())


def state_of(module):
    return (
        [m.training for m in module.modules()], [p.requires_grad for p in module.parameters()],
        [m.active for m in module.modules() if isinstance(m, BranchedBatchNorm)],
    )


def test_repeats_run_in_the_recorded_state_and_put_it_back():
    run = small("acl", steps=1)
    calls = count(run).calls
    before, seen = state_of(run.method), []
    for part in {c.module for c in calls}:
        part.register_forward_hook(lambda m, args, out: seen.append((*state_of(m), len(args[0]), out.requires_grad)))
    for call in calls: repeat(call)
    assert state_of(run.method) == before and all(p.grad is None for p in run.method.parameters())
    assert seen == [(c.modes, c.wanted, c.branches, len(c.args[0]), c.graph) for c in calls]
    assert {tuple(c.branches) for c in calls if c.module is run.method.encoder} == {("adv",) * 4, ("clean",) * 4}


def test_a_repeat_takes_gradients_where_they_were_taken(monkeypatch):
    asked = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda out, wanted, *a, **k: asked.append(len(wanted)) or grad(out, wanted, *a, **k))
    run = small("rocl", steps=1)
    calls = count(run).calls
    asked.clear()
    for call in calls: repeat(call)
    sizes = [len(list(c.module.parameters())) for c in calls]
    # the constant branch: none; the attack: inputs; the step: weights, and the projector's input
    assert asked == [1, 1, sizes[4], sizes[5] + 1]


def test_a_repeat_takes_the_second_derivative_where_it_was_taken(monkeypatch):
    run = small("multi-task", steps=1)
    found = [call for call in count(run).calls if call.twice]
    encoders = [call for call in found if call.module is run.method.encoder]
    assert len(encoders) == 2 and all(call.backward and any(call.wanted) for call in encoders)  # not Selfie: it calls layers
    assert any(isinstance(call.module, nn.Conv2d) for call in found)
    asked, grad = [], torch.autograd.grad
    def watched(out, wanted, *args, **more):
        asked.append((len(wanted), more.get("create_graph", False)))
        return grad(out, wanted, *args, **more)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    for call in found:  # attention too, whose fused form has no second derivative
        asked.clear()
        repeat(call)
        weights = sum(call.wanted)
        assert asked == [(1, True), (1 + weights, False)], call.module
    assert not any(call.twice for call in count(small("multi-task", steps=1, weight=0.0)).calls)


def test_products_are_those_with_a_memory_and_between_features():
    sizes = lambda name, **settings: [tuple(tuple(a.shape) for a in p.args) for p in count(small(name, **settings)).products]
    assert sizes("simclr") == [((2 * B, 128), (128, 2 * B))] and sizes("mae") == []
    adco = [p for p in count(small("adco", bank_size=32)).products if 32 in (*p.args[0].shape, *p.args[1].shape)]
    # similarities for the encoder's loss, and the bank's pull without a graph
    found = [(*p.args[0].shape, p.args[1].shape[1], p.graph, p.backward) for p in adco]
    assert found == [(B, 128, 32, True, True), (32, B, 128, False, False)]


# measurements with a clock that ticks at each look


@pytest.fixture
def ticking(monkeypatch):
    ticks = counter()
    monkeypatch.setattr(cost, "clock", lambda device: float(next(ticks)))


def test_parts_of_the_ideal(ticking):
    run = small("rocl", steps=2)
    run.whole_step()
    found = count(run)
    # similarities: of two steps of the attack, of the joint pass, and of its regulariser
    assert [len(p.args[0]) for p in found.products] == [2 * B] * 2 + [3 * B, 2 * B] and all(p.backward for p in found.products)
    assert alone(run, found) == {"forward": 2 * 4.0, "backward": 2 * 3.0, "products": 4 * 2.0, "augmentation": 1.0, "optimizer": 1.0}


def test_a_row(ticking):
    row = measure("rocl", batch_size=B, images=128, rounds=3)
    calls = 2 * (1 + 3 + 1)  # encoder and projector: constant branch, three steps, the joint pass
    products = 2 * (3 + 2)  # similarities of each step, of the joint pass and its regulariser, forward and backward
    assert row["passes"] == {"graph": 6.0, "constant": 1.0, "to_input": 3.0, "to_weights": 3.0}
    assert row["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0} and row["ideal"] == calls + (calls - 2) + products + 2
    assert row["distance"]["value"] == 1 / row["ideal"]
    assert row["parts"] == {"forward": calls, "backward": calls - 2, "products": products, "augmentation": 1, "optimizer": 1}
    assert row["microseconds"] == 1e6 / B and row["peak_bytes"] > row["held_bytes"] > 0 and row["rounds"] == 3
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert len(set(map(tuple, [cost.cost_line(row)]))) == 1 and "RoCL" in markdown_table([cost.cost_line(row)])


def test_the_reference_has_the_methods_encoder_and_batch(monkeypatch):
    made = []
    monkeypatch.setattr(cost, "trial", lambda *a, _real=cost.trial, **k: made.append(_real(*a, **k)) or made[-1])
    measure("mae", batch_size=B, images=16, rounds=2)
    assert [r.config.method for r in made] == ["mae", "simclr"] and len({(r.config.encoder, r.config.batch_size) for r in made}) == 1


def test_both_are_timed_in_changing_order(monkeypatch):
    order = []
    seconds = {"rotation": 3.0, "simclr": 2.0}
    monkeypatch.setattr(cost, "_seconds", lambda run: order.append(run.config.method) or seconds[run.config.method])
    row = measure("rotation", batch_size=B, images=16, rounds=4)
    assert order == ["simclr", "rotation", "rotation", "simclr"] * 2 and row["ratio"]["value"] == 1.5


# memory


def test_peak_bytes():
    def twice(n): return lambda: torch.ones(n) + torch.ones(n)
    def freed(n): return lambda: [torch.ones(n).sum() for _ in range(5)]
    assert peak_bytes(twice(10**6)) == pytest.approx(12e6, abs=1e3)
    assert peak_bytes(freed(10**6)) == pytest.approx(4e6, abs=1e3)
    assert peak_bytes(lambda: None) == 0


def test_held_bytes_counts_weights_banks_and_moments():
    run = small("simclr")
    weights = sum(p.nbytes for p in run.method.parameters())
    buffers = sum(b.nbytes for b in run.method.buffers())
    assert held_bytes(run) == weights + buffers
    run.whole_step()
    steps = 4 * len(list(run.method.parameters()))  # AdamW counts steps for each tensor
    assert held_bytes(run) == 3 * weights + buffers + steps


# intervals


CASES = [(2, 1, 0.9), (4, 1, 0.9), (5, 1, 0.9), (7, 1, 0.9), (8, 2, 0.9), (9, 2, 0.95), (9, 3, 0.8), (11, 3, 0.9)]


@pytest.mark.parametrize("n, k, level", CASES)
def test_order_of_the_interval(n, k, level):
    values = [float(v) for v in torch.randperm(n, generator=torch.Generator().manual_seed(n))]
    assert median_interval(values, level) == ((n - 1) / 2, k - 1, n - k)


def test_the_rank_is_the_largest_that_covers():
    assert [cost.median_rank(n) for n in (2, 4, 5, 9, 11)] == [0, 0, 1, 2, 3]
    for n in range(5, 40):
        k = cost.median_rank(n)
        assert coverage(n, k) >= 0.9 and (k == n // 2 or coverage(n, k + 1) < 0.9)


def test_coverage_is_the_binomials():
    inside = sum(math.comb(9, i) for i in range(2, 8)) / 2**9  # two to seven values below the median
    assert coverage(9, 2) == pytest.approx(inside)


# rows


def test_rows_are_resumed(tmp_path, monkeypatch):
    done = []

    def quick(name, scale, **options):
        if name == "hcl" and len(done) == 2: raise RuntimeError("killed")
        done.append(name)
        return {"method": name, **options}

    monkeypatch.setattr(cost, "measure", quick)
    with pytest.raises(RuntimeError): measure_costs(["simclr", "RoCL", "hcl"], "demo", tmp_path, rounds=2)
    assert done == ["simclr", "rocl"] and sorted(p.name for p in tmp_path.iterdir()) == ["rocl.json", "simclr.json"]
    done.append("-")
    rows = measure_costs(["simclr", "RoCL", "hcl"], "demo", tmp_path, rounds=2)
    assert done[2:] == ["-", "hcl"] and [r["method"] for r in rows] == ["simclr", "rocl", "hcl"]
    measure_costs(["simclr"], "demo", tmp_path, rounds=3)  # other settings
    measure_costs(["rocl"], replace(get_scale("demo"), train_steps=4), tmp_path, rounds=2)  # another recipe
    assert done[4:] == ["simclr", "rocl"]
    monkeypatch.setattr(cost, "code_digest", lambda *modules: "other")
    measure_costs(["hcl"], "demo", tmp_path, rounds=2)
    assert done[6:] == ["hcl"]


def test_all_methods_that_train(monkeypatch):
    asked = []
    monkeypatch.setattr(cost, "code_digest", lambda *modules: "")  # parsing every method takes seconds
    monkeypatch.setattr(cost, "measure", lambda name, *a, **k: asked.append(name) or {})
    measure_costs()
    assert "untrained" not in asked and {"simclr", "rocl", "mae", "adios"} <= set(asked) and len(asked) == len(set(asked))


def test_bad_input():
    with pytest.raises(ValueError, match="no spread"): measure("simclr", rounds=1)
    with pytest.raises(ValueError, match="unknown method"): measure_costs(["simclear"])


def test_empty_records(): assert Record().passes == Passes() and Passes(graph=6).per_image(3)["graph"] == 2


# tools/bench.py

spec = importlib.util.spec_from_file_location("bench", ROOT / "tools" / "bench.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def test_bench_writes_tables_with_their_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "ATTACKS", {k: bench.ATTACKS[k] for k in ("rocl", "advmim")})
    assert bench.main(["--tiny", "--figures", str(tmp_path)]) == 0
    for part in bench.PARTS:
        text, table = (tmp_path / "bench" / f"{part}.md").read_text(), (tmp_path / "bench" / f"{part}.csv").read_text().splitlines()
        assert text.startswith(f"**{part.capitalize()}**") and "plain / ours" in table[0] or part == "evaluation"
        assert len(table) == 1 + {"attacks": 5, "augmentation": 3, "contrast": 3, "bank": 1, "evaluation": 4}[part]
        sidecar = json.loads((tmp_path / "bench" / f"{part}.provenance.json").read_text())
        if part == "attacks":
            assert [line.split(",")[1] for line in table[1:]] == ["small_convnet", "vit_demo", "resnet18", "vit_tiny", "vit_base"]
        assert set(sidecar["files"]) == {f"{part}.md", f"{part}.csv"} and {"processor", "commit", "packages"} <= set(sidecar["provenance"])


@pytest.mark.parametrize("name", ["rocl", "clae", "advcl", "byorl", "unified"])
def test_plain_attacks_end_where_ours_do(name):
    run = trial(name, "demo", 4, 128)
    method, views = run.method, next(run.source)
    attack, before = bench.ATTACKS[name](method, views), [p.detach().clone() for p in method.parameters()]
    plain, steps = bench.Plain(method), method.player.steps if hasattr(method, "player") else 1
    results, passes = [], []
    for work in (attack, lambda: plain.run(attack, steps)):
        method.generator.manual_seed(0)
        with record(method, torch.zeros(1, 1, 28, 28)) as found: results.append(work())
        passes.append(found.passes)
    assert (results[0] - results[1]).abs().le(1e-5).float().mean() > 0.99
    assert passes[0].to_weights == 0 and passes[1].to_input == 0 and passes[1].to_weights == pytest.approx(passes[0].to_input)
    assert passes[1].constant == pytest.approx(steps * passes[0].constant)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(method.parameters(), before, strict=True))


def test_written_losses_are_the_losses():
    torch.manual_seed(0)
    q, k, queue = (nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (4, 4, 12))
    for margin in (0.0, 0.1):
        ours = bench.info_nce(q, k, q @ queue.T, margin=(margin, margin), alpha=1.0 if margin else None)
        assert torch.allclose(ours, bench.written_out(q, k, queue, margin=margin), atol=1e-6)
    z = torch.randn(2, 5, 8)
    assert torch.allclose(bench.nt_xent(z, 0.5), bench.written_pairs(z), atol=1e-6)
