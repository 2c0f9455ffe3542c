"""The picture of an equivalence report. Needs matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchdiffeq_symplectic.benchmark.report import COLOURS, MARKERS

if TYPE_CHECKING:
    from torchdiffeq_symplectic.resnet.report import EquivalenceReport

__all__ = ["draw"]

_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKED = 12  # points of a line that have a marker


def draw(report: EquivalenceReport, path: str | Path) -> None:
    """Distance and bound, weights, and errors of the memory-free gradient over depth, side by side."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_distance(report, left)
    _draw_weights(report, middle)
    _draw_gradients(report, right)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(-0.02, 1.02)
        if axes.lines:
            columns = 2 if len(axes.lines) > 2 else 1
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False)
    figure.suptitle(f"{report.blocks} blocks: {report.verdict}")
    figure.savefig(path, dpi=150)


def _draw_distance(report: EquivalenceReport, axes: Axes) -> None:
    depths = [n / report.blocks for n in range(1, report.blocks + 1)]  # at 0, both are zero
    _line(axes, depths, report.distance[1:], 0, "distance ‖x_n - x(n/N)‖")
    _line(axes, depths, report.bound[1:], 1, "bound, Proposition 1")
    axes.set_yscale("log")
    axes.set(xlabel="depth n/N", ylabel="Euclidean norm over the batch", title="Network and ODE")


def _draw_weights(report: EquivalenceReport, axes: Axes) -> None:
    axes.set(xlabel="depth n/N", ylabel="entry that varies most", title="Weights")
    if report.smoothness is None or not report.weights:
        reason = report.smoothness_reason or "blocks have no parameters"
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, textwrap.fill(reason, 40), ha="center", va="center", transform=axes.transAxes)
        return
    depths = [n / report.blocks for n in range(report.blocks)]
    for style, (name, values) in enumerate(report.weights.items()):
        _line(axes, depths, values, style, name)


def _draw_gradients(report: EquivalenceReport, axes: Axes) -> None:
    axes.set(xlabel="depth n/N of the block", ylabel="relative error", title="Memory-free gradient")
    depths = [n / report.blocks for n in range(report.blocks)]
    for style, (method, found) in enumerate(report.memory_free_error.items()):
        cosine = "none" if found.cosine is None else f"{found.cosine:.4f}"
        label = f"{method}: {found.relative:.1e} in all, cosine {cosine}"
        values = found.by_block or [found.relative] * report.blocks
        _line(axes, depths, values, style, label)
    axes.set_yscale("log")


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], style: int, label: str) -> None:
    """The finite values as a line that is known by its colour, and without it by its dashes and its marker."""
    every = max(1, len(x) // _MARKED)
    finite = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    axes.plot(
        [a for a, _ in finite],
        [b for _, b in finite],
        color=COLOURS[style % len(COLOURS)],
        linestyle=_DASHES[style % len(_DASHES)],
        marker=MARKERS[style % len(MARKERS)],
        fillstyle="none",
        markevery=(style % min(3, every), every),  # not all at the same place
        label=label,
    )
