"""``steps``: memory and time against the number of steps, in a network whose arithmetic is all."""

from __future__ import annotations

from functools import partial

import torch

from torchdiffeq_symplectic.benchmark.problem import Problem
from torchdiffeq_symplectic.benchmark.problems._network import network, steps_of_size
from torchdiffeq_symplectic.benchmark.series import Axis, Case, Series

__all__ = ["STEPS"]


def _build(number: int, seed: int) -> Problem:
    options = steps_of_size(1 / (number - 0.5))  # the last one ends behind t = 1, as rounding must not add another
    return network(seed, (64, 256, 256, 64), 128, torch.linspace(0, 1, 2), rtol=1e-3, atol=1e-3, options=options)


STEPS = Series(
    "steps",
    "What do more steps cost?",
    tuple(Case(f"{number} steps", partial(_build, number), number) for number in (10, 30, 100, 300, 1000)),
    Axis("steps N"),
    shows=("peak_bytes", "relative_time"),
)
