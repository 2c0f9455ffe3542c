"""What the studies share: weights that are smooth in depth, rows with named columns, slopes, curves."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = [
    # weights
    "TanhBlock",
    "smooth",
    "tanh_blocks",
    # rows
    "Sheet",
    "column",
    "slope",
    "sloped",
    "table",
    "write_csv",
    # pictures
    "SIZE",
    "curve",
    "depth_axis",
    # progress
    "Tell",
    "quiet",
]

SIZE = 7, 5  # inches of a picture
DASHES = ("-", "--", "-.", ":")

Tell: TypeAlias = Callable[[str, float], object]  # what is being done, and the fraction that is done


def quiet(doing: str, fraction: float) -> None:
    """Tell nobody."""


def smooth(depth: int, *shape: int, generator: torch.Generator) -> Tensor:
    """Values at n/N of a random function on [0, 1] that is smooth and is the same for every depth N.

        θ(s) = (c_0 + c_1 sin 2πs + c_2 cos 2πs) / √2,    c_k standard normal

    so each entry has mean 0 and variance 1 at each s.

    Args:
        depth: N.
        shape: of θ(s).
        generator: on the CPU; in the same state it gives the same function.

    Returns:
        float64 on the CPU, shape ``(N, *shape)``.
    """
    constant, sine, cosine = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    angle = (2 * math.pi / depth * torch.arange(depth, dtype=torch.float64)).reshape(depth, *[1] * len(shape))
    values: Tensor = (constant + sine * torch.sin(angle) + cosine * torch.cos(angle)) / math.sqrt(2)
    return values


class TanhBlock(nn.Module):
    """A bare residual function, f_n(x) = tanh(W_n x + b_n)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, shape ``(batch, width)``, in the same shape."""
        return torch.tanh(nn.functional.linear(x, self.weight, self.bias))


def tanh_blocks(depth: int, width: int, generator: torch.Generator) -> list[nn.Module]:
    """N residual functions of tanh whose weights are :func:`smooth` in depth, ‖W_n‖ of size one."""
    weights = smooth(depth, width, width, generator=generator) / math.sqrt(width)
    biases = smooth(depth, width, generator=generator)
    return [TanhBlock(weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def slope(depths: Sequence[int], values: Sequence[float]) -> float:
    """The exponent p of values ~ depths ** p: the slope of the line through their logarithms by least squares."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (depths, values))
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def sloped(label: str, depths: Sequence[int], values: Sequence[float]) -> str:
    """``label`` of a curve, with its :func:`slope` where there is more than one depth."""
    return f"{label}: slope {slope(depths, values):.2f}" if len(depths) > 1 else label


def column(title: str, form: str = "") -> Any:
    """A dataclass's field that is called ``title`` in files and tables, and is written as ``form`` in tables."""
    return dataclasses.field(metadata={"title": title, "form": form})


@dataclasses.dataclass(frozen=True)
class Sheet:
    """What a study found, or a part of it.

    Attributes:
        name: of its file, without the ending.
        title: of the table in the terminal.
        rows: instances of one dataclass whose fields are made by :func:`column`.
        shown: those that the terminal shows.
    """

    name: str
    title: str
    rows: Sequence[Any]
    shown: Sequence[Any]


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """A line for each row of a :class:`Sheet`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.metadata["title"] for field in dataclasses.fields(rows[0]))
        writer.writerows(dataclasses.astuple(row) for row in rows)


def table(rows: Sequence[Any], title: str) -> Table:
    """Rows of a :class:`Sheet` for the terminal; needs rich."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=title)
    fields = dataclasses.fields(rows[0])
    for field in fields:
        text = isinstance(getattr(rows[0], field.name), str)
        heading = Text(field.metadata["title"])  # no markup: units stand in brackets
        result.add_column(heading, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        result.add_row(*(format(getattr(row, field.name), field.metadata["form"]) for field in fields))
    return result


def curve(
    axes: Axes, x: Sequence[float], y: Sequence[float], style: int, label: str | None = None, **changes: Any
) -> None:
    """A line with markers in the ``style``-th colour, marker and dash, so that it is known without colour, too."""
    from torchdiffeq_symplectic.benchmark.report import COLOURS, MARKERS

    place = style % len(COLOURS)
    look = {"color": COLOURS[place], "marker": MARKERS[place], "linestyle": DASHES[style % len(DASHES)]}
    axes.plot(x, y, label=label, **{**look, **changes})


def depth_axis(axes: Axes, depths: Sequence[int]) -> None:
    """A logarithmic axis of depth with a tick at each of ``depths``, and a light grid."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.set_xlabel("depth N [blocks]")
    axes.grid(alpha=0.3)
