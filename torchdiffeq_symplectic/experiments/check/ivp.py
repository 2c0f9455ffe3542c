"""The problem on which the modes are verified: no two of its entries, times or outputs are alike."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Ivp", "loss_of"]

_WIDTH = 3
_BATCH = 2
# For steps of a power of two times 2^-4, from the first: inside a step, on the end of one, inside, at the end.
_TIMES = (0.25, 0.4, 0.75, 1.1, 1.25)


class _CheckField(nn.Module):
    """``f(t, y) = tanh(W y + b sin(w t)) - t y² / 5`` on the last dimension of ``y``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2102)
        self.weight = nn.Parameter(_uniform(generator, dtype, _WIDTH, _WIDTH) / _WIDTH**0.5)
        self.bias = nn.Parameter(_uniform(generator, dtype, _WIDTH))
        self.frequency = nn.Parameter(torch.tensor(4.7, dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        t = t.to(y.dtype)
        return torch.tanh(y @ self.weight.T + self.bias * torch.sin(self.frequency * t)) - t * y * y / 5


class Ivp(NamedTuple):
    """An initial value problem; all of its tensors are leaves that require gradients.

    Attributes:
        field: ``field(t, y)``.
        y0: initial state, shape ``(2, 3)``, or ``(2, 6)`` if it holds as many velocities.
        t: output times, shape ``(5,)``.
    """

    field: nn.Module
    y0: Tensor
    t: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype, halves: bool) -> Ivp:
        """The problem, on the CPU; the same at each call."""
        generator = torch.Generator().manual_seed(9750)
        y0 = _uniform(generator, dtype, _BATCH, 2 * _WIDTH if halves else _WIDTH).requires_grad_()
        t = torch.tensor(_TIMES, dtype=dtype, device="cpu", requires_grad=True)
        return cls(_CheckField(dtype), y0, t)

    @property
    def wanted(self) -> dict[str, Tensor]:
        """The tensors that gradients are taken for, by name."""
        return {"y0": self.y0, "t": self.t, **dict(self.field.named_parameters())}


def loss_of(solution: Tensor) -> Tensor:
    """A nonlinear function of the whole solution in which no two entries count alike, 0-d, float64."""
    flat = solution.double().reshape(-1)
    weights = torch.cos(1.3 * torch.arange(len(flat), dtype=flat.dtype, device=flat.device))
    return (weights * flat + 0.4 * weights.roll(1) * flat * flat).sum()


def _uniform(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Entries from -1 to 1."""
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") - 1).to(dtype)
