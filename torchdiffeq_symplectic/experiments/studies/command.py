"""Running a study from the command line: progress, table, picture and CSV. Needs the extra ``resnet``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from torchdiffeq_symplectic.resnet.studies import common, depth, linear, memory_free, tied

__all__ = ["STUDIES", "run"]

STUDIES: dict[str, Any] = {"depth": depth, "memory-free": memory_free, "linear": linear, "tied": tied}


def run(name: str, settings: dict[str, Any], out: Path) -> None:
    """Run a study, print what it found, and write ``<name>.png`` and ``<name>.csv``, for "tied" two CSV files.

    Args:
        name: one of `STUDIES`.
        settings: arguments of its ``run``; those that are None are left to it.
        out: an existing directory for the files.
    """
    study = STUDIES[name]
    given = {key: value for key, value in settings.items() if value is not None}
    if "depths" in given:
        given["depths"] = sorted(set(given["depths"]))  # curves run from left to right
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=1.0)

        def tell(doing: str, fraction: float) -> None:
            progress.update(task, description=doing, completed=fraction)

        found = study.run(**given, tell=tell)
        tell(name, 1.0)
    files = [out / f"{name}.png"]
    figure = Figure(figsize=getattr(study, "SIZE", common.SIZE), layout="constrained")
    study.draw(found, figure)
    figure.savefig(files[0], dpi=150)
    for sheet in study.sheets(found):
        console.print(common.table(sheet.shown, sheet.title))
        files.append(out / f"{sheet.name}.csv")
        common.write_csv(sheet.rows, files[-1])
    for sentence in study.summary(found):
        console.print(sentence, markup=False, highlight=False)
    console.print(f"Wrote {', '.join(map(str, files))}", markup=False, highlight=False)
