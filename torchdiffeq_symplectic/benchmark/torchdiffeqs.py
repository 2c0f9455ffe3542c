"""torchdiffeq's ways to differentiate its solve, and this package's modes in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchdiffeq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchdiffeq_symplectic.benchmark.contender import BACKPROPAGATION, Contender
from torchdiffeq_symplectic.benchmark.problem import Problem, Solver, State, as_tuple
from torchdiffeq_symplectic.modes import MODES

__all__ = ["OWN", "installed"]


def installed() -> list[Contender]:
    """Those that run torchdiffeq's solvers: its own and this package's."""
    return [
        Contender(BACKPROPAGATION, _backpropagation, may_fail=False),
        Contender("adjoint", _adjoint()),
        Contender("adjoint, seminorm", _seminorm, refusal=_has_fixed_steps),
        Contender("checkpoint", _checkpoint),
        *(
            Contender(name, _adjoint(**arguments), refusal=_refusal(arguments["adjoint_method"]), may_fail=False)
            for name, arguments in OWN.items()
        ),
    ]


OWN: dict[str, dict[str, Any]] = {
    "baseline": {"adjoint_method": "baseline"},
    "aca": {"adjoint_method": "aca"},
    "symplectic": {"adjoint_method": "symplectic"},
    "symplectic, stages": {"adjoint_method": "symplectic", "adjoint_options": {"checkpoint": "stages"}},
    "memory_free": {"adjoint_method": "memory_free"},
}


def _backpropagation(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    solution: State = torchdiffeq.odeint(func, y0, t, **settings)
    return solution


def _adjoint(**mode: Any) -> Solver:
    """One of the modes of torchdiffeq's ``odeint_adjoint``, which is looked up at each call, as it may be patched."""

    def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        solution: State = torchdiffeq.odeint_adjoint(func, y0, t, **settings, **mode)
        return solution

    return solve


def _seminorm(func: nn.Module, y0: State, t: Tensor, *, options: dict[str, Any], **settings: Any) -> State:
    """Upstream's adjoint without the parameters' gradients in the norm of its error; the options are those of forward.

    Kidger, Chen, Lyons, "Hey, that's not an ODE": Faster ODE Adjoints via Seminorms, ICML 2021,
    https://arxiv.org/abs/2009.09457
    """
    adjoint_options = {**options, "norm": "seminorm"}
    solution: State = torchdiffeq.odeint_adjoint(
        func, y0, t, options=options, adjoint_options=adjoint_options, **settings
    )
    return solution


def _checkpoint(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    """PyTorch's checkpoint around the whole solve: no graph is kept, all of it is made again in backward."""

    def solve(*parts: Tensor) -> State:
        solution: State = torchdiffeq.odeint(func, parts if isinstance(y0, tuple) else parts[0], t, **settings)
        return solution

    solution: State = checkpoint(solve, *as_tuple(y0), use_reentrant=False)
    return solution


def _has_fixed_steps(problem: Problem) -> str | None:
    return "its norm has no effect on fixed steps" if problem.has_fixed_steps else None


def _refusal(mode: str) -> Callable[[Problem], str | None]:
    only = MODES[mode].methods

    def refusal(problem: Problem) -> str | None:
        if not only or problem.method in only:
            return None
        return f"only for {' and '.join(only)}"

    return refusal
