"""The network beside the solution of its ODE, block by block: how far apart they are, and what bounds that.

Two states are alive at a time, and the graph of two blocks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from torchdiffeq_symplectic.resnet.bounds import Linearised, lipschitz_constant
from torchdiffeq_symplectic.resnet.field import ResidualField

__all__ = ["Comparison", "compare_with_solution"]

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
        amplifications: a Lipschitz constant of the step ``x + f_n(x)/N``, between ``x_n`` and ``x(n/N)``.
        errors: of the step from ``x(n/N)``, its distance to ``x((n + 1)/N)``.
        change: ``‖x_N - x_0‖`` of the network; no less than what rounding makes of a difference between such states.
        slopes: ``‖f_n(x_n)‖``.
        jumps: ``‖f_{n+1}(x_n) - f_n(x_n)‖``, ``N - 1`` numbers.
        double_jumps: ``‖f_{n+2}(x_n) - f_n(x_n)‖``, ``N - 2`` numbers.
        trouble: why the comparison ended before the last block, or None.
    """

    distance: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    amplifications: list[float] = dataclasses.field(default_factory=list)
    errors: list[float] = dataclasses.field(default_factory=list)
    change: float = math.inf
    slopes: list[float] = dataclasses.field(default_factory=list)
    jumps: list[float] = dataclasses.field(default_factory=list)
    double_jumps: list[float] = dataclasses.field(default_factory=list)
    trouble: str | None = None


@torch.no_grad()
def compare_with_solution(field: ResidualField, x: Tensor, accuracy: float) -> Comparison:
    """Go through the network and, by torchdiffeq's dopri5, along the solution, from ``x``.

    Args:
        field: its parameters need no gradient, and are of the dtype of ``x``.
        x: the first state.
        accuracy: of the distance, relative: the solver's tolerance is this part of what an Euler step errs by.
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
        slopes = [self._field(self._start, state) for state in (network, solution)]
        self._compare_blocks(network, slopes[0], found)
        next_solution = self._solve(solution, slopes[1])
        next_network, stepped = network + self._size * slopes[0], solution + self._size * slopes[1]
        amplification = max(self._amplification(state, generator) for state in (network, solution))
        # Both are of points; what the step makes of the very distance between the two counts, too.
        apart = _norm(network - solution)
        if apart > _telling(solution):
            amplification = max(amplification, _norm(next_network - stepped) / apart)
        found.distance.append(_norm(next_network - next_solution))
        found.amplifications.append(amplification)
        found.errors.append(_norm(stepped - next_solution))
        return next_network, next_solution

    def _amplification(self, x: Tensor, generator: torch.Generator) -> float:
        """``‖I + J/N‖``, of the Jacobian at the step's start."""
        return lipschitz_constant(Linearised(lambda y: y + self._size * self._field(self._start, y), x), generator)

    def _compare_blocks(self, x: Tensor, slope: Tensor, found: Comparison) -> None:
        found.slopes.append(_norm(slope))
        for ahead, jumps in (1, found.jumps), (2, found.double_jumps):
            if self._n + ahead < len(self._field):
                jumps.append(_norm(self._field((self._n + ahead) / len(self._field), x) - slope))

    def _solve(self, x: Tensor, slope: Tensor) -> Tensor:
        """The solution at the end of the step."""
        # The error of an Euler step, as Heun's method sees it.
        error = self._size / 2 * (self._inside(self._end, x + self._size * slope) - slope)
        rounding = torch.finfo(x.dtype).eps * max(_root_mean_square(x), self._size * _root_mean_square(slope))
        options: dict[str, Any] = {
            "first_step": self._size,
            "step_t": self._times(self._end),
            "max_num_steps": _MOST_STEPS,
            "dtype": x.dtype,
        }
        times = self._times(self._start, self._end)
        states: Tensor = torchdiffeq.odeint(
            self._inside,
            x,
            times.to(x),
            method="dopri5",
            rtol=0.0,
            atol=max(self._accuracy * _root_mean_square(error), _ROUNDINGS * rounding),
            options=options,
        )
        return states[-1]

    def _times(self, *times: float) -> Tensor:
        return torch.tensor(times, dtype=torch.float64)


def _fill(found: Comparison, count: int) -> None:
    """Infinity for what is missing, and for what is not a number."""
    for values, length in (found.distance, count + 1), (found.amplifications, count), (found.errors, count):
        values += [math.inf] * (length - len(values))
        values[:] = [math.inf if math.isnan(value) else value for value in values]


def _telling(x: Tensor) -> float:
    return _TELLING * torch.finfo(x.dtype).eps * _norm(x)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _root_mean_square(x: Tensor) -> float:
    return _norm(x) / math.sqrt(x.numel())
