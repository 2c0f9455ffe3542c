"""``tolerance``: gradient error and time over the tolerance, where the upstream adjoint's gradient depends on it.

The systems are those of the adaptive checkpoint adjoint's paper (Zhuang et al., ICML 2020,
https://arxiv.org/abs/2006.02493): van der Pol's oscillator, y'' = μ (1 - y²) y' - y, and three bodies under gravity.
Trained are μ, or the masses, and the initial state. All is in float64.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Problem, Series
from torchdiffeq_symplectic.experiments.benchmark.problems.network import mean_square

__all__ = ["TOLERANCE", "ThreeBodies", "VanDerPol"]


class VanDerPol(nn.Module):
    """State y and y', shape ``(2,)``."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope, shape ``(2,)``."""
        place, speed = y
        return torch.stack([speed, self.mu * (1 - place**2) * speed - place])


class ThreeBodies(nn.Module):
    """Positions and velocities in the plane, shape ``(2, 3, 2)``; the gravitational constant is one."""

    def __init__(self) -> None:
        super().__init__()
        self.masses = nn.Parameter(torch.tensor([1.0, 0.8, 1.2], dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope, in the shape of ``y``."""
        places, speeds = y
        apart = places - places[:, None]  # from body i to body j
        # A body does not pull itself: 0 over 1.
        cubes = (apart.square().sum(-1) + torch.eye(3, dtype=y.dtype, device=y.device)).pow(1.5)
        return torch.stack([speeds, (self.masses[:, None] * apart / cubes[..., None]).sum(1)])


PLACES = [[1.0, 0.0], [-0.6, 0.7], [-0.4, -0.8]]
SPEEDS = [[0.1, 0.9], [-0.7, -0.5], [0.8, -0.3]]
SYSTEMS: dict[str, tuple[type[nn.Module], list[object], float]] = {  # with the initial state and the end
    "van der Pol": (VanDerPol, [2.0, 0.0], 5.0),
    "three bodies": (ThreeBodies, [PLACES, SPEEDS], 2.0),
}


def _build(name: str, rtol: float, seed: int) -> Problem:
    del seed  # nothing is drawn
    field, y0, end = SYSTEMS[name]
    state, t = (torch.tensor(values, dtype=torch.float64) for values in (y0, [0.0, end]))
    return Problem(field(), state, t, mean_square, "dopri5", rtol, rtol / 100, {"first_step": 0.01})


TOLERANCE = Series(
    "tolerance",
    "How exact is the gradient at which tolerance, and what does that cost?",
    tuple(
        Case(f"{name}, rtol {rtol:.0e}", partial(_build, name, rtol), rtol, name)
        for name in SYSTEMS
        for rtol in (1e-2, 1e-4, 1e-6, 1e-8, 1e-10)
    ),
    axis="rtol",
    shows=("gradient_error", "relative_time"),
    budget=10_000,
)
