"""Residual functions whose weights are smooth in depth: what the studies and the benchmark are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["TanhBlock", "smooth", "tanh_blocks"]


def smooth(depth: int, *shape: int, generator: torch.Generator) -> Tensor:
    """Values at n/N of a random function on [0, 1] that is smooth and is the same for every depth N.

        θ(s) = (c_0 + c_1 sin 2πs + c_2 cos 2πs) / √2,    c_k standard normal

    so each entry has mean 0 and variance 1 at each s.

    Args:
        depth: N.
        shape: of θ(s).
        generator: on the CPU; in the same state it gives the same function.

    Returns:
        float64 on the CPU, shape ``(N, *shape)``.
    """
    constant, sine, cosine = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    angle = (2 * math.pi / depth * torch.arange(depth, dtype=torch.float64)).reshape(depth, *[1] * len(shape))
    values: Tensor = (constant + sine * torch.sin(angle) + cosine * torch.cos(angle)) / math.sqrt(2)
    return values


class TanhBlock(nn.Module):
    """A bare residual function, f_n(x) = tanh(W_n x + b_n)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, shape ``(batch, width)``, in the same shape."""
        return torch.tanh(nn.functional.linear(x, self.weight, self.bias))


def tanh_blocks(depth: int, width: int, generator: torch.Generator) -> list[nn.Module]:
    """N residual functions of tanh whose weights are :func:`smooth` in depth, ‖W_n‖ of size one."""
    weights = smooth(depth, width, width, generator=generator) / math.sqrt(width)
    biases = smooth(depth, width, generator=generator)
    return [TanhBlock(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
