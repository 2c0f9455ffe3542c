"""torchdyn's own steps, done again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.torchdyn._states import State, parts_of, state_of
from torchdiffeq_symplectic.tape import Linear, Step, Tape

__all__ = ["Cost", "Note", "SolverStepper", "laid_out"]


class Note(NamedTuple):
    """What a step notes: how its time and size came, and where its first slope comes from.

    Attributes:
        time, size: dtype and shape.
        slope: "carried" by the step before, "own" where torchdyn evaluates it before the first step, or "none" where
            the solver evaluates it itself.
    """

    time: tuple[torch.dtype, torch.Size]
    size: tuple[torch.dtype, torch.Size]
    slope: str


class Cost(NamedTuple):
    """A running cost, ``integral_loss``, in the place where torchdyn's adjoint has it: in backward alone.

    Its integral is one more entry of a state that is laid out flat, integrated by the steps themselves.

    Attributes:
        of: ``of(t, x)``, of any shape, summed.
        sign: -1 where torchdyn negates a decreasing time span.
        shape: of the state.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    sign: int
    shape: torch.Size

    def field(self, field: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``field`` of flat states."""

        def flat(t: Tensor, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = z[:-1].view(self.shape)
            slope = field(t, x, *args, **kwargs).expand(self.shape)
            cost = self.sign * self.of(self.sign * t, x).sum()
            return laid_out(slope, cost)

        return flat

    def flat(self, x: Tensor) -> Tensor:
        """The flat state, its integral zero."""
        return laid_out(x, x.new_zeros(()))

    def split(self, z: Tensor) -> Tensor:
        """The state, which carries the gradient of the integral's increment along."""
        state: Tensor = _Charged.apply(z[:-1].view(self.shape), z[-1])
        return state


def laid_out(part: Tensor, entry: Tensor) -> Tensor:
    """``part`` laid out flat, and one more entry."""
    return torch.cat([part.reshape(-1), entry.reshape(1).to(part.dtype)])


class _Charged(torch.autograd.Function):
    """The state. The integral adds to whatever loss there is, so the cotangent of its increment is one."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, increment: Tensor) -> Tensor:
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "integral_loss adds its gradient to every backward pass, so that of a gradient is not defined, and "
                "create_graph=True not supported. To differentiate twice, carry the running cost in the state."
            )
        (cotangent,) = cotangents
        return cotangent, cotangent.new_ones(())


class SolverStepper:
    """Steps of a torchdyn solver; the carry is the state and the slope that a step hands to the next.

    Args:
        solver: as it was in the solve: its coefficients are cast to the dtype of each state for good.
        args: what ``step`` is given besides.
        keys: of a state that is a dictionary, or None.
        cost: the running cost, or None.
        interpolator: of the solve, or None.
        has_tensors: whether the solver's steps use tensors that need a gradient besides those of the field.
    """

    sums_steps = False  # bit for bit what torchdyn's own backpropagation gives

    def __init__(
        self,
        solver: Any,
        args: Mapping[str, Any],
        keys: Sequence[str] | None,
        cost: Cost | None,
        interpolator: Any,
        has_tensors: bool,
    ) -> None:
        self._solver = copy.copy(solver)
        self._args, self._keys, self._cost, self._interpolator = args, keys, cost, interpolator
        self.has_tensors = has_tensors

    def evaluated(self, step: Step, field: Any, state: Sequence[Tensor]) -> Tensor:
        """The slope at the carried state; the solver's own differs from it by rounding."""
        t, _ = self._times(step)
        x = state_of(state, self._keys) if self._cost is None else self._cost.flat(state[0])
        with torch.no_grad():
            slope: Tensor = field.evaluate_as(step.draw, t, x)
        return slope

    def advance(self, step: Step, field: Any, carry: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """A step of the solver, and its interpolant at the outputs inside."""
        t, dt = self._times(step)
        note: Note = step.note
        parts = 1 if self._keys is None else len(self._keys)
        x = state_of(carry[:parts], self._keys)
        start: State = x if self._cost is None else self._cost.flat(carry[0])
        slope = None
        if note.slope == "carried":
            slope = carry[parts]
        elif note.slope == "own":
            slope = field(t, start)
        handed, end, *rest = self._solver.step(field, start, t, dt, k1=slope, args=self._args)
        outputs = []
        if step.times:
            outputs = self._inside(step, (t, dt), (start, slope, end, handed), rest[-1])
        if self._cost is not None:
            outputs = [[row[0][:-1].view(self._cost.shape)] for row in outputs]
            end = self._cost.split(end)
        return [*parts_of(end, self._keys), *([handed] if isinstance(handed, Tensor) else [])], outputs

    def _inside(
        self, step: Step, times: tuple[Tensor, Tensor], ends: tuple[Any, ...], stages: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """The interpolant, as torchdyn's loop makes it."""
        (t, dt), (x, f0, x1, f1), interpolator = times, ends, self._interpolator
        x_mid = x + dt * sum(interpolator.bmid[i] * stages[i] for i in range(len(stages)))
        coefficients = interpolator.fit(dt, f0, f1, x, x1, x_mid)
        return [[interpolator.evaluate(coefficients, t, t + dt, time)] for time in step.times]

    def _times(self, step: Step) -> tuple[Tensor, Tensor]:
        """Time and size as they came to the step."""
        note: Note = step.note
        (time, time_shape), (size, size_shape) = note.time, note.size
        return step.start.to(time).reshape(time_shape), step.size.to(size).reshape(size_shape)

    def linear(self, tape: Tape, field: Any, check: Any) -> Linear | None:
        """None: torchdyn's steps go the general way."""
        return None
