"The small networks of the parity files, built from the weights of a case."
import torch
from torch import Tensor, nn


class TanhEncoder(nn.Module):
    "f(x) = W2 tanh(W1 flatten(x) + b1) + b2, flattened in the order C, H, W."

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        for name in ("W1", "b1", "W2", "b2"): self.register_parameter(name, nn.Parameter(weights[name].clone()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.W1.T + self.b1) @ self.W2.T + self.b2

    def grads(self) -> dict[str, Tensor]:
        "Gradients by the names of the file, after a backward pass."
        return {name: p.grad for name, p in self.named_parameters()}


def linear(weight: Tensor, bias: Tensor) -> nn.Module:
    "x W^T + b."
    layer = nn.Linear(*weight.T.shape).to(weight)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def pixelwise(weight: Tensor, bias: Tensor) -> nn.Module:
    "A 1x1 convolution."
    layer = nn.Conv2d(*weight.T.shape, 1).to(weight)
    layer.load_state_dict({"weight": weight[..., None, None], "bias": bias})
    return layer


def tanh_layer(weight: Tensor, bias: Tensor) -> nn.Sequential:
    "tanh(W flatten(x) + b)."
    return nn.Sequential(nn.Flatten(), linear(weight, bias), nn.Tanh())


def tanh_masks(weights: dict[str, Tensor]) -> nn.Sequential:
    "Masks: a softmax over the channels of two 1x1 convolutions with a tanh between them."
    first, last = (pixelwise(weights[f"Wm{i}"], weights[f"bm{i}"]) for i in (1, 2))
    return nn.Sequential(first, nn.Tanh(), last, nn.Softmax(1))
