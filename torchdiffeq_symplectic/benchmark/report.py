"""What was found as tables, files and pictures. Needs the extra ``benchmark``."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from torchdiffeq_symplectic.benchmark.compare import Row
from torchdiffeq_symplectic.benchmark.contenders import is_own
from torchdiffeq_symplectic.benchmark.memory import MIB
from torchdiffeq_symplectic.benchmark.results import Measured
from torchdiffeq_symplectic.benchmark.series import Axis, Series

__all__ = ["COLOURS", "MARKERS", "draw", "plot", "table", "write_cases", "write_csv"]

# Okabe and Ito's palette, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/), and as many markers.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("s", "X", "^", "v", "o", "D")
DASHES = ("-", "--", ":", "-.")  # one for each six contenders
LABELS = {
    "gradient_error": "relative error of the gradient",
    "peak_bytes": "peak memory [MiB]",
    "relative_time": "time over that of backpropagation",
}


def table(rows: Sequence[Row], title: str = "One gradient, the same accepted steps") -> Table:
    """A table for the terminal. Evaluations are those of forward and backward pass."""
    result = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    result.caption_justify = "left"
    result.add_column("gradient by", min_width=18, overflow="fold")
    for heading in ("relative\nerror", "memory\n[MiB]", "relative\ntime", "quartiles", "evaluations", "steps"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if not row.note:
            result.add_row(row.contender, *_cells(row))
    notes = dict.fromkeys(row.note for row in rows if row.note)
    noted = ["; ".join(row.contender for row in rows if row.note == note) + f": {note}" for note in notes]
    result.caption = "\n".join(noted) or None
    return result


def _cells(row: Row) -> list[str]:
    return [
        f"{row.gradient_error:.1e}",
        f"{(row.peak_bytes or 0) / MIB:.2f}",
        f"{row.relative_time:.2f}",
        f"{row.relative_time_low:.2f}-{row.relative_time_high:.2f}",
        f"{row.forward_evaluations}+{row.backward_evaluations}",
        str(row.steps),
    ]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for each row; the columns are named as :class:`Row`'s attributes."""
    _write(path, Row.columns(), map(dataclasses.asdict, rows))


def write_cases(cases: Sequence[Measured], path: Path) -> None:
    """A line for each row of each case: the case and its value, then as :func:`write_csv`."""
    lines = ({"case": case.case, "value": case.value, **dataclasses.asdict(row)} for case in cases for row in case.rows)
    _write(path, ["case", "value", *Row.columns()], lines)


def _write(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)


def plot(rows: Sequence[Row], axes: Axes) -> None:
    """Gradient error, logarithmic, over peak memory, with a marker for each row. The best place is the lower left."""
    for row, marker, colour in zip(rows, cycle(MARKERS), cycle(COLOURS), strict=False):
        if row.peak_bytes is None or not row.gradient_error:
            continue
        axes.semilogy(
            row.peak_bytes / MIB,
            row.gradient_error,
            linestyle="none",
            marker=marker,
            markersize=10,
            markeredgewidth=2,
            fillstyle="none",  # where two rows agree, both markers show
            color=colour,
            label=row.contender,
        )
    axes.set_xlim(left=0)
    axes.set(xlabel=LABELS["peak_bytes"], ylabel=LABELS["gradient_error"])
    axes.grid(alpha=0.3)
    axes.legend()


def draw(series: Series, cases: Sequence[Measured], path: Path) -> None:
    """A picture of ``cases``: curves along the series' axis, or bars for each case where it has none."""
    if series.axis:
        groups = [[case for case in cases if case.panel == panel] for panel in dict.fromkeys(c.panel for c in cases)]
        figure, grid = _grid(len(series.shows), len(groups), 4.5, 3.4)
        for row, quantity in zip(grid, series.shows, strict=True):
            for axes, group in zip(row, groups, strict=True):
                _curves(series.axis, group, quantity, axes)
                axes.set_title(group[0].panel)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    else:
        figure, grid = _grid(len(cases), len(series.shows), 4.5, 4.0)
        for row, case in zip(grid, cases, strict=True):
            for axes, quantity in zip(row, series.shows, strict=True):
                _bars(case, quantity, axes)
                axes.set_title(case.case, fontsize="medium")
    figure.suptitle(series.title, x=0.01, horizontalalignment="left")
    figure.savefig(path, dpi=100)


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of axes that are ``width`` by ``height`` inches large, with space for a legend."""
    figure = Figure(figsize=(width * columns + 2.5, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in grid]


def _curves(axis: Axis, cases: Sequence[Measured], quantity: str, axes: Axes) -> None:
    for style, contender in enumerate(dict.fromkeys(row.contender for case in cases for row in case.rows)):
        points = [(case.value, _value(case.of(contender), quantity)) for case in cases]
        drawn = [(x, y) for x, y in points if x is not None and y is not None]
        if drawn:
            axes.loglog(
                *zip(*drawn, strict=True),
                color=COLOURS[style % len(COLOURS)],
                marker=MARKERS[style % len(MARKERS)],
                linestyle=DASHES[style // len(COLOURS) % len(DASHES)],
                fillstyle="none",
                label=contender,
            )
    axes.set(xlabel=axis.label, ylabel=LABELS[quantity])
    axes.grid(alpha=0.3)
    if axis.falling:
        axes.invert_xaxis()


def _bars(case: Measured, quantity: str, axes: Axes) -> None:
    """A bar for each contender, in another colour if it is one of this package's modes; logarithmic."""
    found = [(row.contender, _value(case.of(row.contender), quantity)) for row in case.rows]
    drawn = [(name, value) for name, value in found if value is not None]
    colours = [COLOURS[1] if is_own(name) else COLOURS[2] for name, _ in drawn]
    axes.barh([name for name, _ in drawn], [value for _, value in drawn], color=colours)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.grid(alpha=0.3, axis="x", which="both")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize="small")
    axes.set_xlabel(LABELS[quantity])


def _value(row: Row | None, quantity: str) -> float | None:
    if row is None:
        return None
    value = float(getattr(row, quantity))
    if quantity == "peak_bytes":
        value /= MIB
    return value if value > 0 and math.isfinite(value) else None  # the axes are logarithmic
