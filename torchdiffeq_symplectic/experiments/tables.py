"""Data frames for the terminal and as Markdown."""

from __future__ import annotations

import pandas as pd
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

__all__ = ["markdown", "rich_table"]


def rich_table(frame: pd.DataFrame, title: str, caption: str | None = None) -> Table:
    """``frame`` without its index; columns of texts on the left, all others on the right, what is missing empty."""
    table = Table(title=title, caption=caption, box=SIMPLE, pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    for place, column in enumerate(frame.columns):
        table.add_column(Text(str(column)), justify="right" if place else "left", no_wrap=not place)
    for row in frame.itertuples(index=False):
        table.add_row(*(cell if isinstance(cell, Text) else Text("" if pd.isna(cell) else str(cell)) for cell in row))
    return table


def markdown(frame: pd.DataFrame) -> str:
    """``frame`` of texts as a table in Markdown, without its index; all but the first column on the right."""
    alignment = ["left", *["right"] * (len(frame.columns) - 1)]
    text: str = frame.fillna("").to_markdown(index=False, colalign=alignment, disable_numparse=True)
    return text
