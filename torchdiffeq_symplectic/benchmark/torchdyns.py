"""torchdyn's ways to differentiate its own solve, this package's modes in it, and the gradient to measure them by."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.contender import Contender
from torchdiffeq_symplectic.benchmark.problem import Problem, Solver, State
from torchdiffeq_symplectic.benchmark.reference import Reference
from torchdiffeq_symplectic.benchmark.replay import Flat, Taken, accepted, recorded, repeated, without_equal

__all__ = ["installed", "reference"]

ADAPTIVE, FIXED = ("dopri5",), ("euler", "midpoint")  # torchdyn's rk4 is not the method that torchdiffeq has there


def installed() -> list[Contender]:
    """torchdyn's three ways and this package's modes; none if torchdyn is not installed.

    Some errors have causes of their own. Backpropagation, ``autograd``, also differentiates the choice of the first
    step, on which torchdyn takes no advice. ``interpolated_adjoint`` adds the gradients of output times between the
    first and the last at wrong ones. Both adjoints go the wrong way for decreasing times.
    """
    if importlib.util.find_spec("torchdyn") is None:
        return []
    upstream = [Contender(f"torchdyn, {name}", _solver(name), _refusal, reference) for name in _SENSITIVITIES]
    own = [
        Contender(f"torchdyn, {name}", _solver(mode, options), _refusal, reference, may_fail=False)
        for name, (mode, options) in _MODES.items()
    ]
    return [*upstream, *own]


_SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
_MODES: dict[str, tuple[str, dict[str, str]]] = {
    "baseline": ("baseline", {}),
    "aca": ("aca", {}),
    "symplectic": ("symplectic", {}),
    "symplectic, stages": ("symplectic", {"checkpoint": "stages"}),
}


def _refusal(problem: Problem) -> str | None:
    if problem.method not in ADAPTIVE + FIXED:
        return f"only for {', '.join(ADAPTIVE + FIXED)}"
    if problem.method in FIXED and not _grid(problem.t, problem.options)[1]:
        return "its steps must end at the output times"
    return without_equal(problem.options, "step_size")


def _grid(t: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The times between which torchdiffeq's fixed steps go, and whether ``t`` are among them."""
    size = options.get("step_size")
    if size is None:
        return t, True
    duration = t[-1] - t[0]
    number = math.ceil(abs(float(duration)) / size - 1e-4)  # one more, if by rounding, would be of no length
    grid = t[0] + duration.sign() * size * torch.arange(number + 1, dtype=t.dtype, device=t.device)
    grid[-1] = t[-1]
    distance, nearest = (grid[:, None] - t).abs().min(dim=0)
    grid[nearest] = t
    return grid, bool((distance < 1e-2 * size).all())


def _solver(sensitivity: str, adjoint_options: Mapping[str, str] | None = None) -> Solver:
    def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        field = Flat(func, y0)
        way: dict[str, Any] = {"sensitivity": sensitivity, "adjoint_options": adjoint_options or {}}
        return field.unpack(_solution(field, field.pack(y0), t, settings["method"], **way, **settings))

    return solve


def _solution(
    field: Flat,
    x: Tensor,
    t: Tensor,
    solver: Any,
    *,
    sensitivity: str,
    adjoint_options: Mapping[str, str],
    rtol: float,
    atol: float,
    method: str,
    options: Mapping[str, Any],
) -> Tensor:
    """torchdyn's solution at ``t``; ``solver`` is the method's name, as users give it, or an object."""
    from torchdyn.core import ODEProblem

    sign = _sign(t)
    grid, outputs = t, t[:0]
    if method in FIXED:
        rtol = atol = 1e-3  # torchdyn warns of any others, as they have no effect
        (grid, _), outputs = _grid(t, options), sign * t
    tolerances = {"rtol": rtol, "atol": atol, "rtol_adjoint": rtol, "atol_adjoint": atol}
    times: Tensor
    states: Tensor
    problem = ODEProblem(field, solver, sensitivity=sensitivity, **tolerances)
    problem.adjoint_options = dict(adjoint_options)
    times, states = problem(x, grid, outputs)
    if len(times) == len(t):
        return states
    # The adjoint modes return more: that of fixed steps knows no `save_at`, the interpolated one takes all steps.
    rows = (times == sign * t[:, None]).nonzero()[:, 1]
    if len(rows) != len(t):
        raise RuntimeError(f"torchdyn returned {len(rows)} of {len(t)} output times")
    return states[rows]


def reference(problem: Problem) -> Reference:
    """The gradient of torchdyn's discrete solve of ``problem``, in float64, with its accepted steps held constant.

    It is of torchdyn's own step, whose coefficients are those of float32, as torchdyn makes them for a method's name.

    Raises:
        RuntimeError: if the repeated solve is not the first one to the rounding of ``problem``'s dtype.
    """
    return repeated(problem, _record, _repeat)


def _record(field: Flat, x: Tensor, t: Tensor, **settings: Any) -> tuple[Tensor, Taken]:
    from torchdyn.numerics.solvers.ode import str_to_solver

    solver = str_to_solver(settings["method"])
    calls = recorded(solver, position=2)
    solution = _solution(field, x, t, solver, sensitivity="autograd", adjoint_options={}, **settings)
    steps = accepted(calls)
    ends = torch.stack([(time + length).reshape(()) for time, length in steps])
    # Fixed steps end at an output time up to rounding only.
    outputs = 1 + (ends - _sign(t) * t[1:, None]).abs().argmin(dim=1)
    return solution, Taken(steps, [0, *outputs.tolist()])


def _repeat(taken: Taken, field: Flat, x: Tensor, t: Tensor, *, method: str, **settings: Any) -> Iterator[Tensor]:
    from torchdyn.numerics.solvers.ode import str_to_solver

    sign = _sign(t)
    solver = str_to_solver(method)
    solver.sync_device_dtype(x, t)
    slope = None  # carried from step to step, if the solver hands one on
    for time, length in taken.steps:
        slope, x, *_ = solver.step(lambda t, x: sign * field(sign * t, x), x, time, length, k1=slope)
        yield x


def _sign(t: Tensor) -> int:
    """torchdyn solves with decreasing times as with the increasing ones -t."""
    return 1 if t[1] > t[0] else -1
