"""The papers' baseline: nothing but the initial state is kept, and the whole solve is done again with its graph.

Exact. With ``N`` steps of ``s`` stages and ``L`` of memory for the graph of one field evaluation, memory is ``N s L``
while backward runs and the initial state before; a step costs ``s`` evaluations. The same replay, differentiable
itself, serves double backward in every mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.modes._mode import Mode
from torchdiffeq_symplectic.tableau import Narrow
from torchdiffeq_symplectic.trajectory import Keep, Step, Trajectory, carriers

__all__ = ["Baseline", "backpropagate"]


@dataclasses.dataclass(frozen=True)
class Baseline(Mode):
    """``adjoint_method="baseline"``."""

    name = "baseline"

    @property
    def keep(self) -> Keep:
        """What the recording must keep."""
        return Keep.NORMS

    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        """Replay the whole solve with its graph, and backpropagate."""
        return backpropagate(trajectory, field, outputs, check, create_graph=False)


def backpropagate(
    trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck, *, create_graph: bool
) -> Gradients:
    """Gradients through the replayed solve, differentiable themselves with ``create_graph``.

    Args:
        trajectory: as for a mode, as are the next three.
        field: evaluates the field.
        outputs: the cotangent of the solution.
        check: is told how well the states were reproduced.
        create_graph: whether the gradients are to be functions of initial state, times and parameters.
    """
    sources = (trajectory.initial, trajectory.start, trajectory.size, trajectory.theta)
    gate = _Gate()
    with torch.enable_grad():
        if create_graph:
            initial, *times = (_Gated.apply(source, gate) for source in sources)
        else:
            initial, *times = (source.detach() for source in sources)
            initial.requires_grad_()
            for vector in times:
                vector.requires_grad_(field.wants_time)
        solution = _Replay(trajectory, field, check, initial, times).solution(len(outputs))
        leading = [tensor for tensor in (initial, *times) if tensor.requires_grad]
        wanted = [*leading, *field.params]
        gate.closed = True
        # The graph is kept for what lies outside of the solve: the field may close over results of other operations.
        products = torch.autograd.grad(
            solution, wanted, outputs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        gate.closed = False
    found = [
        torch.zeros_like(tensor) if product is None else product
        for tensor, product in zip(wanted, products, strict=True)
    ]
    of = dict(zip(map(id, leading), found[: len(leading)], strict=True))
    return Gradients(of.get(id(initial)), found[len(leading) :], *(of.get(id(vector)) for vector in times))


class _Gate:
    """Whether products pass a `_Gated` tensor: not while gradients with respect to it are taken.

    What it was computed from may be a parameter, too; what comes through it is passed on by the caller's own graph.
    """

    closed = False


class _Gated(torch.autograd.Function):
    """The same tensor, with a gate between it and its history."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *products: Tensor) -> tuple[Tensor | None, None]:
        return None if ctx.gate.closed else products[0], None


class _Replay:
    """The solve done again in the present gradient mode, by the recorded tableaus."""

    def __init__(
        self, trajectory: Trajectory, field: Field, check: ReplayCheck, initial: Tensor, times: Sequence[Tensor]
    ) -> None:
        self._trajectory, self._field, self._check = trajectory, field, check
        self._initial = initial
        self._start, self._size, theta = times
        self._theta = theta.split([len(step.interpolated) for step in trajectory.forwards()])
        self._slopes: list[list[Tensor]] = []
        self._passed: dict[int, Tensor] = {}
        self._states: list[Tensor] = []
        self._looked = False

    def solution(self, length: int) -> Tensor:
        """The solution at all output times, shape ``(length, *y0.shape)``."""
        rows = [self._initial] * length
        state = self._initial
        for step in self._trajectory.forwards():
            self._states.append(state)
            state = self._advance(step, state)
            recorded = step.next_state
            if recorded is not None:
                norm = recorded if self._trajectory.has_norms else torch.linalg.vector_norm(recorded)
                self._check.norm(step.index, state.detach(), norm)
            if step.at_end is not None:
                rows[step.at_end] = state
        for step in self._trajectory.forwards():
            for output, theta in zip(step.interpolated, self._theta[step.index].unbind(0), strict=True):
                rows[output] = self._inside(step, theta)
        return torch.stack([row.to(self._initial.dtype) for row in rows])

    def _advance(self, step: Step, state: Tensor) -> Tensor:
        tableau, size, start = step.tableau, self._size[step.index], self._start[step.index]
        if step.whole is not None:
            t, h = (
                time + (moving - moving.detach()).to(time.dtype)
                for time, moving in zip(step.times, (start, size), strict=True)
            )
            self._slopes.append([])
            result = self._field.advance(step.whole, t, h, state, step.random[0] if step.random else None)
            self._look(result, t, h, state)
            return result
        slopes = [self._passed[n] for n in carriers(step.index, tableau)]
        rounded: Sequence[Sequence[bool]] = [()] * (tableau.stages + 1)
        if tableau.narrow is not None:
            rounded = [*tableau.narrow.a, tableau.narrow.b]
        for i, (row, node) in enumerate(zip(tableau.a, tableau.c, strict=True)):
            moving = start + node * size
            t = step.times[i] + (moving - moving.detach()).to(step.times[i].dtype)
            y = self._combine(state, size, row, slopes, tableau.narrow, rounded[i])
            slope = self._field(t, y, step.random[i] if step.random else None)
            if not i:
                self._look(slope, t, y)
            slopes.append(slope)
        self._slopes.append(slopes)
        if tableau.passes is not None:
            self._passed[step.index] = slopes[tableau.carried + tableau.passes]
        return self._combine(state, size, tableau.b, slopes, tableau.narrow, rounded[-1])

    def _look(self, value: Tensor, *known: Tensor) -> None:
        """Report what the first graph reaches that nobody listed."""
        if value.requires_grad and not self._looked:
            self._field.params_in(value, (*known, self._initial, self._start, self._size))
        self._looked = True

    def _inside(self, step: Step, theta: Tensor) -> Tensor:
        slopes = self._slopes[step.index]
        if step.tableau.closing is not None:
            slopes = [*slopes, self._slopes[step.index + 1][0]]
        theta = theta.to(torch.promote_types(theta.dtype, self._field.dtype.to_real()))
        powers = [theta**power for power in range(len(step.tableau.dense))]
        weights = [
            sum(
                (weight * power for weight, power in zip(column, powers, strict=True) if weight),
                torch.zeros_like(theta),
            )
            for column in zip(*step.tableau.dense, strict=True)
        ]
        return self._combine(self._states[step.index], self._size[step.index], weights, slopes)

    def _combine(
        self,
        state: Tensor,
        size: Tensor,
        weights: Sequence[float | Tensor],
        slopes: Sequence[Tensor],
        narrow: Narrow | None = None,
        rounded: Sequence[bool] = (),
    ) -> Tensor:
        total = state.to(self._field.dtype) if slopes else state
        wide = size.to(torch.promote_types(size.dtype, self._field.dtype.to_real()))
        for i, (weight, slope) in enumerate(zip(weights, slopes, strict=True)):
            if isinstance(weight, Tensor) or weight:
                product = wide * weight
                if narrow is not None and rounded[i]:
                    # The value is the host's, the derivative that of the product.
                    value = size.detach().to(narrow.dtype) * torch.tensor(weight, dtype=narrow.dtype)
                    product = product + (value.to(product.dtype) - product.detach())
                total = total + product.to(self._field.dtype) * slope
        return total
