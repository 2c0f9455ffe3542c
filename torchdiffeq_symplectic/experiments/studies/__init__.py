"""The experiments of the paper on residual networks and ODEs, each small enough to run in minutes.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from torchdiffeq_symplectic.experiments.studies import depth, linear, memory_free, tied, training
from torchdiffeq_symplectic.experiments.studies.common import Study
from torchdiffeq_symplectic.experiments.tables import rich_table

__all__ = ["STUDIES", "run"]

STUDIES: dict[str, Study] = {
    "depth": depth.STUDY,
    "memory-free": memory_free.STUDY,
    "training": training.STUDY,
    "linear": linear.STUDY,
    "tied": tied.STUDY,
}


def run(name: str, settings: Mapping[str, Any], out: Path) -> None:
    """Run a study, print what it found, and write ``<name>.png`` and its CSV files.

    Args:
        name: one of `STUDIES`.
        settings: arguments of its ``run``.
        out: the directory for the files, made if need be.
    """
    study = STUDIES[name]
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=1.0)
        found = study.run(**settings, tell=lambda doing, part: progress.update(task, description=doing, completed=part))
        progress.update(task, description=name, completed=1.0)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{name}.png"]
    figure = Figure(figsize=study.size, layout="constrained")
    study.draw(found, figure)
    figure.savefig(files[0], dpi=150)
    for file, frame in found.items():
        console.print(rich_table(_texts(study.shown(frame)), study.title))
        files.append(out / f"{file}.csv")
        frame.to_csv(files[-1], index=False)
    for sentence in study.summary(found):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"Wrote {', '.join(map(str, files))}", markup=False, highlight=False)


def _texts(frame: pd.DataFrame) -> pd.DataFrame:
    """With numbers of three digits."""
    return frame.apply(
        lambda column: column.map("{:.3g}".format, na_action="ignore") if column.dtype == float else column
    )
