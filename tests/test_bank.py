"The queue and the learnable bank: what is too dull or too slow for the page."
import copy
from collections import deque

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import Watch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from advssl.bank import LearnableBank, Queue, signed_softmax

DIM, SIZE, N = 5, 11, 6


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def raw(seed=0):
    "Slots of very different lengths, two of them in the same direction."
    W = unit(SIZE, DIM, seed=seed) * torch.logspace(-1, 1, SIZE, dtype=torch.float64)[:, None]
    W[1] = 3 * W[0]
    return W


def make(W, **kwargs):
    bank = LearnableBank(W.shape[1], len(W), **{"temperature": 0.1, "lr": 0.3, **kwargs}).double()
    bank.W.copy_(W)
    return bank


def test_the_watch_sees():
    with Watch(4) as watch: torch.ones(2, 2).add_(1)[0, 0].add(1).item()
    assert len(watch.made) == 1 and len(watch.synced) == 1


# the queue


@given(st.integers(1, 7), st.lists(st.integers(0, 20), max_size=12))
def test_queue_keeps_the_last_keys(size, batches):
    queue, model, count = Queue(2, size), deque(maxlen=size), 0
    for n in batches:
        values = torch.arange(count, count + n, dtype=torch.float32)
        queue.push(torch.stack([values, -values], 1))
        model.extend(values.tolist())
        count += n
        assert len(queue) == len(queue.rows) == len(model)
        assert sorted(queue.rows[:, 0].tolist()) == list(model)
        assert torch.equal(queue.rows[:, 1], -queue.rows[:, 0])
        for slot, value in enumerate(queue.rows[:, 0].tolist()): assert int(value) % size == slot


def test_queue_survives_a_checkpoint(tmp_path):
    queue = Queue(3, 8)
    queue.push(torch.randn(13, 3, requires_grad=True))
    assert not queue.rows.requires_grad
    save_file({k: v.contiguous() for k, v in queue.state_dict().items()}, tmp_path / "queue.safetensors")
    restored = Queue(3, 8)
    restored.load_state_dict(load_file(tmp_path / "queue.safetensors"))
    more = torch.randn(2, 3)
    for each in (queue, restored): each.push(more)
    assert torch.equal(queue.rows, restored.rows) and queue.pushed == restored.pushed == 15


def test_queue_never_waits_for_the_device():
    queue = Queue(3, 8)
    with Watch(1) as watch:
        for n in (3, 4, 5): queue.push(torch.ones(n, 3)), queue.rows.sum()
    assert not watch.synced


@pytest.mark.parametrize("keys", [torch.zeros(3), torch.zeros(2, 4), torch.zeros(2, 2, 3)])
def test_queue_refuses_other_shapes(keys):
    queue = Queue(3, 8)
    with pytest.raises(ValueError, match=r"\(n, 3\)"): queue.push(keys)
    with pytest.raises(ValueError, match="at least 1"): Queue(3, 0)


# the bank against autograd and torch's optimiser


def loss(W, q, keys, positives, temperature, minus, plus):
    "Cross entropy at the bank's temperature; signs by gradient reversal on the cosines."
    s = q @ F.normalize(W, dim=1).T
    sign = torch.full_like(s, minus)
    if positives is not None: sign[torch.arange(len(q)), positives] = plus
    s = sign * s + ((1 - sign) * s).detach()
    if keys is None: return F.cross_entropy(s / temperature, positives)
    inner = q @ keys.T if keys.ndim == 2 else torch.einsum("nc,nmc->nm", q, keys)
    label = torch.arange(len(q)) if keys.ndim == 2 else torch.zeros(len(q), dtype=torch.int64)
    label = label if positives is None else positives + inner.shape[1]
    return F.cross_entropy(torch.cat([inner, s], 1) / temperature, label)


def batch(kind, step):
    "Queries, keys and positives of a step; the third query is a copy of the second."
    q, k = unit(N, DIM, seed=2 * step), unit(N, DIM, seed=2 * step + 1)
    q[2] = q[1]
    y = torch.randint(SIZE, (N,), generator=torch.Generator().manual_seed(step))
    return {"in-batch": (q, k, None), "own key": (q, k[:, None], None), "slots": (q, None, y), "both": (q, k, y)}[kind]


@pytest.mark.parametrize("minus, plus", [(1, -1), (1, 1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("kind", ["in-batch", "own key", "slots", "both"])
def test_fifty_moves_are_fifty_steps_of_sgd(kind, minus, plus):
    how = dict(lr=0.3, momentum=0.9, weight_decay=1e-2)
    bank = make(raw(), temperature=0.07, negative_sign=minus, positive_sign=plus, **how)
    W = raw().requires_grad_()
    optimiser = torch.optim.SGD([W], maximize=True, **how)
    for step in range(50):
        q, keys, positives = batch(kind, step)
        bank.move(bank.pull(q, keys, positives))
        optimiser.zero_grad()
        loss(W, q, keys, positives, 0.07, minus, plus).backward()
        optimiser.step()
    torch.testing.assert_close(bank.W, W.detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(bank.velocity, optimiser.state[W]["momentum_buffer"], rtol=1e-8, atol=1e-9)


@settings(max_examples=40)
@given(
    temperature=st.floats(0.02, 2), momentum=st.floats(0, 0.99), decay=st.floats(0, 0.1), lr=st.floats(0, 3),
    kind=st.sampled_from(["in-batch", "own key", "slots"]), seed=st.integers(0, 99),
)
def test_moves_equal_sgd_for_any_setting(temperature, momentum, decay, lr, kind, seed):
    how = dict(lr=lr, momentum=momentum, weight_decay=decay)
    bank, W = make(raw(seed), temperature=temperature, **how), raw(seed).requires_grad_()
    optimiser = torch.optim.SGD([W], maximize=True, **how)
    for step in range(2):
        q, keys, positives = batch(kind, seed + step)
        bank.move(bank.pull(q, keys, positives))
        optimiser.zero_grad()
        loss(W, q, keys, positives, temperature, 1, -1).backward()
        optimiser.step()
    torch.testing.assert_close(bank.W, W.detach(), rtol=1e-8, atol=1e-8)


def test_velocity_that_is_already_there_counts():
    bank, v = make(raw(), momentum=0.5, weight_decay=0.0), unit(SIZE, DIM, seed=9)
    bank.velocity.copy_(v)
    q, keys, _ = batch("in-batch", 0)
    W = raw().requires_grad_()
    (g,) = torch.autograd.grad(loss(W, q, keys, None, 0.1, 1, 1), W)
    bank.move(bank.pull(q, keys))
    torch.testing.assert_close(bank.W, raw() - 0.3 * (0.5 * v - g), rtol=1e-10, atol=1e-12)


def test_views_compose_by_weights():
    (q1, k1, _), (q2, k2, _) = batch("in-batch", 0), batch("in-batch", 1)
    W = raw().requires_grad_()
    (0.5 * loss(W, q1, k2, None, 0.1, 1, 1) + 2.0 * loss(W, q2, k1, None, 0.1, 1, 1)).backward()
    bank = make(raw(), momentum=0.0)
    pulls = bank.pull(q1, k2), bank.pull(q2, k1)
    kept = [u.clone() for u in pulls]
    bank.move(*pulls, weights=(0.5, 2.0))
    torch.testing.assert_close(bank.W, raw() + 0.3 * W.grad, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(kept, pulls, strict=True))  # a pull is not used up
    summed, once = make(raw()), make(raw())
    summed.move(*pulls)
    once.move(pulls[0] + pulls[1])
    torch.testing.assert_close(summed.W, once.W)


def test_a_tiny_temperature_stays_finite():
    bank = LearnableBank(DIM, SIZE, temperature=1e-3, lr=3.0)
    q = unit(N, DIM).float()
    for keys in (None, q): bank.move(bank.pull(q, keys))
    assert bank.W.isfinite().all() and all(v.isfinite() for v in bank.metrics(q, -q, bank.nearest(q)).values())
    y = bank.nearest(q)
    exact = copy.deepcopy(bank).double()
    for keys, positives in ((q, None), (-q, None), (q, y), (None, y)):
        u = exact.pull(q, keys, positives) * exact.temperature
        torch.testing.assert_close(bank.pull(q, keys, positives) * 1e-3, u.float(), rtol=1e-3, atol=1e-5)


# limits and state


@pytest.mark.parametrize("kwargs", [{"lr": 0.0, "weight_decay": 0.1}, {"negative_sign": 0, "positive_sign": 0}])
def test_a_frozen_bank_is_frozen_bit_for_bit(kwargs):
    bank = make(raw(), **kwargs)
    for step in range(3):
        q, _, y = batch("slots", step)
        bank.move(bank.pull(q, positives=y))
    assert torch.equal(bank.W, raw())


def test_signs_touch_only_their_own_slots():
    q, _, y = batch("slots", 0)
    q, y = q[:1], y[:1]
    still = torch.arange(SIZE) != y
    for kwargs, mask in (({"negative_sign": 0}, still), ({"positive_sign": 0}, ~still)):
        bank = make(raw(), **kwargs)
        bank.move(bank.pull(q, positives=y))
        assert torch.equal(bank.W[mask], raw()[mask]) and (bank.W[~mask] != raw()[~mask]).any()


def test_state_round_trip_is_exact(tmp_path):
    bank = make(raw(), weight_decay=0.01)
    step = lambda each, t: each.move(each.pull(*batch("in-batch", t)))
    for t in range(3): step(bank, t)
    save_file(bank.state_dict(), tmp_path / "bank.safetensors")
    restored = make(torch.ones(SIZE, DIM), weight_decay=0.01)
    _ = restored.directions  # a cache of the slots about to be replaced
    restored.load_state_dict(load_file(tmp_path / "bank.safetensors"))
    for each in (bank, restored): step(each, 3)
    for name, value in bank.state_dict().items(): assert torch.equal(value, restored.state_dict()[name]), name
    assert {"W", "velocity", "hits"} == set(bank.state_dict())


def test_directions_are_computed_once_for_each_change():
    bank = make(raw())
    first = bank.directions
    assert bank.directions is first
    torch.testing.assert_close(first, F.normalize(raw(), dim=1))
    bank.move(bank.pull(unit(N, DIM)))
    torch.testing.assert_close(bank.directions, F.normalize(bank.W, dim=1))
    bank.W.mul_(-1)
    torch.testing.assert_close(bank.directions, F.normalize(bank.W, dim=1))
    assert bank.float().directions.dtype == torch.float32


@pytest.mark.parametrize("look", ["metrics", "nearest", "pull"])
def test_directions_made_in_inference_mode_serve_a_loss_that_trains(look):
    bank, q = make(raw()), unit(N, DIM).requires_grad_()
    with torch.inference_mode(): getattr(bank, look)(unit(N, DIM, seed=1))
    (q @ bank.directions.T).sum().backward()
    torch.testing.assert_close(q.grad, bank.directions.sum(0).expand(N, -1))
    bank.move(bank.pull(q.detach()))  # and the bank goes on


def test_a_copy_has_directions_of_its_own():
    bank = make(raw())
    for _ in range(5): bank.W.mul_(1.0)
    _ = bank.directions
    clone = copy.deepcopy(bank)
    while clone.W._version < bank.W._version: clone.W.copy_(raw(seed=1))  # as many changes as the original had
    torch.testing.assert_close(clone.directions, F.normalize(raw(seed=1), dim=1))
    torch.testing.assert_close(bank.directions, F.normalize(raw(), dim=1))


def test_nearest_is_by_direction_not_by_length():
    bank = make(raw())
    assert torch.equal(bank.nearest(7 * raw()[2:]), torch.arange(2, SIZE))


def test_a_waiting_loss_keeps_its_directions():
    bank, q = make(raw()), unit(N, DIM).requires_grad_()
    old = bank.directions.clone()
    logits = q @ bank.directions.T
    bank.move(bank.pull(q, logits=logits))
    logits.sum().backward()
    torch.testing.assert_close(q.grad, old.sum(0).expand_as(q))
    assert not bank.W.requires_grad


# start


def test_a_bank_bigger_than_the_data():
    seeded = lambda: torch.Generator().manual_seed(3)
    keys = 4 * unit(7, DIM).float()
    banks = [LearnableBank(DIM, SIZE, 0.1, 0.3) for _ in range(2)]
    for bank in banks:
        bank.velocity.fill_(1.0)
        bank.hits.fill_(1)
        assert bank.fill(keys, seeded()) == 7
        assert not bank.velocity.any() and not bank.hits.any()
    assert torch.equal(banks[0].W, banks[1].W)
    torch.testing.assert_close(banks[0].W[:7], keys / 4)
    torch.testing.assert_close(banks[0].W.norm(dim=1), torch.ones(SIZE))
    small = LearnableBank(DIM, 3, 0.1, 0.3)
    assert small.fill(keys.split(2)) == 3
    torch.testing.assert_close(small.W, keys[:3] / 4)
    assert LearnableBank(DIM, SIZE, 0.1, 0.3).fill([]) == 0


def test_fill_leaves_the_caller_free_to_train():
    "The features may come from a generator that trains the encoder between its batches."
    encoder = torch.nn.Linear(DIM, DIM)

    def features():
        for _ in range(3):
            z = encoder(torch.ones(4, DIM))
            z.square().sum().backward()
            yield z

    bank = LearnableBank(DIM, SIZE, 0.1, 0.3)
    assert bank.fill(features()) == SIZE and encoder.weight.grad is not None and not bank.W.requires_grad


def test_first_directions_follow_the_generator():
    a, b = (LearnableBank(DIM, SIZE, 0.1, 0.3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a.W, b.W)
    torch.testing.assert_close(a.W.norm(dim=1), torch.ones(SIZE))


# cost


@pytest.mark.parametrize("positives", [None, torch.tensor([0, 1, 2])])
def test_one_large_tensor_beside_the_logits_and_no_wait(positives):
    n, size, dim = 3, 1000, 2
    bank, q = LearnableBank(dim, size, 0.1, 0.3), unit(3, 2).float()
    logits = q @ bank.directions.T
    with Watch(n * size) as watch: u = bank.pull(q, q, positives, logits)
    assert len({x.data_ptr() for _, x in watch.made}) == 1, watch.made
    with Watch(n * size) as steps: bank.move(u, u, weights=(0.5, 0.5)), bank.nearest(q), bank.metrics(q, q, positives)
    assert not watch.synced and not steps.synced


def test_autocast_does_not_touch_the_bank():
    q, y = unit(N, DIM).float(), torch.arange(N)
    bank = LearnableBank(DIM, SIZE, 0.02, 0.3)
    plain = bank.pull(q, q, y)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(bank.pull(q, q, y), plain)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(bank.nearest(q), bank.nearest(q.bfloat16().float()))


# metrics


def test_hits_and_metrics():
    bank = make(torch.eye(DIM, dtype=torch.float64), temperature=0.5)
    q = F.normalize(torch.eye(DIM, dtype=torch.float64)[:3] + 0.1, dim=1)
    bank.pull(q)
    assert bank.hits.tolist() == [1, 1, 1, 0, 0]
    bank.pull(q, positives=torch.tensor([4, 4, 0]))
    assert bank.hits.tolist() == [2, 1, 1, 0, 2]
    m = bank.metrics(q, keys=q, positives=torch.tensor([4, 4, 0]))
    both = (torch.cat([q @ q.T, q @ bank.W.T], 1) / 0.5).softmax(1)
    torch.testing.assert_close(m["outside"], both[:, :3].sum(1).mean())
    torch.testing.assert_close(m["positive"], both[[0, 1, 2], [7, 7, 3]].mean())
    torch.testing.assert_close(m["hardness"], (q @ bank.W.T).amax(1).mean())
    torch.testing.assert_close(m["norm"], torch.tensor(1.0).double())
    p = (q @ bank.W.T / 0.5).softmax(1)
    torch.testing.assert_close(m["perplexity"], (-(p * p.log()).sum(1)).exp().mean())
    share = torch.tensor([2, 1, 1, 2]) / 6
    torch.testing.assert_close(m["usage"], (-(share * share.log()).sum()).exp(), check_dtype=False)
    assert m["dead"] == 1 and all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in m.values())
    assert "outside" not in bank.metrics(q) and bank.hits.tolist() == [2, 1, 1, 0, 2]


# bad input


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"temperature": 0.0}, "temperature must be > 0"), ({"temperature": -1.0}, "got -1.0"),
        ({"temperature": float("nan")}, "temperature"), ({"lr": -1.0}, "give a sign of -1"),
        ({"weight_decay": -1e-4}, "weight_decay"), ({"momentum": 1.0}, "momentum"), ({"momentum": -0.1}, "momentum"),
        ({"negative_sign": 2}, "signs must be"), ({"positive_sign": 0.5}, "signs must be"), ({"size": 0}, "at least 1"),
    ],
)
def test_settings_are_checked(kwargs, message):
    good = {"dim": 4, "size": 8, "temperature": 0.1, "lr": 1.0}
    with pytest.raises(ValueError, match=message): LearnableBank(**{**good, **kwargs})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"q": torch.zeros(DIM)}, "q must have shape"),
        ({"q": torch.zeros(0, DIM)}, "n > 0"),
        ({"q": torch.zeros(N, DIM + 1)}, "q must have shape"),
        ({"keys": torch.zeros(DIM)}, "keys must have shape"),
        ({"keys": torch.zeros(N, DIM + 1)}, "keys must have shape"),
        ({"keys": torch.zeros(N + 1, 2, DIM)}, "keys must have shape"),
        ({"positives": torch.zeros(N)}, "int64"),
        ({"positives": torch.zeros(N + 1, dtype=torch.int64)}, "shape"),
        ({"logits": torch.zeros(N, SIZE + 1)}, "directions"),
    ],
)
def test_inputs_are_checked(kwargs, message):
    bank = make(raw())
    with pytest.raises(ValueError, match=message): bank.pull(**{"q": unit(N, DIM), **kwargs})
    assert not bank.hits.any()


def test_moves_and_fills_are_checked():
    bank = make(raw())
    u = bank.pull(unit(N, DIM))
    for pulls, weights in (((), None), ((u, u), (1.0,)), ((u[:-1],), None)):
        with pytest.raises(ValueError, match="give pulls of shape"): bank.move(*pulls, weights=weights)
    for keys in (torch.zeros(3, DIM), torch.full((3, DIM), float("nan"))):
        with pytest.raises(ValueError, match="no direction"): bank.fill(keys)
    with pytest.raises(ValueError, match="keys must have shape"): bank.fill(torch.zeros(3, DIM + 1))
    assert torch.equal(bank.W, raw())  # a refused fill changes nothing


def test_signed_softmax_leaves_its_inputs_alone():
    logits, others = unit(N, SIZE), unit(N, 3)
    before = logits.clone(), others.clone()
    signed_softmax(logits, 0.1, others, torch.zeros(N, dtype=torch.int64))
    assert torch.equal(logits, before[0]) and torch.equal(others, before[1])


# two processes


def game(bank, rank=None):
    "A start and three moves of two views, on batches that are whole (rank None) or shared by two processes."
    mine = slice(None) if rank is None else slice(rank * N // 2, (rank + 1) * N // 2)
    bank.fill(unit(7, DIM, seed=90 + (rank or 0)), torch.Generator().manual_seed(rank or 0))  # own data
    for step in range(3):
        (q1, k1, _), (q2, k2, y) = batch("in-batch", 2 * step), batch("both", 2 * step + 1)
        bank.move(bank.pull(q1[mine], k2), bank.pull(q2[mine], k1, y[mine]), weights=(0.5, 0.5))
    return bank


def new(rank=0):
    return LearnableBank(DIM, SIZE, 0.1, 0.3, weight_decay=0.01, generator=torch.Generator().manual_seed(rank)).double()


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    started = new(rank)
    _ = started.directions
    started.sync()
    torch.save((started.W, started.directions, game(new(rank), rank).state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    (W0, d0, a), (W1, d1, b) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(W0, W1) and torch.equal(d0, d1) and torch.equal(W0, new(0).W)  # sync
    for name in ("W", "velocity"): assert torch.equal(a[name], b[name])
    one = game(new()).state_dict()
    for name in ("W", "velocity"): torch.testing.assert_close(a[name], one[name], rtol=1e-10, atol=1e-12)
    assert torch.equal(a["hits"] + b["hits"], one["hits"])  # each counts its own queries
