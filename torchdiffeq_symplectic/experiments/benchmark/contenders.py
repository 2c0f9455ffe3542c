"""The ways to differentiate a solve of torchdiffeq that are measured against each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torchdiffeq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchdiffeq_symplectic.experiments.benchmark.problem import Problem, Solver, State, as_tuple

__all__ = ["BACKPROPAGATION", "MODES", "Contender", "backpropagation", "is_own", "of_torchdiffeq"]

BACKPROPAGATION = "backpropagation"  # the one whose time the others' are divided by
TIGHT = 1e-2  # of the tolerances, in the second run of upstream's adjoint

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
        solve: called as torchdiffeq's ``odeint`` is, ``(func, y0, t, *, rtol, atol, method, options)``.
        truth: the same solve for autograd to follow, its accepted steps held constant.
        refusal: why it does not solve a problem, or None if it does.
        may_fail: whether an error in it is something that was found, not a defect of the benchmark.
    """

    name: str
    solve: Solver
    truth: Solver = backpropagation
    refusal: Callable[[Problem], str | None] = lambda problem: None
    may_fail: bool = True


def is_own(name: str) -> bool:
    """Whether a contender of this name is one of this package's modes, in whatever host."""
    return name.removeprefix("torchdyn, ") in MODES


def of_torchdiffeq() -> list[Contender]:
    """Backpropagation, upstream's adjoint in three ways, PyTorch's checkpoint, and this package's modes."""
    own = [Contender(name, partial(_adjoint, **mode), may_fail=False) for name, mode in MODES.items()]
    return [
        Contender(BACKPROPAGATION, backpropagation, may_fail=False),
        Contender("adjoint", _adjoint),
        Contender("adjoint, tight", _tight, refusal=_has_fixed_steps),
        Contender("adjoint, seminorm", _seminorm, refusal=_has_fixed_steps),
        Contender("checkpoint", _checkpoint),
        *own,
    ]


def _adjoint(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    solution: State = torchdiffeq.odeint_adjoint(func, y0, t, **settings)
    return solution


def _tight(func: nn.Module, y0: State, t: Tensor, *, rtol: float, atol: float, **settings: Any) -> State:
    """Upstream's adjoint, its backward pass at a hundredth of the tolerances."""
    tolerances = {"rtol": rtol, "atol": atol, "adjoint_rtol": TIGHT * rtol, "adjoint_atol": TIGHT * atol}
    return _adjoint(func, y0, t, **tolerances, **settings)


def _seminorm(func: nn.Module, y0: State, t: Tensor, *, options: dict[str, Any], **settings: Any) -> State:
    """Upstream's adjoint without the parameters' gradients in the norm of its error (Kidger, Chen, Lyons, ICML 2021,
    https://arxiv.org/abs/2009.09457).
    """
    return _adjoint(func, y0, t, options=options, adjoint_options={**options, "norm": "seminorm"}, **settings)


def _checkpoint(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    """PyTorch's checkpoint around the whole solve: no graph is kept, all of it is made again in backward."""

    def solve(*parts: Tensor) -> State:
        return backpropagation(func, parts if isinstance(y0, tuple) else parts[0], t, **settings)

    solution: State = checkpoint(solve, *as_tuple(y0), use_reentrant=False)
    return solution


def _has_fixed_steps(problem: Problem) -> str | None:
    return "no effect on fixed steps" if problem.has_fixed_steps else None
