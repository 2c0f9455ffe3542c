"""Measuring gradients: their error, memory, time and field evaluations, side by side on one problem."""

from torchdiffeq_symplectic.benchmark.compare import Row, compare
from torchdiffeq_symplectic.benchmark.contender import Contender
from torchdiffeq_symplectic.benchmark.memory import live_bytes, peak_bytes
from torchdiffeq_symplectic.benchmark.problem import Problem

__all__ = [
    "Contender",
    "Problem",
    "Row",
    "compare",
    "live_bytes",
    "peak_bytes",
]
