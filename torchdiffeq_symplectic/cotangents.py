"""From the cotangents of a solve's outputs to those of its states, slopes and times.

An output is a state of the trajectory or lies inside a step, ``u = y + h * sum_j W_j(theta) k_j``; then its cotangent
reaches the step's slopes directly. The last of them may be the slope that the next step begins with, and the slopes
that a step carries in belong to earlier ones, so cotangents are routed across steps here, not in the modes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.tableau import Tableau
from torchdiffeq_symplectic.trajectory import Step, Trajectory, carriers

__all__ = ["Cotangents", "Gradients"]


@dataclasses.dataclass
class Gradients:
    """What a mode returns: the cotangents of everything that the solve was computed from.

    Attributes:
        initial: of the initial state, of its shape.
        params: of the parameters, in their order.
        start, size: of the steps' times and sizes, shape ``(N,)``; theta: of the positions of the interpolated outputs
            inside their steps, shape ``(M,)``; None where times need no gradient.
    """

    initial: Tensor | None
    params: Sequence[Tensor | None]
    start: Tensor | None = None
    size: Tensor | None = None
    theta: Tensor | None = None


class Cotangents:
    """The cotangents of the outputs, asked for while the steps are swept from the last to the first.

    Args:
        trajectory: the solve.
        outputs: cotangent of the solution, shape ``(T, *y0.shape)``.
    """

    def __init__(self, trajectory: Trajectory, outputs: Tensor) -> None:
        self._trajectory = trajectory
        self._outputs = outputs.reshape(len(outputs), trajectory.initial.numel())
        self._pending: dict[int, Tensor] = {}
        self._first_slope: Tensor | None = None
        self._latest: tuple[int, Tensor] | None = None
        self._start: dict[int, Tensor] = {}
        self._size: dict[int, Tensor] = {}
        self._theta: dict[int, Tensor] = {}

    def of_output(self, index: int) -> Tensor:
        """The cotangent of one output, flat."""
        return self._outputs[index]

    def inside(self, step: Step) -> Tensor:
        """The cotangents of the outputs inside ``step``, shape ``(M, n)``, in the states' dtype."""
        return self._outputs[step.interpolated.start : step.interpolated.stop].to(self._trajectory.dtype)

    def of_slopes(self, step: Step) -> dict[int, Tensor]:
        """What reaches the slopes of ``step`` from outside of its own arithmetic, flat, by own stage."""
        tableau = step.tableau
        found: dict[int, Tensor] = {}
        if step.interpolated:
            reached = (self._weights(step) * step.size).to(self._trajectory.dtype).t() @ self.inside(step)
            for row in range(tableau.carried):
                self._defer(step.index - 1 - row, reached[row])
            found = dict(enumerate(reached[tableau.carried : tableau.carried + tableau.stages]))
        earlier = self._trajectory.before(step)
        if earlier is not None and earlier.interpolated and tableau.continues(earlier.tableau):
            weights = (self._weights(earlier)[:, -1] * earlier.size).to(self._trajectory.dtype)
            _add(found, 0, weights @ self.inside(earlier))
        if step.index in self._pending and tableau.passes is not None:
            _add(found, tableau.passes, self._pending.pop(step.index))
        return found

    def pass_on(self, step: Step, carried: Tensor) -> None:
        """Hand the cotangents of the carried slopes, shape ``(q, n)``, to the steps that these are slopes of."""
        for n, cotangent in zip(carriers(step.index, step.tableau), carried.unbind(0), strict=True):
            self._defer(n, cotangent)

    def time_of_step(self, step: Step, slopes: Tensor, lam: Tensor) -> None:
        """What the new state and the outputs inside say about the step's size and their positions.

        ``slopes`` are the carried and own ones, shape ``(q + s, n)``; ``lam`` is the cotangent of the new state.
        """
        _, b, _ = self._constants(step.tableau)
        self._grow(self._size, step, _dot(lam, b.to(slopes.dtype) @ slopes))
        if step.interpolated:
            every = slopes if step.tableau.closing is None else torch.cat([slopes, self._first_slope[None]])  # type: ignore[index]
            inside = self.inside(step)
            moved, rate = (matrix.to(every.dtype) @ every for matrix in (self._weights(step), self._rates(step)))
            self._grow(self._size, step, _dot(inside.reshape(-1), moved.reshape(-1)))
            self._theta[step.index] = (inside.conj() * rate).sum(1).real * step.size
        earlier = self._trajectory.before(step)
        if earlier is not None and earlier.interpolated and step.tableau.continues(earlier.tableau):
            self._first_slope = slopes[0].clone()

    def time_of_stage(self, step: Step, i: int, product: Tensor | None, product_t: Tensor | None, rate: Tensor) -> None:
        """What stage ``i`` says: its state moves with the step's size at ``rate``, its time with start and size."""
        if product is not None:
            self._grow(self._size, step, _dot(product.reshape(-1), rate))
        if product_t is not None:
            product_t = product_t.reshape(())
            self._grow(self._start, step, product_t)
            self._grow(self._size, step, step.tableau.c[i] * product_t)

    def time_of_whole(self, step: Step, product_t: Tensor | None, product_h: Tensor | None) -> None:
        """What a whole step says, whose products with respect to its time and size are these."""
        zero = torch.zeros((), dtype=step.size.dtype, device=step.size.device)
        self._grow(self._size, step, zero if product_h is None else product_h.reshape(()))
        if product_t is not None:
            self._grow(self._start, step, product_t.reshape(()))

    def gradients(self, lam: Tensor, params: Sequence[Tensor]) -> Gradients:
        """The result, once every step is swept; ``lam`` is the cotangent of the first step's initial state."""
        trajectory = self._trajectory
        initial = lam.reshape(-1).clone()  # lam is a row of the sweep's workspace
        for index in trajectory.at_start:
            initial = initial + self._outputs[index]
        gradients = Gradients(initial.to(trajectory.initial.dtype).reshape(trajectory.initial.shape), params)
        if self._size:
            zero = torch.zeros((), dtype=trajectory.dtype.to_real(), device=lam.device)
            steps = range(len(trajectory))
            gradients.start = torch.stack([self._start.get(n, zero) for n in steps]).to(trajectory.start.dtype)
            gradients.size = torch.stack([self._size[n] for n in steps]).to(trajectory.size.dtype)
            parts = [self._theta[n] for n in sorted(self._theta)]
            gradients.theta = torch.cat(parts).to(trajectory.theta.dtype) if parts else None
        return gradients

    @staticmethod
    def _grow(totals: dict[int, Tensor], step: Step, term: Tensor) -> None:
        totals[step.index] = totals[step.index] + term if step.index in totals else term

    def _defer(self, n: int, cotangent: Tensor) -> None:
        self._pending[n] = self._pending[n] + cotangent if n in self._pending else cotangent.clone()

    def _constants(self, tableau: Tableau) -> tuple[Tensor, Tensor, Tensor]:
        theta = self._trajectory.theta
        dtype = torch.promote_types(theta.dtype, self._trajectory.dtype.to_real())
        return _constants(tableau, dtype, theta.device)

    def _weights(self, step: Step) -> Tensor:
        """Weights of the slopes in the outputs inside ``step``, shape ``(M, columns)``."""
        if self._latest is None or self._latest[0] != step.index:
            dense, _, powers = self._constants(step.tableau)
            theta = step.theta.detach().to(dense.dtype)[:, None]
            self._latest = step.index, theta**powers @ dense
        return self._latest[1]

    def _rates(self, step: Step) -> Tensor:
        """The derivatives of these weights in theta."""
        dense, _, powers = self._constants(step.tableau)
        theta = step.theta.detach().to(dense.dtype)[:, None]
        return (powers * theta ** (powers - 1).clamp(min=0)) @ dense


@functools.lru_cache(maxsize=1024)
def _constants(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``dense``, shape ``(powers, columns)``, ``b`` and the exponents of the powers as tensors."""
    dense = torch.tensor(tableau.dense, dtype=dtype, device=device)
    return dense, torch.tensor(tableau.b, dtype=dtype, device=device), torch.arange(len(dense), device=device)


def _add(found: dict[int, Tensor], stage: int, cotangent: Tensor) -> None:
    found[stage] = found[stage] + cotangent if stage in found else cotangent


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """The real inner product of two flat tensors, 0-d."""
    product = torch.vdot(left, right.to(left.dtype))
    return product.real if product.is_complex() else product
