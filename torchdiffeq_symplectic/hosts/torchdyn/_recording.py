"""torchdyn's own solve, written down: field, solver and interpolator are replaced by ones that tell the recorder.

torchdyn's loops call ``solver.step`` and decide by what comes back. They run here with the times' graph and without
that of the states: each ``t`` and ``dt`` that a step is called with is then a differentiable function of ``t_span``, as
torchdyn itself computed it, and the choice of the first step size is a constant.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_symplectic.gradient import Times
from torchdiffeq_symplectic.graph import reachable
from torchdiffeq_symplectic.hosts.torchdyn._captured import Captured
from torchdiffeq_symplectic.hosts.torchdyn._listening import Listener
from torchdiffeq_symplectic.hosts.torchdyn._measuring import Clock, Measured
from torchdiffeq_symplectic.hosts.torchdyn._states import Layout, State, detached
from torchdiffeq_symplectic.modes import Mode
from torchdiffeq_symplectic.tableau import Tableau, UnknownFormError, Whole
from torchdiffeq_symplectic.trajectory import Keep, Recording

__all__ = ["Recorder"]


@dataclasses.dataclass(frozen=True)
class _Heard:
    """Evaluations of the field in their order, as the listener heard them."""

    times: Sequence[Tensor] = ()
    draws: Sequence[Tensor] = ()
    slopes: Sequence[Tensor] = ()
    costs: Sequence[Tensor] = ()
    drew: bool = False

    @classmethod
    def of(cls, listener: Listener) -> _Heard:
        """What was heard since the step was started."""
        times, draws, slopes, costs = map(tuple, (listener.times, listener.draws, listener.slopes, listener.costs))
        return cls(times, draws, slopes, costs, bool(draws) and listener.drew)

    def only(self, part: slice) -> _Heard:
        """Some of the evaluations."""
        return _Heard(self.times[part], self.draws[part], self.slopes[part], self.costs[part], self.drew)

    def then(self, later: _Heard) -> _Heard:
        """These, and the ``later`` ones."""
        return _Heard(
            (*self.times, *later.times),
            (*self.draws, *later.draws),
            (*self.slopes, *later.slopes),
            (*self.costs, *later.costs),
            self.drew or later.drew,
        )


class _Attempt(NamedTuple):
    """A step that torchdyn tried, and has not said yet whether it accepts it; ``inside`` are outputs in it."""

    x: State
    new: State
    t: Tensor
    dt: Tensor
    first: State | None
    handed: State | None
    heard: _Heard
    inside: list[Tensor]


class Recorder:
    """Writes down the steps that torchdyn accepts.

    A step is accepted if the next one starts from its result, the same object, or if it is the last.

    Args:
        solver: the user's solver.
        interpolator: the user's interpolator, or None.
        listener: the field.
        layout: of the states.
        captured: is told what a whole step uses.
        mode: says what of each step is kept, and which steps it is for.
        args: what ``solver.step`` is given besides.
        refuse: makes the error that says why a solver cannot be differentiated.

    Attributes:
        recording: the accepted steps.
        field: the field as the solver is given it.
    """

    def __init__(
        self,
        solver: Any,
        interpolator: Any,
        listener: Listener,
        layout: Layout,
        captured: Captured,
        mode: Mode,
        args: Mapping[str, Any],
        refuse: Callable[[str], Exception],
    ) -> None:
        self.recording = Recording(mode.keep)
        self._mode = mode
        self._solver, self._interpolator = solver, interpolator
        self._listener, self._layout, self._captured = listener, layout, captured
        self._args, self._refuse = args, refuse
        self._measured: Measured | None = None
        self._is_whole = False
        self._whole: Whole | None = None
        self._attempt: _Attempt | None = None
        self._attempted = False
        self._heard = _Heard()
        self._form: Tableau | Whole | None = None
        self._total: Tensor | None = None
        self._totals: list[Tensor | None] = []
        self._final: State | None = None
        self._starts: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._inside: list[list[Tensor]] = []
        self.field: Callable[..., Any] = listener

    @property
    def reversed(self) -> bool:
        """Whether time runs backwards: torchdyn then gives its solver the negative field of the negative time."""
        return self.field is not self._listener

    def measure(self, x: State, t_span: Tensor) -> None:
        """Called when torchdyn has synchronised its solver with the state, before the first evaluation."""
        self._final = x
        keys = None if isinstance(x, Tensor) else list(x)
        self._measured = Measured(self._solver, self._interpolator, self._args, keys)
        adaptive = self._solver.stepping_class == "adaptive"
        clock = Clock.of(t_span[0], t_span[0], self._layout.pack(x).dtype)
        tableau = None
        try:
            if any(parameter.requires_grad for parameter in self._solver.parameters()):
                raise UnknownFormError("it has parameters of its own")
            if not self._layout.uniform:
                raise UnknownFormError("the entries of the state are not of one floating dtype")
            if adaptive:
                self._measured.start(clock)
            else:
                tableau = self._measured.alone(clock)
        except UnknownFormError as reason:
            if adaptive:
                raise self._refuse(str(reason)) from reason
            if self._layout.cost:
                raise self._refuse(f"{reason}, so integral_loss has no weights to be integrated with") from reason
            self._is_whole = True
            self._listener.without_slopes()
        if self._mode.methods and (tableau is None or not self._mode.admits(tableau)):
            known = ", ".join(self._mode.methods)
            raise ValueError(
                f'sensitivity="{self._mode.name}" is for solvers whose step is that of one of {known}, but solver is '
                f'{type(self._solver).__name__}. Use solver="euler" or another sensitivity.'
            )

    def step(self, f: Any, x: State, t: Tensor, dt: Tensor, k1: State | None, args: Any) -> Any:
        """In the place of ``solver.step``."""
        listener = self._listener
        self._settle(x)
        first = not self._attempted
        self._attempted = True
        if first:  # not if it is the same step again, after one that was rejected
            self.field = f
            self._heard = _Heard.of(listener).only(slice(1))
        listener.start_step()
        if first and self._is_whole:
            self._whole = Whole(functools.partial(_advance, self._solver, f, self._layout, args))
            handed, rest = None, [None]
            new = self._followed(self._whole, x, t.detach(), dt.detach())
        else:
            with torch.no_grad():
                handed, new, *rest = self._solver.step(f, x, t.detach(), dt.detach(), k1=k1, args=args)
        new = detached(new)
        self._attempt = _Attempt(x, new, t, dt, k1, handed, _Heard.of(listener), [])
        return handed, new, *rest

    def _followed(self, whole: Whole, x: State, t: Tensor, dt: Tensor) -> State:
        """The result of a first step that is whole, if autograd can follow it back to the state it starts from."""
        self._listener.transparent = True
        with torch.enable_grad():
            start = self._layout.pack(x).detach().clone().requires_grad_()
            end = whole.advance(t, dt, start)
        self._listener.transparent = False
        _, leaves = reachable([end.grad_fn], {})
        if not any(leaf is start for leaf in leaves):
            raise self._refuse("autograd cannot follow its step back to the state that it starts from")
        self._captured.look([end], [start, t, dt])
        return self._layout.unpack(end.detach())

    def inside(self, theta: Tensor) -> None:
        """An output is interpolated in the latest step, which is thereby accepted."""
        assert self._attempt is not None
        self._attempt.inside.append(theta)

    def _settle(self, x: State) -> None:
        """Record the latest step if the next one starts from its result ``x``."""
        attempt = self._attempt
        self._attempt = None
        if attempt is not None and x is attempt.new:
            self._record(attempt)
        elif attempt is not None and x is not attempt.x:
            raise self._refuse("torchdyn goes on from a state that its step did not give")

    def _record(self, attempt: _Attempt) -> None:
        self._final = attempt.new
        self._starts.append(attempt.t.reshape(()))
        self._sizes.append(attempt.dt.reshape(()))
        self._inside.append([theta.reshape(()) for theta in attempt.inside])
        state = self._layout.pack(attempt.x, self._total)
        if self._whole is not None:
            self._form = self._whole
            random = attempt.heard.draws[:1] if attempt.heard.drew else ()
            self.recording.step(self._whole, state, random=random, times=(attempt.t, attempt.dt))
            return
        carried = self._heard.only(slice(-1, None))
        tableau = self._tableau(attempt, state.dtype)
        own = carried.then(attempt.heard) if attempt.first is not None and not tableau.carried else attempt.heard
        if len(own.times) != tableau.stages + (tableau.closing is not None):
            raise self._refuse("the number of its field evaluations changes from step to step")
        if self._layout.cost:
            self._add_cost(tableau, attempt.dt, (*(carried.costs if tableau.carried else ()), *own.costs))
        slopes = passed = None
        if self.recording.keep is Keep.SLOPES:
            slopes = torch.stack([slope.expand(state.shape) for slope in own.slopes[: tableau.stages]])
            slopes = slopes.neg() if self.reversed else slopes
        elif self.recording.keep is Keep.STATES and tableau.passes is not None:
            assert attempt.handed is not None
            cost = own.costs[tableau.passes] if self._layout.cost else None
            passed = self._layout.pack(detached(attempt.handed), self._signed(cost))
        random = own.draws if own.drew else ()
        times = [time.neg() if self.reversed else time for time in own.times]
        self.recording.step(tableau, state, slopes=slopes, passed=passed, random=random, times=times)
        self._totals.append(self._total)
        self._form, self._heard = tableau, attempt.heard

    def _tableau(self, attempt: _Attempt, dtype: torch.dtype) -> Tableau:
        assert self._measured is not None
        clock = Clock.of(attempt.t, attempt.dt, dtype)
        try:
            if attempt.first is None:
                return self._measured.alone(clock)
            if isinstance(self._form, Tableau) and self._form.passes is not None:
                return self._measured.carrying(clock)
            return self._measured.start(clock)
        except UnknownFormError as reason:
            raise self._refuse(str(reason)) from reason

    def _add_cost(self, tableau: Tableau, dt: Tensor, costs: Sequence[Tensor]) -> None:
        size = dt.detach().reshape(()).to(torch.promote_types(dt.dtype, costs[0].dtype))
        weighted = [weight * size * cost for weight, cost in zip(tableau.b, costs, strict=False) if weight]
        change = self._signed(torch.stack(weighted).sum())
        assert change is not None
        self._total = change if self._total is None else self._total + change

    def _signed(self, cost: Tensor | None) -> Tensor | None:
        return cost.neg() if cost is not None and self.reversed else cost

    def finish(self, t_eval: Tensor, rows: Tensor) -> Tensor:
        """Called when torchdyn has returned: settle which output is which state.

        Args:
            t_eval: the times that torchdyn returned.
            rows: its solution, packed.

        Returns:
            The solution; where there is a running cost, its integral is the last entry of the last row, which is the
            last state, added if that is no output.
        """
        self._listener.conclude()
        if self._attempt is not None:
            self._record(self._attempt)
            self._attempt = None
        ends = self._at_end(t_eval.detach(), len(rows))
        output = len(rows) - sum(map(len, self._inside)) - sum(ends)
        if output:
            self.recording.at_start.append(0)
        for n, thetas in enumerate(self._inside):
            for _ in thetas:
                self.recording.interpolate(output, step=n)
                output += 1
            if ends[n]:
                self.recording.interpolate(output, at_end=True, step=n)
                total = self._totals[n] if self._layout.cost else None
                if total is not None:
                    rows[output, -1] = total
                output += 1
        assert self._final is not None
        final = self._layout.pack(self._final, self._total)
        if self._layout.cost and ends and not ends[-1]:
            self.recording.interpolate(output, at_end=True)
            rows = torch.cat([rows, final[None]])
        self.recording.finish(final)
        return rows

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
        for t, dt, thetas in zip(self._starts, self._sizes, self._inside, strict=True):
            row += len(thetas)
            found.append(row < rows and float((t + dt).detach()) == times[row])
            row += found[-1]
        return found

    def times(self) -> Times:
        """The times of the recorded solve, as torchdyn computed them from ``t_span``."""
        if not self._starts:
            assert self._final is not None
            none = torch.zeros(0, device=self._layout.pack(self._final).device)
            return Times(none, none, none, none)
        start, size = _stacked(self._starts), _stacked(self._sizes)
        thetas = [theta for step in self._inside for theta in step]
        return Times(start, size, start + size, _stacked(thetas) if thetas else start[:0])


def _advance(solver: Any, field: Any, layout: Layout, args: Any, t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """A step done again as a whole. It holds nothing of the solve, as it lives as long as the gradient."""
    return layout.pack(solver.step(field, layout.unpack(y), t, h, k1=None, args=args)[1])


def _stacked(times: Sequence[Tensor]) -> Tensor:
    widest = functools.reduce(torch.promote_types, {time.dtype for time in times})
    return torch.stack([time.to(widest) for time in times])
