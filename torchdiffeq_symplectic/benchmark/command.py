"""The command ``benchmark``: its arguments, and what it does. Needs the extra ``benchmark`` to run."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from torchdiffeq_symplectic.benchmark.contender import BACKPROPAGATION, Contender
from torchdiffeq_symplectic.benchmark.contenders import installed
from torchdiffeq_symplectic.benchmark.markdown import report, update
from torchdiffeq_symplectic.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.benchmark.results import Measured, OtherRunError, Results, Settings
from torchdiffeq_symplectic.benchmark.run import missing, run
from torchdiffeq_symplectic.benchmark.series import Series

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FILE", "add_arguments", "benchmark"]

FILE = "benchmark.json"
INTERRUPTED = 130  # the exit status that shells give to what Ctrl-C ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments, all but ``--device``, ``--seed`` and ``--out``."""
    parser.add_argument(
        "problems",
        nargs="*",
        metavar="PROBLEM",
        help=f"what is measured, of {', '.join(PROBLEMS)} (default: all)",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        metavar="MODE",
        help="contenders, by the names of the table, beside backpropagation (default: all; those of torchdyn and of "
        "peers if they are installed)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="measure anew what is there already; figures of other settings are dropped"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="write the results into FILE, too, between the lines <!-- benchmark --> and <!-- /benchmark -->",
    )


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure what is missing, show and write all that was found, and return the exit status."""
    from rich.console import Console

    series = _series(arguments)
    chosen = _contenders(arguments)
    settings = Settings.here(arguments.device, arguments.repeats, arguments.seed)
    path = arguments.out / FILE
    try:
        results = _results(path, settings, [one.name for one in series] if arguments.fresh else [])
    except OtherRunError as error:
        arguments.parser.error(f"argument --out: {error}; give another directory, or --fresh to measure anew")
    console = Console()
    finished = _measure(series, chosen, results, path, console)
    _write(results, arguments.out, console)
    if arguments.readme is not None and finished:
        try:
            update(arguments.readme, results)
        except (OSError, ValueError) as error:
            arguments.parser.error(f"argument --readme: {error}")
    if not finished:
        console.print("Interrupted: what was measured is kept. The same command goes on from here.", style="yellow")
    return 0 if finished else INTERRUPTED


def _results(path: Path, settings: Settings, fresh: list[str]) -> Results:
    """What is there, but for the series that are to be measured anew."""
    try:
        results = Results.resume(path, settings)
    except OtherRunError:
        if not fresh:
            raise
        return Results(settings)
    for name in fresh:
        results.drop(name)
    return results


def _series(arguments: argparse.Namespace) -> list[Series]:
    unknown = [name for name in arguments.problems if name not in PROBLEMS]
    if unknown:
        arguments.parser.error(f"argument PROBLEM: {unknown[0]!r} is not one of {', '.join(PROBLEMS)}")
    return [series for name, series in PROBLEMS.items() if name in (arguments.problems or PROBLEMS)]


def _contenders(arguments: argparse.Namespace) -> list[Contender]:
    there = installed()
    wanted = arguments.modes or [contender.name for contender in there]
    unknown = [name for name in wanted if name not in [contender.name for contender in there]]
    if unknown:
        names = ", ".join(f'"{contender.name}"' for contender in there)
        arguments.parser.error(f"argument --modes: {unknown[0]!r} is not one of those that are installed: {names}")
    return [contender for contender in there if contender.name in (*wanted, BACKPROPAGATION)]


def _measure(series: list[Series], chosen: list[Contender], results: Results, path: Path, console: Console) -> bool:
    """Measure, save and print each case that is missing; whether it was done before somebody interrupted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from torchdiffeq_symplectic.benchmark.report import table

    def show(measured: Measured) -> None:
        console.print(table(measured.rows, f"{measured.problem}: {measured.case}"))

    for name in results.problems:
        for measured in results.of(name):
            show(measured)
    cases = missing(series, chosen, results)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress, contextlib.suppress(KeyboardInterrupt):
        task = progress.add_task("", total=len(cases))

        def done(measured: Measured) -> None:
            results.save(path)
            progress.update(task, advance=1)
            show(measured)

        run(cases, chosen, results, done, lambda doing: progress.update(task, description=doing))
        progress.update(task, description="")
        return True
    return False


def _write(results: Results, out: Path, console: Console) -> None:
    """A CSV file and a picture for each series, and all tables as Markdown."""
    from torchdiffeq_symplectic.benchmark.report import draw, write_cases

    for name in results.problems:
        write_cases(results.of(name), out / f"{name}.csv")
        draw(PROBLEMS[name], results.of(name), out / f"{name}.png")
    if results.problems:
        (out / "benchmark.md").write_text(report(results), encoding="utf-8")
        files = ", ".join(f"{name}.csv, {name}.png" for name in results.problems)
        console.print(f"{out} has {FILE}, benchmark.md, {files}", markup=False, highlight=False)
