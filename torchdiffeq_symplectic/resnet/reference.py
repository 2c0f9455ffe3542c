"""The network beside the solution of its ODE, block by block: how far apart they are, and what bounds that.

Two states are alive at a time, and the graph of two blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from torchdiffeq_symplectic.resnet.bounds import Linearised, curvature, lipschitz_constant
from torchdiffeq_symplectic.resnet.field import ResidualField

__all__ = ["Comparison", "compare_with_solution"]

# Where the curvature is measured inside a step, as parts of it. At its ends, where blocks stand, ∂_s φ jumps.
_INSIDE = (1 / 32, 1 / 2, 31 / 32)
_DELTA = 1 / 64  # of a step, for difference quotients in depth

_MOST_STEPS = 1000  # of the adaptive solver, a block
_ROUNDINGS = 100  # no tolerance below that many units of rounding

# Where two states are closer than that many units of rounding, ratios of their difference tell of rounding alone.
_TELLING = 1e6


@dataclasses.dataclass
class Comparison:
    """What was measured at the blocks ``n = 0 ... N - 1``, whose residual functions are ``f_n``, step size ``1/N``.

    Norms are Euclidean, of the whole batch. Where a state is not finite, or the solver gives up, what follows is
    infinite.

    Attributes:
        distance: ``‖x_n - x(n/N)‖``, ``N + 1`` numbers.
        lipschitz: of ``f_n``, between ``x_n`` and ``x(n/N)``.
        curvatures: ``‖∂_s φ + ∂_x φ[φ]‖`` on the solution between ``n/N`` and ``(n + 1)/N``, the largest.
        change: ``‖x_N - x_0‖`` of the network; no less than what rounding makes of a difference between such states.
        slopes: ``‖f_n(x_n)‖``.
        jumps: ``‖f_{n+1}(x_n) - f_n(x_n)‖``, ``N - 1`` numbers.
        double_jumps: ``‖f_{n+2}(x_n) - f_n(x_n)‖``, ``N - 2`` numbers.
        trouble: why the comparison ended before the last block, or None.
    """

    distance: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    lipschitz: list[float] = dataclasses.field(default_factory=list)
    curvatures: list[float] = dataclasses.field(default_factory=list)
    change: float = math.inf
    slopes: list[float] = dataclasses.field(default_factory=list)
    jumps: list[float] = dataclasses.field(default_factory=list)
    double_jumps: list[float] = dataclasses.field(default_factory=list)
    trouble: str | None = None


@torch.no_grad()
def compare_with_solution(
    field: ResidualField, x: Tensor, accuracy: float, advance: Callable[[], object]
) -> Comparison:
    """Go through the network and, by torchdiffeq's dopri5, along the solution, from ``x``.

    Args:
        field: its parameters need no gradient, and are of the dtype of ``x``.
        x: the first state.
        accuracy: of the distance, relative: the solver's tolerance is this part of what an Euler step errs by.
        advance: called after each block.
    """
    found = Comparison()
    generator = torch.Generator().manual_seed(0)
    network = solution = x
    for n in range(len(field)):
        step = _Step(field, n, accuracy)
        try:
            network, solution = step.measure(network, solution, found, generator)
        except AssertionError as error:  # torchdiffeq's: too many steps, a step too small, a state that is not finite
            found.trouble = f"the ODE's solver gave up between blocks {n} and {n + 1}: {error}"
            break
        advance()
    else:
        found.change = max(_norm(network - x), _telling(x))
    _fill(found, len(field))
    return found


class _Step:
    """Block ``n``'s Euler step, and the solution's way over the same depth.

    Between its ends, and at them, the field is that of this step: ``"piecewise"`` jumps at the blocks.
    """

    def __init__(self, field: ResidualField, n: int, accuracy: float) -> None:
        self._field, self._n, self._accuracy = field, n, accuracy
        self._size = 1 / len(field)
        self._start, self._end = n / len(field), (n + 1) / len(field)

    def _inside(self, t: Tensor | float, x: Tensor) -> Tensor:
        if self._field.interpolate == "piecewise":
            t = self._start + self._size / 2
        slope: Tensor = self._field(t, x)
        return slope

    def measure(
        self, network: Tensor, solution: Tensor, found: Comparison, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Append to ``found`` and return the two states after the step."""
        of_network, at_network = self._linearised(network, generator)
        of_solution, at_solution = self._linearised(solution, generator)
        self._compare_blocks(network, of_network, found)
        inside, next_solution = self._solve(solution, of_solution)
        next_network = torchdiffeq.odeint(self._field, network, self._times(self._start, self._end), method="euler")[-1]

        # The bound holds if each step's error is at most (1 + L h) times the one before plus C h²/2. Both constants
        # are largest values, sampled here, so what the step itself shows of them counts, too: a mean of the Jacobian
        # between the two states, and a mean of the second derivative over the step.
        apart, further = network - solution, of_network - of_solution
        error = next_network - next_solution - apart
        lipschitz = max(at_network, at_solution)
        if _norm(apart) > _telling(solution):
            lipschitz = max(lipschitz, _norm(further) / _norm(apart))
            error = error - self._size * further
        curvatures = [
            curvature(self._inside, self._start + part * self._size, state, _DELTA * self._size)
            for part, state in zip(_INSIDE, inside, strict=True)
        ]
        found.distance.append(_norm(next_network - next_solution))
        found.lipschitz.append(lipschitz)
        found.curvatures.append(max(*curvatures, 2 * _norm(error) / self._size**2))
        return next_network, next_solution

    def _linearised(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """The slope at the step's start, and the norm of its Jacobian."""
        at = Linearised(lambda y: self._field(self._start, y), x)
        return at.value, lipschitz_constant(at, generator)

    def _compare_blocks(self, x: Tensor, slope: Tensor, found: Comparison) -> None:
        found.slopes.append(_norm(slope))
        for ahead, jumps in (1, found.jumps), (2, found.double_jumps):
            if self._n + ahead < len(self._field):
                jumps.append(_norm(self._field((self._n + ahead) / len(self._field), x) - slope))

    def _solve(self, x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """The solution inside of the step, a state for each of `_INSIDE`, and at its end."""
        # The error of an Euler step, as Heun's method sees it.
        error = self._size / 2 * (self._inside(self._end, x + self._size * slope) - slope)
        rounding = torch.finfo(x.dtype).eps * max(_root_mean_square(x), self._size * _root_mean_square(slope))
        options: dict[str, Any] = {
            "first_step": self._size,
            "step_t": self._times(self._end),
            "max_num_steps": _MOST_STEPS,
            "dtype": x.dtype,
        }
        times = self._times(self._start, *(self._start + part * self._size for part in _INSIDE), self._end)
        states: Tensor = torchdiffeq.odeint(
            self._inside,
            x,
            times.to(x),
            method="dopri5",
            rtol=0.0,
            atol=max(self._accuracy * _root_mean_square(error), _ROUNDINGS * rounding),
            options=options,
        )
        return states[1:-1], states[-1]

    def _times(self, *times: float) -> Tensor:
        return torch.tensor(times, dtype=torch.float64)


def _fill(found: Comparison, count: int) -> None:
    """Infinity for what is missing, and for what is not a number."""
    for values, length in (found.distance, count + 1), (found.lipschitz, count), (found.curvatures, count):
        values += [math.inf] * (length - len(values))
        values[:] = [math.inf if math.isnan(value) else value for value in values]


def _telling(x: Tensor) -> float:
    return _TELLING * torch.finfo(x.dtype).eps * _norm(x)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _root_mean_square(x: Tensor) -> float:
    return _norm(x) / math.sqrt(x.numel())
