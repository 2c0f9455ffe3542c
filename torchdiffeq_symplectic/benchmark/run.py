"""Measuring series of problems, one case after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torchdiffeq_symplectic.benchmark.compare import compare
from torchdiffeq_symplectic.benchmark.contender import Contender
from torchdiffeq_symplectic.benchmark.results import Measured, Results
from torchdiffeq_symplectic.benchmark.series import Case, Series

__all__ = ["missing", "run"]


def missing(series: Sequence[Series], contenders: Sequence[Contender], results: Results) -> list[tuple[Series, Case]]:
    """The cases of ``series`` that ``results`` do not have with all of ``contenders``."""
    names = [contender.name for contender in contenders]
    return [(one, case) for one in series for case in one.cases if not results.has(one.name, case.label, names)]


def run(
    cases: Sequence[tuple[Series, Case]],
    contenders: Sequence[Contender],
    results: Results,
    done: Callable[[Measured], object],
    tell: Callable[[str], object] = lambda doing: None,
) -> None:
    """Measure ``cases`` under the settings of ``results``, which take each of them in.

    Args:
        cases: with the series that they belong to.
        contenders: one of them backpropagation.
        results: what is there already.
        done: is called with each case, once results have it.
        tell: is told what is being done.
    """
    settings = results.settings
    for series, case in cases:
        problem = case.build(settings.seed).to(settings.device)
        rows = compare(
            problem,
            [_in(case, contender) for contender in contenders],
            settings.repeats,
            series.budget,
            lambda doing, at=f"{series.name}: {case.label}": tell(f"{at}, {doing}"),  # type: ignore[misc]
        )
        measured = Measured(series.name, case.label, case.value, case.panel, tuple(rows))
        results.add(measured)
        done(measured)


def _in(case: Case, contender: Contender) -> Contender:
    """``contender``, which refuses ``case`` if it is to be left out there."""
    reason = case.without.get(contender.name)
    return contender if reason is None else dataclasses.replace(contender, refusal=lambda problem: reason)
