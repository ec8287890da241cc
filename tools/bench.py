"""Measures single parts of advssl beside the plain forms that they replace, and writes figures/bench/.

Each ratio is taken between two programs that run in turn, with the processor's seconds on a CPU, and is given as the median
over rounds with an interval for it. Both programs of a pair compute the same result, and the table says how far that holds.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from advssl.attack import Perturbation, frozen
from advssl.augment import Augment
from advssl.bank import LearnableBank
from advssl.config import Config
from advssl.contrast import info_nce, nt_xent, unit
from advssl.data import load
from advssl.encoders import make_encoder
from advssl.evaluate.robust import robust_mask
from advssl.images import ImageSet
from advssl.method import Method
from advssl.methods import clae
from advssl.pretrain import build
from advssl.suite.cost import Trial, between, clock, median_interval, peak_bytes, trial
from advssl.suite.passes import record
from advssl.suite.scales import resolve
from advssl.suite.store import markdown_table, write_target
from advssl.threat import Linf

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Sizes:
    """How much is measured."""

    rounds: int = 9
    batch: int = 64  # images of an attack on the demo's encoder
    large_rounds: int = 5
    large_batch: int = 8  # images of an attack on an encoder of published recipes for small images
    full_batch: int = 4  # images of an attack on ViT-B
    pixels: int = 256  # their side
    images: int = 256  # of an augmentation
    queries: int = 256
    negatives: tuple[int, ...] = (4096, 16384, 65536)
    judged: int = 500  # images of an evaluation


TINY = Sizes(rounds=2, batch=4, large_rounds=2, large_batch=2, full_batch=2, pixels=32, images=4, queries=4, negatives=(16,), judged=8)


def in_turn(ours: Callable, plain: Callable, rounds: int) -> dict:
    """Median seconds of both, and the interval of plain / ours; in changing order, after one call of each."""
    ours(), plain()
    seconds = {ours: [], plain: []}
    for i in range(rounds):
        for work in (ours, plain) if i % 2 else (plain, ours):
            began = clock("cpu")
            work()
            seconds[work].append(clock("cpu") - began)
    value, low, high = median_interval([p / o for o, p in zip(seconds[ours], seconds[plain], strict=True)])
    own, other = (median_interval(seconds[work]) for work in (ours, plain))
    ratio = between({"value": value, "low": low, "high": high})
    return {
        "ours, ms": f"{1e3 * own[0]:.1f}", "plain, ms": f"{1e3 * other[0]:.1f}", "plain / ours": ratio,
        "spread": f"{max((top - bottom) / middle for middle, bottom, top in (own, other)):.0%}",
    }


def memory_of(ours: Callable, plain: Callable) -> dict:
    """Peaks of both and their ratio."""
    own, other = (peak_bytes(work) / 1e6 for work in (ours, plain))
    return {"ours, MB": f"{own:.3g}", "plain, MB": f"{other:.3g}", "MB plain / ours": f"{other / own:.2f}"}


# attacks


@contextmanager
def melted(*modules: nn.Module, train: bool = False) -> Iterator[None]:
    """`frozen` without the freezing: modes and buffers as there, and every weight still asks for a gradient."""
    wanted = [p for m in modules for p in m.parameters() if p.requires_grad]
    with frozen(*modules, train=train):
        for p in wanted: p.requires_grad_()
        yield


class Plain:
    """A search of K steps as K searches of one step: what is constant is forwarded anew, and every backward pass is a full one."""

    def __init__(self, network: nn.Module):
        self.network, self.points, self.calls = network, [], 0

    def step(self, player: Perturbation, objective: Callable, x: Tensor, model=(), generator=None) -> Tensor:
        """One step of the player's search from where its last one ended. Stands in for `Perturbation.find`."""
        self.calls += 1
        if self.calls > len(self.points):
            start = player.threat.random_start(x, generator) if player.start == "random" else torch.zeros_like(x)
            self.points.append((x + start).clamp(0, 1))
        leaf = self.points[self.calls - 1].clone().requires_grad_()
        with melted(*(model if isinstance(model, tuple) else (model,))): objective(leaf).sum().backward()
        size = player.step_size or 2.5 * player.threat.eps / player.steps
        moved = leaf.detach() + player.sign * size * player.threat.step(leaf.grad)
        self.points[self.calls - 1] = (x + player.threat.project(moved - x)).clamp(0, 1)
        self.network.zero_grad()
        return self.points[self.calls - 1]

    def run(self, attack: Callable, steps: int) -> Tensor:
        """All steps of an attack that calls `find` any number of times."""
        self.points = []
        with ExitStack() as stack:
            step = lambda player, *args, **kwargs: self.step(player, *args, **kwargs)
            stack.enter_context(patch.object(Perturbation, "find", step))
            one = lambda objective, x, threat, sign, pixels: self.step(Perturbation(threat, 1, threat.eps, "zero", sign), objective, x)
            stack.enter_context(patch.object(clae, "fgsm", one))
            for module in [m for name, m in sys.modules.items() if name.startswith("advssl.") and hasattr(m, "frozen")]:
                stack.enter_context(patch.object(module, "frozen", melted))
            for _ in range(steps):
                self.calls = 0
                found = attack()
        return found


def pretext(method: nn.Module, views) -> Callable:
    """The attack on one set of questions."""
    method.generator.manual_seed(1)
    questions = method.task(views.weak)
    return lambda: method.attack(*questions)


def masked(method: nn.Module, views) -> Callable:
    mask = method.hide(views.weak)
    return lambda: method.attack(views.weak, mask)[0]


def joint(method: nn.Module, views) -> Callable:
    mask = method.question(views.strong1)
    return lambda: method.attack(views.strong1, views.strong2, mask)


ATTACKS: dict[str, Callable] = {  # method: from the method and its views to its attack, with what it forwards and does not change
    "rocl": lambda m, v: lambda: m.attack(v.strong1, v.strong2),
    "clae": lambda m, v: lambda: m.attack(v.strong1),
    "acl": lambda m, v: lambda: torch.cat(m.attack(v.strong1, v.strong2)),
    "advcl": lambda m, v: lambda: torch.cat(m.attack(v.weak, m.clean_views(v), m.labels[v.index])),
    "arocl": lambda m, v: lambda: m.attack(v.strong1, v.strong2),
    "dynacl": lambda m, v: lambda: torch.cat(m.attack(v.strong1, v.strong2)),
    "deacl": lambda m, v: lambda: m.attack(v.weak, m.teacher(v.weak).detach()),
    "advmim": masked,
    "byorl": lambda m, v: lambda: m.attack(v.strong1, m.target(v.strong2)),
    "adv-rotation": pretext,
    "adv-jigsaw": pretext,
    "adv-selfie": pretext,
    "hybrid": lambda m, v: lambda: m.attack(v.strong1, m.bank.nearest(unit(m.slow(v.strong2)))),
    "unified": joint,
}


LARGE = {"small_convnet": "resnet18", "vit_demo": "vit_tiny"}  # encoders of the recipes for CIFAR in the place of the demo's


class OnNoise(Trial):
    """A trial on random pixels: an attack takes as long whatever they show."""

    def __init__(self, config: Config, folder: str, pixels: int):
        self.pixels = pixels  # side of the images
        super().__init__(config, folder)

    def materials(self) -> tuple[ImageSet, Method]:
        images = torch.randint(0, 256, (16, 3, self.pixels, self.pixels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return ImageSet(images, torch.full((16,), -1), (), "random pixels"), build(self.config, 3, self.pixels)


def on_imagenet(name: str, batch: int, pixels: int) -> Trial:
    """A method as its recipe for ImageNet builds it, ready for its first step; only the search has the steps of the demo."""
    steps = resolve(name, "demo").settings["steps"]
    config = resolve(name, "imagenet", 0, {"batch_size": batch, "images": 16, "precision": "32-true", "threads": 1, "steps": steps})
    with tempfile.TemporaryDirectory() as folder: run = OnNoise(config, folder, pixels)
    run.begin()
    return run


def attack_beside_plain(name: str, run: Trial, rounds: int) -> dict:
    """One method's attack beside the one that a training loop without care would make."""
    method, views, batch = run.method, next(run.source), run.config.batch_size
    attack, plain = ATTACKS[name](method, views), Plain(method)
    steps = method.player.steps if hasattr(method, "player") else 1

    def ours():
        method.generator.manual_seed(0)
        return attack()

    def theirs():
        method.generator.manual_seed(0)
        return plain.run(attack, steps)

    results, units = [], []
    for work in (ours, theirs):
        with record(method, torch.zeros(1, *run.data.images.shape[1:])) as found: results.append(work())
        units.append(found.passes.units(batch))
    same = (results[0] - results[1]).abs().le(1e-5).float().mean().item()
    about = {"method": run.config.method, "encoder": run.config.encoder, "pixels": run.size, "images": batch, "steps": steps}
    return about | in_turn(ours, theirs, rounds) | {"by passes": f"{units[1] / units[0]:.2f}", "same pixels": f"{same:.2%}"}


def attacks(sizes: Sizes) -> tuple[str, list[dict]]:
    """Each method's attack beside the plain one, on the demo's encoder and on those of published recipes."""
    small = {name: resolve(name, "demo").encoder for name in ATTACKS}
    on = lambda name, encoder, batch: trial(name, "demo", batch, 128, encoder=encoder)
    table = [attack_beside_plain(name, on(name, encoder, sizes.batch), sizes.rounds) for name, encoder in small.items()]
    table += [attack_beside_plain(name, on(name, LARGE[encoder], sizes.large_batch), sizes.large_rounds) for name, encoder in small.items()]
    masked = [name for name, encoder in small.items() if encoder == "vit_demo"]
    table += [attack_beside_plain(name, on_imagenet(name, sizes.full_batch, sizes.pixels), sizes.large_rounds) for name in masked]
    return (
        "One batch attacked. Plain: every step is a backward pass to the weights too, and what is constant during the search is "
        "forwarded in every step, though never for a gradient. Goal: 1.5 and more. *By passes*: the ratio if a forward pass, a backward "
        "pass to the input and the gradients of the weights took one unit of time each. Where nothing is constant that is 1.5, and what is "
        "reached depends on the encoder: in small layers the gradients of the weights take less than a forward pass, and attention has "
        "no weights; in wide convolutions on a processor they take more. Encoders: the demo's; those of the recipes for CIFAR; for "
        "transformers also that of the recipe for ImageNet, ViT-B behind a decoder of 8 blocks of width 512, on random pixels. On the "
        f"latter two medians are over {sizes.large_rounds} rounds. "
        "*Same pixels*: share of pixels on which both end within 1e-5; a sign of a gradient near zero may fall either way.", table)


# augmentation


def per_image(size: int, channels: int, blurs: bool) -> v2.Compose:
    """SimCLR's recipe for one image, of torchvision's transforms."""
    jitter = v2.ColorJitter(0.8, 0.8, *((0.8, 0.2) if channels == 3 else ()))
    steps = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.RandomApply([jitter], p=0.8)]
    if channels == 3: steps.append(v2.RandomGrayscale(0.2))
    if blurs: steps.append(v2.RandomApply([v2.GaussianBlur(2 * max(1, size // 20) + 1, (0.1, 2.0))], p=0.5))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def of_kornia(size: int, channels: int, blurs: bool) -> Callable[[Tensor], Tensor]:
    """The same for a batch of bytes, of kornia's transforms."""
    jitter = K.ColorJitter(0.8, 0.8, *((0.8, 0.2) if channels == 3 else ()), p=0.8)
    steps = [K.RandomResizedCrop((size, size)), K.RandomHorizontalFlip(), jitter]
    if channels == 3: steps.append(K.RandomGrayscale(p=0.2))
    if blurs: steps.append(K.RandomGaussianBlur((2 * max(1, size // 20) + 1,) * 2, (0.1, 2.0), p=0.5))
    work = K.AugmentationSequential(*steps, data_keys=["input"])
    return lambda x: work(x.float() / 255)


def augmentation(sizes: Sizes) -> tuple[str, list[dict]]:
    """The recipe `simclr` for a batch, beside torchvision's transforms image by image, and kornia's for the batch."""
    table, generator = [], torch.Generator().manual_seed(0)
    for channels, size in ((1, 28), (3, 32), (3, 96)):
        x = torch.randint(0, 256, (sizes.images, channels, size, size), dtype=torch.uint8, generator=generator)
        augment, one, batched = Augment("simclr", size), per_image(size, channels, size >= 64), of_kornia(size, channels, size >= 64)
        ours, plain = lambda x=x, f=augment: f(x, generator), lambda x=x, f=one: torch.stack([f(image) for image in x])
        beside = in_turn(ours, lambda x=x, f=batched: f(x), sizes.rounds)
        kornia = {"kornia, ms": beside["plain, ms"], "kornia / ours": beside["plain / ours"]}
        table.append({"images": "x".join(map(str, x.shape))} | in_turn(ours, plain, sizes.rounds) | kornia)
    return (
        "The recipe `simclr` for a whole batch of uint8 images. Plain: torchvision.transforms.v2 on each image, in this process. "
        "Goal: 10 and more. Kornia: its transforms on the whole batch, beside ours in turn.", table)


# contrast


def written_out(q: Tensor, k: Tensor, queue: Tensor, temperature: float = 0.2, margin: float = 0.0) -> Tensor:
    """InfoNCE with all logits in one matrix; with a margin IFM's, which writes a second one."""
    pos, neg = (q * k).sum(1, keepdim=True), q @ queue.T
    labels = torch.zeros(len(q), dtype=torch.int64)
    ce = lambda a, b: F.cross_entropy(torch.cat([a, b], 1) / temperature, labels)
    return (ce(pos, neg) + ce(pos - margin, neg + margin)) / 2 if margin else ce(pos, neg)


def written_pairs(z: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent with the matrix of all pairs and a mask."""
    u = F.normalize(z.flatten(0, 1), dim=1)
    sim = (u @ u.T / temperature).masked_fill(torch.eye(len(u), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(sim, torch.arange(len(u)).roll(len(u) // 2))


def contrastive(sizes: Sizes) -> tuple[str, list[dict]]:
    """The log-sum-exp core beside losses that write their logits down, forward and backward."""
    generator, table, n = torch.Generator().manual_seed(0), [], sizes.queries
    rows = lambda count: F.normalize(torch.randn(count, 128, generator=generator), dim=1)

    def compare(name, negatives, ours, plain, leaf):
        def both(loss):
            value = loss(leaf)
            return value.detach(), *torch.autograd.grad(value, leaf)

        work = [lambda f=f: both(f) for f in (ours, plain)]
        apart = max((a - b).abs().max().item() for a, b in zip(work[0](), work[1](), strict=True))
        about = {"loss": name, "queries": len(leaf.flatten(0, -2)), "negatives": negatives}
        table.append(about | in_turn(*work, sizes.rounds) | memory_of(*work) | {"largest difference": f"{apart:.0e}"})

    for count in sizes.negatives:
        q, k, queue = rows(n).requires_grad_(), rows(n), rows(count)
        compare("InfoNCE", count, lambda q, k=k, b=queue: info_nce(q, k, q @ b.T), lambda q, k=k, b=queue: written_out(q, k, b), q)
        ifm = lambda q, k=k, b=queue: info_nce(q, k, q @ b.T, margin=(0.1, 0.1), alpha=1.0)
        compare("IFM", count, ifm, lambda q, k=k, b=queue: written_out(q, k, b, margin=0.1), q)
    z = torch.randn(2, 4 * n, 128, generator=generator).requires_grad_()
    compare("NT-Xent", 8 * n - 2, lambda z: nt_xent(z, 0.5), written_pairs, z)
    return (
        "Value and gradient of a loss of 128-dimensional embeddings; memory is the peak of what is allocated meanwhile. "
        "Plain: the logits of each query side by side in a matrix, and a cross entropy.", table)


# bank


def bank(sizes: Sizes) -> tuple[str, list[dict]]:
    """A step of the learnable bank in closed form, beside automatic differentiation and torch's SGD."""
    table, generator, n = [], torch.Generator().manual_seed(0), sizes.queries
    for count in sizes.negatives:
        ours = LearnableBank(128, count, 0.1, lr=0.5, generator=generator)
        slots = ours.W.clone().requires_grad_()
        sgd = torch.optim.SGD([slots], lr=0.5, momentum=0.9)
        q = F.normalize(torch.randn(n, 128, generator=generator), dim=1)

        def closed(ours=ours, q=q): ours.move(ours.pull(q))

        def automatic(slots=slots, sgd=sgd, q=q):
            loss = -(q @ F.normalize(slots, dim=1).T / 0.1).logsumexp(1).mean()  # climbs
            sgd.zero_grad()
            loss.backward()
            sgd.step()

        closed(), automatic()
        apart = (ours.W - slots.detach()).abs().max().item()
        timed = in_turn(closed, automatic, sizes.rounds) | memory_of(closed, automatic)
        table.append({"queries": n, "slots": count} | timed | {"largest difference": f"{apart:.0e}"})
    return (
        "One move of a bank of negatives. Plain: the slots as parameters, automatic differentiation, torch.optim.SGD. "
        "*Largest difference*: of a slot's number after one step.", table)


# evaluation


def evaluation(sizes: Sizes) -> tuple[str, list[dict]]:
    """PGD on test images with batches of several sizes, beside the default."""
    torch.manual_seed(0)
    data, table = load("fashion").test, []
    model = nn.Sequential(make_encoder("small_convnet"), nn.Linear(128, 10)).eval().to(memory_format=torch.channels_last)
    images, labels = data.images[: sizes.judged], data.labels[: sizes.judged]
    clean = torch.ones(len(images), dtype=torch.bool)  # all are attacked
    judge = lambda size: robust_mask(model, images, labels, Linf(0.05), steps=3, clean=clean, batch_size=size)
    usual = judge(250)
    for size in (25, 50, 100, 500):
        same = bool((judge(size) == usual).all())
        timed = in_turn(lambda: judge(250), lambda size=size: judge(size), sizes.rounds)
        memory = peak_bytes(lambda size=size: judge(size)) / 1e6
        about = {"batch size": size, "this / 250": timed["plain / ours"], "spread": timed["spread"], "peak, MB": f"{memory:.3g}"}
        table.append(about | {"same answers": "yes" if same else "no"})
    return (
        f"PGD-3 on {sizes.judged} test images and the small convolutional network: time beside that with batches of 250, the default. "
        "The answers do not depend on the batch size.", table)


PARTS = {"attacks": attacks, "augmentation": augmentation, "contrast": contrastive, "bank": bank, "evaluation": evaluation}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all")
    parser.add_argument("--figures", type=Path, default=ROOT / "figures", help="folder of all figures")
    parser.add_argument("--tiny", action="store_true", help="sizes that measure nothing, to see that everything runs")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown: parser.error(f"unknown part {unknown[0]!r}: choose among {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for name in options.parts or PARTS:
        began, sizes = time.monotonic(), TINY if options.tiny else Sizes()
        words, table = PARTS[name](sizes)
        how = (
            f"Medians over {sizes.rounds} rounds, in turn, in processor seconds on one thread; brackets: interval of the median ratio; "
            "spread: width of that interval for the seconds of the noisier of the two, as a share of their median.")
        text = f"**{name.capitalize()}**. {words} {how}\n\n{markdown_table(table, right=list(table[0])[1:])}"
        write_target(options.figures, "bench", name, text, table, seconds=time.monotonic() - began)
        print(text, flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
