"""The gradient to measure others by: float64 backpropagation through the very steps that a solve accepted.

An adaptive solver chooses its steps by its own rounded error estimates. The same solve in float64 would choose others,
and so have another gradient, by as much as the tolerance allows. Here the accepted steps are recorded and prescribed.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.problem import Problem, Solver, State, as_tuple, flatten

__all__ = ["Measure", "Reference", "Steps", "check_repeated", "in_float64", "recorded_steps", "reference"]

BEYOND_ANY_ERROR = 1e100  # a tolerance at which each trial step is accepted
SMALLEST = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Reference:
    """What a contender's gradient is measured by.

    Attributes:
        gradient: float64, shape ``(M,)``: with respect to y0 and all parameters, one after the other.
        steps: accepted steps of the forward pass, of all fields together.
    """

    gradient: Tensor
    steps: int


Measure: TypeAlias = Callable[[Problem], Reference]


@dataclass(frozen=True)
class Steps:
    """The steps of one solve.

    Attributes:
        number: how many were accepted.
        grid: where they begin and where the last one ends, in the order of integration, which may be behind the last
            output time: the solvers step past it and interpolate. Empty for a method of fixed steps.
    """

    number: int
    grid: Sequence[float]


def reference(problem: Problem) -> Reference:
    """The gradient of torchdiffeq's discrete solve of ``problem``, in float64, with its accepted steps held constant.

    Raises:
        RuntimeError: if the repeated solve is not the first one to the rounding of ``problem``'s dtype, as for a field
            that draws new noise at each call; or if torchdiffeq does not tell the steps of the method.
    """
    with torch.no_grad():
        solution = problem.solve(torchdiffeq.odeint)
    steps = recorded_steps(problem)
    double = in_float64(problem)
    again = [_prescribing(problem, each.grid) for each in steps]
    with torch.no_grad():
        check_repeated(solution, double.solve(_in_order(again)))
    return Reference(flatten(double.gradient(_in_order(again))), sum(each.number for each in steps))


def recorded_steps(problem: Problem) -> list[Steps]:
    """The steps of torchdiffeq's solve of each field of ``problem``."""
    recorders: list[_StepRecorder] = []

    def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        recorders.append(_StepRecorder(func))
        solution: State = torchdiffeq.odeint(recorders[-1], y0, t, **settings)
        return solution

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not support callbacks.*")
        problem.solve(solve)
    if not all(recorder.trials for recorder in recorders):
        raise RuntimeError(
            f"torchdiffeq {torchdiffeq.__version__} does not tell the steps of method={problem.method!r}, which the "
            "reference gradient repeats: use a Runge-Kutta method, and torchdiffeq 0.2.4 or later"
        )
    forwards = bool(problem.t[-1] > problem.t[0])
    return [recorder.steps(forwards) for recorder in recorders]


class _StepRecorder(nn.Module):
    """The field, and torchdiffeq's callbacks that tell of each step. Fixed steps are not said to be accepted."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.trials = 0
        self.accepted: list[tuple[float, float]] = []  # where it starts, how long it is

    def forward(self, t: Tensor, y: Any) -> Any:
        return self.field(t, y)

    def callback_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        del t0, y0, dt
        self.trials += 1

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        del y0
        self.accepted.append((float(t0), float(dt)))

    def steps(self, forwards: bool) -> Steps:
        if not self.accepted:
            return Steps(self.trials, [])
        last, length = self.accepted[-1]
        grid = [start for start, _ in self.accepted] + [last + length if forwards else last - length]
        return Steps(len(self.accepted), grid)


def in_float64(problem: Problem) -> Problem:
    """``problem`` with state, parameters and times in float64."""
    y0 = tuple(part.double() for part in as_tuple(problem.y0))
    return problem.replace(
        field=copy.deepcopy(problem.field).double(),
        y0=y0 if isinstance(problem.y0, tuple) else y0[0],
        t=problem.t.double(),
    )


def _in_order(solvers: Sequence[Solver]) -> Solver:
    """A solver whose n-th call is one of the n-th of ``solvers``."""
    remaining = iter(solvers)
    return lambda *arguments, **settings: next(remaining)(*arguments, **settings)


def _prescribing(problem: Problem, grid: Sequence[float]) -> Solver:
    """torchdiffeq's solver, made to step from each point of ``grid`` to the next, if it has any."""
    prescribed: dict[str, Any] = {}
    if grid:
        prescribed = {"rtol": BEYOND_ANY_ERROR, "atol": BEYOND_ANY_ERROR, "options": _stepping(problem, grid)}

    def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        solution: State = torchdiffeq.odeint(func, y0, t, **{**settings, **prescribed})
        return solution

    return solve


def _stepping(problem: Problem, grid: Sequence[float]) -> dict[str, Any]:
    """Options with which each step ends at the next point of ``grid``.

    Each trial step must reach beyond that point, for torchdiffeq then cuts it short there: the first is longer than the
    whole grid, and each later one may be ``ifactor`` times longer than the one before.
    """
    jumps = {
        float(jump) for jump in problem.options.get("jump_t", ())
    }  # must not be in step_t as well; also end a step
    return {
        **problem.options,
        "dtype": torch.float64,
        "first_step": 2 * abs(grid[-1] - grid[0]),
        "step_t": torch.tensor([end for end in grid[1:] if end not in jumps], dtype=torch.float64),
        "ifactor": 1e12,
        "min_step": 0.0,
        "max_step": math.inf,
    }


def check_repeated(solution: State, repeated: State) -> None:
    """Raise if ``repeated`` is another solution than ``solution``, the one that it is to repeat in float64."""
    for part, double in zip(as_tuple(solution), as_tuple(repeated), strict=True):
        exact = double.detach()
        difference = float((part.detach().double() - exact).norm() / exact.norm().clamp_min(SMALLEST))
        if not difference < math.sqrt(torch.finfo(part.dtype).eps):
            raise RuntimeError(
                f"repeating the accepted steps of problem in float64 gave a solution that differs by {difference:.1e} "
                "(relative): problem.field must give the same slope for the same time and state, so fix its noise and "
                "switch dropout off"
            )
