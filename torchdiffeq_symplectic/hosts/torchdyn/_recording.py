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
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.hosts.torchdyn._linked import Linked
from torchdiffeq_symplectic.hosts.torchdyn._states import State, parts_of, state_of
from torchdiffeq_symplectic.hosts.torchdyn._steps import Note, laid_out
from torchdiffeq_symplectic.listener import Call, Listener, detached, differentiable
from torchdiffeq_symplectic.recording import Keep, Recording
from torchdiffeq_symplectic.tape import Times
from torchdiffeq_symplectic.uses import Captured

__all__ = ["NOT_FOLLOWED", "Recorder"]


@dataclasses.dataclass
class _Attempt:
    """A step that torchdyn took, and may take back.

    Attributes:
        x, new: the states at its start and end; slope: the first slope that it was given, or None.
        t, dt: its time and size, with their graph.
        calls: its evaluations; drew: whether they drew random numbers.
        slopes: as the solver saw them, where they are kept; laid out flat where there is a running cost.
        inside: the times of the outputs inside it.
        handed: the slope that it hands on, where there is a running cost.
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
    handed: Tensor | None = None


NOT_FOLLOWED = "autograd cannot follow its step back to the state that it starts from"
_CANNOT_INTEGRATE = "its step cannot integrate integral_loss along with the state"


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
        self._given: Tensor | None = None  # the slope that the next step is given, laid out flat with its running cost
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
            self._sign = 1 if f is listener else -1
            if self._costs is not None and k1 is not None:
                self._given = laid_out(k1, self._sign * self._costs[0])
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
        if isinstance(handed, Tensor):
            handed = handed.detach()
        attempt = _Attempt(x, new, k1, t, dt, listener.calls, listener.drew, slopes, [])
        if self._costs is not None:
            self._integrate(attempt, args)
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
                slope = f(t.detach(), detached(y), *rest, **kwargs)
                func = functools.partial(f, **kwargs) if kwargs else f
                parts, structure = pytree.tree_flatten(slope)
                linked = Linked.apply(func, rest, self._keys, parts, t, *parts_of(y, self._keys))
                return pytree.tree_unflatten(linked, structure)

            result = self._solver.step(linked, state, t, dt, k1=k1, args=args)
            if not self._captured.look_at_step(parts_of(result[1], self._keys), start):
                raise self._refuse(NOT_FOLLOWED)
        self.has_tensors = True
        return detached(result)

    def _integrate(self, attempt: _Attempt, args: Any) -> None:
        """Take the step again, its slopes as they were, on the state laid out flat with the running cost's integral.

        It must do the same to the state; the running cost then goes where the slopes go, also into the slope handed on.
        """
        assert self._costs is not None
        assert isinstance(attempt.x, Tensor)
        assert isinstance(attempt.new, Tensor)
        attempt.slopes = [
            laid_out(slope, self._sign * cost) for slope, cost in zip(attempt.slopes, self._costs, strict=True)
        ]
        if attempt.slope is not None:
            attempt.slope = self._given
        attempt.handed, new = self._flat_step(attempt, args)
        is_sum = torch.equal(new[:-1], attempt.new.reshape(-1))
        if self._follows and not self._starts and is_sum:
            # Any step of torchdyn's own sums its slopes; of others, that is seen from twice the cost, and from none.
            _, twice = self._flat_step(attempt, args, cost=2.0)
            _, constant = self._flat_step(attempt, args, cost=0.0, integral=1.0)
            is_sum = bool((twice[-1] == 2 * new[-1]) & (constant[-1] == 1))
        if not is_sum:
            raise self._refuse(_CANNOT_INTEGRATE)

    def _flat_step(
        self, attempt: _Attempt, args: Any, cost: float = 1.0, integral: float = 0.0
    ) -> tuple[Tensor | None, Tensor]:
        """Slope handed on and new state of the step with slopes as they were, ``cost`` times the running cost."""
        assert isinstance(attempt.x, Tensor)

        def scaled(slope: Tensor) -> Tensor:
            return torch.cat([slope[:-1], cost * slope[-1:]])

        slopes = map(scaled, attempt.slopes)
        x = laid_out(attempt.x, attempt.x.new_full((), integral))
        k1 = None if attempt.slope is None else scaled(attempt.slope)
        with torch.no_grad():
            try:
                step = self._solver.step(
                    lambda *_, **__: next(slopes), x, attempt.t.detach(), attempt.dt.detach(), k1=k1, args=args
                )
            except (RuntimeError, IndexError, ValueError, TypeError, StopIteration) as error:
                raise self._refuse(_CANNOT_INTEGRATE) from error
        if step[1].shape != x.shape:
            raise self._refuse(_CANNOT_INTEGRATE)
        return step[0], step[1]

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
        self._given = attempt.handed
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


def _stacked(times: Sequence[Tensor]) -> Tensor:
    widest = functools.reduce(torch.promote_types, {time.dtype for time in times})
    return torch.stack([time.to(widest) for time in times])
