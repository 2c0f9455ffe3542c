"""Measuring series of problems, one case after the other; each is kept as soon as it is there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from torchdiffeq_symplectic.experiments.benchmark import publication
from torchdiffeq_symplectic.experiments.benchmark.compare import compare
from torchdiffeq_symplectic.experiments.benchmark.contenders import Contender
from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Series
from torchdiffeq_symplectic.experiments.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.experiments.benchmark.results import OtherRunError, Results, Settings

__all__ = ["FILE", "run"]

FILE = "benchmark.json"


def run(
    series: Sequence[Series],
    contenders: Sequence[Contender],
    settings: Settings,
    out: Path,
    fresh: bool = False,
    readme: Path | None = None,
) -> bool:
    """Measure what is missing, then show and write all that was found.

    Args:
        series: what is measured.
        contenders: by what; one of them backpropagation.
        settings: of the run, those of this process.
        out: the directory for ``benchmark.json``, ``benchmark.md``, and a CSV file and a picture for each series.
        fresh: whether ``series`` are measured again; figures of other settings are dropped.
        readme: a file that the results are put into, too, once all are there.

    Returns:
        Whether it came to the end before somebody interrupted.

    Raises:
        OtherRunError: if ``out`` has figures of other settings.
    """
    results = _results(out / FILE, settings, [one.name for one in series] if fresh else [])
    console = Console()
    names = [contender.name for contender in contenders]
    cases = [(one, case) for one in series for case in one.cases if not results.has(one.name, case.label, names)]
    for (problem, case), rows in results.frame.groupby(["problem", "case"], sort=False):
        console.print(publication.table(rows, f"{problem}: {case}"))
    finished = False
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress, contextlib.suppress(KeyboardInterrupt):
        task = progress.add_task("", total=len(cases))
        for one, case in cases:
            rows = compare(
                case.build(settings.seed).to(settings.device),
                [_in(case, contender) for contender in contenders],
                settings.repeats,
                one.budget,
                one.rounding,
                lambda doing, at=f"{one.name}: {case.label}": progress.update(task, description=f"{at}, {doing}"),  # type: ignore[misc]
            )
            results.add(one.name, case.label, case.value, case.panel, rows)
            out.mkdir(parents=True, exist_ok=True)
            results.save(out / FILE)
            progress.update(task, advance=1)
            console.print(publication.table(rows, f"{one.name}: {case.label}"))
        finished = True
    _write(results, out, console)
    if readme is not None and finished:
        publication.update(readme, results)
    if not finished:
        console.print("Interrupted: what was measured is kept. The same command goes on from here.", style="yellow")
    return finished


def _results(path: Path, settings: Settings, fresh: Sequence[str]) -> Results:
    """What is there, but for the series that are to be measured again."""
    try:
        results = Results.resume(path, settings)
    except OtherRunError:
        if not fresh:
            raise
        return Results(settings)
    results.frame = results.frame[~results.frame["problem"].isin(fresh)]
    return results


def _in(case: Case, contender: Contender) -> Contender:
    """``contender``, which refuses ``case`` if it is to be left out there."""
    reason = case.without.get(contender.name)
    return contender if reason is None else replace(contender, refusal=lambda problem: reason)


def _write(results: Results, out: Path, console: Console) -> None:
    """A CSV file and a picture for each series, and all tables as Markdown."""
    for name in results.problems:
        results.of(name).drop(columns="problem").to_csv(out / f"{name}.csv", index=False)
        publication.draw(PROBLEMS[name], results.of(name), out / f"{name}.png")
    front = results.of(*publication.OVERVIEW)
    if len(front):
        publication.overview(front, out / "overview.png")
    if results.problems:
        (out / "benchmark.md").write_text(publication.report(results), encoding="utf-8")
        files = ", ".join(f"{name}.csv, {name}.png" for name in results.problems)
        console.print(f"{out} has {FILE}, benchmark.md, {files}", markup=False, highlight=False)
