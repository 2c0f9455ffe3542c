"""What the studies share: exponents, curves, progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic.experiments.figures import depth_axis

__all__ = ["METHODS", "Device", "Study", "Tell", "curves", "quiet", "slope"]

METHODS = {name: title for name, title in {"euler": "Euler", "heun2": "Heun"}.items() if name in SOLVERS}

Device: TypeAlias = torch.device | str
Tell: TypeAlias = Callable[[str, float], object]  # what is being done, and the fraction that is done


@dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
        run: computes what it finds, name of the file -> data; its keyword ``tell`` is told of progress.
        summary: sentences about that.
        draw: its picture.
        title: of the table in the terminal.
        size: of the picture in inches.
        shown: the rows that the terminal shows.
    """

    run: Callable[..., dict[str, pd.DataFrame]]
    summary: Callable[[dict[str, pd.DataFrame]], list[str]]
    draw: Callable[[dict[str, pd.DataFrame], Figure], None]
    title: str
    size: tuple[float, float] = (7.0, 5.0)
    shown: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame


def quiet(doing: str, fraction: float) -> None:
    """Tell nobody."""


def slope(depths: Sequence[float] | pd.Series[Any], values: Sequence[float] | pd.Series[Any]) -> float:
    """The exponent p of values ~ depths ** p: the slope of the line through their logarithms by least squares."""
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0])


def curves(axes: Axes, frame: pd.DataFrame, quantity: str, kind: str, slopes: bool = False) -> None:
    """``quantity`` over "depth", both logarithmic: a curve for each ``kind``, with its exponent where ``slopes``."""
    names = {}
    for name, of in frame.groupby(kind, sort=False):
        sloped = slopes and len(of) > 1
        names[name] = f"{name}: slope {slope(of['depth'], of[quantity]):.2f}" if sloped else str(name)
    labelled = frame.assign(label=frame[kind].map(names))
    sns.lineplot(
        labelled, x="depth", y=quantity, hue="label", style="label", markers=True, palette="colorblind", ax=axes
    )
    depth_axis(axes, sorted(frame["depth"].unique()))
    axes.set_yscale("log")
    axes.legend(title=None)
