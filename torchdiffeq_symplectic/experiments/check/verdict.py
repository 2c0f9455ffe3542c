"""What ``check`` found: for the terminal, as JSON, and the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.text import Text

from torchdiffeq_symplectic import MODES
from torchdiffeq_symplectic.experiments.check.measure import THRESHOLDS, Finding
from torchdiffeq_symplectic.experiments.tables import rich_table

__all__ = ["is_exact", "report", "to_dict"]

STYLES = {"exact": "green", "inexact": "bold red", "approximate": "yellow", "refused": "dim", "failed": "bold red"}


def is_exact(rows: Sequence[Finding]) -> bool:
    """Whether all that should be exact is, and each mode was measured for one method of each host at least."""
    return bool(rows) and not _wrong(rows) and not _unmeasured(rows)


def to_dict(rows: Sequence[Finding], versions: Mapping[str, str], dtype: torch.dtype) -> dict[str, Any]:
    """For a JSON file; an error that is not finite is a text, as JSON has no such number."""
    return {
        "versions": dict(versions),
        "dtype": str(dtype).removeprefix("torch."),
        "threshold": THRESHOLDS[dtype],
        "exact": is_exact(rows),
        "rows": [
            {
                "host": row.host,
                "method": row.method,
                "mode": row.variant,
                "outcome": row.outcome,
                "error": _number(row.error),
                "errors": {name: _number(error) for name, error in row.errors.items()},
                "reason": row.reason,
            }
            for row in rows
        ],
    }


def report(rows: Sequence[Finding], versions: Mapping[str, str], dtype: torch.dtype, console: Console) -> None:
    """Print versions, a table for each host, what was refused or went wrong and why, and the verdict."""
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()), highlight=False)
    frame = pd.DataFrame([dataclasses.asdict(row) | {"cell": _cell(row)} for row in rows])
    for host, of in frame.groupby("host", sort=False):
        cells = of.pivot(index="method", columns="variant", values="cell")
        cells = cells.reindex(index=of["method"].unique(), columns=of["variant"].unique())
        console.print(rich_table(cells.reset_index(), f"{host}: relative error of the gradient"))
    _explain("Refused", [row for row in rows if row.outcome == "refused"], console)
    _explain("Wrong", _wrong(rows), console)
    for host, variant in _unmeasured(rows):
        console.print(Text(f"{variant} refuses every method of {host}: nothing shows that it works.", "bold red"))
    console.print(_verdict(rows, dtype))


def _explain(heading: str, rows: Sequence[Finding], console: Console) -> None:
    """Each reason once, in the words of its first row, with the methods and modes that it was given for."""
    if not rows:
        return
    console.print(Text(f"{heading}:", "bold"))
    frame = pd.DataFrame([dataclasses.asdict(row) for row in rows])
    # The same reason but for the names of mode and method, which it may give.
    frame["kind"] = [(row.reason or "").replace(f'"{row.mode}"', "").replace(row.method, "") for row in rows]
    by_method = frame.groupby(["host", "method", "kind"], sort=False)
    frame["modes"] = by_method["variant"].transform("; ".join)
    for (host, modes, _), of in frame.groupby(["host", "modes", "kind"], sort=False):
        methods = "; ".join(of["method"].unique())
        console.print(Text(f"- {host} {methods}, by {modes}: {of['reason'].iloc[0]}"), soft_wrap=True)


def _cell(row: Finding) -> Text:
    text = row.outcome if row.error is None else f"{row.error:.1e}"
    return Text(f"~{text}" if row.outcome == "approximate" else text, STYLES[row.outcome])


def _verdict(rows: Sequence[Finding], dtype: torch.dtype) -> Text:
    exact, wrong = [row for row in rows if row.outcome == "exact"], _wrong(rows)
    limit = f"The limit in {str(dtype).removeprefix('torch.')} is {THRESHOLDS[dtype]:.0e}."
    if wrong:
        return Text(f"NOT exact: {len(wrong)} of the {len(exact) + len(wrong)} that should be. {limit}", "bold red")
    if not exact:
        return Text("Nothing was measured that should be exact.", "bold yellow" if is_exact(rows) else "bold red")
    worst = max(row.error or 0.0 for row in exact)
    return Text(f"Exact: all {len(exact)} that should be, with errors up to {worst:.1e}. {limit}", "bold green")


def _wrong(rows: Sequence[Finding]) -> list[Finding]:
    return [row for row in rows if row.outcome in ("inexact", "failed")]


def _unmeasured(rows: Sequence[Finding]) -> list[tuple[str, str]]:
    """Host and variant, for the variants that should be exact and refuse every method of the host."""
    judged = dict.fromkeys((row.host, row.variant) for row in rows if MODES[row.mode].exact)
    return [pair for pair in judged if all(row.outcome == "refused" for row in rows if (row.host, row.variant) == pair)]


def _number(error: float | None) -> float | str | None:
    return error if error is None or math.isfinite(error) else str(error)
