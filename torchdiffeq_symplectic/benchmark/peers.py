"""Other packages with a gradient of their own as contenders: zuko and TorchDiffEqPack.

Both only return the last state, so they go from output time to output time, and start anew at each.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.contender import Contender
from torchdiffeq_symplectic.benchmark.problem import Problem, Solver, State
from torchdiffeq_symplectic.benchmark.reference import Reference
from torchdiffeq_symplectic.benchmark.replay import Flat, Step, Taken, accepted, recorded, repeated, without_equal

__all__ = ["installed", "versions"]


def installed() -> list[Contender]:
    """zuko's adjoint, which takes ACA's name but integrates the continuous adjoint; ACA and MALI by their authors.

    Those that are installed. MALI solves by its own method, of second order, whose error estimate is of first order.
    """
    found = []
    if importlib.util.find_spec("zuko") is not None:
        found.append(Contender("zuko", _restarting(_zuko), _refusal, _zuko_reference))
    if importlib.util.find_spec("TorchDiffEqPack") is not None:
        found.append(Contender("TorchDiffEqPack, ACA", _restarting(_aca), _refusal, _aca_reference))
        found.append(Contender("TorchDiffEqPack, MALI", _restarting(_mali), _refusal, _mali_reference))
    return found


def versions() -> dict[str, str]:
    """The peers that are installed: name -> version."""
    return {
        name: importlib.metadata.version(name)
        for name in ("zuko", "TorchDiffEqPack")
        if importlib.util.find_spec(name) is not None
    }


def _refusal(problem: Problem) -> str | None:
    return without_equal(problem.options) if problem.method == "dopri5" else "only in place of dopri5"


def _restarting(solve: Callable[..., Tensor]) -> Solver:
    """A solver that goes from output to output, from one that only returns the last state."""

    def solver(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        field = Flat(func, y0)
        states = [field.pack(y0)]
        for start, end in pairwise(t):
            states.append(solve(field, states[-1], start, end, **settings))
        return field.unpack(torch.stack(states))

    return solver


def _recording(record: Callable[..., tuple[Tensor, list[Step]]]) -> Callable[..., tuple[Tensor, Taken]]:
    """The same for a solver that also returns the steps of each interval."""

    def recorder(field: Flat, x: Tensor, t: Tensor, **settings: Any) -> tuple[Tensor, Taken]:
        states, intervals = [x], []
        for start, end in pairwise(t):
            state, steps = record(field, states[-1], start, end, **settings)
            states.append(state)
            intervals.append(steps)
        outputs = accumulate(map(len, intervals), initial=0)
        return torch.stack(states), Taken([step for steps in intervals for step in steps], list(outputs))

    return recorder


def _zuko(field: Flat, x: Tensor, start: Tensor, end: Tensor, *, rtol: float, atol: float, **rest: Any) -> Tensor:
    """zuko's, which chooses its first step itself: it tries the whole interval."""
    from zuko.utils import odeint

    parameters = (parameter for parameter in field.parameters() if parameter.requires_grad)
    solution: Tensor = odeint(field, x, start, end, parameters, atol, rtol)
    return solution


def _zuko_recorded(field: Flat, x: Tensor, start: Tensor, end: Tensor, **settings: Any) -> tuple[Tensor, list[Step]]:
    with torch.enable_grad():
        solution = _zuko(field, x.detach().requires_grad_(), start, end, **settings)
    node: Any = solution.grad_fn  # its steps: of each the state and the time at its end, and its length
    starts = [start, *(t for _, t, _ in node.steps[:-1])]
    return solution.detach(), [(t, dt) for t, (_, _, dt) in zip(starts, node.steps, strict=True)]


def _zuko_repeated(taken: Taken, field: Flat, x: Tensor, t: Tensor, **settings: Any) -> Iterator[Tensor]:
    from zuko.utils import dopri45

    for start, length in taken.steps:
        x = dopri45(field, x, start, length)
        yield x


def _zuko_reference(problem: Problem) -> Reference:
    return repeated(problem, _recording(_zuko_recorded), _zuko_repeated)


def _aca(field: Flat, x: Tensor, start: Tensor, end: Tensor, **settings: Any) -> Tensor:
    from TorchDiffEqPack import odesolve_adjoint

    solution: Tensor = odesolve_adjoint(field, x, _pack_options("dopri5", start, end, **settings))
    return solution


def _mali(field: Flat, x: Tensor, start: Tensor, end: Tensor, **settings: Any) -> Tensor:
    from TorchDiffEqPack import odesolve_adjoint_sym12

    solution: Tensor = odesolve_adjoint_sym12(field, x, _pack_options("sym12async", start, end, **settings))
    return solution


def _pack_options(
    name: str, start: Tensor, end: Tensor, *, rtol: float, atol: float, options: Mapping[str, Any], **rest: Any
) -> dict[str, Any]:
    """TorchDiffEqPack's settings, whose first step is taken as it is if it is longer than the whole interval.

    Whatever the dtype of the state, all times but the last become float32. Backward takes the steps' lengths from them,
    so that they differ in rounding from those of forward: that is the gradient's error in float64, 1e-9 to 1e-6.
    """
    return {"method": name, "t0": start, "t1": end, "h": options.get("first_step"), "rtol": rtol, "atol": atol}


def _pack_solver(name: str, field: Flat, x: Tensor, start: Tensor, end: Tensor, **settings: Any) -> Any:
    """The solver that TorchDiffEqPack's adjoint modes use."""
    from TorchDiffEqPack import odesolve_endtime

    return odesolve_endtime(field, x, _pack_options(name, start, end, **settings), return_solver=True)


def _pack_state(name: str, field: Flat, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """What a step takes and returns: MALI's leapfrog advances a velocity of its own beside the state."""
    return (x, field(t, x)) if name == "sym12async" else (x,)


def _pack_recorded(
    name: str, field: Flat, x: Tensor, start: Tensor, end: Tensor, **settings: Any
) -> tuple[Tensor, list[Step]]:
    solver = _pack_solver(name, field, x, start, end, **settings)
    calls = recorded(solver, position=1)
    solver.tensor_input = False  # so that it returns a tuple, as it is given one
    state = solver.integrate(_pack_state(name, field, x, start), t0=start)
    return state[0], accepted(calls)


def _pack_repeated(name: str, taken: Taken, field: Flat, x: Tensor, t: Tensor, **settings: Any) -> Iterator[Tensor]:
    solver = _pack_solver(name, field, x, t[0], t[-1], **settings)
    for start, (first, last) in zip(t[:-1], pairwise(taken.outputs), strict=True):
        state = _pack_state(name, field, x, start)
        for time, length in taken.steps[first:last]:
            state, _ = solver.step(solver.func, time, length, state)
            x = state[0]
            yield x


def _aca_reference(problem: Problem) -> Reference:
    return repeated(problem, _recording(partial(_pack_recorded, "dopri5")), partial(_pack_repeated, "dopri5"))


def _mali_reference(problem: Problem) -> Reference:
    return repeated(problem, _recording(partial(_pack_recorded, "sym12async")), partial(_pack_repeated, "sym12async"))
