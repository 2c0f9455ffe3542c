"""What a way to differentiate a solve is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torchdiffeq_symplectic.benchmark.problem import Problem, Solver
from torchdiffeq_symplectic.benchmark.reference import Measure, reference

__all__ = ["BACKPROPAGATION", "Contender"]

BACKPROPAGATION = "backpropagation"  # the one whose time the others' are divided by


@dataclass(frozen=True)
class Contender:
    """A way to differentiate a solve.

    Attributes:
        name: what tables and plots call it.
        solve: called as torchdiffeq's ``odeint`` is, ``(func, y0, t, *, rtol, atol, method, options)``; what it returns
            is a solution that can be differentiated.
        refusal: why it does not solve a problem, or None if it does.
        reference: the gradient of the discrete solve that it makes, in float64.
        may_fail: whether an error in it is something that was found, not a defect of the benchmark.
    """

    name: str
    solve: Solver
    refusal: Callable[[Problem], str | None] = lambda problem: None
    reference: Measure = reference
    may_fail: bool = True
