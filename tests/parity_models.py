"The small network of the parity files, built from the weights of a case."
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
