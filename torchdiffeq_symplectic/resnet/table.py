"""Figures as a table, for ``print``."""

from __future__ import annotations

import io
from collections.abc import Sequence

__all__ = ["render"]


def render(rows: Sequence[tuple[str, str]], title: str) -> str:
    """A table of two columns, framed; only aligned where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError:
        width = max(len(name) for name, _ in rows)
        return "\n".join([title, *(f"{name:{width}}  {value}" for name, value in rows)])
    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue().rstrip()
