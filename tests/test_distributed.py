"""Two processes on halves of a batch take the step of one process on the whole batch, up to BatchNorm (here in evaluation mode)."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from advssl.method import Views, play
from advssl.pretrain import average_gradients, build
from advssl.suite import resolve

METHODS = {
    "simclr": {}, "adco": {"bank_size": 24, "embedding_dim": 16, "hidden_dim": 32},
    "adco with crops": {"bank_size": 24, "embedding_dim": 16, "hidden_dim": 32, "crops": 2},
    "caco": {"bank_size": 24, "embedding_dim": 16, "hidden_dim": 32, "bank_warmup": 0.0},
    "caco with crops": {"bank_size": 24, "embedding_dim": 16, "hidden_dim": 32, "bank_warmup": 0.0, "crops": 2},
    "moco-v2": {"queue_size": 24, "embedding_dim": 16, "hidden_dim": 32, "shares": 1},
    "ifm": {"queue_size": 24, "embedding_dim": 16, "hidden_dim": 32, "shares": 1},
    "hcl": {"embedding_dim": 16, "hidden_dim": 32},
}


def step(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """One step on this process's share of a fixed batch; the state afterwards."""
    torch.set_num_threads(1)
    method = build(resolve(name.split()[0], "smoke", 0, METHODS[name]), 1, 28).eval().double()
    generator = torch.Generator().manual_seed(5)
    whole = {view: torch.rand(8, 1, 28, 28, generator=generator).double() for view in method.views}
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    optimizers = {"network": torch.optim.SGD(method.network.parameters(), 0.5)}
    views = Views(index=torch.arange(8)[mine], **{k: v[mine] for k, v in whole.items()})
    method.prepare((Views(index=views.index + 100, strong2=views.strong1 / (i + 1)) for i in range(3)), torch.empty(24))
    for _ in range(2): play(method, views, optimizers, reduce=average_gradients)
    return method.state_dict()


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in METHODS:
        state = step(name, rank, 2)
        torch.save({k: v for k, v in state.items() if k != "bank.hits"}, f"{folder}/{name}.{rank}")  # hits are each process's own
    dist.destroy_process_group()


def test_two_processes_take_the_step_of_one(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    for name in METHODS:
        alone = step(name, 0, 1)
        first, second = (torch.load(tmp_path / f"{name}.{rank}", weights_only=True) for rank in (0, 1))
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)
            torch.testing.assert_close(value, alone[key], rtol=1e-8, atol=1e-10, msg=lambda text, at=f"{name} {key}": f"{at}: {text}")
