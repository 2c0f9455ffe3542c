"""What a way to differentiate a solve is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import Problem, Solver, State

__all__ = ["BACKPROPAGATION", "MODES", "Contender", "backpropagation"]

BACKPROPAGATION = "backpropagation"  # the one whose time the others' are divided by

MODES: dict[str, dict[str, Any]] = {
    "baseline": {"adjoint_method": "baseline"},
    "aca": {"adjoint_method": "aca"},
    "symplectic": {"adjoint_method": "symplectic"},
    "symplectic, stages": {"adjoint_method": "symplectic", "adjoint_options": {"checkpoint": "stages"}},
    "memory_free": {"adjoint_method": "memory_free"},
}


def backpropagation(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    """torchdiffeq's own solve, for autograd to follow."""
    solution: State = torchdiffeq.odeint(func, y0, t, **settings)
    return solution


@dataclass(frozen=True)
class Contender:
    """A way to differentiate a solve.

    Attributes:
        name: what tables and plots call it.
        solve: called as torchdiffeq's ``odeint`` is, ``(func, y0, t, *, rtol, atol, method, options)``; what it returns
            is a solution that can be differentiated.
        truth: the same solve for autograd to follow, its steps held constant.
        refusal: why it does not solve a problem, or None if it does.
        may_fail: whether an error in it is something that was found, not a defect of the benchmark.
    """

    name: str
    solve: Solver
    truth: Solver = backpropagation
    refusal: Callable[[Problem], str | None] = lambda problem: None
    may_fail: bool = True
