"""The matrix of versions: what pytest and ``check`` found for each, as `matrix.csv` and as the table in README.md.

``compat/noxfile.py`` runs them and leaves ``tests.xml`` (pytest's ``--junitxml``) and ``check.json`` in a folder for
each entry of `planned`. This module needs neither PyTorch nor a host, as it runs beside nox.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

# What the ids of tests call a mode -> what `check` calls it, which is also what the CSV and the table call it.
MODES = {
    "symplectic": "symplectic",
    "stages": "symplectic, stages",
    "symplectic, stages": "symplectic, stages",
    "aca": "aca",
    "baseline": "baseline",
    "memory_free": "memory_free",
}
HOSTS_UNCHANGED = "hosts unchanged"  # what the hosts do and what is taken for granted of them: no matter of a mode
OTHER = "other"  # all that remains, so that every test is counted, and once
COLUMNS = (*dict.fromkeys(MODES.values()), HOSTS_UNCHANGED, OTHER)

START, END = "<!-- matrix -->", "<!-- /matrix -->"


class Versions(NamedTuple):
    """What is installed together, or shall be."""

    torch: str
    torchdiffeq: str
    torchdyn: str

    @property
    def folder(self) -> str:
        """The name of the folder of its results."""
        return "_".join(f"{name}-{version}" for name, version in self._asdict().items())


NEWEST = "newest"
HOSTS = (("0.2.3", "1.0.6"), ("0.2.4", "1.0.6"), ("0.2.5", "1.0.6"), ("0.2.5", "1.0.5"))  # torchdiffeq, torchdyn


def lowest(name: str, project: str) -> str:
    """The lowest version of a requirement, by the text of the project file."""
    bounds = set(re.findall(rf'"{name}>=([\d.]+)"', project))
    if len(bounds) != 1:
        raise ValueError(f"the project file should give one lowest version of {name}, not {sorted(bounds)}")
    return str(bounds.pop())


def planned(project: str) -> list[Versions]:
    """All that are run, in the order of the table."""
    return [Versions(torch, *hosts) for torch in (lowest("torch", project), NEWEST) for hosts in HOSTS]


@dataclass(frozen=True)
class Row:
    """A line of the CSV: what was found for these versions in one of `COLUMNS`; None where nothing was run.

    Attributes:
        torch, torchdiffeq, torchdyn: the versions that were installed, or else those that were planned.
        mode: one of COLUMNS.
        passed, failed, skipped: tests; an error in a test's fixtures, or while tests are collected, is a failure.
        exact, approximate, refused, wrong: methods of the hosts, by what ``check`` says of them; wrong is what is
            inexact or failed.
        worst_error: the largest relative error of a gradient that ``check`` measured.
    """

    torch: str
    torchdiffeq: str
    torchdyn: str
    mode: str
    passed: int | None = None
    failed: int | None = None
    skipped: int | None = None
    exact: int | None = None
    approximate: int | None = None
    refused: int | None = None
    wrong: int | None = None
    worst_error: float | None = None

    @property
    def versions(self) -> Versions:
        return Versions(self.torch, self.torchdiffeq, self.torchdyn)

    @property
    def missing(self) -> bool:
        """Whether something was not run that should be."""
        return self.passed is None or (self.mode in MODES.values() and self.exact is None)

    @property
    def good(self) -> bool:
        return not self.missing and not self.failed and not self.wrong


FIELDS = [field.name for field in dataclasses.fields(Row)]


# From results to rows.


def column_of(classname: str, name: str) -> str:
    """Where a test counts, by its ``classname`` and ``name`` in the XML file.

    By its file, and else by a mode that is a whole part of its parameters, ``test_exact[euler-aca]``. The arguments of
    `symplectic` with all stages kept have "stages" beside it.
    """
    # Of a file that cannot be imported, its name is all there is.
    if any(part.endswith(("_unchanged", "_seams")) for part in (classname or name).split(".")):
        return HOSTS_UNCHANGED
    found = {MODES[part] for part in name.partition("[")[2].removesuffix("]").split("-") if part in MODES}
    if MODES["stages"] in found:
        found.discard("symplectic")
    return found.pop() if len(found) == 1 else OTHER


def tests(path: Path) -> dict[str, Counter[str]] | None:
    """Column -> how many passed, failed and were skipped, or None if no test was run."""
    if not path.exists():
        return None
    # A test that fails and whose fixture fails after it is there twice.
    outcomes: dict[tuple[str, str], set[str]] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        key = case.get("classname", ""), case.get("name", "")
        outcomes.setdefault(key, set()).update(child.tag for child in case)
    counts: dict[str, Counter[str]] = {column: Counter() for column in COLUMNS}
    for key, tags in outcomes.items():
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        counts[column_of(*key)][outcome] += 1
    return counts if outcomes else None


def findings(path: Path) -> dict[str, Any] | None:
    """What ``check`` wrote, or None if it came to nothing; it makes an empty file before it measures."""
    text = path.read_text(encoding="utf8") if path.exists() else ""
    return json.loads(text) if text else None


def rows_of(plan: Versions, folder: Path) -> list[Row]:
    """One row for each of `COLUMNS`.

    Raises:
        ValueError: if other versions were installed than were planned, or ``check`` knows a mode that is not in MODES.
    """
    counts, found = tests(folder / "tests.xml"), findings(folder / "check.json")
    versions = plan if found is None else Versions(*(found["versions"][name] for name in Versions._fields))
    for planned, installed in zip(plan, versions, strict=True):
        if planned != NEWEST and not f"{installed}.".startswith(f"{planned}."):
            raise ValueError(f"{folder}: planned were {tuple(plan)}, installed {tuple(versions)}")
    if found is not None and (unknown := {row["mode"] for row in found["rows"]} - set(COLUMNS)):
        raise ValueError(f"{folder}: unknown modes {sorted(unknown)}")
    rows = []
    for column in COLUMNS:
        values: dict[str, Any] = {**versions._asdict(), "mode": column}
        if counts is not None:
            values |= {outcome: counts[column][outcome] for outcome in ("passed", "failed", "skipped")}
        if found is not None:
            values |= _measured(found, column)
        rows.append(Row(**values))
    return rows


def _measured(found: dict[str, Any], column: str) -> dict[str, Any]:
    """The part of a row that ``check`` found."""
    if column not in MODES.values():
        # The verdict may be that a mode refuses all methods, which is wrong in no row.
        nothing_wrong = not any(row["outcome"] in ("inexact", "failed") for row in found["rows"])
        return {"wrong": 1} if column == OTHER and nothing_wrong and not found["exact"] else {}
    rows = [row for row in found["rows"] if row["mode"] == column]
    outcomes = Counter(row["outcome"] for row in rows)
    errors = [float(row["error"]) for row in rows if row["error"] is not None]
    return {
        **{name: outcomes[name] for name in ("exact", "approximate", "refused")},
        "wrong": outcomes["inexact"] + outcomes["failed"],
        "worst_error": _worst(errors),
    }


def _worst(errors: Sequence[float]) -> float | None:
    return next((error for error in errors if error != error), max(errors, default=None))


def collect(results: Path, plans: Iterable[Versions]) -> list[Row]:
    """The rows of all plans; what was not run has rows, too."""
    return [row for plan in plans for row in rows_of(plan, results / plan.folder)]


# From rows to the CSV, and back.


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            error = None if row.worst_error is None else f"{row.worst_error:.1e}"
            writer.writerow({**dataclasses.asdict(row), "worst_error": error})


def read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf8", newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: dict[str, str]) -> Row:
    kinds = {**dict.fromkeys((*Versions._fields, "mode"), str), "worst_error": float}
    values: dict[str, Any] = {name: kinds.get(name, int)(text) for name, text in line.items() if text}
    return Row(**values)


# From rows to README.


def table(rows: Sequence[Row]) -> str:
    """The table in Markdown: a line for each versions, a column for each mode."""
    heads = (*Versions._fields, *COLUMNS, "skipped", "worst error")
    lines = [heads, ("---",) * len(heads)]
    for versions in dict.fromkeys(row.versions for row in rows):
        own = {row.mode: row for row in rows if row.versions == versions}
        errors = [row.worst_error for row in own.values() if row.worst_error is not None and not row.approximate]
        worst = _worst(errors)
        skipped = [row.skipped for row in own.values() if row.skipped is not None]
        lines.append(
            (
                versions.torch.partition("+")[0],  # without the version of CUDA
                *versions[1:],
                *(_cell(own[column]) for column in COLUMNS),
                str(sum(skipped)) if skipped else "",
                "" if worst is None else f"{worst:.0e}",
            )
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(row: Row) -> str:
    if row.passed is None and row.exact is None:
        return "not run"
    parts = ["tests not run" if row.passed is None else f"{row.passed} ✓"]
    parts += [f"**{row.failed} failed**"] if row.failed else []
    if row.mode in MODES.values() and row.exact is None:
        parts.append("check not run")
    measured = {"exact": row.exact, "approximate": row.approximate}
    parts += [f"{count} {name}" for name, count in measured.items() if count]
    parts += [f"**{row.wrong} wrong**"] if row.wrong else []
    return " · ".join(parts)


def replaced(text: str, table: str) -> str:
    """``text`` with ``table`` between the two marker lines.

    Raises:
        ValueError: if the marker lines are not there, once each and in their order.
    """
    parts = re.fullmatch(rf"(.*^{START}\n).*(^{END}$.*)", text, flags=re.DOTALL | re.MULTILINE)
    if parts is None or text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"no place for the table: there should be a line {START} and after it a line {END}")
    return f"{parts[1]}{table}{parts[2]}"


def write(rows: Sequence[Row], csv_file: Path, readme: Path) -> None:
    """Write the CSV, and the table into README."""
    text = replaced(readme.read_text(encoding="utf8"), table(rows))
    write_csv(csv_file, rows)
    readme.write_text(text, encoding="utf8")
