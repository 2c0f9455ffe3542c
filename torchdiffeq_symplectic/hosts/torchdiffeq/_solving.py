"""A solve of torchdiffeq under a gradient mode: recorded while torchdiffeq solves, then joined to autograd's graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.errors import UnsupportedSolverError
from torchdiffeq_symplectic.graph import edge_of, is_behind
from torchdiffeq_symplectic.held import Held, refuse_sharded, search
from torchdiffeq_symplectic.hosts.torchdiffeq._call import Call, recorder_of
from torchdiffeq_symplectic.hosts.torchdiffeq._followed import followed
from torchdiffeq_symplectic.hosts.torchdiffeq._host import (
    SOLVERS,
    AdamsBashforthMoulton,
    FixedGridODESolver,
    RKAdaptiveStepsizeODESolver,
)
from torchdiffeq_symplectic.hosts.torchdiffeq._recording import FixedRecorder
from torchdiffeq_symplectic.hosts.torchdiffeq._steps import AdaptiveStepper
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed
from torchdiffeq_symplectic.listener import Listener, with_graph
from torchdiffeq_symplectic.modes import Mode, configured
from torchdiffeq_symplectic.recording import Keep, Recording
from torchdiffeq_symplectic.replay import Conditions
from torchdiffeq_symplectic.solve_function import Solve, attach, missing_gradients, warn_of_escaped, warn_of_missing
from torchdiffeq_symplectic.transforms import is_followed
from torchdiffeq_symplectic.uses import Captured

__all__ = ["solve"]


def solve(mode: Mode, call: Call) -> tuple[Tensor | None, Tensor]:
    """The time of the event, or None where there is none to find, and the solution with the gradient of ``mode``.

    Raises:
        UnsupportedSolverError: before the solve starts, if something needs a gradient and the method's steps cannot be
            replayed.
        ValueError: if an entry of ``adjoint_options`` that is the mode's own has a wrong value.
    """
    if torch.compiler.is_compiling():  # one graph break, and no more
        return torch.compiler.disable(solve)(mode, call)  # type: ignore[no-any-return]
    mode, check = configured(mode, call.adjoint_options, _options_of_upstream)
    if is_followed():
        return followed(mode, call)
    if not torch.is_grad_enabled():
        return _plain(call, call.func)
    sources = [call.y0, call.t, *map(call.option, ("step_t", "jump_t", "step_size")), _grid(call)]
    needed = _any_requires_grad(*sources, *(call.params or ()))
    if call.params is not None and not needed:
        return _plain(call, _Looking(call))
    try:
        solver = _recording_solver(mode, call)
    except UnsupportedSolverError as refusal:
        if needed:
            raise
        return _plain(call, _Looking(call, refusal))
    held = search(call.given)
    if call.params is None and not needed and not _any_requires_grad(*held.tensors):
        try:
            return _plain(call, _Looking(call, _Needed()))
        except _Needed:  # by a tensor that is held out of sight
            pass
    refuse_sharded(call.given, held)
    conditions = Conditions(held, call.y0.device)
    watched = [tensor for tensor in held.tensors if call.params is None or not tensor.is_leaf]
    captured = Captured(held.tensors, conditions.random, watched)
    captured.know(param for param in call.params or () if not param.is_leaf)
    func = with_graph(call.func.base_func) if call.params is None else call.func.base_func
    slopes = mode.keep is Keep.SLOPES and isinstance(solver, FixedRecorder)
    listener = Listener(func, conditions, captured, keeps_slopes=slopes)
    recording = Recording(mode.keep, [call.y0])
    solver.func = Timed(listener, call.func)
    if call.event_fn is None and isinstance(solver, FixedRecorder):
        solver.use_grid(call.y0, call.t)
    with torch.no_grad():
        solver.start_recording(recording, listener)
        recording.at_start.append(0)
        event_t, solution = call.run(solver, call.t.detach())
        recording.finish([solver.final_state], [solution])
    listener.close()
    conditions.solved()
    if captured.escaped:
        warn_of_escaped()
    targets, missing = _targets(call, captured, held)
    if not _any_requires_grad(*sources, *targets):
        return event_t, solution
    outputs = call.t[1:] if event_t is None else event_t.reshape(1)
    inside = [output - 1 for _, output in recording.inside]
    if len(inside) < len(outputs):
        outputs = outputs[torch.tensor(inside, dtype=torch.long, device=outputs.device)]
    finished = Solve(
        mode,
        recording,
        solver.stepper(),
        func,
        conditions,
        check,
        retains=captured.walked_through,
        missing=missing_gradients(missing),
    )
    times = solver.times(call.t, outputs, call.option("step_t"), call.option("jump_t"))
    (result,) = attach(finished, [solution], [call.y0], times, targets)
    return event_t, result


def _targets(call: Call, captured: Captured, held: Held) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What the solve is differentiated with respect to, and what the field uses besides that needs a gradient."""
    used = captured.tensors
    if call.params is None:
        return used, ()
    listed = dict.fromkeys(call.params)
    edges = {edge_of(param) for param in listed if param.requires_grad}
    others = [tensor for tensor in used if edge_of(tensor) not in edges]
    # What is computed from a listed tensor passes its gradient on to it.
    computed = [tensor for tensor in others if is_behind(tensor, edges)]
    left_out = {id(tensor) for tensor in computed}
    if not listed:  # parameters of the field are left out on purpose
        left_out |= {id(param) for module in held.modules for param in module.parameters(recurse=False)}
    return (*listed, *computed), [tensor for tensor in others if id(tensor) not in left_out]


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _grid(call: Call) -> Tensor | None:
    """The grid of a constructor that the user gave, which is called once: it may be what needs a gradient."""
    constructor = call.options.get("grid_constructor")
    if constructor is None or call.event_fn is not None or not issubclass(call.solver_class, FixedGridODESolver):
        return None
    grid: Any = constructor(call.func, call.y0, call.t)
    if not isinstance(grid, Tensor) or grid.dim() != 1:
        what = f"one of shape {tuple(grid.shape)}" if isinstance(grid, Tensor) else f"a {type(grid).__name__}"
        raise TypeError(
            'options["grid_constructor"] must return the times of the steps from t[0] to t[-1], a tensor of shape '
            f"(N,), but returned {what}."
        )
    call.options = {**call.options, "grid_constructor": lambda func, y0, t: grid}
    return grid


def _plain(call: Call, func: Callable[..., Tensor]) -> tuple[Tensor | None, Tensor]:
    """The solve where no gradient is asked for: nothing is recorded, nothing kept."""
    with torch.no_grad():
        return call.run(call.solver(call.solver_class, func), call.t)


class _Needed(Exception):  # noqa: N818 (caught: no error)
    """A gradient is needed after all."""


class _Looking:
    """The field of a solve that nothing known needs a gradient of, which may use something that does.

    Args:
        call: the solve.
        refusal: what to raise in that case; None for a warning.
    """

    def __init__(self, call: Call, refusal: Exception | None = None) -> None:
        self._call, self._refusal = call, refusal
        self._seen = False

    def __call__(self, t: Tensor, y: Tensor, **perturb: Any) -> Tensor:
        slope: Tensor
        if self._seen:
            slope = self._call.func(t, y, **perturb)
            return slope.detach()
        self._seen = True
        with torch.enable_grad():
            slope = self._call.func(t, y, **perturb)
        if slope.requires_grad and self._refusal is not None:
            raise self._refusal
        if slope.requires_grad:
            held = search(self._call.given)
            captured = Captured(held.tensors)
            captured.look(slope)
            warn_of_missing(missing_gradients(_targets(self._call, captured, held)[1]))
        return slope.detach()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.func, name)


def _recording_solver(mode: Mode, call: Call) -> Any:
    """An instance of the method's solver class that also records. Its own warnings and errors are upstream's."""
    solver = call.solver_class
    recording = recorder_of(solver)
    name = f'method="{call.method}" cannot be differentiated by adjoint_method="{mode.name}"'
    if recording is None:
        raise UnsupportedSolverError(
            f"{name}: {solver.__name__} is neither an adaptive Runge-Kutta nor a fixed-grid solver. Use another "
            "method, or leave this solve to torchdiffeq: by one of its own adjoint methods or, inside "
            "torchdiffeq_symplectic.use, by `with torchdiffeq_symplectic.use(None):`."
        )
    instance = call.solver(recording, call.func)
    one_step = not issubclass(solver, AdamsBashforthMoulton)
    if issubclass(solver, RKAdaptiveStepsizeODESolver):
        one_step = AdaptiveStepper.evaluates_carry(instance)
    if mode.keep is Keep.OUTPUTS and not one_step:
        raise UnsupportedSolverError(
            f"{name}: its steps start from slopes of earlier steps, which stepping back does not recover. Use "
            'adjoint_method="symplectic", or a method that starts from the state alone, such as "rk4" or "dopri5".'
        )
    return instance


def _options_of_upstream() -> frozenset[str]:
    """The options of all of torchdiffeq's solvers: given to a mode, they have no effect."""
    classes = {cls for solver in SOLVERS.values() for cls in solver.__mro__ if "__init__" in vars(cls)}
    names = {name for cls in classes for name in inspect.signature(cls).parameters}
    return frozenset({"norm", *names})
