"""Two processes on halves of a batch take the steps of one on the whole batch: every method, up to BatchNorm (in evaluation mode)."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from advssl.augment import Augment
from advssl.data import load, stream
from advssl.method import Views, methods, play
from advssl.pretrain import PLAYERS, Loader, average_gradients, build
from advssl.suite.scales import resolve

# beside every method at the smoke scale's recipe: forms that gather in other places
FORMS = {f"{key} {what}": settings for key, what, settings in [
    ("adco", "with crops", {"crops": 2}),
    ("caco", "without warm-up", {"bank_warmup": 0.0}), ("caco", "with crops", {"bank_warmup": 0.0, "crops": 2}),
    ("moco-v2", "symmetric", {"symmetric": True}), ("mochi", "from the start", {"warmup": 0.0}), ("arocl", "oracle", {"detect": "oracle"}),
    ("aacl", "oracle", {"detect": "oracle"}), ("adios", "both at once", {"simultaneous": True}), ("adios", "single", {"single": True}),
]}
# both views of a pair are attacked in one batch, view after view, so several processes draw the starts in another order
ZERO = ("acl", "aacl", "dynacl")
CASES = [key for key in methods() if key != "untrained"] + list(FORMS)
OWN = "hits"  # each process counts its own queries


def config_of(case: str):
    return resolve(case.split()[0], "smoke", 0, FORMS.get(case, {}) | {"batch_size": 8, "images": 64})


def steps(case: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Preparation and two steps on this process's share of the batches; the state afterwards, and the objectives."""
    torch.set_num_threads(1)
    config = config_of(case)
    method = build(config, 1, 28).eval().double()
    method.generator = stream(0, PLAYERS)
    if config.method in ZERO: object.__setattr__(method.player, "start", "zero")
    augmentations = lambda progress: {view: Augment(method.augmentation(view, progress), 28) for view in method.views}
    pool = load("fashion").train
    # no pixel like its neighbour: in a flat region rounding decides which one max pooling takes, and the gradient goes there
    pool = replace(pool, images=torch.randint(256, pool.images.shape, generator=stream(1), dtype=torch.uint8), sha256="")
    loader = Loader(pool, augmentations, config, method.generator, rank, world)
    double = lambda views: Views(**{k: v.double() if v.is_floating_point() else v for k, v in vars(views).items()})
    method.prepare(map(double, loader.endless()), pool.images[:64])
    method.progress = 0.5
    optimizers = {p.name: torch.optim.SGD(p.parameters(), 0.1) for p in method.players() if p.parameters()}
    for _, views in zip(range(2), loader.epoch(0), strict=False):
        objectives = play(method, double(views), optimizers, reduce=average_gradients)
    return method.state_dict() | {"objectives": objectives, "generator": method.generator.get_state()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({case: steps(case, rank, 2) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@cache
def alone(case): return steps(case, 0, 1)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(both, case):
    first, second, one = both[0][case], both[1][case], alone(case)
    for name, value in first.items():
        if name.endswith(OWN) or name == "objectives": continue
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, one[name], rtol=1e-8, atol=1e-10, msg=lambda text, at=name: f"{at}: {text}")
    mean = (first["objectives"] + second["objectives"]) / 2  # a loss of images alone is each process's own share of it
    torch.testing.assert_close(mean, one["objectives"], rtol=1e-8, atol=1e-10)
    untouched = build(config_of(case), 1, 28).double().state_dict()
    assert any(not torch.equal(one[name], value) for name, value in untouched.items()), "nobody moved"
