"""torchdiffeq's solvers, which also write down the steps that they accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.torchdiffeq._host import (
    FixedGridODESolver,
    RKAdaptiveStepsizeODESolver,
    _sort_tvals,
    fixed_grid,
)
from torchdiffeq_symplectic.hosts.torchdiffeq._steps import (
    AdaptiveStepper,
    FixedStepper,
    Grid,
    Jump,
    Memory,
    copied,
    same,
)
from torchdiffeq_symplectic.listener import Call, Listener
from torchdiffeq_symplectic.recording import Keep, Recording
from torchdiffeq_symplectic.tape import Times
from torchdiffeq_symplectic.transforms import is_followed, value_of

__all__ = ["AdaptiveRecorder", "FixedRecorder"]


class AdaptiveRecorder(RKAdaptiveStepsizeODESolver):  # type: ignore[misc]
    """Mixed in before an adaptive solver class.

    A subclass, not replaced methods: a closure over the solver would be a reference cycle.
    """

    def start_recording(self, recording: Recording, listener: Listener) -> None:
        """Record the solve that follows."""
        excluded = _OF_A_SOLVE | _OF_STEP_SIZES
        self.settings = {name: value for name, value in vars(self).items() if name not in excluded}
        self.recording = recording
        self._listener = listener
        self._accepted: list[tuple[Tensor, Tensor]] = []
        self._starts: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._ends: list[Tensor] = []
        self._output = 0
        self._evaluates_carry = AdaptiveStepper.evaluates_carry(self)
        self._jumped = False

    def _before_integrate(self, t: Tensor) -> None:
        super()._before_integrate(t)
        # The first evaluation is the slope at the start; the others choose the first step.
        self._first: tuple[Call, ...] = tuple(self._listener.calls[:1])
        self._first_drew = self._listener.drew

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
        recording, listener = self.recording, self._listener
        # After a discontinuity torchdiffeq evaluates the slope once more, from the other side.
        jumps = bool(new.f1.numel()) and new.f1.untyped_storage().data_ptr() != k.untyped_storage().data_ptr()
        slopes = None
        if recording.keep is Keep.SLOPES:
            slopes = [*k.unbind(-1)[1 - len(self._first) :], *([new.f1] if jumps else [])]
        further: list[Tensor | None] = []
        if len(recording):
            is_field = (self._jumped or self._evaluates_carry) and recording.keep is not Keep.SLOPES
            further = [None if is_field else k[..., 0]]
        drew = listener.drew or self._first_drew
        recording.step(
            [old.y1], further, [*self._first, *listener.calls], drew=drew, slopes=slopes, note=Jump(self._jumped, jumps)
        )
        # A carried slope is the last evaluation of the step before: its random state is kept there.
        self._first, self._first_drew = (), drew
        self._jumped = jumps
        self._starts.append(old.t1)
        self._sizes.append(size)
        self._ends.append(new.t1)

    def _advance(self, next_t: Tensor) -> Tensor:
        value: Tensor = super()._advance(next_t)
        self._output += 1
        self.recording.output(self._output)
        return value

    def _advance_until_event(self, event_fn: Callable[[Tensor, Tensor], Tensor]) -> Any:
        event_t, value = super()._advance_until_event(event_fn)
        self._output += 1
        if len(self.recording):
            self.recording.output(self._output)
        else:
            self.recording.at_start.append(self._output)
        return event_t, value

    @property
    def final_state(self) -> Tensor:
        """The state after the last step."""
        state: Tensor = self.rk_state.y1 if len(self.recording) else self.y0
        return state

    def stepper(self) -> AdaptiveStepper:
        """What does the recorded steps again."""
        return AdaptiveStepper(self)

    def times(self, t: Tensor, outputs: Tensor, step_t: Tensor | None, jump_t: Tensor | None) -> Times:
        """The times of the recorded solve, differentiable along torchdiffeq's own arithmetic.

        The first time moves all steps up to the first that was cut at a ``step_t`` or ``jump_t``; that one moves the
        steps up to the next such, and the sizes of the steps that end there. Accepted sizes are constants.

        Args:
            t: times of the call, shape ``(T,)``.
            outputs: the times of the outputs inside steps, shape ``(M,)``.
            step_t: the option as given, after torchdiffeq's own normalisation.
            jump_t: the same.
        """
        t, outputs = t.to(self.dtype), outputs.to(self.dtype)
        if not len(self.recording):
            return Times(t[:0], t[:0], t[:0], outputs)
        start, size, end = (torch.stack(times) for times in (self._starts, self._sizes, self._ends))
        if is_followed() or any(tensor is not None and tensor.requires_grad for tensor in (t, step_t, jump_t)):
            shift, origin = self._anchors(t, step_t, jump_t)
            start = start + shift[origin[:-1]]
            end = end + shift[origin[1:]]
            size = size + (shift[origin[1:]] - shift[origin[:-1]])
        return Times(start, size, end, outputs)

    def _anchors(self, t: Tensor, step_t: Tensor | None, jump_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """Times that steps are anchored to, as zeros that carry their gradient; and each step boundary's anchor."""
        anchors = [t[0]]
        origin = [0]
        options = [
            (_sort_tvals(given.to(self.dtype), value_of(t[0])), used)
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
        return stacked - value_of(stacked), torch.tensor(origin, device=t.device)


class FixedRecorder(FixedGridODESolver):  # type: ignore[misc]
    """Mixed in before a fixed-grid solver class, the Adams methods among them."""

    _grid: Tensor | None = None
    grid_constructor: Callable[[Any, Tensor, Tensor], Tensor]

    def start_recording(self, recording: Recording, listener: Listener) -> None:
        """Record the solve that follows."""
        iterates = type(self)._step_func.__module__ != fixed_grid.__name__ and getattr(self, "implicit", True)
        excluded = _OF_A_SOLVE if iterates else _OF_A_SOLVE | _OF_STEP_SIZES
        self.settings = {name: value for name, value in vars(self).items() if name not in excluded}
        self.recording = recording
        self._listener = listener
        self._starts: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._ends: list[Tensor] = []
        self._output = 0
        self._attempt: tuple[Tensor, list[Tensor], Grid, Tensor] | None = None
        self._in_event = False
        # torchdiffeq's own explicit solvers remember nothing.
        own = type(self)._step_func.__module__ == fixed_grid.__name__
        self._at_first = None if own else {name: copied(value) for name, value in vars(self).items()}

    def use_grid(self, y0: Tensor, t: Tensor) -> None:
        """Call the grid constructor once, with gradients; the solve and its time arithmetic use the same result."""
        grid = self.grid_constructor(self.func, y0, t)
        self._grid = grid
        detached = grid.detach()
        self.grid_constructor = lambda func, y0, t: detached

    def _remembers(self) -> list[str]:
        """The attributes that hold something else than at first."""
        if self._at_first is None:
            return []
        first = self._at_first
        return [
            name
            for name, value in vars(self).items()
            if name not in _OF_THE_RECORDER and (name not in first or not same(value, first[name]))
        ]

    def _step_func(self, func: Callable[..., Tensor], t0: Tensor, dt: Any, t1: Tensor, y0: Tensor) -> Any:
        self._flush()
        self._listener.start_step()
        memory, tensors = Memory.of(self, names) if (names := self._remembers()) else (None, [])
        change, slope = super()._step_func(func, t0, dt, t1, y0)
        number = None if isinstance(dt, Tensor) else dt
        note = Grid(number, memory, tuple(self._remembers()), self.interp == "cubic")
        self._attempt = y0, tensors, note, change
        self._outputs: list[tuple[int, bool]] = []
        if self._grid is None:
            self._starts.append(t0)
            self._sizes.append(torch.as_tensor(dt, dtype=t0.dtype, device=t0.device))
            self._ends.append(t1)
        return change, slope

    def _flush(self) -> None:
        """Record the latest step, once its outputs are known."""
        if self._attempt is None:
            return
        y0, tensors, note, change = self._attempt
        calls, recording = self._listener.calls, self.recording
        slopes = [call.slope for call in calls] if recording.keep is Keep.SLOPES else None
        recording.step([y0], tensors, calls, drew=self._listener.drew, slopes=slopes, note=note)
        for output, at_end in self._outputs:
            recording.output(output, at_end)
        self._last = y0, change
        self._attempt = None

    def _linear_interp(self, t0: Tensor, t1: Tensor, y0: Tensor, y1: Tensor, t: Tensor) -> Tensor:
        value: Tensor = super()._linear_interp(t0, t1, y0, y1, t)
        self._note_output(at_start=value is y0, at_end=value is y1)
        return value

    def _cubic_hermite_interp(self, *args: Any) -> Tensor:
        value: Tensor = super()._cubic_hermite_interp(*args)
        self._note_output(at_start=False, at_end=False)
        return value

    def _note_output(self, at_start: bool, at_end: bool) -> None:
        self._latest_output = at_start, at_end
        if self._in_event:  # the search for the event interpolates many times; the last time counts
            return
        self._output += 1
        if at_start and not len(self.recording):
            self.recording.at_start.append(self._output)
        else:
            self._outputs.append((self._output, at_end))

    def integrate_until_event(self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]) -> Any:
        self._in_event = True
        result = super().integrate_until_event(t0, event_fn)
        self._in_event = False
        self._note_output(*self._latest_output)
        return result

    @property
    def final_state(self) -> Tensor:
        """The state after the last step."""
        self._flush()
        if not len(self.recording):
            start: Tensor = self.y0
            return start
        state, change = self._last
        return state + change

    def stepper(self) -> FixedStepper:
        """What does the recorded steps again."""
        first = {name: self._at_first[name] for name in self._remembers() if self._at_first and name in self._at_first}
        return FixedStepper(self, first)

    def times(self, t: Tensor, outputs: Tensor, step_t: Tensor | None, jump_t: Tensor | None) -> Times:
        """The times of the recorded solve, differentiable through the grid to every entry of ``t``.

        In a search for an event the grid is ``t[0]`` plus constants.

        Args:
            t: times of the call, shape ``(T,)``.
            outputs: the times of the outputs inside steps, shape ``(M,)``.
            step_t: not used by these solvers.
            jump_t: not used by these solvers.
        """
        outputs = outputs.to(t.dtype)
        if self._grid is not None:
            start, end = self._grid[:-1], self._grid[1:]
            return Times(start, end - start, end, outputs)
        start, size, end = (torch.stack(times) for times in (self._starts, self._sizes, self._ends))
        shift = (t[0] - t[0].detach()).to(start.dtype)
        return Times(start + shift, size, end + shift, outputs)


# A step done again needs neither the solve's own tensors nor, where it does not iterate, what chooses its size.
_OF_A_SOLVE = frozenset({"func", "y0", "grid_constructor", "_grid", "step_t", "jump_t", "norm"})
_OF_STEP_SIZES = frozenset(
    {"rtol", "atol", "min_step", "max_step", "first_step", "safety", "ifactor", "dfactor", "max_num_steps"}
)
_OF_THE_RECORDER = frozenset(
    {
        "func", "y0", "grid_constructor", "settings", "recording", "_listener", "_starts", "_sizes", "_ends", "_output",
        "_attempt", "_outputs", "_last", "_latest_output", "_in_event", "_at_first", "_grid",
    }
)  # fmt: skip
