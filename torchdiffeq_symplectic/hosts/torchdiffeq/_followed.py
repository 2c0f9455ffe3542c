"""Solves that transforms of ``torch.func`` or forward-mode differentiation follow."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.held import search
from torchdiffeq_symplectic.hosts.torchdiffeq._call import Call, recorder_of
from torchdiffeq_symplectic.hosts.torchdiffeq._host import (
    AdamsBashforthMoulton,
    FixedGridODESolver,
    RKAdaptiveStepsizeODESolver,
    fixed_grid,
)
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed
from torchdiffeq_symplectic.listener import Listener
from torchdiffeq_symplectic.modes import Mode
from torchdiffeq_symplectic.recording import Keep, Recording
from torchdiffeq_symplectic.replay import Conditions, ReplayCheck
from torchdiffeq_symplectic.sweep import replayed
from torchdiffeq_symplectic.tape import Tape
from torchdiffeq_symplectic.transforms import Rows, Untransformed, is_vmapped, value_of
from torchdiffeq_symplectic.uses import Captured

__all__ = ["followed"]


def followed(mode: Mode, call: Call) -> tuple[Tensor | None, Tensor]:
    """The solve as a chain of plain operations, which transforms can follow, with torchdiffeq's own values.

    Fixed grids are solved by torchdiffeq itself. Adaptive methods choose their steps by values first; then the accepted
    steps are taken once more, their sizes constant.

    Raises:
        NotImplementedError: before the solve, if it cannot be followed.
    """
    solver = call.solver_class
    if issubclass(solver, FixedGridODESolver):
        if is_vmapped() and (call.event_fn is not None or _decides_by_values(solver, call)):
            raise _refusal(mode, call, "torch.func.vmap cannot follow it, as what it computes depends on values")
        instance = solver(
            func=Timed(call.func.base_func, call.func), y0=call.y0, rtol=call.rtol, atol=call.atol, **call.options
        )
        with Rows(len(call.t)) as rows:
            event_t, solution = call.run(instance, call.t)
        return event_t, rows.stacked(solution)
    if is_vmapped():
        raise _refusal(mode, call, "torch.func.vmap cannot follow it, as its steps depend on values")
    if not issubclass(solver, RKAdaptiveStepsizeODESolver):
        raise _refusal(mode, call, "it is no solver of PyTorch operations alone")
    if call.event_fn is not None:
        raise _refusal(mode, call, "a search for an event has no derivative in forward mode or under torch.func")
    return None, _retaken(call)


def _decides_by_values(solver: Any, call: Call) -> bool:
    """Whether a fixed-grid solver iterates until something is small."""
    if issubclass(solver, AdamsBashforthMoulton):
        return bool(solver(func=call.func, y0=call.y0, **call.options).implicit)
    return bool(solver._step_func.__module__ != fixed_grid.__name__)


def _retaken(call: Call) -> Tensor:
    """The solution of an adaptive method, its accepted steps taken once more."""
    conditions = Conditions(search(call.given), call.y0.device)
    recording = Recording(Keep.NORMS, [value_of(call.y0)])
    with Untransformed() as untransformed, torch.no_grad():
        values = dataclasses.replace(
            call,
            y0=value_of(call.y0),
            rtol=value_of(call.rtol),
            atol=value_of(call.atol),
            options=pytree.tree_map(value_of, call.options),
        )
        solver = values.solver(recorder_of(call.solver_class), call.func)  # type: ignore[arg-type]
        listener = Listener(untransformed.values_of(call.func.base_func), conditions, Captured((), looks=0))
        solver.func = Timed(listener, call.func)
        solver.start_recording(recording, listener)
        recording.at_start.append(0)
        solution = solver.integrate(value_of(call.t))
        recording.finish([solver.final_state], [solution])
        stepper = solver.stepper()
    conditions.solved()
    inside = [output for _, output in recording.inside]
    times = solver.times(call.t, call.t[inside], call.option("step_t"), call.option("jump_t"))
    tape = Tape(recording, recording.saved, [call.y0], times)
    check = ReplayCheck("ignore", 0.0)
    with conditions.restored():
        field = Field(call.func.base_func, (), conditions, check, wants_time=False, expected={})
        field.cuts = False
        rows = replayed(tape, stepper, field, check, [call.y0], times)
    return torch.stack([rows[output][0] for output in range(len(call.t))])


def _refusal(mode: Mode, call: Call, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f'method="{call.method}" under adjoint_method="{mode.name}": {reason}. Use an explicit fixed-grid method, such '
        'as "rk4" with a step_size; or put the batch into a dimension of y0, and differentiate by torch.autograd.grad, '
        "which takes is_grads_batched=True."
    )
