"""A call of torchdiffeq, and the solvers that do it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchdiffeq_symplectic.hosts.torchdiffeq._host import (
    SOLVERS,
    FixedGridODESolver,
    RKAdaptiveStepsizeODESolver,
    _PerturbFunc,
    _ReverseFunc,
    _TupleFunc,
)
from torchdiffeq_symplectic.hosts.torchdiffeq._recording import AdaptiveRecorder, FixedRecorder

__all__ = ["Call", "recorder_of"]


@dataclasses.dataclass
class Call:
    """The arguments of a solve as torchdiffeq normalises them: a flat state, increasing times, a wrapped field.

    Attributes:
        func: torchdiffeq's outermost wrapper of the field.
        y0: initial state; t: increasing times, shape ``(T,)``.
        rtol, atol: floats or tensors that broadcast with ``y0``.
        method, options, event_fn: as torchdiffeq takes them.
        params: tensors that gradients are wanted for; None for all that the field uses.
        adjoint_options: of the mode, and upstream's, which have no effect.
    """

    func: Any
    y0: Tensor
    t: Tensor
    rtol: Any
    atol: Any
    method: str
    options: dict[str, Any]
    event_fn: Callable[[Tensor, Tensor], Tensor] | None
    params: Sequence[Tensor] | None
    adjoint_options: Mapping[str, Any]

    @property
    def solver_class(self) -> Any:
        """That of the method."""
        return SOLVERS[self.method]

    @property
    def given(self) -> Callable[..., Any]:
        """The field that the user passed."""
        func = self.func
        while isinstance(func, _PerturbFunc | _ReverseFunc | _TupleFunc):
            func = func.base_func
        result: Callable[..., Any] = func
        return result

    def option(self, name: str) -> Tensor | None:
        """An option that may be a tensor with a gradient."""
        value = self.options.get(name)
        return value if isinstance(value, Tensor) else None

    def solver(self, solver: type, func: Callable[..., Tensor]) -> Any:
        """An instance of a solver class, for ``func`` in the place of the wrapped field."""
        # Detached: a field may mark the state that it is given as requiring gradients; that is not to be the caller's.
        return solver(func=func, y0=self.y0.detach(), rtol=self.rtol, atol=self.atol, **self.options)

    def run(self, solver: Any, t: Tensor) -> tuple[Tensor | None, Tensor]:
        """The solve as torchdiffeq does it: the time of the event, or None, and the solution."""
        return (
            (None, solver.integrate(t)) if self.event_fn is None else solver.integrate_until_event(t[0], self.event_fn)
        )


@functools.cache
def recorder_of(solver: type) -> type | None:
    """The class of ``solver`` with a recorder mixed in, or None."""
    if issubclass(solver, FixedGridODESolver):
        return type(solver.__name__, (FixedRecorder, solver), {})
    if issubclass(solver, RKAdaptiveStepsizeODESolver):
        return type(solver.__name__, (AdaptiveRecorder, solver), {})
    return None
