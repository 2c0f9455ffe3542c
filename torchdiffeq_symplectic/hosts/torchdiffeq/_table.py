"""torchdiffeq's table of methods, as its ``odeint`` looks it up at each call: where a `use` reaches that function.

A name that was imported earlier is reached, too. What ``odeint`` finds there while a choice is in force is something
that behaves as the solver's class but solves by way of the chosen gradient mode.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.context import Choice, current
from torchdiffeq_symplectic.hosts.torchdiffeq._call import Call
from torchdiffeq_symplectic.hosts.torchdiffeq._solving import solve

__all__ = ["Table"]


class Table(UserDict[str, Any]):
    """``solvers`` itself, written and read through, except that a class comes diverted where a choice is in force."""

    def __init__(self, solvers: dict[str, Any]) -> None:
        super().__init__()
        self.data = solvers

    def __getitem__(self, method: str) -> Any:
        solver, choice = self.data[method], current()
        # Where nothing can need a gradient, upstream's own class does as it always does.
        return solver if choice is None or not torch.is_grad_enabled() else _Diverted(solver, method, choice)


class _Diverted:
    """In the place of a solver's class."""

    def __init__(self, solver: Any, method: str, choice: Choice) -> None:
        self._solver, self._method, self._choice = solver, method, choice

    def __call__(self, *, func: Any, y0: Tensor, rtol: Any, atol: Any, **options: Any) -> _Pending:
        return _Pending(self._method, self._choice, func, y0, rtol, atol, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._solver, name)


class _Pending:
    """In the place of a solver: a solve whose times are still to come."""

    def __init__(
        self, method: str, choice: Choice, func: Any, y0: Tensor, rtol: Any, atol: Any, options: dict[str, Any]
    ) -> None:
        self._choice = choice
        self._arguments = (func, y0), (rtol, atol, method, options)

    def integrate(self, t: Tensor) -> Tensor:
        """The solution at ``t``."""
        return self._solve(t, None)[1]

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> Any:
        """The time of the event, and the solution at ``t0`` and there."""
        return self._solve(t0.reshape(1), event_fn)

    def _solve(self, t: Tensor, event_fn: Any) -> tuple[Tensor | None, Tensor]:
        before, after = self._arguments
        call = Call(*before, t, *after, event_fn, None, self._choice.options)
        return solve(self._choice.mode, call)
