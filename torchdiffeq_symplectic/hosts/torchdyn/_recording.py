"""torchdyn's own solve, written down: field, solver and interpolator are replaced by ones that tell the recorder.

torchdyn's loops call ``solver.step`` and decide by what comes back. They run here with the times' graph and without
that of the states: each ``t`` and ``dt`` that a step is called with is then a differentiable function of ``t_span``, as
torchdyn itself computed it, and the choice of the first step size is a constant.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.field import Call, Listener, detached, differentiable
from torchdiffeq_symplectic.hosts.torchdyn._states import State, parts_of, state_of
from torchdiffeq_symplectic.hosts.torchdyn._steps import Note
from torchdiffeq_symplectic.tape import Keep, Recording, Times
from torchdiffeq_symplectic.uses import Captured

__all__ = ["Recorder", "RecordingInterpolator", "RecordingSolver"]


@dataclasses.dataclass
class _Attempt:
    """A step that torchdyn took, and may take back.

    Attributes:
        x, new: the states at its start and end; slope: the first slope that it was given, or None.
        t, dt: its time and size, with their graph.
        calls: its evaluations; drew: whether they drew random numbers.
        slopes: as the solver saw them, where they are kept.
        inside: the times of the outputs inside it.
        cost: the running cost where the slope that it hands on was evaluated, or None.
    """

    x: State
    new: State
    slope: Any
    t: Tensor
    dt: Tensor
    calls: list[Call]
    drew: bool
    slopes: list[Any]
    inside: list[Tensor]
    cost: Tensor | None = None


class Recorder:
    """Accepted steps of a solve of torchdyn.

    Args:
        solver: of the solve.
        listener: the field, as torchdyn is given it.
        captured: is shown the tensors that a step uses besides the field.
        recording: is filled.
        keys: of a state that is a dictionary, or None.
        costs: the running cost at each evaluation of the present step, added to by the field; None if there is none.
        follows: whether a step is tried with its graph, as it is not one of torchdyn's own.
        refuse: makes the error that says why the solver is refused.

    Attributes:
        field: the field as the solver is given it; torchdyn negates it for a decreasing time span.
        has_tensors: whether steps use tensors that need a gradient besides those that the field uses.
    """

    def __init__(
        self,
        solver: Any,
        listener: Listener,
        captured: Captured,
        recording: Recording,
        keys: Sequence[str] | None,
        costs: list[Tensor] | None,
        follows: bool,
        refuse: Callable[[str], Exception],
    ) -> None:
        self._solver, self._listener, self._captured = solver, listener, captured
        self._keys, self._costs = keys, costs
        self.recording, self._follows, self._refuse = recording, follows, refuse
        self.field: Any = None
        self.has_tensors = False
        self._attempt: _Attempt | None = None
        self._first_calls: list[Call] = []
        self._first_drew = False
        self._carried: Tensor | None = None  # the running cost of the slope that the step before handed on
        self._final: State | None = None
        self._starts: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._inside: list[list[Tensor]] = []

    def step(self, f: Any, x: State, t: Tensor, dt: Tensor, k1: Any, args: Any) -> Any:
        """In the place of ``solver.step``."""
        listener = self._listener
        self._settle(x)
        first = self.field is None
        if first:
            self.field = f
            self._first_calls, self._first_drew = listener.calls[:1], listener.drew
        listener.start_step()
        slopes: list[Any] = []
        if self._costs is not None:
            self._costs.clear()
        if self._costs is not None or self.recording.keep is Keep.SLOPES:
            f = _kept(f, slopes)
        if first and self._follows:
            handed, new, *rest = self._followed(f, x, t.detach(), dt.detach(), k1, args)
        else:
            with torch.no_grad():
                handed, new, *rest = self._solver.step(f, x, t.detach(), dt.detach(), k1=k1, args=args)
        new = detached(new)
        attempt = _Attempt(x, new, k1, t, dt, listener.calls, listener.drew, slopes, [])
        if self._costs is not None:
            if first and self._follows:
                self._compare_flat(attempt, args)
            attempt.cost = next(
                (cost for cost, slope in zip(self._costs, slopes, strict=True) if slope is handed), None
            )
            if handed is not None and attempt.cost is None:
                raise self._refuse("the slope that it hands on is not one that it evaluated, so has no running cost")
        if isinstance(handed, Tensor):
            handed = handed.detach()
        self._attempt = attempt
        return handed, new, *rest

    def _followed(self, f: Any, x: State, t: Tensor, dt: Tensor, k1: Any, args: Any) -> Any:
        """A step with its graph, the field's evaluations cut out: what does it use, and does it lead to its start?"""
        with torch.enable_grad():
            start = [part.detach() for part in parts_of(x, self._keys)]
            for part in start:
                part.requires_grad_(differentiable(part))
            state = state_of(start, self._keys)

            def linked(t: Tensor, y: Any, *rest: Any, **kwargs: Any) -> Any:
                slope = f(t, detached(y), *rest, **kwargs)
                if isinstance(slope, Tensor) and isinstance(y, Tensor):
                    return _Linked.apply(slope, y, lambda y: f(t, y, *rest, **kwargs))
                return slope

            result = self._solver.step(linked, state, t, dt, k1=k1, args=args)
            if not self._captured.look_at_step(parts_of(result[1], self._keys), start):
                raise self._refuse("autograd cannot follow its step back to the state that it starts from")
        self.has_tensors = True
        return detached(result)

    def _compare_flat(self, attempt: _Attempt, args: Any) -> None:
        """Make sure that the step does the same to a state laid out flat, as integrating a running cost needs."""
        x, new, slopes = attempt.x, attempt.new, iter(attempt.slopes)
        assert isinstance(x, Tensor)
        assert isinstance(new, Tensor)
        k1 = None if attempt.slope is None else attempt.slope.reshape(-1)
        with torch.no_grad():
            try:
                flat = self._solver.step(
                    lambda t, y, *rest, **kwargs: next(slopes).reshape(-1),
                    x.reshape(-1),
                    attempt.t.detach(),
                    attempt.dt.detach(),
                    k1=k1,
                    args=args,
                )[1]
                same = torch.equal(flat, new.reshape(-1))
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                raise self._refuse("its step cannot integrate integral_loss along with the state") from error
        if not same:
            raise self._refuse("its step cannot integrate integral_loss along with the state")

    def inside(self, time: Tensor) -> None:
        """An output is interpolated in the latest step, which is thereby accepted."""
        assert self._attempt is not None
        self._attempt.inside.append(time)

    def _settle(self, x: State) -> None:
        """Record the latest step if the next one starts from its result ``x``."""
        attempt = self._attempt
        self._attempt = None
        if attempt is not None and x is attempt.new:
            self._record(attempt)
        elif attempt is not None and x is not attempt.x:
            raise self._refuse("torchdyn goes on from a state that its step did not give")

    def _record(self, attempt: _Attempt) -> None:
        first = not self._starts
        self._final = attempt.new
        calls, drew = attempt.calls, attempt.drew
        slope = "none" if attempt.slope is None else "own" if first else "carried"
        if slope == "own":
            calls, drew = [*self._first_calls, *calls], drew or self._first_drew
        keeps = self.recording.keep is Keep.SLOPES
        slopes = [*([attempt.slope] if slope == "own" else []), *attempt.slopes] if keeps else None
        note = Note((attempt.t.dtype, attempt.t.shape), (attempt.dt.dtype, attempt.dt.shape), slope)
        further = [attempt.slope] if slope == "carried" else []
        if further and self._carried is not None:  # laid out flat, with the running cost there
            cost = self._carried.neg() if self.field is not self._listener else self._carried
            further = [torch.cat([attempt.slope.reshape(-1), cost.reshape(1).to(attempt.slope.dtype)])]
            slopes = None if slopes is None else [part.reshape(-1) for part in slopes]
        self._carried = attempt.cost
        self.recording.step(parts_of(attempt.x, self._keys), further, calls, drew=drew, slopes=slopes, note=note)
        self._starts.append(attempt.t.reshape(()))
        self._sizes.append(attempt.dt.reshape(()))
        self._inside.append([time.reshape(()) for time in attempt.inside])

    def finish(self, t_eval: Tensor, solution: list[Tensor], x: State, adds_final: bool) -> list[Tensor]:
        """Called when torchdyn has returned: settle which output is which state.

        Args:
            t_eval: the times that torchdyn returned.
            solution: the parts of its solution.
            x: the initial state.
            adds_final: whether the last state is to be an output in any case.

        Returns:
            The parts of the solution, with one more row for the last state if that was added.
        """
        if self._attempt is not None:
            self._record(self._attempt)
            self._attempt = None
        rows = len(solution[0])
        ends = self._at_end(t_eval.detach(), rows)
        output = rows - sum(map(len, self._inside)) - sum(ends)
        if output:
            self.recording.at_start.append(0)
        for n, times in enumerate(self._inside):
            for _ in times:
                self.recording.output(output, step=n)
                output += 1
            if ends[n]:
                self.recording.output(output, at_end=True, step=n)
                output += 1
        final = parts_of(x if self._final is None else self._final, self._keys)
        if adds_final and ends and not ends[-1]:
            self.recording.output(output, at_end=True)
            solution = [torch.cat([part, last[None]]) for part, last in zip(solution, final, strict=True)]
        self.recording.finish(final, solution)
        return solution

    def _at_end(self, t_eval: Tensor, rows: int) -> list[bool]:
        """Of each step, whether its end is an output, decided as torchdyn decides it."""
        steps = len(self._starts)
        if self._solver.stepping_class == "fixed":
            if rows == steps + 1:
                return [True] * steps
            ends = [(t + dt).detach() for t, dt in zip(self._starts, self._sizes, strict=True)]
            return [bool(torch.isclose(end, t_eval).any()) for end in ends]
        times = t_eval.tolist()
        found = []
        row = 1
        for t, dt, inside in zip(self._starts, self._sizes, self._inside, strict=True):
            row += len(inside)
            found.append(row < rows and float((t + dt).detach()) == times[row])
            row += found[-1]
        return found

    def times(self, device: torch.device) -> Times:
        """The times of the recorded solve, as torchdyn computed them from ``t_span``."""
        if not self._starts:
            none = torch.zeros(0, device=device)
            return Times(none, none, none, none)
        start, size = _stacked(self._starts), _stacked(self._sizes)
        inside = [time for step in self._inside for time in step]
        return Times(start, size, (start + size).detach(), _stacked(inside) if inside else start[:0])


def _kept(f: Any, slopes: list[Any]) -> Callable[..., Any]:
    """``f``, whose slopes are kept in ``slopes``."""

    def keeping(*args: Any, **kwargs: Any) -> Any:
        slope = f(*args, **kwargs)
        slopes.append(slope)
        return slope

    return keeping


class _Linked(torch.autograd.Function):
    """A slope as a function of the state that it was evaluated at; a solver may differentiate it."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, y: Tensor, func: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.func = func
        ctx.save_for_backward(y)
        return slope.view_as(slope)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[None, Tensor | None, None]:
        (y,) = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            slope = ctx.func(y)
        if not slope.requires_grad:
            return None, None, None
        return None, *torch.autograd.grad(slope, y, *cotangents, allow_unused=True), None


class _InPlaceOf:
    """In the place of one of the user's objects, of which it shows every attribute."""

    def __init__(self, original: Any, recorder: Recorder) -> None:
        self._original, self._recorder = original, recorder

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # torchdyn asks isinstance(solver, Tsitouras45)
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class RecordingSolver(_InPlaceOf):
    """In the place of a solver."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> Any:
        """As the solver does."""
        return self._recorder.step(f, x, t, dt, k1, args)


class RecordingInterpolator(_InPlaceOf):
    """In the place of an interpolator."""

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As the interpolator does."""
        with torch.no_grad():
            return self._original.fit(*args, **kwargs)

    def evaluate(self, coefs: Any, t0: Tensor, t1: Tensor, t: Tensor) -> Any:
        """As the interpolator does."""
        self._recorder.inside(t)
        with torch.no_grad():
            return self._original.evaluate(coefs, t0, t1, t)


def _stacked(times: Sequence[Tensor]) -> Tensor:
    widest = functools.reduce(torch.promote_types, {time.dtype for time in times})
    return torch.stack([time.to(widest) for time in times])
