"""Every method in torchdiffeq's table, as it is at the time of the call, ready to be solved."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torchdiffeq as host
from torch import Tensor, nn

from torchdiffeq_symplectic.hosts.methods import Method
from torchdiffeq_symplectic.hosts.torchdiffeq._host import SOLVERS, FixedGridODESolver, RKAdaptiveStepsizeODESolver

__all__ = ["methods"]

_STEPS = 4  # of a fixed grid, up to the third output time; explicit Adams methods are unstable on many
# Some steps, a few of them rejected. None is small: the slope of torchdiffeq's interpolant, and so the gradient of a
# time, is a difference of states over the step size, which loses digits there.
_TOLERANCES = {"rtol": 1e-2, "atol": 1e-3}


def methods() -> list[Method]:
    """The methods by their names in the table, aliases included."""
    return [Method(name, functools.partial(_solve, name)) for name in SOLVERS]


def _solve(
    method: str, field: nn.Module, y0: Tensor, t: Tensor, mode: str | None, options: Mapping[str, object]
) -> Tensor:
    settings: dict[str, Any] = {"method": method, **_TOLERANCES, "options": _options(SOLVERS[method], t.detach())}
    solution: Tensor
    if mode is None:
        solution = host.odeint(field, y0, t, **settings)
    else:  # looked up at the call, as users' code finds it
        solution = host.odeint_adjoint(field, y0, t, **settings, adjoint_method=mode, adjoint_options=dict(options))
    return solution


def _options(solver: type, t: Tensor) -> dict[str, Any]:
    """Those that fix the steps which torchdiffeq would differentiate, or that put a step's end on an output time."""
    if issubclass(solver, FixedGridODESolver):
        return {"step_size": float(t[2] - t[0]) / _STEPS}
    if issubclass(solver, RKAdaptiveStepsizeODESolver):
        return {"first_step": float(t[-1] - t[0]) / 4, "step_t": t[2:3]}
    return {}
