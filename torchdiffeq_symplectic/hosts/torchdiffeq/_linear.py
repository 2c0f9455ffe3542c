"""The adjoint of explicit Runge-Kutta steps by matrix-vector products, for speed: no step's arithmetic under autograd.

A step of ``s`` stages, slope ``k_1`` carried in or its own, and its adjoint, with ``lambda`` the cotangent of the
state, ``kappa`` that of the slope carried on and ``gamma_m`` that of an output inside:

    Y_i = y + h sum_j<i a_ij k_j        y+ = y + h sum_i b_i k_i        u_m = y + h sum_i B_i(theta_m) k_i

    l_i  = h b_i lambda+ + h sum_m B_i(theta_m) gamma_m + [i = s] kappa+ + h sum_j>i a_ji xi_j
    xi_i = (df/dy)^T l_i       p' += (df/dp)^T l_i       at (t + c_i h, Y_i)
    lambda = lambda+ + sum_m gamma_m + sum_i xi_i        (kappa = l_1 where k_1 is carried in)

The stage states are formed by the very operations that torchdiffeq issues, in its layout, so they are the forward
pass's bit for bit; each step checks its new state. Where a release forms them another way, `forms_states_of` says so,
and every step goes the general way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.hosts.torchdiffeq._host import _runge_kutta_step, fixed_grid
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.tape import Step, Stepper, Tape

__all__ = ["AdaptiveSweep", "FixedSweep", "coefficients_of", "forms_states_of"]

# Steps whose coefficients are computed together; those of all steps would outgrow small states.
_BLOCK = 16


class Coefficients(NamedTuple):
    """``a``, shape ``(s, s)``, and ``b``, shape ``(s,)``, of an explicit step; float64."""

    a: Tensor
    b: Tensor


class _Sweep:
    """One buffer a solve, a column a stage and one for lambda. Column ``c`` turns from ``k_c`` into ``xi_c``."""

    def __init__(self, coefficients: Coefficients, tape: Tape, field: Field, check: ReplayCheck) -> None:
        (initial,) = tape.initial
        self._tape, self._field, self._check = tape, field, check
        self._shape, self._dtype = initial.shape, tape.dtype
        a, b = (matrix.to(device=initial.device, dtype=self._dtype) for matrix in coefficients)
        self._stages = stages = len(b)
        self._rows = [torch.cat([a[c + 1 :, c], b[c : c + 1]]) for c in range(stages)]
        self._buffer = torch.zeros(*self._shape, stages + 1, dtype=self._dtype, device=initial.device)
        self._columns = self._buffer.unbind(-1)
        self._lam = self._columns[-1]
        flat = self._buffer.view(-1, stages + 1)
        self._after = [flat[:, c + 1 :] for c in range(stages)]
        self._before = [self._buffer[..., : i + 1] for i in range(stages)]
        self._block: int | None = None
        self._weights: list[Sequence[Any]] = []

    def _of_block(self, step: Step) -> Sequence[Any]:
        """What `_prepared` gives for ``step``."""
        block, place = divmod(step.number, _BLOCK)
        if self._block != block:
            self._block = block
            chosen = slice(block * _BLOCK, (block + 1) * _BLOCK)
            start, size, end = (vector[chosen].to(self._dtype) for vector in self._tape.times[:3])
            self._weights = self._prepared(start, size, end)
        return self._weights[place]

    def _scaled(self, size: Tensor, rows: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """``rows`` times the size of each step of a block, step by step."""
        scaled = (size[:, None] * torch.cat([*rows])).split([len(row) for row in rows], 1)
        return list(zip(*(part.unbind() for part in scaled), strict=True))

    def _prepared(self, start: Tensor, size: Tensor, end: Tensor) -> list[Sequence[Any]]:
        raise NotImplementedError

    def _start_from(self, of_after: Sequence[Tensor | None]) -> None:
        lam = of_after[0]
        if lam is None:
            self._lam.zero_()
        elif lam is not self._lam:
            self._lam.copy_(lam)

    def _value(self, linearisation: Linearisation) -> Tensor:
        """The slope as torchdiffeq's assignment to its buffer of slopes makes it."""
        value: Tensor = linearisation.value
        if value.dtype != self._dtype or value.shape != self._shape:
            with torch.enable_grad():
                value = value.to(self._dtype).expand(self._shape)
        return value

    def _pull_back_stage(self, c: int, linearisation: Linearisation, weights: Tensor, outside: Tensor | None) -> None:
        """Turn column ``c`` into ``xi_c``."""
        cotangent = self._cotangent(c, weights, outside)
        (product,) = self._field.pull_back(linearisation, [self._value(linearisation)], [cotangent.view(self._shape)])
        if product is None:
            self._columns[c].zero_()
        else:
            self._columns[c].copy_(product)

    def _cotangent(self, c: int, weights: Tensor, outside: Tensor | None) -> Tensor:
        if outside is None:
            return torch.mv(self._after[c], weights)
        return torch.addmv(outside.reshape(-1), self._after[c], weights)


class AdaptiveSweep(_Sweep):
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
        self._alpha = tableau.alpha.tolist()
        first, last = torch.eye(stages, dtype=b.dtype, device=b.device)[[0, -1]]
        self._dense = torch.stack(
            [
                first,
                last - 4 * first - 5 * b + 16 * mid,
                5 * first - 3 * last + 14 * b - 32 * mid,
                2 * (last - first) - 8 * b + 16 * mid,
            ]
        )

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


class FixedSweep(_Sweep):
    """Steps of torchdiffeq's explicit fixed-grid solvers, whose states the solver's own step forms.

    Args:
        coefficients: of its steps.
        stepper: does them again.
        tape, field, check: of the solve.
    """

    def __init__(
        self, coefficients: Coefficients, stepper: Stepper, tape: Tape, field: Field, check: ReplayCheck
    ) -> None:
        super().__init__(coefficients, tape, field, check)
        self._stepper = stepper

    def takes(self, step: Step) -> bool:
        """All but those with a cubic interpolation, which evaluates the field once more."""
        return step.calls == self._stages

    def _prepared(self, start: Tensor, size: Tensor, end: Tensor) -> list[Sequence[Any]]:
        return list(self._scaled(size, self._rows))

    def pull_back(
        self, step: Step, of_after: list[Tensor | None], inside: Sequence[Sequence[Tensor | None]]
    ) -> list[Tensor | None]:
        """The cotangent of the state."""
        self._start_from(of_after)
        stayed = self._of_outputs(step, inside)
        listing = _Listing(self._field, step)
        y = step.carry[0]
        assert y is not None
        with torch.no_grad():
            (after, *_), _ = self._stepper.advance(dataclasses.replace(step, times=()), listing, [y.detach()])
        if step.after is not None:
            self._check.step(step.number, after, step.after[0])
        weights = self._of_block(step)
        for c in reversed(range(self._stages)):
            t, y_c, linearisation = listing.stages.pop()
            if linearisation is None:
                linearisation = self._field.linearise(c, t, y_c)
            self._pull_back_stage(c, linearisation, weights[c], None)
            del linearisation
        self._lam.add_(self._buffer[..., : self._stages].sum(-1))
        if stayed is not None:
            self._lam.add_(stayed)
        return [self._lam]

    def _of_outputs(self, step: Step, inside: Sequence[Sequence[Tensor | None]]) -> Tensor | None:
        """Add to lambda what the linearly interpolated outputs say to the new state; what they say to the old one."""
        stayed: Tensor | None = None
        for time, (part,) in zip(step.times, inside, strict=True):
            if part is not None:
                theta = ((time - step.start) / (step.end - step.start)).to(self._dtype)
                self._lam.add_(theta * part)
                stayed = (1 - theta) * part if stayed is None else stayed + (1 - theta) * part
        return stayed


class _Listing:
    """In the place of the field while a step forms its stage states; evaluates the last with its graph."""

    def __init__(self, field: Field, step: Step) -> None:
        self._field, self._step = field, step
        self.stages: list[tuple[Tensor, Tensor, Linearisation | None]] = []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        number = len(self.stages)
        linearisation = None
        slope: Tensor
        if self._step.slopes is not None:
            slope = self._step.slopes[number]
        elif number == self._step.calls - 1 or self._field.holds:
            linearisation = self._field.linearise(number, t, y)
            slope = linearisation.value.detach()
        else:
            slope = self._field.evaluate(number, t, y.detach()).detach()
        self.stages.append((t, y, linearisation))
        return slope


@functools.lru_cache(maxsize=64)
def coefficients_of(solver: type) -> Coefficients | None:
    """Those of a fixed-grid solver of torchdiffeq's own file of explicit methods; None for any other.

    The solver's own step is given unit vectors as slopes: a stage state is then a row of ``a``, the change ``b``.
    """
    step_func = solver._step_func  # type: ignore[attr-defined]
    if step_func.__module__ != fixed_grid.__name__:
        return None
    most = 16
    states: list[Tensor] = []

    def unit(t: Tensor, y: Tensor, **perturb: Any) -> Tensor:
        states.append(y)
        return torch.eye(most, dtype=torch.float64)[len(states) - 1]

    with torch.no_grad():
        zero, one = torch.zeros(2, dtype=torch.float64)[0], torch.ones(2, dtype=torch.float64)[0]
        instance = solver(func=None, y0=torch.zeros(most, dtype=torch.float64), rtol=0.0, atol=0.0)
        change, _ = instance._step_func(unit, zero, one, one, torch.zeros(most, dtype=torch.float64))
    stages = len(states)
    return Coefficients(torch.stack(states)[:, :stages], change[:stages])


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
