"""Error, memory, time and field evaluations of the ways to differentiate one and the same solve."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.memory import peak_bytes
from torchdiffeq_symplectic.benchmark.problem import Problem, State, flatten, gradient
from torchdiffeq_symplectic.benchmark.reference import reference_gradient

__all__ = ["CONTENDERS", "Contender", "Row", "compare"]

BACKPROPAGATION = "backpropagation"


@dataclass(frozen=True)
class Contender:
    """A way to differentiate a solve.

    Attributes:
        name: what tables and plots call it.
        solve: called as torchdiffeq's ``odeint`` is, ``(func, y0, t, *, rtol, atol, method, options)``; what it returns
            is a solution that can be differentiated.
    """

    name: str
    solve: Callable[..., State]


@dataclass(frozen=True)
class Row:
    """What :func:`compare` found for one contender. Evaluations are calls of the field.

    Attributes:
        contender: its name.
        gradient_error: ‖g - g*‖ / ‖g*‖ over y0 and all parameters, g* as :func:`reference_gradient` gives it.
        peak_bytes: most bytes alive at once during forward and backward, above those alive before.
        seconds: median time of forward and backward.
        relative_time: ``seconds`` over those of backpropagation.
        forward_evaluations: those until the solution is there.
        backward_evaluations: those from there to the gradient.
    """

    contender: str
    gradient_error: float
    peak_bytes: int
    seconds: float
    relative_time: float
    forward_evaluations: int
    backward_evaluations: int


def _backpropagation(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    solution: State = torchdiffeq.odeint(func, y0, t, **settings)
    return solution


def _adjoint(**mode: Any) -> Callable[..., State]:
    """One of the modes of torchdiffeq's ``odeint_adjoint``, which is looked up at each call, as it may be patched."""

    def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        solution: State = torchdiffeq.odeint_adjoint(func, y0, t, **settings, **mode)
        return solution

    return solve


CONTENDERS = (
    Contender(BACKPROPAGATION, _backpropagation),
    Contender("adjoint", _adjoint()),
    Contender("aca", _adjoint(adjoint_method="aca")),
    Contender("baseline", _adjoint(adjoint_method="baseline")),
    Contender("symplectic", _adjoint(adjoint_method="symplectic")),
    Contender("symplectic, stages", _adjoint(adjoint_method="symplectic", adjoint_options={"checkpoint": "stages"})),
)


def compare(problem: Problem, contenders: Sequence[Contender] = CONTENDERS, repeats: int = 5) -> list[Row]:
    """Measure ``contenders`` side by side on ``problem``.

    Args:
        problem: what is solved and differentiated; its field must give the same slope at each call.
        contenders: one of them must be named "backpropagation", whose time the others' are divided by.
        repeats: rounds of timing after one to warm up. The contenders take turns in each, so that a machine that slows
            down slows all of them.

    Returns:
        A row for each contender, in their order.

    Raises:
        ValueError: if ``repeats`` is less than one, or none of ``contenders`` is backpropagation.
        RuntimeError: if the field's slopes are not reproducible (see :func:`reference_gradient`).
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    if BACKPROPAGATION not in [contender.name for contender in contenders]:
        raise ValueError(f"contenders must have one named {BACKPROPAGATION!r}: times are relative to its own")
    reference = reference_gradient(problem)
    seconds = _time_in_turn(problem, contenders, repeats)
    return [
        Row(
            contender.name,
            gradient_error=_gradient_error(problem, contender, reference),
            peak_bytes=peak_bytes(partial(_run, problem, contender.solve), problem.t.device),
            seconds=seconds[contender.name],
            relative_time=seconds[contender.name] / seconds[BACKPROPAGATION],
            **_count_evaluations(problem, contender),
        )
        for contender in contenders
    ]


def _run(problem: Problem, solve: Callable[..., State]) -> tuple[Tensor, ...]:
    """One forward and backward pass."""
    return gradient(problem.loss(problem.solve(solve)), problem.leaves)


def _gradient_error(problem: Problem, contender: Contender, reference: Tensor) -> float:
    difference = flatten(_run(problem, contender.solve)) - reference
    return float(difference.norm() / reference.norm())


def _time_in_turn(problem: Problem, contenders: Sequence[Contender], repeats: int) -> dict[str, float]:
    """Median seconds of each contender."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(1 + repeats):
        for contender in contenders:
            gc.collect()  # what one leaves behind is not to be cleared away in another's time
            start = _now(problem.t.device)
            _run(problem, contender.solve)
            times[contender.name].append(_now(problem.t.device) - start)
    return {name: statistics.median(rounds[1:]) for name, rounds in times.items()}


def _now(device: torch.device) -> float:
    """Seconds on a clock that only goes up, once ``device`` has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _EvaluationCounter(nn.Module):
    """The field, and how often it has been called."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field
        self.calls = 0

    def forward(self, t: Tensor, y: State) -> State:
        self.calls += 1
        slope: State = self.field(t, y)
        return slope


def _count_evaluations(problem: Problem, contender: Contender) -> dict[str, int]:
    counter = _EvaluationCounter(problem.field)
    loss = problem.loss(problem.solve(contender.solve, counter))
    forward = counter.calls
    gradient(loss, problem.leaves)
    return {"forward_evaluations": forward, "backward_evaluations": counter.calls - forward}
