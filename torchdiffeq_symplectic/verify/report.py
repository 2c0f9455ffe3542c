"""What was found, for the terminal. Needs rich, of the extra ``demo``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchdiffeq_symplectic.verify.findings import Findings
from torchdiffeq_symplectic.verify.measure import Row

__all__ = ["report"]

_STYLES = {"exact": "green", "inexact": "bold red", "approximate": "yellow", "refused": "dim", "failed": "bold red"}


def report(findings: Findings, console: Console) -> None:
    """Print versions, a table for each host, what was refused or went wrong and why, and the verdict."""
    console.print(", ".join(f"{name} {version}" for name, version in findings.versions.items()), highlight=False)
    for host in _unique(row.host for row in findings.rows):
        console.print(_table(host, [row for row in findings.rows if row.host == host]))
    _explain("Refused", [row for row in findings.rows if row.outcome == "refused"], console)
    _explain("Wrong", findings.wrong, console)
    for host, variant in findings.unmeasured:
        console.print(Text(f"{variant} refuses every method of {host}: nothing shows that it works.", "bold red"))
    console.print(_verdict(findings))


def _table(host: str, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{host}: relative error of the gradient", title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("method", min_width=14, overflow="fold")
    names = _unique(row.variant for row in rows)
    for name in names:
        table.add_column(name.replace(", ", ",\n"), justify="right", no_wrap=True)
    for method in _unique(row.method for row in rows):
        cells = {row.variant: _cell(row) for row in rows if row.method == method}
        table.add_row(Text(method), *(cells[name] for name in names))
    return table


def _cell(row: Row) -> Text:
    text = row.outcome if row.error is None else f"{row.error:.1e}"
    if row.outcome == "approximate":
        text = f"~{text}"
    return Text(text, _STYLES[row.outcome])


def _explain(heading: str, rows: Sequence[Row], console: Console) -> None:
    """Each reason once, in the words of its first row, with the methods and modes that it was given for."""
    by_method = _joined([[row] for row in rows], lambda part: (part[0].host, part[0].method))
    groups = _joined(by_method, lambda part: (part[0].host, [row.variant for row in part]))
    if groups:
        console.print(Text(f"{heading}:", "bold"))
    for group in groups:
        methods, modes = ("; ".join(_unique(getattr(row, name) for row in group)) for name in ("method", "variant"))
        console.print(Text(f"- {group[0].host} {methods}, by {modes}: {group[0].reason}"), soft_wrap=True)


def _joined(parts: Iterable[Sequence[Row]], key: Callable[[Sequence[Row]], object]) -> list[list[Row]]:
    """Parts that have the same key and the same reason joined, in the order in which the first of each came."""
    found: list[tuple[object, list[Row]]] = []
    for part in parts:
        own = key(part)
        same = next((group for other, group in found if other == own and _same_reason(group[0], part[0])), None)
        if same is None:
            found.append((own, list(part)))
        else:
            same += part
    return [group for _, group in found]


def _same_reason(one: Row, other: Row) -> bool:
    """Whether the reasons are the same but for the names of mode and method, which they may give."""
    reason = (one.reason or "").replace(f'"{one.mode}"', f'"{other.mode}"')
    return other.reason in (reason, reason.replace(one.method, other.method))


def _verdict(findings: Findings) -> Text:
    exact = [row for row in findings.rows if row.outcome == "exact"]
    limit = f"The limit in {str(findings.dtype).removeprefix('torch.')} is {findings.threshold:.0e}."
    if findings.wrong:
        judged = len(exact) + len(findings.wrong)
        return Text(f"NOT exact: {len(findings.wrong)} of the {judged} that should be. {limit}", "bold red")
    if not exact:
        return Text("Nothing was measured that should be exact.", "bold yellow" if findings.exact else "bold red")
    worst = max(row.error or 0.0 for row in exact)
    return Text(f"Exact: all {len(exact)} that should be, with errors up to {worst:.1e}. {limit}", "bold green")


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
