"""Measuring gradients: their error, memory, time and field evaluations, side by side on one problem."""

from torchdiffeq_symplectic.benchmark.compare import CONTENDERS, Contender, Row, compare
from torchdiffeq_symplectic.benchmark.memory import live_bytes, peak_bytes
from torchdiffeq_symplectic.benchmark.problem import Problem
from torchdiffeq_symplectic.benchmark.reference import accepted_grid, reference_gradient

__all__ = [
    "CONTENDERS",
    "Contender",
    "Problem",
    "Row",
    "accepted_grid",
    "compare",
    "live_bytes",
    "peak_bytes",
    "reference_gradient",
]
