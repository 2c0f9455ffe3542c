"""The linear sweep of torchdiffeq's adaptive solvers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.hosts.torchdiffeq._host import _runge_kutta_step
from torchdiffeq_symplectic.hosts.torchdiffeq._linear import Coefficients, LinearSweep
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.tape import Step, Tape

__all__ = ["AdaptiveSweep", "forms_states_of"]


class AdaptiveSweep(LinearSweep):
    """Steps of torchdiffeq's adaptive solvers.

    Args:
        tableau, mid: of the solver.
        tape, field, check: of the solve.
    """

    def __init__(self, tableau: Any, mid: Tensor, tape: Tape, field: Field, check: ReplayCheck) -> None:
        b = tableau.c_sol
        stages = len(b)
        a = torch.zeros(stages, stages, dtype=b.dtype, device=b.device)
        for i, row in enumerate(tableau.beta):
            a[i + 1, : i + 1] = row
        super().__init__(Coefficients(a, b), tape, field, check)
        # The last stage's state is the new state: it is known, and checks what is before it.
        self._closes = bool(b[-1] == 0 and (b[:-1] == tableau.beta[-1]).all())
        self._forward = [*tableau.beta, b]
        self._forward = [row.to(self._buffer.device) for row in self._forward]
        self._alpha = tableau.alpha.tolist()
        first, last = torch.eye(stages, dtype=b.dtype, device=b.device)[[0, -1]]
        self._dense = torch.stack(
            [
                first,
                last - 4 * first - 5 * b + 16 * mid,
                5 * first - 3 * last + 14 * b - 32 * mid,
                2 * (last - first) - 8 * b + 16 * mid,
            ]
        ).to(self._buffer.device)

    def takes(self, step: Step) -> bool:
        """All but those that evaluate a slope behind a discontinuity."""
        return not step.note.after

    def _prepared(self, start: Tensor, size: Tensor, end: Tensor) -> list[Sequence[Any]]:
        before = torch.nextafter(end, end - 1)
        times = torch.stack([before if node == 1 else start + node * size for node in self._alpha], 1)
        forward, backward = self._scaled(size, self._forward), self._scaled(size, self._rows)
        return list(zip(size.unbind(), [row.unbind() for row in times.unbind()], forward, backward, strict=True))

    def pull_back(
        self, step: Step, of_after: list[Tensor | None], inside: Sequence[Sequence[Tensor | None]]
    ) -> list[Tensor | None]:
        """The cotangents of state and slope."""
        stages, columns, field = self._stages, self._columns, self._field
        size, times, forward, backward = self._of_block(step)
        y, *carried = (part for part in step.carry if part is not None)
        own = len(carried)  # the first stage that the step evaluates itself
        self._start_from(of_after)
        kappa = of_after[1] if len(of_after) > 1 else None
        outside, total = self._of_outputs(step, size, inside)
        last = stages - 1
        times = [step.start.to(self._dtype), *times]
        states: list[Tensor] = [y]
        graphs: dict[int, Linearisation] = {}
        checked = last - 1 if self._closes else last
        if carried:
            columns[0].copy_(carried[0])
        if step.slopes is not None:
            torch._foreach_copy_(list(columns[own:stages]), list(step.slopes))
        # The stage states. A slope that no later state needs is evaluated with its graph alone, when its turn comes.
        for c in range(stages):
            if c:
                known = step.after[0] if c == last and self._closes and step.after is not None else None
                states.append(y + torch.sum(self._before[c - 1] * forward[c - 1], -1) if known is None else known)
            if c < own or step.slopes is not None or (c >= checked and step.after is not None and not field.holds):
                continue
            if field.holds and not (c == last and self._closes and kappa is None and outside is None):
                graphs[c] = field.linearise(c - own, times[c], states[c])
                columns[c].copy_(self._value(graphs[c]).detach())
            elif c < last or not self._closes:
                columns[c].copy_(field.evaluate(c - own, times[c], states[c].detach()).detach())
        # Their cotangents, from the last.
        for c in range(last, own - 1, -1):
            y_c = states.pop()
            reached = outside[c] if outside is not None else None
            if c == last and kappa is not None:
                reached = kappa.reshape(-1) if reached is None else reached + kappa.reshape(-1)
            if c == last and self._closes and reached is None:
                columns[c].zero_()
                continue
            linearisation = graphs.pop(c) if c in graphs else field.linearise(c - own, times[c], y_c)
            if c == checked and step.after is not None:
                columns[c].copy_(self._value(linearisation).detach())
                formed = y + torch.sum(self._before[c] * forward[c], -1)
                self._check.step(step.number, formed, step.after[0])
            self._pull_back_stage(c, linearisation, backward[c], reached)
            del linearisation  # else its graph lived on while the next one is built
        result: list[Tensor | None] = [self._lam]
        if own:
            first = self._cotangent(0, backward[0], None if outside is None else outside[0])
            result.append(first.view(self._shape))
        self._lam.add_(self._buffer[..., own:stages].sum(-1))
        if total is not None:
            self._lam.add_(total)
        return result

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


def forms_states_of(tableau: Any) -> bool:
    """Whether torchdiffeq's step forms stage states as `AdaptiveSweep` does, for a tableau of this dtype."""
    return _forms_states(len(tableau.c_sol), tableau.c_sol.dtype)


@functools.lru_cache(maxsize=64)
def _forms_states(stages: int, dtype: torch.dtype) -> bool:
    """The same, tried once with coefficients of its own."""
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
