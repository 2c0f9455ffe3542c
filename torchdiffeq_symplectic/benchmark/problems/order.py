"""``order``: memory against the number of stages, at the same number of steps."""

from __future__ import annotations

from functools import partial

import torch

from torchdiffeq_symplectic.benchmark.problem import Problem
from torchdiffeq_symplectic.benchmark.problems._network import network, steps_of_size
from torchdiffeq_symplectic.benchmark.series import Axis, Case, Series

__all__ = ["ORDER"]

STEPS = 30
# method -> evaluations a step, whether it is adaptive
METHODS = {"heun2": (2, False), "bosh3": (3, True), "dopri5": (6, True), "dopri8": (13, True)}


def _build(method: str, seed: int) -> Problem:
    adaptive = METHODS[method][1]
    size = 1 / (STEPS - 0.5) if adaptive else 1 / STEPS
    return network(
        seed,
        (64, 256, 256, 64),
        128,
        torch.linspace(0, 1, 2),
        method,
        rtol=1e-3,
        atol=1e-3,
        options=steps_of_size(size, adaptive),
    )


ORDER = Series(
    "order",
    "What do more stages cost?",
    tuple(Case(method, partial(_build, method), stages) for method, (stages, _) in METHODS.items()),
    Axis("evaluations a step (heun2, bosh3, dopri5, dopri8)"),
    shows=("peak_bytes", "relative_time"),
)
