"""The memory-free adjoint of residual networks: states are recovered by stepping back.

Only the outputs are kept. For the methods of Euler and Heun, a step of size ``h`` from ``t`` to ``t1`` is undone by the
same method with ``-h``, the times of its stages taken in reverse order,

    Euler:  y~ = y1 - h f(t, y1)            Heun:  y~ = y1 - h/2 (k1 + k2),   k1 = f(t1, y1),   k2 = f(t, y1 - h k1),

and the discrete adjoint of the step is taken at ``y~``. Approximate: the states, and so the gradients with respect to
initial state, parameters and times, are off by O(h) for Euler and O(h^2) for Heun, where the field is smooth. A state
that is an output is not approximated but taken up again. With ``T`` outputs, ``M`` entries of a state and ``L`` of
memory for the graph of one field evaluation, memory is ``T M + s M + L``, whatever the number of steps; a step costs
``s`` evaluations to step back and ``2 s - 1`` for the adjoint (Euler 2, Heun 5).

M. E. Sander, P. Ablin, G. Peyre, Do Residual Neural Networks discretize Neural Ordinary Differential Equations?,
NeurIPS 2022, https://arxiv.org/abs/2205.14612.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck, ReplayError, ReplayWarning
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.modes._adjoint import sweep
from torchdiffeq_symplectic.modes._mode import Mode
from torchdiffeq_symplectic.modes.symplectic import evaluated_twice
from torchdiffeq_symplectic.tableau import Tableau
from torchdiffeq_symplectic.trajectory import Keep, Step, Trajectory

__all__ = ["MemoryFree"]

# Rows of a, b and c of the methods that the paper steps back by.
_FORMS = (
    (((),), (1.0,), (0.0,)),
    (((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
)

# From this reconstruction error on the gradient is not to be trusted: it is off by about as much.
_TRUSTED = 0.1


@dataclasses.dataclass(frozen=True)
class MemoryFree(Mode):
    """``adjoint_method="memory_free"``, with ``adjoint_options={"report": True or a function}``.

    The report is the reconstruction error ``|y~_0 - y_0| / |y_0|``, the largest where states are kept in between. True
    prints it to stderr after each backward pass; a function is called with it.
    """

    name = "memory_free"
    exact = False
    replay_check = "warn"
    methods = ("euler", "heun2")

    report: bool | Callable[[float], object] = False

    def __post_init__(self) -> None:
        if not (isinstance(self.report, bool) or callable(self.report)):
            raise ValueError(
                'adjoint_options["report"] must be True, False or a function that is called with the reconstruction '
                f"error, but is {self.report!r}"
            )

    @property
    def keep(self) -> Keep:
        """What the recording must keep."""
        return Keep.OUTPUTS

    def admits(self, tableau: Tableau) -> bool:
        """Whether it is a step of Euler's or Heun's method."""
        return not tableau.carried and (tableau.a, tableau.b, tableau.c) in _FORMS

    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        """Sweep back, recovering the state that each step started from."""
        recovery = _Recovery(field, trajectory.dtype, check.active or self.report is not False)
        unchecked = ReplayCheck("ignore", trajectory.dtype)
        gradients = sweep(trajectory, field, outputs, unchecked, evaluated_twice, recovery.start_of)
        if recovery.errors:
            _tell(float(torch.stack(recovery.errors).max()), self.report, check.action)
        return gradients


class _Recovery:
    """Steps back, and compares with the states that were kept.

    Attributes:
        errors: of every kept state that was recovered from states that were recovered themselves, relative, 0-d.
    """

    def __init__(self, field: Field, dtype: torch.dtype, compares: bool) -> None:
        self._field, self._dtype, self._compares = field, dtype, compares
        self._kept_after: Tensor | None = None
        self.errors: list[Tensor] = []

    def start_of(self, step: Step) -> Tensor:
        """The state that ``step`` started from: as kept, else as recovered from the one after it."""
        after = step.next_state
        assert after is not None
        if self._kept_after is None:
            self._kept_after = after
        if step.state is None:
            return self._stepped_back(step, after)
        if self._compares and after is not self._kept_after:
            self._compare(self._stepped_back(step, after), step.state, self._kept_after)
        self._kept_after = None
        return step.state

    def _stepped_back(self, step: Step, after: Tensor) -> Tensor:
        tableau, size = step.tableau, step.size
        # A step that also evaluates the slope at its end, for an interpolation, has a stage of no weight more.
        stages = next(len(b) for _, b, _ in _FORMS if b == tableau.b[: len(b)])
        slopes: list[Tensor] = []
        for i, row in enumerate(tableau.a[:stages]):
            back = stages - 1 - i
            state = self._moved(after, size, row, slopes)
            random = step.random[back] if step.random else None
            slopes.append(self._field(step.times[back].detach(), state.detach(), random).detach())
        return self._moved(after, size, tableau.b[:stages], slopes)

    def _moved(self, state: Tensor, size: Tensor, weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
        state = state.to(self._dtype)
        for weight, slope in zip(weights, slopes, strict=True):
            state = state - (size * weight).to(self._dtype) * slope
        return state

    def _compare(self, recovered: Tensor, kept: Tensor, kept_after: Tensor) -> None:
        norm = torch.linalg.vector_norm
        deviation, size = norm(recovered - kept), norm(kept)
        # A state of zero is compared with the one that it led to.
        size = torch.where(size > 0, size, norm(kept_after))
        self.errors.append(torch.where(deviation == 0, deviation, deviation / size))


def _tell(error: float, report: bool | Callable[[float], object], action: str) -> None:
    """Report the reconstruction error, and say so if it is too large."""
    if callable(report):
        report(error)
    elif report:
        print(f"memory_free: reconstruction error {error:.3g}", file=sys.stderr)
    if error <= _TRUSTED or action == "ignore":
        return
    how = "by far" if math.isinf(error) or math.isnan(error) else f"by {error:.2g} of its norm"
    message = (
        f"memory_free: stepping back did not recover the initial state; it is off {how}, so the gradient is not to be "
        'trusted. Take smaller steps, ask for the solution at more times between, or use adjoint_method="symplectic".'
    )
    if action == "error":
        raise ReplayError(message)
    warnings.warn(message, ReplayWarning, stacklevel=2)
