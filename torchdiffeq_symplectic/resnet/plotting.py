"""The picture of an equivalence report. Needs the extra ``cli``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from torchdiffeq_symplectic.resnet.report import EquivalenceReport

__all__ = ["draw"]


def draw(report: EquivalenceReport, path: str | Path) -> None:
    """Distance and bound, weights, and errors of the memory-free gradient over depth, side by side."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    depths = [n / report.blocks for n in range(report.blocks + 1)]
    both = {"distance ‖x_n - x(n/N)‖": report.distance[1:], "bound": report.bound[1:]}  # at 0, both are zero
    _curves(left, depths[1:], both, "depth n/N", "Euclidean norm over the batch", "Network and ODE")
    left.set_yscale("log")
    if report.weights and report.smoothness is not None:
        _curves(middle, depths[:-1], report.weights, "depth n/N", "entry that varies most", "Weights")
    else:
        reason = report.smoothness_reason or "blocks have no parameters"
        middle.set(xticks=[], yticks=[], xlabel="depth n/N", ylabel="entry that varies most", title="Weights")
        middle.text(0.5, 0.5, textwrap.fill(reason, 40), ha="center", va="center", transform=middle.transAxes)
    errors = {
        f"{method}: {found.relative:.1e} in all": found.by_block or [found.relative] * report.blocks
        for method, found in report.memory_free_error.items()
    }
    _curves(right, depths[:-1], errors, "depth n/N of the block", "relative error", "Memory-free gradient")
    right.set_yscale("log")
    figure.suptitle(f"{report.blocks} blocks: {report.verdict}")
    figure.savefig(path, dpi=150)


def _curves(
    axes: Axes, x: Sequence[float], values: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, title: str
) -> None:
    """The finite values as lines that differ in colour, dashes and marker."""
    frame = pd.DataFrame(values, index=pd.Index(x, name="x")).replace([np.inf, -np.inf], np.nan)
    every = max(1, len(x) // 12)
    sns.lineplot(frame, markers=True, palette="colorblind", markevery=every, ax=axes)
    axes.set(xlim=(-0.02, 1.02), xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
