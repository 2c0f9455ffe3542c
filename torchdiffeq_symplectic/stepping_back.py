"""The memory-free mode: the state that a step started from is recovered by stepping back, not kept.

A step ``y+ = Phi(y)`` is undone by the method's own step of size ``-h``, and what that leaves is corrected where it
shows, at the end of the step:

    w = y+;    y = Phi_-h(w);    then, until the residual y+ - Phi(y) is at rounding:  w += y+ - Phi(y);  y = Phi_-h(w)

Correcting the *defect* converges for every explicit method; without a correction this is the scheme of residual
networks (M. E. Sander, P. Ablin, G. Peyre, NeurIPS 2022, https://arxiv.org/abs/2205.14612). What a contraction has lost
cannot be recovered: with a Lipschitz constant L the error grows as ``eps exp(L T)``, which the residuals do not show.
So the recovered initial state is always compared with the true one, and so is, where it is stepped through again, the
state after each step.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.errors import ReplayError, ReplayWarning
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.tape import Step, Stepper

__all__ = ["Recovery"]

# From this error on the gradient is not to be trusted: it is off by about as much.
_TRUSTED = 0.1
_CORRECTIONS = 3
_CORRECTIONS_OF_ONE_STAGE = 5


class Recovery:
    """Steps back, and compares with the states that were kept.

    Args:
        stepper: does the steps again.
        field: evaluates the field.
        check: whether anything is compared.
        corrections: the most of a step; None for 3, or 5 where a step evaluates the field once.
    """

    def __init__(self, stepper: Stepper, field: Field, check: ReplayCheck, corrections: int | None) -> None:
        self._stepper, self._field, self._check = stepper, field, check
        self._corrections = corrections
        self._is_kept = True  # whether the state after the step is one that was kept
        self._errors: list[Tensor] = []
        self._residuals: list[Tensor] = []

    def start_of(self, step: Step) -> list[Tensor]:
        """The state that ``step`` started from: as kept, else as recovered from the one after it."""
        assert step.after is not None
        kept = [part for part in step.carry if part is not None]
        parts = len(step.after)
        if len(kept) < parts:
            self._is_kept = False
            return self._recovered(step)
        if not self._is_kept:
            if step.number == 0 or self._check.active:
                recovered = self._recovered(step)
                self._errors.append(_relative(recovered, kept[:parts], step.after))
            step.after = None  # no residual: it was recovered, and where the step starts from was not
        self._is_kept = True
        return kept[:parts]

    @torch.no_grad()
    def _recovered(self, step: Step) -> list[Tensor]:
        assert step.after is not None
        after = step.after
        # The same map once more where it has one stage, as in a residual network; else the step of the opposite size.
        start = step.start if step.calls == 1 else step.end
        back = dataclasses.replace(
            step, start=start, size=-step.size, end=step.start, times=(), inside=range(0), direction=-1
        )
        there = dataclasses.replace(step, times=(), inside=range(0))
        limit = self._corrections
        if limit is None:
            limit = _CORRECTIONS_OF_ONE_STAGE if step.calls == 1 else _CORRECTIONS
        aim = [*after]
        state = self._advanced(back, aim)
        residual = math.inf
        for _ in range(limit):
            reached = self._advanced(there, state)
            defect = [true - part for true, part in zip(after, reached, strict=True)]
            previous, residual = residual, float(_relative(reached, after))
            if not residual > torch.finfo(after[0].dtype).eps or residual > previous / 2:
                break
            aim = [part + gap for part, gap in zip(aim, defect, strict=True)]
            state = self._advanced(back, aim)
        self._require_finite(step, state)
        self._field.start_step(step)
        return state

    def _require_finite(self, step: Step, state: Sequence[Tensor]) -> None:
        assert step.after is not None
        if not self._check.active or all(bool(part.isfinite().all()) for part in state):
            return
        if all(bool(part.isfinite().all()) for part in step.after):
            raise ReplayError(
                f"memory_free: stepping back from step {step.number} gave a state that is not finite. Take smaller "
                'steps, ask for the solution at more times between, or use "symplectic", which is exact.'
            )

    def _advanced(self, step: Step, state: Sequence[Tensor]) -> list[Tensor]:
        self._field.start_step(step)
        carry = [*state]
        if len(step.carry) > len(state):
            carry.append(self._stepper.evaluated(step, self._field, state))
        return self._stepper.advance(step, self._field, carry)[0][: len(state)]

    def conclude(
        self, steps: int, residual: float, tolerance: float | None, report: bool | Callable[[float], object]
    ) -> None:
        """Report the reconstruction error; say so if it, or ``steps`` times the largest ``residual``, is too large."""
        if not self._errors:
            return
        error = float(torch.stack(self._errors).max())
        if callable(report):
            report(error)
        elif report:
            print(f"memory_free: reconstruction error {error:.3g}, largest residual {residual:.3g}", file=sys.stderr)
        # Without corrections a residual is the scheme's own, and shows in the reconstruction.
        largest = error if self._corrections == 0 else max(error, steps * residual)
        if largest <= (_TRUSTED if tolerance is None else tolerance):
            return
        how = f"by {error:.2g} of its norm" if math.isfinite(error) else "by far"
        message = (
            f"memory_free: stepping back did not recover the initial state; it is off {how}, and a step by up to "
            f"{residual:.2g} of its state (of {steps} steps), so the gradient is not to be trusted. Take smaller "
            'steps, ask for the solution at more times between, or use "symplectic", which is exact.'
        )
        if tolerance is not None:
            raise ReplayError(message)
        if self._check.active:
            warnings.warn(message, ReplayWarning, stacklevel=2)


def _relative(found: Sequence[Tensor], true: Sequence[Tensor], other: Sequence[Tensor] = ()) -> Tensor:
    """The norm of the difference over that of the true state, or of the other where that is zero; 0-d."""
    distance = torch.stack([torch.linalg.vector_norm(a - b) for a, b in zip(found, true, strict=True)]).norm()
    size = torch.stack([torch.linalg.vector_norm(part) for part in true]).norm()
    if other:
        size = torch.where(size > 0, size, torch.stack([torch.linalg.vector_norm(part) for part in other]).norm())
    return torch.where(distance == 0, distance, distance / size)
