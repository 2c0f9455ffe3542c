"""The linear sweep of torchdiffeq's explicit fixed-grid solvers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.hosts.torchdiffeq._host import fixed_grid
from torchdiffeq_symplectic.hosts.torchdiffeq._linear import Coefficients, LinearSweep
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.tape import Step, Stepper, Tape

__all__ = ["FixedSweep", "coefficients_of"]


class FixedSweep(LinearSweep):
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
def coefficients_of(solver: type, device: torch.device, dtype: torch.dtype) -> Coefficients | None:
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
    return Coefficients(*(part[..., :stages].to(device, dtype) for part in (torch.stack(states), change)))
