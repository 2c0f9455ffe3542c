"""What :func:`compare` found as a table, a file and a plot. Needs the extra ``demo``."""

import csv
import dataclasses
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from rich.table import Table

from torchdiffeq_symplectic.benchmark.compare import Row

__all__ = ["COLOURS", "plot", "table", "write_csv"]

MIB = 2**20
# Okabe and Ito's palette, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/), and as many markers.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7")
MARKERS = ("s", "X", "^", "v", "o", "D")


def table(rows: Sequence[Row]) -> Table:
    """A table for the terminal."""
    result = Table(title="One gradient, the same accepted steps")
    result.add_column("gradient by", no_wrap=True)
    for heading in ("relative\nerror", "peak\nmemory", "relative\ntime", "forward\ncalls", "backward\ncalls"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.contender,
            f"{row.gradient_error:.1e}",
            f"{row.peak_bytes / MIB:.2f} MiB",
            f"{row.relative_time:.2f}",
            str(row.forward_evaluations),
            str(row.backward_evaluations),
        )
    return result


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for each row; the columns are named as :class:`Row`'s attributes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def plot(rows: Sequence[Row], axes: Axes) -> None:
    """Gradient error, logarithmic, over peak memory, with a marker for each row. The best place is the lower left."""
    for row, marker, colour in zip(rows, cycle(MARKERS), cycle(COLOURS), strict=False):
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
    axes.set(xlabel="peak memory of forward and backward [MiB]", ylabel="relative error of the gradient")
    axes.grid(alpha=0.3)
    axes.legend()
