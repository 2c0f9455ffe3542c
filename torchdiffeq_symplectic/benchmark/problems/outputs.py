"""``outputs``: a solution taken at many times, as of latent ODEs and neural controlled differential equations."""

from __future__ import annotations

from functools import partial

import torch

from torchdiffeq_symplectic.benchmark.problem import Problem
from torchdiffeq_symplectic.benchmark.problems._network import network
from torchdiffeq_symplectic.benchmark.series import Axis, Case, Series

__all__ = ["OUTPUTS"]


def _build(number: int, seed: int) -> Problem:
    return network(seed, (32, 128, 128, 32), 128, torch.linspace(0, 3, number), rtol=1e-6, atol=1e-6)


OUTPUTS = Series(
    "outputs",
    "What do more output times cost?",
    tuple(Case(f"{number} outputs", partial(_build, number), number) for number in (2, 5, 20, 100, 500)),
    Axis("output times"),
    shows=("relative_time", "peak_bytes"),
)
