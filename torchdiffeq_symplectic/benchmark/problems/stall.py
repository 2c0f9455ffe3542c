"""``stall``: settings of a package on PyPI under which the upstream adjoint's backward pass does not come to an end.

neuralpde (https://pypi.org/project/neuralpde/) solves a convolutional network of 64 channels in float32 by
``odeint_adjoint`` with all of torchdiffeq's defaults: rtol=1e-7 and atol=1e-9 are below the rounding of float32. The
forward pass manages; the adjoint, whose error includes that of all parameters' gradients, takes ever smaller steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.problem import Problem, State, as_tuple
from torchdiffeq_symplectic.benchmark.problems._network import seeded
from torchdiffeq_symplectic.benchmark.series import Case, Series

__all__ = ["STALL"]


class ConvolutionalField(nn.Module):
    """dy/dt of ``channels`` fields on a periodic grid, shape ``(batch, channels, height, width)``."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, padding_mode="circular"),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 3, padding=1, padding_mode="circular"),
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope, in the shape of ``y``."""
        slope: Tensor = self.network(y)
        return slope


def _build(seed: int) -> Problem:
    with seeded(seed):
        field = ConvolutionalField(1, 64)
        y0 = torch.randn(4, 1, 16, 16)
    return Problem(field, y0, torch.tensor([0.0, 1.0]), _square)


def _square(solution: State) -> Tensor:
    return torch.stack([part[-1].square().sum() for part in as_tuple(solution)]).sum()


STALL = Series(
    "stall",
    "Does backward come to an end with the default tolerances in float32?",
    (Case("convolutions, torchdiffeq's defaults", _build),),
    budget=2000,
)
