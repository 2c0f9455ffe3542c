"""torchdiffeq's adaptive Runge-Kutta solvers: measured, recorded, and their time arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_symplectic.gradient import Times
from torchdiffeq_symplectic.hosts.torchdiffeq._host import RKAdaptiveStepsizeODESolver, _sort_tvals
from torchdiffeq_symplectic.hosts.torchdiffeq._listening import Listener
from torchdiffeq_symplectic.hosts.torchdiffeq._measuring import Probe, cached, maximum, scalar
from torchdiffeq_symplectic.tableau import Outcome, ProbeField, Step, Tableau, UnknownFormError, measure
from torchdiffeq_symplectic.trajectory import Keep, Recording

__all__ = ["Adaptive", "AdaptiveRecorder", "measure_adaptive"]

# Replaced while measuring: they say which steps are taken, not what a step is.
_STEPPING = ("first_step", "min_step", "max_step", "step_t", "jump_t", "norm", "rtol", "atol", "dtype")


class Adaptive(NamedTuple):
    """The step as it is after the start or a jump, and as it is when it begins with the slope of the step before."""

    fresh: Tableau
    continuing: Tableau


def measure_adaptive(solver: type, options: Mapping[str, Any]) -> Adaptive:
    """The tableaus of an adaptive solver class under ``options``; UnknownFormError if they cannot be read off."""

    def run() -> Adaptive:
        step = _probe(solver, options)
        fresh = measure(step)
        reduced = fresh.first_same_as_last()
        if reduced.closing is not None:
            return Adaptive(reduced, reduced.starting(reduced.closing))
        return Adaptive(fresh, measure(step, carried=1))

    return cached(solver, options, RKAdaptiveStepsizeODESolver, None, run)


def _probe(solver: type, options: Mapping[str, Any]) -> Step:
    passed = {name: value for name, value in options.items() if name not in _STEPPING}
    huge = 1e30

    def step(field: ProbeField, t: float, h: float, y: Tensor, carried: Sequence[Tensor]) -> Outcome:
        probe = Probe(field)
        still = Probe(lambda t, y, side: torch.zeros_like(y))
        func = still if carried else probe
        instance = solver(func=func, y0=y, rtol=huge, atol=huge, norm=maximum, first_step=h, **passed)
        instance._before_integrate(torch.stack([scalar(t), scalar(t + h)]))
        state = instance.rk_state
        if carried:
            instance.func = probe
            state = state._replace(f1=carried[0])
        state = instance._adaptive_step(state)
        if float(state.t1) != t + h:
            raise UnknownFormError("it does not accept a step without error")
        instance.rk_state = state
        at = 0.3
        shown = instance._advance(scalar(t + at * h))
        powers = sum(
            (coefficient * at**power for power, coefficient in enumerate(state.interp_coeff)), torch.zeros_like(y)
        )
        if not torch.allclose(shown, powers, rtol=1e-10, atol=1e-10):
            raise UnknownFormError("its interpolation is not the polynomial that it keeps")
        return Outcome(state.y1, state.f1, state.interp_coeff)

    return step


class AdaptiveRecorder(RKAdaptiveStepsizeODESolver):  # type: ignore[misc]
    """Mixed in before a solver class: the same solver, which also writes down the steps that it accepts.

    A subclass, not replaced methods: a closure over the solver would be a reference cycle.
    """

    def start_recording(self, recording: Recording, measured: Adaptive, listener: Listener) -> None:
        """Record the solve that follows."""
        self.recording = recording
        self._measured = measured
        self._listener = listener
        self.func = listener
        self._accepted: list[tuple[Tensor, Tensor]] = []
        self._starts: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._ends: list[Tensor] = []
        self._tableau = measured.fresh
        self._output = 0

    def _before_integrate(self, t: Tensor) -> None:
        super()._before_integrate(t)
        self._first_draw, self._first_drew = self._listener.draws[0], self._listener.drew

    def _interp_fit(self, y0: Tensor, y1: Tensor, k: Tensor, dt: Tensor) -> Any:
        # Called for accepted steps alone, with the size that the step really had and with all of its slopes.
        self._accepted.append((k, dt))
        return super()._interp_fit(y0, y1, k, dt)

    def _adaptive_step(self, rk_state: Any) -> Any:
        self._listener.start_step()
        self._accepted.clear()
        new_state = super()._adaptive_step(rk_state)
        for k, size in self._accepted:
            self._record(rk_state, new_state, k, size)
        return new_state

    def _record(self, old: Any, new: Any, k: Tensor, size: Tensor) -> None:
        recording, tableau = self.recording, self._tableau
        slopes = passed = None
        if recording.keep is Keep.SLOPES:
            slopes = k.movedim(-1, 0)[tableau.carried :]
        elif recording.keep is Keep.STATES and tableau.passes is not None:
            # A copy: a view would keep all slopes of the step.
            passed = k[..., tableau.carried + tableau.passes].clone()
        # The first slope is the last evaluation of the step before, unless it is carried in.
        draws, drew = self._listener.draws, self._listener.drew
        random = [*([] if tableau.carried else [self._first_draw]), *draws[: k.shape[-1] - 1]]
        random = random if drew or self._first_drew else []
        self._first_draw, self._first_drew = draws[-1], drew
        recording.step(tableau, old.y1, slopes=slopes, passed=passed, random=random)
        self._starts.append(old.t1)
        self._sizes.append(size)
        self._ends.append(new.t1)
        # After a jump torchdiffeq evaluates the first slope anew, from the other side.
        jumped = new.f1.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
        self._tableau = self._measured.fresh.starting(1) if jumped and new.f1.numel() else self._measured.continuing

    def _advance(self, next_t: Tensor) -> Tensor:
        value: Tensor = super()._advance(next_t)
        self._output += 1
        self.recording.interpolate(self._output)
        return value

    def _advance_until_event(self, event_fn: Callable[[Tensor, Tensor], Tensor]) -> Any:
        event_t, value = super()._advance_until_event(event_fn)
        self._output += 1
        if len(self.recording):
            self.recording.interpolate(self._output)
        else:
            self.recording.at_start.append(self._output)
        return event_t, value

    def finish_recording(self) -> None:
        """Called when the solve has returned."""
        self.recording.finish(self.rk_state.y1 if len(self.recording) else self.y0)

    def times(self, t: Tensor, outputs: Tensor, step_t: Tensor | None, jump_t: Tensor | None) -> Times:
        """The times of the recorded solve, differentiable along torchdiffeq's own arithmetic.

        The first time moves all steps up to the first that was cut at a ``step_t`` or ``jump_t``; that one moves the
        steps up to the next such, and the sizes of the steps that end there. Accepted sizes are constants.

        Args:
            t: times of the call, shape ``(T,)``.
            outputs: the times of the interpolated outputs, shape ``(M,)``.
            step_t: the option as given, after torchdiffeq's own normalisation.
            jump_t: the same.
        """
        real = self.y0.dtype.to_real()
        t = t.to(self.dtype)
        if not len(self.recording):
            none = t[:0]
            return Times(none, none, none, none)
        start, size, end = (torch.stack(times) for times in (self._starts, self._sizes, self._ends))
        moving = [tensor for tensor in (t, step_t, jump_t) if tensor is not None and tensor.requires_grad]
        if moving:
            shift, origin = self._anchors(t, step_t, jump_t)
            start = start + shift[origin[:-1]]
            end = end + shift[origin[1:]]
            size = size + (shift[origin[1:]] - shift[origin[:-1]])
        inside = torch.tensor([n for n, _ in self.recording.inside], dtype=torch.long, device=start.device)
        theta = (outputs.to(self.dtype) - start[inside]) / (end[inside] - start[inside])
        return Times(start.to(real), size.to(real), end.to(real), theta)

    def _anchors(self, t: Tensor, step_t: Tensor | None, jump_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Times that steps are anchored to, as zeros that carry their gradient; and each step boundary's anchor."""
        anchors = [t[0]]
        origin = [0]
        options = [
            (_sort_tvals(given.to(self.dtype), t[0].detach()), used)
            for given, used in ((step_t, self.step_t), (jump_t, self.jump_t))
            if given is not None and len(used)
        ]
        for end in self._ends:
            # A step that was cut ends at a view of the option's sorted values.
            for given, used in options:
                if end.untyped_storage().data_ptr() == used.untyped_storage().data_ptr():
                    anchors.append(given[end.storage_offset() - used.storage_offset()])
            origin.append(len(anchors) - 1)
        stacked = torch.stack(anchors)
        return stacked - stacked.detach(), torch.tensor(origin, device=t.device)
