"""The matrix of versions: how results are counted, and what the table shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matrix
import pytest
from matrix import COLUMNS, Row, Versions

pytest.importorskip("pandas", reason='needs the extra "cli"')


ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf8")
PLAN = Versions("2.4", "0.2.3", "1.0.6")
INSTALLED = {"Python": "3.11.7", "torch": "2.4.0+cu121", "torchdiffeq": "0.2.3", "torchdyn": "1.0.6"}


def case(name: str, *outcomes: str, file: str = "compat.test_exactness") -> str:
    return f'<testcase classname="{file}" name="{name}">{"".join(f"<{tag}/>" for tag in outcomes)}</testcase>'


def found(mode: str, outcome: str, error: float | str | None = None) -> dict[str, Any]:
    return {"host": "torchdiffeq", "method": "rk4", "mode": mode, "outcome": outcome, "error": error}


def leave(folder: Path, cases: list[str] | None, rows: list[dict[str, Any]] | None, exact: bool = True) -> Path:
    """Results as pytest and ``check`` leave them."""
    folder.mkdir(parents=True)
    if cases is not None:
        text = f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
        (folder / "tests.xml").write_text(text, encoding="utf8")
    if rows is not None:
        text = json.dumps({"versions": INSTALLED, "exact": exact, "rows": rows})
        (folder / "check.json").write_text(text, encoding="utf8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The results of one combination, one failure and one inexact method among them."""
    cases = [
        case("test_exact[symplectic-euler]"),
        case("test_exact[symplectic-stages-rk4]"),
        case("test_exact[symplectic-rk4]", "skipped"),
        case("test_exact[aca-rk4]", "failure"),
        case("test_exact[aca-rk4]", "error"),
        case("test_exact[aca-euler]"),
        case("test_works[rk4]"),
        case("test_solver[symplectic]", file="compat.test_torchdyn_seams"),
    ]
    rows = [
        found("symplectic", "exact", 2e-13),
        found("symplectic", "exact", 1e-15),
        found("symplectic", "refused"),
        found("symplectic, stages", "exact", 0.0),
        found("aca", "inexact", 1e-3),
        found("aca", "failed"),
        found("baseline", "exact", 1e-14),
        found("memory_free", "approximate", 0.25),
    ]
    return leave(tmp_path / PLAN.folder, cases, rows, exact=False)


def row(rows: list[Row], mode: str) -> Row:
    (one,) = [row for row in rows if row.mode == mode]
    return one


# What is run.


def test_lowest_versions_that_are_run_are_those_of_the_project_file() -> None:
    plans = matrix.planned(PROJECT)
    for name in Versions._fields:
        versions = {getattr(plan, name) for plan in plans} - {matrix.NEWEST}
        assert matrix.lowest(name, PROJECT) == min(versions, key=lambda version: [*map(int, version.split("."))])


# Where a test counts.


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("test_exact[rk4-symplectic]", "symplectic"),
        ("test_exact[symplectic-stages-rk4]", "symplectic, stages"),
        ("test_time[small net-symplectic, stages]", "symplectic, stages"),
        ("test_exact[stages]", "symplectic, stages"),
        ("test_exact[aca]", "aca"),
        ("test_exact[dense-baseline-euler]", "baseline"),
        ("test_exact[memory_free]", "memory_free"),
        ("test_exact[maca-symplectically]", "other"),
        ("test_switches[aca-baseline]", "other"),
        ("test_aca", "other"),
        ("test_exact[a list[aca]-b]", "other"),
    ],
)
def test_modes_are_whole_parts_of_parameters(name: str, column: str) -> None:
    assert matrix.column_of("compat.test_exactness", name) == column


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("compat.test_unchanged", "test_outcome[symplectic]"),
        ("compat.test_torch_seams", "test_nodes"),
        ("compat.test_torch_seams.TestNodes", "test_all"),
        ("", "compat.test_torch_seams"),
    ],
)
def test_files_about_hosts_count_there_whatever_the_test(file: str, name: str) -> None:
    assert matrix.column_of(file, name) == "hosts unchanged"


# Rows.


def test_every_test_counts_once(folder: Path) -> None:
    rows = matrix.rows_of(PLAN, folder)
    assert [row.mode for row in rows] == list(COLUMNS)
    outcomes = {row.mode: (row.passed, row.failed, row.skipped) for row in rows}
    assert outcomes == {
        "symplectic": (1, 0, 1),
        "symplectic, stages": (1, 0, 0),
        "aca": (1, 1, 0),
        "baseline": (0, 0, 0),
        "memory_free": (0, 0, 0),
        "hosts unchanged": (1, 0, 0),
        "other": (1, 0, 0),
    }


def test_what_the_check_found(folder: Path) -> None:
    rows = matrix.rows_of(PLAN, folder)
    measured = {row.mode: (row.exact, row.approximate, row.refused, row.wrong, row.worst_error) for row in rows}
    assert measured == {
        "symplectic": (2, 0, 1, 0, 2e-13),
        "symplectic, stages": (1, 0, 0, 0, 0.0),
        "aca": (0, 0, 0, 2, 1e-3),
        "baseline": (1, 0, 0, 0, 1e-14),
        "memory_free": (0, 1, 0, 0, 0.25),
        "hosts unchanged": (None,) * 5,
        "other": (None,) * 5,
    }


@pytest.mark.parametrize("plan", [Versions("2.4", "0.2.4", "1.0.6"), Versions("2.5", "0.2.3", "1.0.6")])
def test_other_versions_than_planned_are_no_result(plan: Versions, folder: Path) -> None:
    with pytest.raises(ValueError, match="planned were"):
        matrix.rows_of(plan, folder)


# The table.


def cells(rows: list[Row]) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in matrix.table(rows).splitlines()]


def test_table_shows_failures_and_what_was_not_run(folder: Path) -> None:
    heads, _, first, second = cells(matrix.collect(folder.parent, [PLAN, Versions("2.4", "0.2.4", "1.0.6")]))
    assert dict(zip(heads, first, strict=True)) == {
        "torch": "2.4.0",
        "torchdiffeq": "0.2.3",
        "torchdyn": "1.0.6",
        "symplectic": "1 ✓ · 2 exact",
        "symplectic, stages": "1 ✓ · 1 exact",
        "aca": "1 ✓ · **1 failed** · **2 wrong**",
        "baseline": "0 ✓ · 1 exact",
        "memory_free": "0 ✓ · 1 approximate",
        "hosts unchanged": "1 ✓",
        "other": "1 ✓",
        "skipped": "1",
        "worst error": "1e-03",
    }
    assert second[:3] == ["2.4", "0.2.4", "1.0.6"]
    assert second[3:10] == ["not run"] * 7


def test_only_what_is_between_the_markers_is_replaced(folder: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n\n{matrix.START}\n| old |\n{matrix.END}\n\nbelow\n", encoding="utf8")
    rows = matrix.rows_of(PLAN, folder)
    for _ in range(2):
        matrix.write(rows, tmp_path / "made.csv", readme)
        expected = f"above\n\n{matrix.START}\n{matrix.table(rows)}{matrix.END}\n\nbelow\n"
        assert readme.read_text(encoding="utf8") == expected
