"""The linear sweep of torchdiffeq's adaptive solvers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.hosts.torchdiffeq._host import RKAdaptiveStepsizeODESolver, _runge_kutta_step
from torchdiffeq_symplectic.hosts.torchdiffeq._linear import Coefficients, LinearSweep
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.tape import Step, Stepper, Tape

__all__ = ["AdaptiveSweep", "LinearTableau", "ends_in_state", "linear_tableau_of"]


class LinearTableau(NamedTuple):
    """What the sweep needs of a tableau.

    Attributes:
        coefficients: of the step.
        forward: the rows that stage states and the new state are made of.
        nodes: of the stages after the first.
        closes: whether the last stage's state is the new state.
        dense: the slopes' weights in an output inside, by powers of its place in the step, shape ``(4, s)``.
    """

    coefficients: Coefficients
    forward: list[Tensor]
    nodes: list[float]
    closes: bool
    dense: Tensor


@functools.lru_cache(maxsize=64)
def linear_tableau_of(solver: type, device: torch.device, dtype: torch.dtype) -> LinearTableau | None:
    """That of a solver class whose tableau is its own, for states on ``device``.

    None for complex states, for a class that makes its tableau itself, and if torchdiffeq forms stage states in another
    way than the sweep does. Kept, so that a backward pass sends nothing to the device.
    """
    if not dtype.is_floating_point or solver.__init__ is not RKAdaptiveStepsizeODESolver.__init__:  # type: ignore[misc]
        return None
    tableau: Any = solver.tableau  # type: ignore[attr-defined]
    if not _forms_states(len(tableau.c_sol), dtype):
        return None
    alpha, forward = tableau.alpha.to(dtype).tolist(), [*tableau.beta, tableau.c_sol]
    *forward, b, mid = (row.to(device, dtype) for row in (*forward, solver.mid))  # type: ignore[attr-defined]
    a = torch.zeros(len(b), len(b), dtype=dtype, device=device)
    for i, row in enumerate(forward):
        a[i + 1, : i + 1] = row
    first, last = torch.eye(len(b), dtype=dtype, device=device)[[0, -1]]
    dense = [
        first,
        last - 4 * first - 5 * b + 16 * mid,
        5 * first - 3 * last + 14 * b - 32 * mid,
        2 * (last - first) - 8 * b + 16 * mid,
    ]
    return LinearTableau(Coefficients(a, b), [*forward, b], alpha, ends_in_state(tableau), torch.stack(dense))


def ends_in_state(tableau: Any) -> bool:
    """Whether the last stage's state is the new state."""
    return bool(tableau.c_sol[-1] == 0 and (tableau.c_sol[:-1] == tableau.beta[-1]).all())


class AdaptiveSweep(LinearSweep):
    """Steps of torchdiffeq's adaptive solvers.

    Args:
        tableau: of the solver.
        stepper: does them again.
        tape, field, check: of the solve.
    """

    def __init__(self, tableau: LinearTableau, stepper: Stepper, tape: Tape, field: Field, check: ReplayCheck) -> None:
        self._stepper = stepper
        coefficients, forward, self._nodes, self._closes, dense = tableau
        super().__init__(coefficients, tape, field, check)
        self._forward = [row.to(self._buffer.device) for row in forward]
        self._dense = dense.to(self._buffer.device)
        # The last slope that the new state is made of: that the last stage's state is known checks what is before it.
        self._checked = self._stages - 2 if self._closes else self._stages - 1
        # The last evaluation of the step to come, which is also the slope that the present one carries in.
        self._closing: Linearisation | None = None

    def takes(self, step: Step) -> bool:
        """All but those that evaluate a slope behind a discontinuity."""
        return not step.note.after

    def _prepared(self, start: Tensor, size: Tensor, end: Tensor) -> list[Sequence[Any]]:
        before = torch.nextafter(end, end - 1)
        times = torch.stack([before if node == 1 else start + node * size for node in self._nodes], 1)
        forward, backward = self._scaled(size, self._forward), self._scaled(size, self._rows)
        return list(zip(size.unbind(), [row.unbind() for row in times.unbind()], forward, backward, strict=True))

    def pull_back(
        self, step: Step, of_after: list[Tensor | None], inside: Sequence[Sequence[Tensor | None]]
    ) -> list[Tensor | None]:
        """The cotangents of state and slope."""
        size, times, forward, backward = self._of_block(step)
        self._start_from(of_after)
        outside, total = self._of_outputs(step, size, inside)
        last = self._stages - 1
        reached: list[Tensor | None] = [None] * self._stages if outside is None else [*outside]
        kappa = of_after[1] if len(of_after) > 1 else None
        if kappa is not None:
            reached[last] = kappa.reshape(-1) if outside is None else outside[last] + kappa.reshape(-1)
        stages = self._stages  # that are still to be pulled back
        if self._closing is not None:  # its cotangent is known, so its graph can go before others are built
            stages = last
            closing, self._closing = self._closing, None
            self._pull_back_stage(last, closing, backward[last], reached[last])
            del closing
        elif self._closes and reached[last] is None:
            stages = last
            self._columns[last].zero_()
        y, *carried = self._carry(step)
        own = len(carried)  # the first stage that the step evaluates itself
        times = [step.start.to(self._dtype), *times]
        states, graphs = self._stage_states(step, y, carried, times, forward, stages)
        for c in range(stages - 1, own - 1, -1):
            y_c = states.pop()
            linearisation = graphs.pop() if graphs else self._field.linearise(c - own, times[c], y_c)
            if c == self._checked and step.after is not None:
                self._columns[c].copy_(self._value(linearisation).detach())
                formed = y + torch.sum(self._before[c] * forward[c], -1)
                self._check.step(step.number, formed, step.after[0])
            self._pull_back_stage(c, linearisation, backward[c], reached[c])
            del linearisation  # else its graph lived on while the next one is built
        result: list[Tensor | None] = [self._lam]
        if own:
            result.append(self._cotangent(0, backward[0], reached[0]).view(self._shape))
        self._lam.add_(self._buffer[..., own : self._stages].sum(-1))
        if total is not None:
            self._lam.add_(total)
        return result

    def _carry(self, step: Step) -> list[Tensor]:
        """State and slope that ``step`` starts from; the slope is evaluated if it was not kept."""
        state, *slopes = step.carry
        assert state is not None
        if not slopes or slopes[0] is not None:
            return [state, *(slope for slope in slopes if slope is not None)]
        before, field = self._tape[step.number - 1], self._field
        if not field.holds or not self.takes(before):
            return [state, self._stepper.evaluated(step, field, [state])]
        # The last evaluation of the step before: its graph is kept for that.
        time = self._of_block(before)[1][-1]
        field.start_step(before)
        self._closing = field.linearise(before.calls - 1, time, state)
        field.start_step(step)
        return [state, self._value(self._closing).detach()]

    def _stage_states(
        self,
        step: Step,
        y: Tensor,
        carried: Sequence[Tensor],
        times: Sequence[Tensor],
        forward: Sequence[Tensor],
        stages: int,
    ) -> tuple[list[Tensor], list[Linearisation]]:
        """The first stage states, and with ``aca`` the evaluations at them.

        A slope that no later state needs is evaluated with its graph alone, when its turn comes.
        """
        field, columns, own = self._field, self._columns, len(carried)
        states: list[Tensor] = []
        graphs: list[Linearisation] = []
        for slope in carried:
            columns[0].copy_(slope)
        if step.slopes is not None:
            torch._foreach_copy_(list(columns[own : self._stages]), list(step.slopes))
        for c in range(stages):
            if c == 0:
                states.append(y)
            elif c == self._stages - 1 and self._closes and step.after is not None:
                states.append(step.after[0])
            else:
                states.append(y + torch.sum(self._before[c - 1] * forward[c - 1], -1))
            if c < own or step.slopes is not None:
                continue
            if field.holds:
                graphs.append(field.linearise(c - own, times[c], states[c]))
                columns[c].copy_(self._value(graphs[-1]).detach())
            elif c < self._checked or (step.after is None and c < stages - 1):
                columns[c].copy_(field.evaluate(c - own, times[c], states[c].detach()).detach())
        return states, graphs

    def _of_outputs(
        self, step: Step, size: Tensor, inside: Sequence[Sequence[Tensor | None]]
    ) -> tuple[Sequence[Tensor] | None, Tensor | None]:
        """What the outputs inside say to the slopes, flat, and to the state."""
        rows = [(time, part) for time, (part,) in zip(step.times, inside, strict=True) if part is not None]
        if not rows:
            return None, None
        theta = torch.stack([(time - step.start) / (step.end - step.start) for time, _ in rows]).to(self._dtype)
        powers = torch.stack([theta, theta**2, theta**3, theta**4], 1)
        cotangents = torch.stack([part.reshape(-1) for _, part in rows]).to(self._dtype)
        outside = (powers @ (self._dense * size)).t() @ cotangents
        return outside.unbind(), cotangents.sum(0).view(self._shape)


@functools.lru_cache(maxsize=64)
def _forms_states(stages: int, dtype: torch.dtype) -> bool:
    """Whether torchdiffeq forms stage states as the sweep does: tried once, with coefficients of its own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    alpha = torch.cat([draw(stages - 2), torch.ones(1, dtype=dtype)])
    beta = [draw(i + 1) for i in range(stages - 1)]
    tableau = _Tableau(alpha, beta, draw(stages), draw(stages))
    start, size = torch.zeros((), dtype=torch.float64), torch.full((), 0.1, dtype=torch.float64)
    y, slopes, seen = draw(3), draw(stages, 3), []

    def slope(t: Tensor, y: Tensor) -> Tensor:
        seen.append((t, y))
        return slopes[len(seen)]

    with torch.no_grad():
        after, _, _, k = _runge_kutta_step(Timed(slope), y, slopes[0], start, size, start + size, tableau)
    h, last = size.to(dtype), torch.nextafter((start + size).to(dtype), (start + size).to(dtype) - 1)
    formed = [y + torch.sum(k[..., : len(row)] * (h * row), -1) for row in (*beta, tableau.c_sol)]
    times = [*(start.to(dtype) + node * h for node in alpha[:-1]), last]
    return all(map(torch.equal, formed, [*(state for _, state in seen), after])) and all(
        map(torch.equal, times, [t for t, _ in seen])
    )


class _Tableau(NamedTuple):
    """As torchdiffeq's."""

    alpha: Tensor
    beta: list[Tensor]
    c_sol: Tensor
    c_error: Tensor
