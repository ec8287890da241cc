"What the tests of several methods share: toy networks, the contract of an attack, and second implementations with loops."
import hashlib
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from advssl.encoders import BranchedBatchNorm
from advssl.features import to_unit
from advssl.images import ImageSet
from advssl.method import Views
from advssl.methods.byol import BYOL
from advssl.methods.jigsaw import Jigsaw
from advssl.methods.moco import MoCo
from advssl.methods.rocl import RoCL
from advssl.methods.rotation import Rotation
from advssl.methods.selfie import Selfie

ORDER = {"linf": torch.inf, "l2": 2, "l1": 1}
examples = settings(max_examples=30, deadline=None)
seeds, signs = st.integers(0, 2**31), st.sampled_from([1, -1])
SHAPE = (6, 3, 2, 2)


def seeded(seed=0): return torch.Generator().manual_seed(seed)


def snapshot(method): return {k: v.clone() for k, v in method.state_dict().items()}


def start_zero(method, **options):
    method.player = replace(method.player, start="zero", **options)
    return method


@contextmanager
def untouched(method, *inputs):
    "The block changes nothing of the method, its modes, flags and branches, the inputs or torch's random numbers, and leaves no gradient."
    look = lambda: (
        [m.training for m in method.modules()], [p.requires_grad for p in method.parameters()],
        [m.active for m in method.modules() if isinstance(m, BranchedBatchNorm)],
    )
    before, kept, stream, seen = snapshot(method), [t.clone() for t in inputs], torch.get_rng_state(), look()
    yield
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items()), "weights or buffers have changed"
    assert look() == seen, "modes, flags or branches have changed"
    assert all(map(torch.equal, inputs, kept)), "inputs have changed"
    assert torch.equal(torch.get_rng_state(), stream), "torch's random numbers were used: all randomness is the method's generator's"
    assert all(p.grad is None for p in method.parameters()), "a gradient is left"


# contrast of two views on 12 pixels


def small_encoder(batch_norm=True):
    "From 12 pixels to 16 features."
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16) if batch_norm else nn.Identity(), nn.Tanh())
    encoder.out_dim = 16
    return encoder


def make_contrastive(cls=RoCL, seed=0, dtype=torch.float64, batch_norm=True, **options):
    "A method on 12 pixels with BatchNorm statistics unlike those of any batch, in training mode, and two views."
    torch.manual_seed(seed)
    encoder = small_encoder(batch_norm)
    method = cls(encoder, hidden_dim=16, embedding_dim=5, **options).to(dtype)
    with torch.no_grad(): encoder(2 * torch.randn(32, 12, dtype=dtype) + 1)
    method.generator = seeded(seed)
    return method, *torch.rand(2, *SHAPE, dtype=dtype)


def turn(method, x1, x2):
    (one,) = list(method.turns(Views(strong1=x1, strong2=x2)))
    return one


def written_nt_xent(z, tau):
    "Sum of -log p over all ordered pairs of different views, divided by the number of queries."
    u, total = [row / row.norm() for row in torch.cat(list(z))], 0.0
    n = len(z[0])
    for i, a in enumerate(u):
        others = torch.stack([(a @ b / tau).exp() for j, b in enumerate(u) if j != i]).sum()
        total = total - sum(((a @ b / tau).exp() / others).log() for j, b in enumerate(u) if j != i and j % n == i % n)
    return total / len(u)


def through(method, x, name):
    "Layer by layer, with the branch picked by hand."
    for layer in [*method.encoder, *method.projector]:
        x = layer.branches[name](x) if isinstance(layer, BranchedBatchNorm) else layer(x)
    return x


def written_acl_step(method, form, x1, x2, eps, alpha, steps, sign, tau=0.5):
    "The attacked views and the objective: every view forwarded by itself where the statistics allow, nothing reused."
    moved, first, second = [x1, x2], "adv", "clean" if form == "a2s" else "adv"
    method.eval()
    for _ in range(steps if form != "s2s" else 0):
        leaves = [x.clone().requires_grad_() for x in moved]
        value = written_nt_xent((through(method, leaves[0], first), through(method, leaves[1], second)), tau)
        grads = torch.autograd.grad(value, leaves)
        for v in (0,) if form == "a2s" else (0, 1):
            x, x0 = moved[v] + sign * alpha * grads[v].sign(), (x1, x2)[v]
            moved[v] = torch.maximum(torch.minimum(x, x0 + eps), x0 - eps).clamp(0, 1)
    method.train()
    stream = lambda views, name: written_nt_xent(through(method, torch.cat(views), name).chunk(2), tau)
    if form == "a2s": objective = written_nt_xent((through(method, moved[0], "adv"), through(method, x2, "clean")), tau)
    elif form == "a2a": objective = stream(moved, "adv")
    elif form == "s2s": objective = stream((x1, x2), "clean")
    else: objective = 0.5 * stream((x1, x2), "clean") + 0.5 * stream(moved, "adv")
    return moved, objective, torch.autograd.grad(objective, list(method.parameters()))


# MoCo, with a queue


N = 6


def make_moco(cls=MoCo, seed=0, filled=3, **options):
    "A method on 12 pixels in double precision, its queue of 20 filled with keys of other images, and a batch."
    torch.manual_seed(seed)
    encoder = small_encoder()
    method = cls(encoder, **{"queue_size": 20, "hidden_dim": 16, "embedding_dim": 5, "momentum": 0.9} | options).double()
    method.generator = seeded(seed)
    for i in range(filled): method.push(method.keys(torch.rand(N, 3, 2, 2).double()), torch.arange(N) + 100 * (i + 1))
    return method, Views(strong1=torch.rand(N, 3, 2, 2).double(), strong2=torch.rand(N, 3, 2, 2).double(), index=torch.arange(N))


def embed(method, x):
    "Unit outputs of the query network."
    rows = method.projector(method.encoder(x))
    return rows / rows.norm(dim=1, keepdim=True)


# banks


class Net(nn.Module):
    "Images of any size to features, with BatchNorm."

    out_dim = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 2, bias=False), nn.BatchNorm2d(8), nn.Tanh())

    def forward(self, x): return self.layers(x).mean((2, 3))


def rows(z): return [row / row.norm() for row in z]


# BYOL: no modules, no autograd switches, statistics by hand


def make_byol(cls=BYOL, seed=0, dtype=torch.float64, batch_norm=True, **options):
    "A method on 12 pixels in training mode, its target apart from it and all statistics unlike those of any batch, and two views."
    torch.manual_seed(seed)
    encoder = small_encoder(batch_norm)
    method = cls(encoder, **{"hidden_dim": 16, "embedding_dim": 5} | options)
    if not batch_norm:
        for head in (method.projector, method.predictor, method.target.module[1]): head[1] = nn.Identity()
    method = method.to(dtype)
    with torch.no_grad():
        method.predict(2 * torch.randn(32, 12, dtype=dtype) + 1)
        for weight in method.target.parameters(): weight += 0.2 * torch.randn_like(weight)
    method.generator = seeded(seed)
    return method, *torch.rand(2, *SHAPE, dtype=dtype)


def optimizers(method, lr=0.3): return {"network": torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr)}


def batch_norm(x, weights, name, buffers=None):
    "Training mode, from the formula; the running averages follow where a dict is given."
    mean, variance = x.mean(0), ((x - x.mean(0)) ** 2).mean(0)
    if buffers is not None:
        n = len(x)
        for key, value in (("running_mean", mean), ("running_var", variance * n / (n - 1))):
            buffers[f"{name}.{key}"] = 0.9 * buffers[f"{name}.{key}"] + 0.1 * value.detach()
        buffers[f"{name}.num_batches_tracked"] = buffers[f"{name}.num_batches_tracked"] + 1
    return (x - mean) / (variance + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def written_embedding(w, x, prefixes, buffers=None):
    "Encoder and projector, by the names of their weights."
    encoder, projector = prefixes
    h = torch.tanh(batch_norm(x.flatten(1) @ w[f"{encoder}.1.weight"].T + w[f"{encoder}.1.bias"], w, f"{encoder}.2", buffers))
    return written_head(w, h, projector, buffers)


def written_head(w, h, name, buffers=None):
    h = batch_norm(h @ w[f"{name}.0.weight"].T, w, f"{name}.1", buffers).clamp(min=0)
    return h @ w[f"{name}.3.weight"].T + w[f"{name}.3.bias"]


def written_bootstrap(q, z):
    "Image by image, from the distance."
    return sum(((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(q, z, strict=True)) / len(q)


ONLINE, TARGET = ("encoder", "projector"), ("target.module.0", "target.module.1")


def written_byol_step(state, x1, x2, m, lr=0.3, moved=None):
    "One step from a state to the next; `moved` are the views that the online network sees instead."
    names = [k for k in state if not k.startswith("target") and k.split(".")[-1] in ("weight", "bias")]
    state = {k: v.clone() for k, v in state.items()}
    w = {k: v.requires_grad_(k in names) for k, v in state.items()}
    buffers = {k: v for k, v in state.items() if k.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")}
    z1, z2 = (written_embedding(w, x, TARGET) for x in (x1, x2))
    q1, q2 = (written_head(w, written_embedding(w, x, ONLINE, buffers), "predictor", buffers) for x in moved or (x1, x2))
    loss = written_bootstrap(q1, z2) + written_bootstrap(q2, z1)
    grads = torch.autograd.grad(loss, [w[k] for k in names])
    new = {k: v.detach().clone() for k, v in state.items()} | {k: v.clone() for k, v in buffers.items()}
    for name, grad in zip(names, grads, strict=True): new[name] -= lr * grad
    for theirs, ours in zip(ONLINE, TARGET, strict=True):
        for name in [k for k in state if k.startswith(ours)]:
            online = new[theirs + name.removeprefix(ours)]
            new[name] = m * new[name] + (1 - m) * online if name.split(".")[-1] in ("weight", "bias") else online.clone()
    return loss.detach(), new


# pretext tasks


def tile(image, k, grid):
    side = image.shape[-1] // grid
    return image[:, k // grid * side : (k // grid + 1) * side, k % grid * side : (k % grid + 1) * side]


def written_question(method, image, label):
    "One image's question."
    if isinstance(method, Rotation):
        size = image.shape[-1]
        for _ in range(int(label)):
            image = torch.stack([torch.stack([image[:, j, size - 1 - i] for j in range(size)], -1) for i in range(size)], 1)
        return image
    if isinstance(method, Jigsaw):
        order = method.orders[int(label)].tolist()
        g = method.grid
        return torch.cat([torch.cat([tile(image, order[r * g + c], g) for c in range(g)], 2) for r in range(g)], 1)
    return image


def written_logits(method, x, order):
    "Of all questions; for Selfie gap by gap, with the stages fed by all patches at once, as BatchNorm wants it."
    if not isinstance(method, Selfie): return method.head(method.encoder(x))
    count, choice = method.grid**2, method.choice
    layers = method.encoder.backbone.layers
    h = torch.stack([tile(image, k, method.grid) for image in x for k in range(count)])
    h = method.encoder.normalise(h)
    for layer in layers[: len(layers) - 4]: h = layer(h)
    h = (h.mean((2, 3)) @ choice.embed.weight.T + choice.embed.bias).view(len(x), count, -1)
    out = []
    for i in range(len(x)):
        hidden, visible = order[i, : method.masked].tolist(), order[i, method.masked :].tolist()
        u = choice.attend(torch.stack([choice.ask[0, 0]] + [h[i, k] + choice.position[k] for k in visible])[None])[0, 0]
        out.append(torch.stack([torch.stack([(u + choice.position[t]) @ h[i, j] / h.shape[-1] ** 0.5 for j in hidden]) for t in hidden]))
    return torch.stack(out)


def written_cross_entropy(logits, labels):
    "The mean over questions and their parts of -log p."
    total, count = 0.0, 0
    for a, y in zip(logits.flatten(0, -2), labels.flatten().tolist(), strict=True):
        total, count = total - (a[y].exp() / sum(v.exp() for v in a)).log(), count + 1
    return total / count


# operations of a step


class Watch(TorchDispatchMode):
    "Storages of at least `numel` numbers made by the operations inside, and reads of a number by the host."

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made, self.synced = numel, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"): self.synced.append(func)
        tensors = lambda tree: [x for x in tree_iter(tree) if isinstance(x, torch.Tensor)]
        given = {x.data_ptr() for x in tensors((args, kwargs))}
        self.made += [(func, x) for x in tensors(out) if x.numel() >= self.numel and x.data_ptr() not in given]
        return out


# evaluations of three classes


CLASSES = 3


def image_set(n, seed, name, noise=0.25):
    "Three blurry patterns under noise, 1x8x8."
    generator = seeded(seed)
    patterns = torch.rand(CLASSES, 1, 8, 8, generator=seeded(99))
    labels = torch.arange(n) % CLASSES
    images = 0.5 + 0.35 * (patterns[labels] - 0.5) + noise * torch.randn(n, 1, 8, 8, generator=generator)
    return ImageSet.from_float(images.clamp(0, 1), labels, ("a", "b", "c"), name)


def make_net(out=12, dtype=torch.float32):
    "BatchNorm with moved statistics and dropout, left in train mode: everything an evaluation can disturb."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(96, out))
    net.train()
    with torch.no_grad():
        for _ in range(30): net(torch.rand(50, 1, 8, 8) * 0.6 + 0.2)
    return net.to(dtype)


def fingerprint(module):
    "Weights, buffers, modes, flags and gradients."
    digest = hashlib.sha256(str([m.training for m in module.modules()]).encode())
    for name, t in module.state_dict().items(): digest.update(name.encode() + t.numpy().tobytes())
    digest.update(str([(p.requires_grad, p.grad is None) for p in module.parameters()]).encode())
    return digest.hexdigest()


def trained(images, dtype=torch.float64, steps=60):
    "A small classifier that is mostly right."
    net = make_net(CLASSES, dtype)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x, y = to_unit(images.images).to(dtype), images.labels
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net
