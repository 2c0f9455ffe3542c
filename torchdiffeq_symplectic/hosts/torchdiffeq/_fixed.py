"""torchdiffeq's fixed-grid solvers, the Adams methods among them: measured, recorded, and their time arithmetic."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.gradient import Times
from torchdiffeq_symplectic.hosts.torchdiffeq._host import _MIN_ORDER, AdamsBashforthMoulton, FixedGridODESolver
from torchdiffeq_symplectic.hosts.torchdiffeq._listening import Listener
from torchdiffeq_symplectic.hosts.torchdiffeq._measuring import Probe, cached, scalar
from torchdiffeq_symplectic.tableau import Outcome, ProbeField, Step, Tableau, measure
from torchdiffeq_symplectic.trajectory import Keep, Recording

__all__ = ["AdamsRecorder", "FixedRecorder", "measure_adams", "measure_fixed"]

# Replaced while measuring: they say where the grid is, not what a step is.
_GRID = ("step_size", "grid_constructor", "norm", "rtol", "atol")
_STEPS_BEFORE = 4
_TOLERANCE = 1e-9


def measure_fixed(solver: type, options: Mapping[str, Any]) -> Tableau:
    """The tableau of a fixed-grid solver class under ``options``; UnknownFormError if it cannot be read off."""
    interp, perturb = options.get("interp", "linear"), options.get("perturb", False)

    def run() -> Tableau:
        tableau = measure(_probe(solver, options))
        return dataclasses.replace(_interpolating(tableau, solver, options), passes=None)

    return cached(solver, options, FixedGridODESolver, (interp, perturb), run)


def measure_adams(solver: type, options: Mapping[str, Any]) -> Callable[[int, int], Tableau]:
    """A function from ``(carried, iterations)`` to the tableau of a step of an Adams solver.

    These are the number of earlier slopes that the step uses, and how often it iterates its corrector. The function
    raises UnknownFormError if the tableau cannot be read off.
    """
    interp, perturb = options.get("interp", "linear"), options.get("perturb", False)

    def measured(carried: int, iterations: int) -> Tableau:
        def run() -> Tableau:
            return _interpolating(measure(_probe_adams(solver, options, iterations), carried), solver, options)

        return cached(solver, options, FixedGridODESolver, (interp, perturb, carried, iterations), run)

    return measured


def _instance(solver: type, options: Mapping[str, Any], y: Tensor) -> Any:
    passed = {name: value for name, value in options.items() if name not in _GRID}
    return solver(func=None, y0=y, rtol=_TOLERANCE, atol=_TOLERANCE, **passed)


def _probe(solver: type, options: Mapping[str, Any]) -> Step:
    def step(field: ProbeField, t: float, h: float, y: Tensor, carried: Sequence[Tensor]) -> Outcome:
        instance = _instance(solver, options, y)
        # A solver that remembers earlier steps betrays itself by what these leave behind.
        other = Probe(lambda t, y, side: torch.full_like(y, 1.0 + t * t))
        for before in range(_STEPS_BEFORE, 0, -1):
            instance._step_func(other, scalar(t - before * h), scalar(h), scalar(t - (before - 1) * h), y)
        return _outcome(instance, field, t, h, y)

    return step


def _probe_adams(solver: type, options: Mapping[str, Any], iterations: int) -> Step:
    class Iterating(solver):  # type: ignore[misc]
        done = 0

        def _has_converged(self, y0: Tensor, y1: Tensor) -> bool:
            self.done += 1
            return bool(self.done == iterations)

    def step(field: ProbeField, t: float, h: float, y: Tensor, carried: Sequence[Tensor]) -> Outcome:
        instance = _instance(Iterating, options, y)
        instance.prev_f = collections.deque(carried, maxlen=instance.prev_f.maxlen)
        instance.prev_t = scalar(t - h)
        return _outcome(instance, field, t, h, y)

    return step


def _outcome(instance: Any, field: ProbeField, t: float, h: float, y: Tensor) -> Outcome:
    change, slope = instance._step_func(Probe(field), scalar(t), scalar(h), scalar(t + h), y)
    return Outcome(y + change, slope, [])


def _interpolating(tableau: Tableau, solver: type, options: Mapping[str, Any]) -> Tableau:
    """Add how outputs inside a step are made: linear in the states, or Hermite's cubic with the slope at the end."""
    columns = tableau.carried + tableau.stages
    units = torch.eye(columns + 1, dtype=torch.float64)
    y0 = torch.zeros(columns + 1, dtype=torch.float64)
    y1 = torch.tensor([*tableau.b, 0.0], dtype=torch.float64)
    instance = _instance(solver, options, y0)
    t0, t1 = scalar(0.0), scalar(1.0)
    if options.get("interp", "linear") != "cubic":
        nodes = [scalar(0.0), scalar(1.0)]
        samples = [instance._linear_interp(t0, t1, y0, y1, node) for node in nodes]
    else:
        f0 = units[tableau.carried + (tableau.passes or 0)]
        nodes = [scalar(0.0), scalar(1.0), scalar(2.0), scalar(-1.0)]
        samples = [instance._cubic_hermite_interp(t0, y0, f0, t1, y1, units[-1], node) for node in nodes]
        columns += 1
        tableau = dataclasses.replace(tableau, closing=0)
    vandermonde = torch.stack([node ** torch.arange(len(nodes)) for node in nodes])
    powers = torch.linalg.solve(vandermonde, torch.stack(samples))[:, :columns]
    return dataclasses.replace(tableau, dense=tuple(tuple(row.tolist()) for row in powers))


class FixedRecorder(FixedGridODESolver):  # type: ignore[misc]
    """Mixed in before a solver class: the same solver, which also writes down its steps."""

    _grid: Tensor | None = None
    grid_constructor: Callable[[Any, Tensor, Tensor], Tensor]

    def start_recording(self, recording: Recording, measured: Any, listener: Listener) -> None:
        """Record the solve that follows; ``measured`` is the tableau of every step."""
        self.recording = recording
        self._measured = measured
        self._listener = listener
        self.func = listener
        self._starts: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._ends: list[Tensor] = []
        self._output = 0
        self._new: tuple[Tensor, Tensor] | None = None
        self._in_event = False

    def use_grid(self, y0: Tensor, t: Tensor) -> None:
        """Call the grid constructor once, with gradients; the solve and its time arithmetic use the same result."""
        grid = self.grid_constructor(self.func, y0, t)
        self._grid = grid
        detached = grid.detach()
        self.grid_constructor = lambda func, y0, t: detached

    def _tableau_used(self) -> Tableau:
        tableau: Tableau = self._measured
        return tableau

    def _step_func(self, func: Callable[..., Tensor], t0: Tensor, dt: Any, t1: Tensor, y0: Tensor) -> Any:
        listener = self._listener
        listener.start_step()
        change, slope = super()._step_func(func, t0, dt, t1, y0)
        tableau = self._tableau_used()
        slopes = passed = None
        if self.recording.keep is Keep.SLOPES:
            slopes = torch.stack([found.expand_as(y0).to(change.dtype) for found in listener.slopes])
        elif self.recording.keep is Keep.STATES and tableau.passes is not None:
            passed = slope.expand_as(y0)
        drew = listener.drew
        if drew and tableau.closing is not None:
            raise NotImplementedError(
                'options={"interp": "cubic"} cannot be differentiated exactly with a func that draws random numbers: '
                'each output draws anew. Use interp="linear".'
            )
        random = list(listener.draws) if drew else []
        self.recording.step(tableau, y0, slopes=slopes, passed=passed, random=random)
        self._new = (y0, change)
        if self._grid is None:
            self._starts.append(t0)
            self._sizes.append(torch.as_tensor(dt, dtype=t0.dtype, device=t0.device))
            self._ends.append(t1)
        return change, slope

    def _linear_interp(self, t0: Tensor, t1: Tensor, y0: Tensor, y1: Tensor, t: Tensor) -> Tensor:
        value: Tensor = super()._linear_interp(t0, t1, y0, y1, t)
        self._record_output(at_start=value is y0, at_end=value is y1)
        return value

    def _cubic_hermite_interp(self, *args: Any) -> Tensor:
        value: Tensor = super()._cubic_hermite_interp(*args)
        self._record_output(at_start=False, at_end=False)
        return value

    def _record_output(self, at_start: bool, at_end: bool) -> None:
        self._last = (at_start, at_end)
        if self._in_event:  # the search for the event interpolates many times; the last time counts
            return
        self._output += 1
        if at_start and len(self.recording) == 1:
            self.recording.at_start.append(self._output)
        else:
            self.recording.interpolate(self._output, at_end)

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> Any:
        self._in_event = True
        result = super().integrate_until_event(t0, event_fn)
        self._in_event = False
        self._record_output(*self._last)
        return result

    def finish_recording(self) -> None:
        """Called when the solve has returned."""
        if self._new is None:
            self.recording.finish(self.y0)
        else:
            state, change = self._new
            self.recording.finish(state + change)

    def times(self, t: Tensor, outputs: Tensor, step_t: Tensor | None, jump_t: Tensor | None) -> Times:
        """The times of the recorded solve, differentiable through the grid to every entry of ``t``.

        In a search for an event the grid is ``t[0]`` plus constants.

        Args:
            t: times of the call, shape ``(T,)``.
            outputs: the times of the interpolated outputs, shape ``(M,)``.
            step_t: not used by these solvers.
            jump_t: not used by these solvers.
        """
        if self._grid is not None:
            start, end = self._grid[:-1], self._grid[1:]
            size = end - start
        else:
            start, size, end = (torch.stack(times) for times in (self._starts, self._sizes, self._ends))
            shift = (t[0] - t[0].detach()).to(start.dtype)
            start, end = start + shift, end + shift
        inside = torch.tensor([n for n, _ in self.recording.inside], dtype=torch.long, device=start.device)
        theta = (outputs.to(t.dtype) - start[inside]) / (end[inside] - start[inside])
        return Times(start, size, end, theta)


class AdamsRecorder(FixedRecorder, AdamsBashforthMoulton):  # type: ignore[misc]
    """The same for the Adams methods: a step uses slopes of earlier ones, and iterates its corrector as it needs.

    What is measured is a function from these two numbers to the tableau.
    """

    _measured: Callable[[int, int], Tableau]
    _history: int | None
    _iterations: int

    def _update_history(self, t: Tensor, f: Tensor) -> None:
        super()._update_history(t, f)
        if self._history is None:
            self._history = len(self.prev_f)

    def _has_converged(self, y0: Tensor, y1: Tensor) -> Any:
        self._iterations += 1
        return super()._has_converged(y0, y1)

    def _step_func(self, func: Callable[..., Tensor], t0: Tensor, dt: Any, t1: Tensor, y0: Tensor) -> Any:
        self._history = None
        self._iterations = 0
        return super()._step_func(func, t0, dt, t1, y0)

    def _tableau_used(self) -> Tableau:
        assert self._history is not None
        # With too short a history torchdiffeq takes a Runge-Kutta step.
        carried = self._history - 1 if min(self._history, self.max_order - 1) >= _MIN_ORDER - 1 else 0
        return self._measured(carried, self._iterations)
