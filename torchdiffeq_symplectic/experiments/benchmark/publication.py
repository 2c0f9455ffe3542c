"""What was found as tables and pictures: for the terminal, all of it as Markdown, and the summary of a README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd
from rich.table import Table

from torchdiffeq_symplectic.experiments.benchmark.contenders import BACKPROPAGATION, is_own
from torchdiffeq_symplectic.experiments.benchmark.problem import Series
from torchdiffeq_symplectic.experiments.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.experiments.benchmark.results import Results
from torchdiffeq_symplectic.experiments.figures import (
    LABELS,
    curves,
    dots,
    grid,
    logarithmic,
    save,
    style_of,
    values_of,
)
from torchdiffeq_symplectic.experiments.memory import MIB
from torchdiffeq_symplectic.experiments.tables import markdown, rich_table

__all__ = ["OVERVIEW", "draw", "has_place", "overview", "report", "section", "table", "update"]

OPENING, CLOSING = "<!-- benchmark -->", "<!-- /benchmark -->"
OVERVIEW = "steps", "100 steps"  # series and case of the front page's picture
SHOWN = {  # series and case -> what stands above its column in a README
    ("cnf", "breast cancer, 30 columns, M = 5"): "`cnf`, M = 5",
    ("kdv", "Korteweg-de Vries, dopri8"): "`kdv`",
    ("kdv", "Korteweg-de Vries, dopri8, 20 intervals"): "`kdv`, x 20",
    ("cahn-hilliard", "Cahn-Hilliard, dopri8"): "`cahn-hilliard`",
    ("cahn-hilliard", "Cahn-Hilliard, dopri8, 20 intervals"): "`cahn-hilliard`, x 20",
    ("steps", "100 steps"): "`steps`, 100",
    ("outputs", "2 outputs"): "`outputs`, 2",
    ("outputs", "20 outputs"): "`outputs`, 20",
    ("outputs", "500 outputs"): "`outputs`, 500",
    ("small", "1,600 weights, batch 32"): "`small`",
    ("resnet", "1024 blocks"): "`resnet`, 1024",
}


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The figures of one case as texts, those without any left out."""
    ran = rows[rows["note"] == ""]
    base = ran.loc[ran["contender"] == BACKPROPAGATION, "peak_bytes"].iloc[0]
    return pd.DataFrame(
        {
            "gradient by": ran["contender"],
            "error": ran["gradient_error"].map("{:.1e}".format),
            "memory [MiB]": (ran["peak_bytes"] / MIB).map("{:.2f}".format),
            "memory": (ran["peak_bytes"] / base).map("{:.2g}".format),
            "time": ran["relative_time"].map("{:.2f}".format),
            "quartiles": [
                f"{a:.2f}-{b:.2f}" for a, b in zip(ran["relative_time_low"], ran["relative_time_high"], strict=True)
            ],
            "forward": ran["relative_forward"].map("{:.2f}".format),
            "backward": ran["relative_backward"].map("{:.2f}".format),
            "evaluations": [
                f"{a:.0f}+{b:.0f}" for a, b in zip(ran["forward_evaluations"], ran["backward_evaluations"], strict=True)
            ],
        }
    )


def _notes(rows: pd.DataFrame) -> Iterator[str]:
    """Each reason for missing figures, with those it is given for."""
    for note, of in rows[rows["note"] != ""].groupby("note", sort=False):
        yield f"{'; '.join(of['contender'])}: {note}"


def table(rows: pd.DataFrame, title: str = "One gradient, the same accepted steps") -> Table:
    """The rows of one case for the terminal."""
    shown = _cells(rows).drop(columns=["memory", "quartiles", "forward", "backward"])
    return rich_table(shown, title, "\n".join(_notes(rows)) or None)


def report(results: Results) -> str:
    """All of it as Markdown: a table for each case, with everything but absolute times."""
    parts = ["# Benchmark", _conditions(results)]
    for name in results.problems:
        parts.append(f"## {name}: {PROBLEMS[name].title}")
        for case, rows in results.of(name).groupby("case", sort=False):
            notes = "\n".join(f"- {note}" for note in _notes(rows))
            parts += [f"### {case}", markdown(_cells(rows)), *([notes] if notes else [])]
    return "\n\n".join(parts) + "\n"


def section(results: Results) -> str:
    """The summary for a README: ratios to backpropagation on the cases of `SHOWN`, as far as they were measured."""
    frame = results.frame[results.frame["note"] == ""].copy()
    keys = pd.Series(list(zip(frame["problem"], frame["case"], strict=True)), index=frame.index)
    base = frame[frame["contender"] == BACKPROPAGATION].set_index(["problem", "case"])["peak_bytes"]
    memory = frame["peak_bytes"] / [base[key] for key in keys]
    frame["title"] = keys.map(SHOWN)
    frame["cost"] = [f"{time:.2f} / {size:.2g}" for time, size in zip(frame["relative_time"], memory, strict=True)]
    frame["error"] = frame["gradient_error"].map("{:.0e}".format)
    shown = frame[frame["title"].notna()]
    heading = "**Time / peak memory of forward and backward pass, over those of backpropagation**"
    parts = [_conditions(results), heading, _wide(shown, "cost")]
    parts += ["**Relative error of the gradient**", _wide(shown, "error")]
    tolerances = frame[frame["problem"] == "tolerance"]
    if len(tolerances):
        tolerances = tolerances.assign(title=tolerances["case"].str.replace(" rtol", ""))
        parts += ["**Error of the gradient over the tolerance** (`tolerance`)", _wide(tolerances, "error")]
    parts.append("\n".join(f"- {line}" for line in (*_gains(shown), *_losses(shown))))
    return "\n\n".join(parts)


def _wide(frame: pd.DataFrame, quantity: str) -> str:
    """A line for each contender, a column for each title."""
    cells = frame.pivot(index="contender", columns="title", values=quantity)
    cells = cells.reindex(index=frame["contender"].unique(), columns=frame["title"].unique()).reset_index()
    return markdown(cells.assign(contender=cells["contender"].map(_code)).rename(columns={"contender": ""}))


def _conditions(results: Results) -> str:
    settings = results.settings
    threads = "one thread" if settings.threads == 1 else f"{settings.threads} threads"
    on = f"{settings.processor}, {threads}" if settings.device == "cpu" else settings.processor
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    return (
        f"{on}; {versions}. Each case is one run: times are medians over {settings.repeats} rounds in which all "
        "contenders take turns; memory is counted exactly."
    )


def _gains(shown: pd.DataFrame) -> Iterable[str]:
    """What `symplectic` makes of the upstream adjoint's time."""
    seconds = shown.pivot(index="title", columns="contender", values="seconds").reindex(shown["title"].unique())
    if {"adjoint", "symplectic"} <= set(seconds):
        ratios = (seconds["adjoint"] / seconds["symplectic"]).dropna().map("1/{:.1f}".format)
        found = "; ".join(f"{title}: {ratio}" for title, ratio in ratios.items())
        yield f"Time of `symplectic` over that of the upstream adjoint: {found}."


def _losses(shown: pd.DataFrame) -> Iterable[str]:
    """Where another way than this package's is faster than all of its modes, or smaller."""
    for quantity, words in (("seconds", "Faster"), ("peak_bytes", "Smaller")):
        found = []
        for title, of in shown.groupby("title", sort=False):
            own = of["contender"].map(is_own)
            better = of[~own & (of[quantity] < of.loc[own, quantity].min())]["contender"]
            if len(better):
                found.append(f"{title}: {' · '.join(map(_code, better))}")
        if found:
            yield f"{words} than every mode of this package: {'; '.join(found)}."


def _code(contender: str) -> str:
    mode, comma, rest = contender.partition(",")
    return f"`{mode}`{comma}{rest}" if is_own(mode) else contender


def has_place(path: Path) -> bool:
    """Whether a file has the two comments between which the summary is put, in their order."""
    _, opening, rest = path.read_text(encoding="utf-8").partition(OPENING)
    return bool(opening) and CLOSING in rest


def update(path: Path, results: Results) -> None:
    """Put :func:`section` between the two comments in a file that :func:`has_place` for it."""
    before, _, rest = path.read_text(encoding="utf-8").partition(OPENING)
    after = rest.partition(CLOSING)[2]
    path.write_text(f"{before}{OPENING}\n\n{section(results)}\n\n{CLOSING}{after}", encoding="utf-8")


def draw(series: Series, frame: pd.DataFrame, path: Path) -> None:
    """A picture of the cases in ``frame``: curves along the series' axis, or dots for each case where it has none."""
    by = "panel" if series.axis else "case"
    panels = list(frame.groupby(by, sort=False))
    figure, axes = grid(len(panels), len(series.shows), height=3.4 if series.axis else 4.0)
    for row, (name, rows) in zip(axes, panels, strict=True):
        for place, quantity in zip(row, series.shows, strict=True):
            if series.axis:
                curves(rows, quantity, place, series.axis)
            else:
                dots(rows, quantity, place)
            place.set_title(name, fontsize="medium")
    figure.suptitle(series.title, x=0.01, horizontalalignment="left")
    save(figure, path, legend=bool(series.axis))


def overview(rows: pd.DataFrame, path: Path) -> None:
    """Time over memory in one case, a point for each contender. The best place is the lower left."""
    figure, ((axes,),) = grid(1, 1, width=5.5, height=4.2)
    measured = rows[rows["note"] == ""]
    points = zip(measured["contender"], values_of(measured, "peak_bytes"), measured["relative_time"], strict=True)
    for contender, x, y in points:
        size = 13 if contender == "symplectic" else 8
        axes.plot(x, y, **style_of(contender) | {"linestyle": "none", "markersize": size}, label=contender)
    axes.set_xscale("log")
    logarithmic(axes.xaxis, "peak_bytes")
    title = "100 steps of dopri5, forward and backward"
    axes.set(xlabel=LABELS["peak_bytes"], ylabel=LABELS["relative_time"], ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    save(figure, path)
