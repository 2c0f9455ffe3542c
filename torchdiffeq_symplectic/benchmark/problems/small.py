"""``small``: a network so small that Python's and PyTorch's overhead is all that a step costs."""

from __future__ import annotations

import torch

from torchdiffeq_symplectic.benchmark.problem import Problem
from torchdiffeq_symplectic.benchmark.problems._network import network
from torchdiffeq_symplectic.benchmark.series import Case, Series

__all__ = ["SMALL"]


def _build(seed: int) -> Problem:
    return network(seed, (8, 32, 32, 8), 32, torch.linspace(0, 10, 2), rtol=1e-7, atol=1e-7)


SMALL = Series(
    "small", "What does a step cost in a tiny network?", (Case("1,600 weights, batch 32", _build),), budget=10_000
)
