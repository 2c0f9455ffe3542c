"""``precision``: the rounding error of gradients in float32, over the number of steps.

Matsubara et al. claim that the symplectic adjoint method is the most robust to rounding (section 4.3 of their paper).
"""

from __future__ import annotations

from functools import partial

import torch

from torchdiffeq_symplectic.benchmark.problem import Problem
from torchdiffeq_symplectic.benchmark.problems._network import network, steps_of_size
from torchdiffeq_symplectic.benchmark.series import Axis, Case, Series

__all__ = ["PRECISION"]

END = 10.0
NUMBERS = {"rk4": (10, 30, 100, 300, 1000), "dopri5": (10, 30, 100, 300)}


def _build(method: str, number: int, seed: int) -> Problem:
    adaptive = method == "dopri5"
    options = steps_of_size(END / (number - 0.5 if adaptive else number), adaptive)
    t = torch.tensor([0.0, END])
    return network(seed, (16, 32, 32, 16), 16, t, method, rtol=1e-1, atol=1e-1, options=options)


PRECISION = Series(
    "precision",
    "How far does rounding in float32 take the gradient?",
    tuple(
        Case(f"{method}, {number} steps", partial(_build, method, number), number, method)
        for method, numbers in NUMBERS.items()
        for number in numbers
    ),
    Axis("steps N"),
    shows=("gradient_error",),
)
