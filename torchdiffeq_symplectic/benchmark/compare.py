"""Error, memory, time and field evaluations of the ways to differentiate one and the same problem."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.contender import BACKPROPAGATION, Contender
from torchdiffeq_symplectic.benchmark.memory import peak_bytes
from torchdiffeq_symplectic.benchmark.problem import Problem, Solver, State, flatten, gradient
from torchdiffeq_symplectic.benchmark.reference import Measure, Reference

__all__ = ["BudgetError", "Counter", "Row", "compare"]


@dataclass(frozen=True)
class Row:
    """What :func:`compare` found for one contender; None is what was not measured.

    Times are medians over rounds in which the contenders take turns, ratios those of the two times in one round.
    Evaluations are calls of a field.

    Attributes:
        contender: its name.
        gradient_error: ‖g - g*‖ / ‖g*‖ over y0 and all parameters, g* in float64 by backpropagation on the same steps.
        peak_bytes: most bytes alive at once during forward and backward, above those alive before.
        seconds: of forward and backward.
        relative_time: ``seconds`` over those of backpropagation.
        relative_time_low: the first quartile of that ratio over the rounds; the ratio itself of two rounds or less.
        relative_time_high: the third quartile, likewise.
        relative_forward: time of the forward pass over that of backpropagation's.
        relative_backward: time of the backward pass over that of backpropagation's.
        forward_evaluations: those until the solution is there.
        backward_evaluations: those from there to the gradient.
        steps: accepted steps of the forward pass.
        note: why there are no figures, else empty.
    """

    contender: str
    gradient_error: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    relative_time: float | None = None
    relative_time_low: float | None = None
    relative_time_high: float | None = None
    relative_forward: float | None = None
    relative_backward: float | None = None
    forward_evaluations: int | None = None
    backward_evaluations: int | None = None
    steps: int | None = None
    note: str = ""

    @classmethod
    def columns(cls) -> list[str]:
        """Names of the attributes, in their order."""
        return [field.name for field in fields(cls)]


def compare(
    problem: Problem,
    contenders: Sequence[Contender],
    repeats: int = 5,
    budget: int | None = None,
    tell: Callable[[str], object] = lambda doing: None,
) -> list[Row]:
    """Measure ``contenders`` side by side on ``problem``.

    Args:
        problem: what is solved and differentiated; its field must give the same slope at each call.
        contenders: one of them must be named "backpropagation", whose time the others' are divided by.
        repeats: rounds of timing after one to warm up. The contenders take turns in each, so that a machine that slows
            down slows all of them.
        budget: a contender that has evaluated the field more often than that is stopped, and its row says so.
        tell: is told what is being done.

    Returns:
        A row for each contender, in their order.

    Raises:
        ValueError: if ``repeats`` is less than one, or none of ``contenders`` is backpropagation.
        RuntimeError: if the field's slopes are not reproducible (see :func:`reference`).
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    if BACKPROPAGATION not in [contender.name for contender in contenders]:
        raise ValueError(f"contenders must have one named {BACKPROPAGATION!r}: times are relative to its own")
    references: dict[Measure, Reference] = {}
    found: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        tell(contender.name)
        found[contender.name] = _try(problem, contender, references, budget)
    ran = [contender for contender in contenders if not found[contender.name].get("note")]
    for name, times in _time_in_turn(problem, ran, repeats, tell).items():
        found[name].update(times)
    for contender in ran:
        tell(f"memory of {contender.name}")
        run = partial(problem.gradient, contender.solve)
        found[contender.name]["peak_bytes"] = peak_bytes(run, problem.t.device)
    return [Row(contender.name, **found[contender.name]) for contender in contenders]


def _try(
    problem: Problem, contender: Contender, references: dict[Measure, Reference], budget: int | None
) -> dict[str, Any]:
    """Whether ``contender`` solves ``problem``; if so its gradient's error, evaluations and steps."""
    reason = contender.refusal(problem)
    if reason is not None:
        return {"note": reason}
    counter = Counter(budget)
    try:
        loss = problem.loss(problem.solve(counter.around(contender.solve)))
        forward = counter.evaluations
        found = flatten(gradient(loss, problem.leaves))
        if contender.reference not in references:
            references[contender.reference] = contender.reference(problem)
    except BudgetError:
        return {"note": f"stopped after {budget} evaluations"}
    except Exception as error:
        if not contender.may_fail:
            raise
        return {"note": f"{type(error).__name__}: {error}".partition("\n")[0]}
    reference = references[contender.reference]
    return {
        "gradient_error": float((found - reference.gradient).norm() / reference.gradient.norm()),
        "forward_evaluations": forward,
        "backward_evaluations": counter.evaluations - forward,
        "steps": reference.steps,
    }


class BudgetError(Exception):
    """The field has been evaluated too often."""


class Counter:
    """How often the fields have been called.

    Args:
        budget: after so many calls :class:`BudgetError` is raised.
    """

    def __init__(self, budget: int | None) -> None:
        self.evaluations = 0
        self._budget = budget

    def count(self) -> None:
        """Count a call; BudgetError if it is one too many."""
        self.evaluations += 1
        if self._budget is not None and self.evaluations > self._budget:
            raise BudgetError

    def around(self, solver: Solver) -> Solver:
        """``solver``, given each field as one that counts."""

        def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
            return solver(_Counted(func, self.count), y0, t, **settings)

        return solve


class _Counted(nn.Module):
    """The field, which calls ``count`` first."""

    def __init__(self, field: nn.Module, count: Callable[[], None]) -> None:
        super().__init__()
        self.field = field
        self.count = count

    def forward(self, t: Tensor, y: State) -> State:
        self.count()
        slope: State = self.field(t, y)
        return slope


def _time_in_turn(
    problem: Problem, contenders: Sequence[Contender], repeats: int, tell: Callable[[str], object]
) -> dict[str, dict[str, float]]:
    """The times of each contender, as they stand in :class:`Row`.

    The order turns by one place from round to round, so that none is always behind the same other.
    """
    rounds: list[dict[str, tuple[float, float]]] = []
    with _garbage_collected_by_hand():
        for number in range(1 + repeats):
            tell(f"round {number} of {repeats}" if number else "warming up")
            place = number % len(contenders)
            times = {}
            for contender in (*contenders[place:], *contenders[:place]):
                gc.collect()
                times[contender.name] = _time(problem, contender)
            rounds.append(times)
    return {contender.name: _summary(rounds[1:], contender.name) for contender in contenders}


@contextmanager
def _garbage_collected_by_hand() -> Iterator[None]:
    """What one contender leaves behind is not cleared away in another's time.

    Whatever is there already is exempt from collection, which takes a while with many modules imported.
    """
    was_enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:  # by somebody else
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def _time(problem: Problem, contender: Contender) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass."""
    device = problem.t.device
    start = _now(device)
    loss = problem.loss(problem.solve(contender.solve))
    between = _now(device)
    gradient(loss, problem.leaves)
    return between - start, _now(device) - between


def _now(device: torch.device) -> float:
    """Seconds on a clock that only goes up, once ``device`` has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _summary(rounds: Sequence[dict[str, tuple[float, float]]], name: str) -> dict[str, float]:
    pairs = [(each[name], each[BACKPROPAGATION]) for each in rounds]
    ratios = [sum(own) / sum(base) for own, base in pairs]
    median = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 2 else (median,) * 3
    return {
        "seconds": statistics.median(sum(own) for own, _ in pairs),
        "relative_time": median,
        "relative_time_low": low,
        "relative_time_high": high,
        "relative_forward": statistics.median(own[0] / base[0] for own, base in pairs),
        "relative_backward": statistics.median(own[1] / base[1] for own, base in pairs),
    }
