"""The adapter of torchdiffeq: how its solve is recorded, and which of its names are patched.

`register` replaces three things: the function ``odeint_adjoint`` wherever torchdiffeq itself holds it; the class that
it looks up at each call, which reaches callers that imported the function earlier; and the table that ``odeint`` looks
its methods up in, which a `use` needs.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torchdiffeq as host
from torch import Tensor, nn

from torchdiffeq_symplectic.context import chosen_by
from torchdiffeq_symplectic.hosts.torchdiffeq._call import Call
from torchdiffeq_symplectic.hosts.torchdiffeq._host import SOLVERS, _check_inputs, _flat_to_shape, adjoint
from torchdiffeq_symplectic.hosts.torchdiffeq._solving import solve
from torchdiffeq_symplectic.hosts.torchdiffeq._table import Table
from torchdiffeq_symplectic.modes import MODES

__all__ = ["odeint_adjoint", "register", "unregister"]

_upstream_odeint_adjoint = adjoint.odeint_adjoint
_upstream_method = adjoint.OdeintAdjointMethod
_table = Table(SOLVERS)


def odeint_adjoint(
    func: Any,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Any = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Any = None,
) -> Any:
    """``odeint_adjoint`` of torchdiffeq, with this package's gradient modes among the values of ``adjoint_method``.

    Gradients are those of the discrete solve, exact to rounding, its accepted step sizes held constant, with respect to
    ``y0``, ``adjoint_params`` and ``t`` (and ``step_t``, ``jump_t`` and what a grid constructor makes the grid from);
    under "memory_free" they are approximate.

    Args:
        func: the field, ``func(t, y) -> dy/dt``; ``t`` 0-d, ``y`` like ``y0``.
        y0: initial state, a tensor of any shape or a tuple of tensors.
        t: output times, shape ``(T,)``, strictly increasing or decreasing; the first belongs to ``y0``.
        rtol: as for ``torchdiffeq.odeint``, as are the next four.
        atol: absolute tolerance.
        method: name of the solver, "dopri5" if not given.
        options: of the solver.
        event_fn: ``event_fn(t, y)``; the solve ends where it is zero.
        adjoint_rtol: accepted; no effect in the modes of this package, whose backward has no tolerance.
        adjoint_atol: the same.
        adjoint_method: "symplectic", "aca", "baseline", "memory_free" (for explicit methods whose step depends on the
            state alone), or one of torchdiffeq's methods, which are passed on to it.
        adjoint_options: for this package's modes ``"replay_check"`` ("error", "warn" or "ignore"), for "symplectic"
            ``"checkpoint"`` ("steps" or "stages"), for "memory_free" ``"tolerance"`` (the largest reconstruction error
            that is no error), ``"corrections"`` (the most of a step back) and ``"report"`` (True, or a function that is
            called with the reconstruction error). Options of upstream's adjoint, its norm too, have no effect.
        adjoint_params: tensors to differentiate with respect to; the parameters of ``func`` if not given, ``()`` for
            none.

    Returns:
        The solution, shape ``(T, *y0.shape)``, or a tuple of such; with ``event_fn`` the event's time and the solution.

    Raises:
        ValueError: for an unknown method, one that the mode is not for, or ``func`` without ``adjoint_params`` that is
            no module.
        TypeError: if ``adjoint_params`` is no sequence of tensors, ``adjoint_options`` no dictionary, or
            ``adjoint_method`` no name.
        NotImplementedError: before the solve, if the steps of ``method`` are of no form that can be replayed.
        ReplayError: in backward, if recomputing a step does not give what the forward pass gave.
    """
    if not isinstance(adjoint_method, Hashable):
        raise TypeError(f'adjoint_method must be a name such as "symplectic", but is {adjoint_method!r}')
    choice = chosen_by(adjoint_method, adjoint_options)
    if choice is None or not _is_known(adjoint_method):
        return _upstream_odeint_adjoint(
            func,
            y0,
            t,
            rtol=rtol,
            atol=atol,
            method=method,
            options=options,
            event_fn=event_fn,
            adjoint_rtol=adjoint_rtol,
            adjoint_atol=adjoint_atol,
            adjoint_method=adjoint_method,
            adjoint_options=adjoint_options,
            adjoint_params=adjoint_params,
        )
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they can be "
            "specified explicitly via the `adjoint_params` argument. If there are no parameters then it is allowable "
            "to set `adjoint_params=()`."
        )
    given = adjoint.find_parameters(func) if adjoint_params is None else _sequence_of_tensors(adjoint_params)
    params = tuple(param for param in given if param.requires_grad)
    shapes, func, y0, t, rtol, atol, method, options, event_fn, decreasing = _check_inputs(
        func, y0, t, rtol, atol, method, options, event_fn, SOLVERS
    )
    call = Call(func, y0, t, rtol, atol, method or "dopri5", options or {}, event_fn, params, choice.options)
    event_t, solution = solve(choice.mode, call)
    if shapes is not None:
        solution = _flat_to_shape(solution, (len(t),), shapes)
    if event_t is None:
        return solution
    event_t = event_t.to(t)
    return -event_t if decreasing else event_t, solution


def _sequence_of_tensors(adjoint_params: Any) -> Sequence[Tensor]:
    wrong = None
    if isinstance(adjoint_params, Tensor):
        wrong = "a single tensor, which would be taken apart into its rows. Pass adjoint_params=(tensor,)"
    elif isinstance(adjoint_params, str | Mapping) or not isinstance(adjoint_params, Iterable):
        wrong = f"a {type(adjoint_params).__name__}. Pass tuple(func.parameters()), say"
    else:
        adjoint_params = tuple(adjoint_params)
        kinds = [type(entry).__name__ for entry in adjoint_params if not isinstance(entry, Tensor)]
        if kinds:
            wrong = f"a sequence with a {kinds[0]} in it. Pass tuple(func.parameters()), say"
    if wrong is not None:
        raise TypeError(f"adjoint_params must be a sequence of tensors, but is {wrong}.")
    return tuple(adjoint_params)


class _Dispatch:
    """In the place of torchdiffeq's ``OdeintAdjointMethod``, which its ``odeint_adjoint`` looks up at each call."""

    @staticmethod
    def apply(
        shapes: Any,
        func: Any,
        y0: Tensor,
        t: Tensor,
        rtol: Any,
        atol: Any,
        method: str,
        options: dict[str, Any],
        event_fn: Any,
        adjoint_rtol: Any,
        adjoint_atol: Any,
        adjoint_method: str,
        adjoint_options: dict[str, Any],
        t_requires_grad: bool,
        *adjoint_params: Tensor,
    ) -> Any:
        needed = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y0, t, *adjoint_params))
        if needed and not _is_known(adjoint_method):
            known = '", "'.join([*SOLVERS, *MODES])
            raise ValueError(f'Invalid method "{adjoint_method}". Must be one of {{"{known}"}}.')
        choice = chosen_by(adjoint_method, adjoint_options)
        if choice is not None:
            call = Call(func, y0, t, rtol, atol, method, options, event_fn, adjoint_params, choice.options)
            event_t, solution = solve(choice.mode, call)
            return solution if event_t is None else (event_t, solution)
        return _upstream_method.apply(
            shapes,
            func,
            y0,
            t,
            rtol,
            atol,
            method,
            options,
            event_fn,
            adjoint_rtol,
            adjoint_atol,
            adjoint_method,
            adjoint_options,
            t_requires_grad,
            *adjoint_params,
        )


def _is_known(adjoint_method: object) -> bool:
    return adjoint_method is None or adjoint_method in SOLVERS or adjoint_method in MODES


def register() -> None:
    """Make the gradient modes known to torchdiffeq. Doing it again changes nothing."""
    _replace(_upstream_odeint_adjoint, odeint_adjoint, _upstream_method, _Dispatch, SOLVERS, _table)


def unregister() -> None:
    """Put back what `register` replaced."""
    _replace(odeint_adjoint, _upstream_odeint_adjoint, _Dispatch, _upstream_method, _table, SOLVERS)


def _replace(function: Any, new_function: Any, method: Any, new_method: Any, table: Any, new_table: Any) -> None:
    modules: tuple[Any, ...] = (host, sys.modules["torchdiffeq._impl"], adjoint)
    for module in modules:
        if module.odeint_adjoint is function:
            module.odeint_adjoint = new_function
    if adjoint.OdeintAdjointMethod is method:
        adjoint.OdeintAdjointMethod = new_method
    solving: Any = sys.modules["torchdiffeq._impl.odeint"]
    if solving.SOLVERS is table:
        solving.SOLVERS = new_table
