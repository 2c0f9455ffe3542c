"""The gradient to measure others by: float64 backpropagation through the very steps that a solve accepted.

An adaptive solver chooses its steps by its own rounded error estimates. The same solve in float64 would choose others,
and so have another gradient, by as much as the tolerance allows. Here the accepted steps are recorded and prescribed.
"""

import copy
import math
import warnings
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.problem import Problem, as_tuple, flatten, gradient

__all__ = ["accepted_grid", "reference_gradient"]

BEYOND_ANY_ERROR = 1e100  # a tolerance at which each trial step is accepted
SMALLEST = torch.finfo(torch.float64).tiny


def reference_gradient(problem: Problem) -> Tensor:
    """Gradient of the discrete solve of ``problem``, in float64, with its accepted steps held constant.

    Returns:
        float64 tensor of shape ``(M,)``: the gradients with respect to y0 and all parameters, one after the other.

    Raises:
        RuntimeError: if the repeated solve is not the first one to the rounding of ``problem``'s dtype, as for a field
            that draws new noise at each call.
    """
    with torch.no_grad():
        solution = problem.solve(torchdiffeq.odeint)
    double = _in_float64(problem, accepted_grid(problem))
    repeated = double.solve(torchdiffeq.odeint)
    _check_repeated(solution, repeated)
    return flatten(gradient(double.loss(repeated), double.leaves))


def accepted_grid(problem: Problem) -> list[float]:
    """Where the accepted steps of ``problem`` begin and where the last one ends, in the order of integration.

    The last step may end behind the last output time: the solvers step past it and interpolate. For a method of fixed
    steps, which reports none, the list is empty.
    """
    recorder = _StepRecorder(problem.field)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not support callbacks.*")
        problem.solve(torchdiffeq.odeint, recorder)
    if not recorder.steps:
        return []
    last, length = recorder.steps[-1]
    forwards = bool(problem.t[-1] > problem.t[0])
    return [start for start, _ in recorder.steps] + [last + length if forwards else last - length]


class _StepRecorder(nn.Module):
    """The field, and torchdiffeq's callback that tells of each accepted step."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.steps: list[tuple[float, float]] = []  # where it starts, how long it is

    def forward(self, t: Tensor, y: Any) -> Any:
        return self.field(t, y)

    def callback_accept_step(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        del y0
        self.steps.append((float(t0), float(dt)))


def _in_float64(problem: Problem, grid: list[float]) -> Problem:
    """``problem`` in float64, made to step from each point of ``grid`` to the next."""
    y0 = as_tuple(problem.y0)
    doubled = tuple(part.double() for part in y0)
    settings: dict[str, Any] = {}
    if grid:
        settings = {"rtol": BEYOND_ANY_ERROR, "atol": BEYOND_ANY_ERROR, "options": _stepping(problem, grid)}
    return problem.replace(
        field=copy.deepcopy(problem.field).double(),
        y0=doubled if isinstance(problem.y0, tuple) else doubled[0],
        t=problem.t.double(),
        **settings,
    )


def _stepping(problem: Problem, grid: list[float]) -> dict[str, Any]:
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


def _check_repeated(solution: Any, repeated: Any) -> None:
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
