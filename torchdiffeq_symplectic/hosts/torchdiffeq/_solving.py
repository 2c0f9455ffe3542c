"""One call of torchdiffeq under a gradient mode: its own solver runs, recorded, and the result gets its gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.closures import held_by, modules_of
from torchdiffeq_symplectic.field import report_missing
from torchdiffeq_symplectic.gradient import Solve, Times, attach
from torchdiffeq_symplectic.graph import edge_of, reachable
from torchdiffeq_symplectic.hosts.torchdiffeq._adaptive import Adaptive, AdaptiveRecorder, measure_adaptive
from torchdiffeq_symplectic.hosts.torchdiffeq._captured import Captured, with_graph
from torchdiffeq_symplectic.hosts.torchdiffeq._fixed import AdamsRecorder, FixedRecorder, measure_adams, measure_fixed
from torchdiffeq_symplectic.hosts.torchdiffeq._host import (
    SOLVERS,
    AdamsBashforthMoulton,
    FixedGridODESolver,
    RKAdaptiveStepsizeODESolver,
    _PerturbFunc,
    _ReverseFunc,
    _TupleFunc,
)
from torchdiffeq_symplectic.hosts.torchdiffeq._listening import Listener
from torchdiffeq_symplectic.hosts.torchdiffeq._measuring import options_of
from torchdiffeq_symplectic.modes import Mode, configured
from torchdiffeq_symplectic.surroundings import Surroundings
from torchdiffeq_symplectic.tableau import Tableau, UnknownFormError
from torchdiffeq_symplectic.trajectory import Keep, Recording

__all__ = ["Call", "solve", "solve_whatever_is_used", "tableau_of"]


@dataclasses.dataclass
class Call:
    """The arguments of a solve as torchdiffeq normalises them: a flat state, increasing times, a wrapped field.

    Attributes:
        func: torchdiffeq's outermost wrapper of the field.
        y0: initial state; t: increasing times, shape ``(T,)``.
        rtol, atol: floats or tensors that broadcast with ``y0``.
        method, options, event_fn: as torchdiffeq takes them.
        params: tensors that gradients are wanted for.
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
    params: Sequence[Tensor]
    adjoint_options: Mapping[str, Any]

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


def solve(mode: Mode, call: Call) -> tuple[Tensor | None, Tensor]:
    """The time of the event, or None where there is none to find, and the solution with the gradient of ``mode``.

    Raises:
        NotImplementedError: before the solve starts, if the method's steps are not of a form that can be replayed.
        ValueError: if an entry of ``adjoint_options`` that is the mode's own has a wrong value, or the mode is not for
            the method.
    """
    mode, check = configured(mode, call.adjoint_options, _options_of_upstream)
    call.params = tuple(dict.fromkeys(call.params))
    if not torch.is_grad_enabled():
        return _plain(call, call.func)
    if not _any_requires_grad(*_sources(call), *call.params):
        return _plain(call, _FirstSlope(call, functools.partial(_report_captured, call)))
    surroundings = Surroundings(modules_of(call.given), call.y0.device)
    solver, event_t, solution = _recorded(mode, call, surroundings, None)
    finished = Solve(mode, solver.recording, call.func.base_func, surroundings, check, _undeclared(call))
    return event_t, _attached(finished, solver, call, event_t, solution)


def solve_whatever_is_used(mode: Mode, call: Call) -> tuple[Tensor | None, Tensor]:
    """The same with the gradients of backpropagation: of all that the field uses, so ``params`` are found, not given.

    Raises:
        NotImplementedError: if something needs a gradient and the method's steps cannot be replayed.
    """
    mode, check = configured(mode, call.adjoint_options, _options_of_upstream)
    sources = _sources(call)
    modules, held = held_by(call.given)
    captured = Captured(held, _any_requires_grad(*sources))
    surroundings = Surroundings(modules, call.y0.device)
    try:
        solver, event_t, solution = _recorded(mode, call, surroundings, captured)
    except (_UnreplayableError, _OtherMethodError) as refusal:
        if _any_requires_grad(*sources):
            raise
        return _plain(call, _FirstSlope(call, functools.partial(_refuse_captured, call, refusal)))
    call.params = captured.tensors
    if not _any_requires_grad(*sources, *call.params):
        return event_t, solution
    func = with_graph(call.func.base_func)
    finished = Solve(mode, solver.recording, func, surroundings, check, ignore=None)
    return event_t, _attached(finished, solver, call, event_t, solution)


def _sources(call: Call) -> list[Tensor | None]:
    """What a solve is differentiated with respect to, besides what its field uses."""
    return [call.y0, call.t, *map(call.option, ("step_t", "jump_t", "step_size")), _grid(call)]


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _recorded(
    mode: Mode, call: Call, surroundings: Surroundings, captured: Captured | None
) -> tuple[Any, Tensor | None, Tensor]:
    """The solver after the solve, which it has recorded; the time of the event or None; the solution."""
    solver, measured = _recording_solver(mode, call)
    if call.event_fn is None and isinstance(solver, FixedRecorder):
        solver.use_grid(call.y0, call.t)
    slopes = mode.keep is Keep.SLOPES and isinstance(solver, FixedRecorder)
    listener = Listener(call.func, surroundings.random, slopes, captured)
    recording = Recording(mode.keep)
    with torch.no_grad():
        solver.start_recording(recording, measured, listener)
        recording.at_start.append(0)
        event_t, solution = _run(solver, call.t.detach(), call.event_fn)
        solver.finish_recording()
    surroundings.solved()
    return solver, event_t, solution


def _attached(finished: Solve, solver: Any, call: Call, event_t: Tensor | None, solution: Tensor) -> Tensor:
    outputs = call.t[1:] if event_t is None else event_t.reshape(1)
    times = _times(solver, finished.recording, call, outputs)
    return attach(finished, solution, call.y0, times, call.params)


def _grid(call: Call) -> Tensor | None:
    """The grid of a constructor that the user gave, which is called once: it may be what needs a gradient."""
    constructor = call.options.get("grid_constructor")
    if constructor is None or call.event_fn is not None or not issubclass(SOLVERS[call.method], FixedGridODESolver):
        return None
    grid: Tensor = constructor(call.func, call.y0, call.t)
    call.options = {**call.options, "grid_constructor": lambda func, y0, t: grid}
    return grid


def _run(solver: Any, t: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor] | None) -> tuple[Tensor | None, Tensor]:
    """The solve as torchdiffeq does it."""
    return (None, solver.integrate(t)) if event_fn is None else solver.integrate_until_event(t[0], event_fn)


def _plain(call: Call, func: Callable[..., Tensor]) -> tuple[Tensor | None, Tensor]:
    """The solve where no gradient is asked for: nothing is recorded, nothing kept."""
    with torch.no_grad():
        solver = _solver(SOLVERS[call.method], call, func)
        return _run(solver, call.t, call.event_fn)


class _FirstSlope:
    """The field of a solve that nothing known needs a gradient of: ``look`` is shown the first slope with its graph."""

    def __init__(self, call: Call, look: Callable[[Tensor], None]) -> None:
        self._func, self._look = call.func, look
        self._seen = False

    def __call__(self, t: Tensor, y: Tensor, **perturb: Any) -> Tensor:
        slope: Tensor
        if self._seen:
            slope = self._func(t, y, **perturb)
        else:
            self._seen = True
            with torch.enable_grad():
                slope = self._func(t, y, **perturb)
            self._look(slope)
        return slope.detach()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._func, name)


def _times(solver: Any, recording: Recording, call: Call, outputs: Tensor) -> Times:
    interpolated = [output - 1 for _, output in recording.inside]
    if len(interpolated) < len(outputs):
        outputs = outputs[torch.tensor(interpolated, dtype=torch.long, device=outputs.device)]
    times: Times = solver.times(call.t, outputs, call.option("step_t"), call.option("jump_t"))
    return times


class _UnreplayableError(NotImplementedError):
    """The steps of a method are of no form that can be replayed."""


class _OtherMethodError(ValueError):
    """The mode is for other methods."""


def _recording_solver(mode: Mode, call: Call) -> tuple[Any, Any]:
    """An instance of the method's solver class that also records, and the tableaus of its steps, measured first.

    The tableaus are None where they are measured step by step. The solver's own warnings and errors are upstream's.
    """
    solver = SOLVERS[call.method]
    try:
        recording, measure = _recorder(solver)
        measured = measure(solver, call.options)
    except UnknownFormError as reason:
        raise _UnreplayableError(
            f'method="{call.method}" cannot be differentiated exactly by adjoint_method="{mode.name}": {reason}. Use a '
            "Runge-Kutta or Adams method of torchdiffeq, or leave this solve to torchdiffeq: by one of its own adjoint "
            "methods or, inside torchdiffeq_symplectic.use, by `with torchdiffeq_symplectic.use(None):`."
        ) from reason
    if mode.methods and not (isinstance(measured, Tableau) and mode.admits(measured)):
        known = " or ".join(f'"{method}"' for method in mode.methods)
        raise _OtherMethodError(f'adjoint_method="{mode.name}" needs method={known}, but method is "{call.method}".')
    return _solver(recording, call, call.func), measured


def _solver(solver: type, call: Call, func: Callable[..., Tensor]) -> Any:
    """An instance of a solver class, for ``func`` in the place of the wrapped field."""
    # Detached: a field may mark the state that it is given as requiring gradients, and that is not to be the caller's.
    return solver(func=func, y0=call.y0.detach(), rtol=call.rtol, atol=call.atol, **call.options)


def tableau_of(method: str, options: Mapping[str, Any] | None = None) -> Tableau:
    """The coefficients that a step of ``method`` is measured to have; for adaptive methods those of the first step.

    Args:
        method: a name in torchdiffeq's table, "rk4" for example.
        options: those that may matter: "interp", "perturb", what a solver of your own takes.

    Raises:
        KeyError: if torchdiffeq has no such method.
        UnknownFormError: if its steps are not explicit with constant coefficients, as those of the Adams methods.
    """
    solver = SOLVERS[method]
    measured = _recorder(solver)[1](solver, options or {})
    if isinstance(measured, Adaptive):
        return measured.fresh
    if isinstance(measured, Tableau):
        return measured
    raise UnknownFormError(f"the coefficients of {method} change from step to step")


@functools.cache
def _recorder(solver: type) -> tuple[type, Callable[[type, Mapping[str, Any]], Any]]:
    """The class of ``solver`` with a recorder mixed in, and how its steps are measured."""
    if issubclass(solver, AdamsBashforthMoulton):
        return type(solver.__name__, (AdamsRecorder, solver), {}), measure_adams
    if issubclass(solver, FixedGridODESolver):
        return type(solver.__name__, (FixedRecorder, solver), {}), measure_fixed
    if issubclass(solver, RKAdaptiveStepsizeODESolver):
        return type(solver.__name__, (AdaptiveRecorder, solver), {}), measure_adaptive
    raise UnknownFormError(f"{solver.__name__} is neither an adaptive Runge-Kutta nor a fixed-grid solver")


def _options_of_upstream() -> frozenset[str]:
    return frozenset({"norm"}).union(*map(options_of, SOLVERS.values()))


def _undeclared(call: Call) -> list[Tensor]:
    """Parameters of the field that are left out on purpose, as nothing is listed at all."""
    return [] if call.params else [p for module in modules_of(call.given) for p in module.parameters(recurse=False)]


def _refuse_captured(call: Call, refusal: Exception, slope: Tensor) -> None:
    """Refuse if the field uses a tensor that needs a gradient, which the method's steps cannot give."""
    if slope.requires_grad:
        raise refusal


def _report_captured(call: Call, slope: Tensor) -> None:
    """Warn if the field uses a tensor that needs a gradient, where nothing listed does."""
    if slope.requires_grad:
        left_out = set(map(id, _undeclared(call)))
        _, leaves = reachable([edge_of(slope).node], {})
        report_missing([leaf for leaf in leaves if id(leaf) not in left_out])
