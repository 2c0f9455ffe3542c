"""Error, memory, time and field evaluations of the ways to differentiate one and the same problem."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.contenders import BACKPROPAGATION, Contender
from torchdiffeq_symplectic.experiments.benchmark.problem import Problem, Solver, State, as_tuple, flatten, gradient
from torchdiffeq_symplectic.experiments.environment import ERRORS
from torchdiffeq_symplectic.experiments.memory import peak_bytes

__all__ = ["COLUMNS", "BudgetError", "Counter", "compare"]

COLUMNS = (
    "contender",
    "gradient_error",
    "peak_bytes",
    "seconds",
    "relative_time",
    "relative_time_low",
    "relative_time_high",
    "relative_forward",
    "relative_backward",
    "forward_evaluations",
    "backward_evaluations",
    "note",
)


def compare(
    problem: Problem,
    contenders: Sequence[Contender],
    repeats: int = 5,
    budget: int | None = None,
    rounding: bool = False,
    tell: Callable[[str], object] = lambda doing: None,
) -> pd.DataFrame:
    """Measure ``contenders`` side by side on ``problem``.

    Args:
        problem: what is solved and differentiated; its field must give the same slope at each call.
        contenders: one of them backpropagation, whose time the others' are divided by.
        repeats: rounds of timing after one to warm up; the contenders take turns in each.
        budget: a contender that evaluates the field more often than that is stopped, and its row says so.
        rounding: whether the error is that of a gradient in the problem's own dtype; else in float64.
        tell: is told what is being done.

    Returns:
        A row for each contender, NaN where it was not measured: ``gradient_error``, ‖g - g*‖ / ‖g*‖ over y0 and all
        parameters, g* in float64 by backpropagation through the contender's own solve, its accepted steps held
        constant; ``peak_bytes``, most alive at once above those alive before; ``seconds``, a median over the rounds;
        ``relative_time``, ``_forward`` and ``_backward``, medians of the ratio to backpropagation's in the same round,
        with quartiles; calls of a field in forward and backward; ``note``, why there are no figures.

    Raises:
        ValueError: if ``repeats`` is less than one, or none of ``contenders`` is backpropagation.
        RuntimeError: if the field's slopes are not reproducible.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    if BACKPROPAGATION not in [contender.name for contender in contenders]:
        raise ValueError(f"contenders must have one named {BACKPROPAGATION!r}: times are relative to its own")
    _require_reproducible(problem)
    found: dict[str, dict[str, Any]] = {}
    truths: dict[Solver, Tensor] = {}
    for contender in contenders:
        tell(contender.name)
        found[contender.name] = _try(problem, contender, truths, budget, rounding)
    ran = [contender for contender in contenders if not found[contender.name]["note"]]
    times = _time_in_turn(problem, ran, repeats, tell)
    for contender in ran:
        tell(f"memory of {contender.name}")
        run = partial(problem.gradient, contender.solve)
        found[contender.name] |= {"peak_bytes": peak_bytes(run, problem.t.device), **times[contender.name]}
    return pd.DataFrame([{"contender": name, **row} for name, row in found.items()]).reindex(columns=list(COLUMNS))


@torch.no_grad()
def _require_reproducible(problem: Problem) -> None:
    one, other = (flatten(as_tuple(problem.solve(torchdiffeq.odeint))) for _ in range(2))
    if not torch.equal(one, other):
        raise RuntimeError(
            "two solves of problem differ: problem.field must give the same slope for the same time and state, so fix "
            "its noise and switch dropout off"
        )


def _try(
    problem: Problem, contender: Contender, truths: dict[Solver, Tensor], budget: int | None, rounding: bool
) -> dict[str, Any]:
    """Whether ``contender`` solves ``problem``; if so its gradient's error and its evaluations."""
    reason = contender.refusal(problem)
    if reason is not None:
        return {"note": reason}
    counter = Counter(budget)
    try:
        loss = problem.loss(problem.solve(counter.around(contender.solve)))
        forward = counter.evaluations
        found = flatten(gradient(loss, problem.leaves))
        backward = counter.evaluations - forward
        exact = problem.to(torch.float64)
        if contender.truth not in truths:
            truths[contender.truth] = flatten(exact.gradient(Counter(budget).around(contender.truth)))
        if not rounding:
            found = flatten(exact.gradient(Counter(budget).around(contender.solve)))
    except BudgetError:
        return {"note": f"stopped after {budget} evaluations"}
    except ERRORS as error:
        if not contender.may_fail:
            raise
        return {"note": f"{type(error).__name__}: {error}".partition("\n")[0]}
    truth = truths[contender.truth]
    return {
        "gradient_error": float((found - truth).norm() / truth.norm()),
        "forward_evaluations": forward,
        "backward_evaluations": backward,
        "note": "",
    }


class BudgetError(Exception):
    """The field has been evaluated too often."""


class Counter:
    """How often the fields have been called; after ``budget`` calls :class:`BudgetError` is raised."""

    def __init__(self, budget: int | None) -> None:
        self.evaluations = 0
        self._budget = budget

    def count(self) -> None:
        """Count a call."""
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
) -> Mapping[str, Mapping[str, float]]:
    """The times of each contender by the names of their columns.

    The order turns by one place from round to round, so that none is always behind the same other.
    """
    rounds: list[dict[tuple[str, str], float]] = []
    with _garbage_collected_by_hand():
        for number in range(1 + repeats):
            tell(f"round {number} of {repeats}" if number else "warming up")
            place = number % len(contenders)
            rounds.append({})
            for contender in (*contenders[place:], *contenders[:place]):
                gc.collect()
                for part, seconds in zip(("forward", "backward"), _time(problem, contender), strict=True):
                    rounds[-1][part, contender.name] = seconds
    times = pd.DataFrame(rounds[1:])  # a row for each round, a column for each part and contender
    times.columns = pd.MultiIndex.from_tuples(times.columns)
    both = times["forward"] + times["backward"]
    ratio = both.div(both[BACKPROPAGATION], axis=0)
    columns = {"seconds": both.median(), "relative_time": ratio.median()}
    columns |= {"relative_time_low": ratio.quantile(0.25), "relative_time_high": ratio.quantile(0.75)}
    for part in ("forward", "backward"):
        columns[f"relative_{part}"] = times[part].div(times[part][BACKPROPAGATION], axis=0).median()
    summary: Mapping[str, Mapping[str, float]] = pd.DataFrame(columns).to_dict(orient="index")
    return summary


@contextmanager
def _garbage_collected_by_hand() -> Iterator[None]:
    """What one contender leaves behind is not cleared away in another's time; what is there already is exempt."""
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
    start = _now(problem.t.device)
    loss = problem.loss(problem.solve(contender.solve))
    between = _now(problem.t.device)
    gradient(loss, problem.leaves)
    return between - start, _now(problem.t.device) - between


def _now(device: torch.device) -> float:
    """Seconds on a clock that only goes up, once ``device`` has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
