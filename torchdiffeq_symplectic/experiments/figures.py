"""One look for all pictures: each way to a gradient has its own colour and marker, and `symplectic` stands out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from torchdiffeq_symplectic.experiments.memory import MIB

__all__ = [
    "FLOOR",
    "LABELS",
    "STYLES",
    "curves",
    "depth_axis",
    "dots",
    "grid",
    "logarithmic",
    "save",
    "style_of",
    "values_of",
]

FLOOR = 1e-17  # where an error of exactly zero is drawn
LABELS = {
    "gradient_error": f"relative error of the gradient (0 at {FLOOR:.0e})",
    "peak_bytes": "peak memory [MiB]",
    "relative_time": "time over that of backpropagation",
}

# Okabe and Ito's colours, which the colour-blind tell apart (https://jfly.uni-koeln.de/color/); colour and marker.
_RED, _ORANGE, _YELLOW, _GREEN, _SKY, _BLUE, _PURPLE = sns.color_palette(
    ["#D55E00", "#E69F00", "#C9B800", "#009E73", "#56B4E9", "#0072B2", "#CC79A7"]
)
STYLES: dict[str, tuple[Any, str]] = {
    "backpropagation": ("black", "s"),
    "adjoint": (_BLUE, "v"),
    "adjoint, tight": (_BLUE, "^"),
    "adjoint, seminorm": (_SKY, "v"),
    "checkpoint": ("0.55", "P"),
    "baseline": (_YELLOW, "X"),
    "aca": (_GREEN, "D"),
    "symplectic": (_RED, "o"),
    "symplectic, stages": (_ORANGE, "o"),
    "memory_free": (_PURPLE, "*"),
    "autograd": ("black", "s"),
    "interpolated_adjoint": (_SKY, "<"),
    "torch_symplectic_adjoint": (_ORANGE, "d"),
    "zuko": (_PURPLE, "p"),
    "TorchDiffEqPack, ACA": (_GREEN, "h"),
    "TorchDiffEqPack, MALI": ("0.55", "H"),
}


def style_of(contender: str) -> dict[str, Any]:
    """Its colour and marker, as matplotlib's keywords; dashed in torchdyn, and `symplectic` fat and full."""
    colour, marker = STYLES[contender.removeprefix("torchdyn, ")]
    own = contender == "symplectic"
    return {
        "color": colour,
        "marker": marker,
        "linestyle": "--" if contender.startswith("torchdyn") else "-",
        "linewidth": 2.5 if own else 1.2,
        "fillstyle": "full" if own else "none",
        "zorder": 3 if own else 2,
    }


def grid(rows: int, columns: int, width: float = 4.5, height: float = 3.4) -> tuple[Figure, list[list[Axes]]]:
    """A figure of axes that are ``width`` by ``height`` inches large, with space for a legend beside them."""
    figure = Figure(figsize=(width * columns + 2.5, height * rows), layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def values_of(frame: pd.DataFrame, quantity: str) -> pd.Series[float]:
    """A column in the unit of its label; zeros at `FLOOR`, as a logarithmic axis has no place for them."""
    values = frame[quantity] / MIB if quantity == "peak_bytes" else frame[quantity]
    return values.replace(0.0, FLOOR).replace([np.inf, -np.inf], np.nan)


def curves(frame: pd.DataFrame, quantity: str, axes: Axes, label: str) -> None:
    """``quantity`` over the column "value", both logarithmic, a curve for each contender."""
    drawn = frame.assign(y=values_of(frame, quantity)).dropna(subset=["y"])
    for contender, of in drawn.groupby("contender", sort=False):
        axes.loglog(of["value"], of["y"], label=contender, **style_of(contender))
    logarithmic(axes.yaxis, quantity)
    axes.set(xlabel=label, ylabel=LABELS[quantity])
    axes.grid(alpha=0.3)


def logarithmic(axis: Axis, quantity: str) -> None:
    """Ticks that do not overprint each other, on an axis that is logarithmic already."""
    axis.set_minor_formatter(NullFormatter())
    if quantity != "gradient_error":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if quantity == "peak_bytes" else (1, 1.5, 2, 3, 5)))
        axis.set_major_formatter("{x:g}")


def dots(frame: pd.DataFrame, quantity: str, axes: Axes) -> None:
    """A dot for each contender, logarithmic: a bar would need a zero to start from."""
    of = frame.assign(y=values_of(frame, quantity)).dropna(subset=["y"])
    names = list(of["contender"])
    palette = {name: style_of(name)["color"] for name in names}
    sns.stripplot(
        of, x="y", y="contender", hue="contender", palette=palette, size=8, jitter=False, legend=False, ax=axes
    )
    axes.set_xscale("log")
    logarithmic(axes.xaxis, quantity)
    axes.set(xlabel=LABELS[quantity], ylabel="")
    axes.grid(alpha=0.3)
    axes.tick_params(axis="y", labelsize="small")
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() == "symplectic" else "normal")


def depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    """A logarithmic axis of depth with a tick at each of ``depths``, and a light grid."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(depths), [str(depth) for depth in depths])
    axes.set_xlabel("depth N [blocks]")
    axes.grid(alpha=0.3)


def save(figure: Figure, path: Path, legend: bool = True) -> None:
    """Write ``figure``, with one legend of every curve that is in any of its axes."""
    if legend:
        found = [axes.get_legend_handles_labels() for axes in figure.axes]
        entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
        if entries:
            figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)
