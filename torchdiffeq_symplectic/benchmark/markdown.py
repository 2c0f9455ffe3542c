"""What was found as Markdown: all of it, and the part that a README shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torchdiffeq_symplectic.benchmark.compare import Row
from torchdiffeq_symplectic.benchmark.contender import BACKPROPAGATION
from torchdiffeq_symplectic.benchmark.contenders import is_own
from torchdiffeq_symplectic.benchmark.memory import MIB
from torchdiffeq_symplectic.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.benchmark.results import Measured, Results

__all__ = ["report", "section", "update"]

OPENING, CLOSING = "<!-- benchmark -->", "<!-- /benchmark -->"
SYMPLECTIC, STAGES, ADJOINT = "symplectic", "symplectic, stages", "adjoint"
SHOWN = (  # in a README: series, case, and what stands above its column
    ("cnf", "breast cancer, 30 columns, M = 5", "`cnf`, M = 5"),
    ("kdv", "Korteweg-de Vries, dopri8", "`kdv`"),
    ("cahn-hilliard", "Cahn-Hilliard, dopri8", "`cahn-hilliard`"),
    ("steps", "100 steps", "`steps`, 100"),
    ("outputs", "2 outputs", "`outputs`, 2"),
    ("outputs", "20 outputs", "`outputs`, 20"),
    ("outputs", "500 outputs", "`outputs`, 500"),
    ("small", "1,600 weights, batch 32", "`small`"),
    ("resnet", "1024 blocks", "`resnet`, 1024"),
)


def report(results: Results) -> str:
    """A table for each case, with everything but absolute times."""
    parts = ["# Benchmark", _conditions(results)]
    for name in results.problems:
        parts.append(f"## {name}: {PROBLEMS[name].title}")
        parts += [f"### {case.case}\n\n{_full(case)}" for case in results.of(name)]
    return "\n\n".join(parts) + "\n"


def section(results: Results) -> str:
    """Ratios to backpropagation on the cases that `SHOWN` names, as far as they were measured."""
    cases = [(title, case) for name, label, title in SHOWN if (case := results.get(name, label)) is not None]
    parts = [_conditions(results)]
    for heading, cell in (
        ("Time / peak memory of forward and backward pass, over those of backpropagation", _time_and_memory),
        ("Relative error of the gradient, against backpropagation in float64 on the same steps", _error),
    ):
        parts.append(f"**{heading}**")
        parts.append(_table(cases, cell))
    tolerances = [(case.case.replace(" rtol", ""), case) for case in results.of("tolerance")]
    if tolerances:
        parts += ["**Error of the gradient over the tolerance**, in float64 (`tolerance`)", _table(tolerances, _error)]
    parts.append("\n".join(f"- {line}" for line in (*_gains(results), *_losses(cases))))
    return "\n\n".join(parts)


def update(readme: Path, results: Results) -> None:
    """Put :func:`section` between the two comments in a file.

    Raises:
        ValueError: if the file does not have both, in this order.
    """
    text = readme.read_text(encoding="utf-8")
    before, opening, rest = text.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not opening or not closing:
        raise ValueError(f"{readme} must have the lines {OPENING} and {CLOSING}, between which the results are put")
    readme.write_text(f"{before}{OPENING}\n\n{section(results)}\n\n{CLOSING}{after}", encoding="utf-8")


def _conditions(results: Results) -> str:
    settings = results.settings
    threads = "one thread" if settings.threads == 1 else f"{settings.threads} threads"
    on = f"{settings.processor}, {threads}" if settings.device == "cpu" else settings.processor
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    return (
        f"{on}; {versions}. Each case is one run: times are medians over {settings.repeats} rounds in which all "
        "contenders take turns; memory is counted exactly. Rows that begin with the name of another package have that "
        "package's own steps."
    )


def _full(case: Measured) -> str:
    head = ("gradient by", "error", "memory [MiB]", "memory", "time", "quartiles", "forward", "backward")
    lines: list[tuple[str, ...]] = [(*head, "evaluations", "steps")]
    for row in case.rows:
        if row.note:
            lines.append((row.contender, row.note, *[""] * (len(lines[0]) - 2)))
            continue
        lines.append(
            (
                row.contender,
                _error(row, case),
                f"{(row.peak_bytes or 0) / MIB:.2f}",
                _memory(row, case),
                _time(row, case),
                f"{row.relative_time_low:.2f} … {row.relative_time_high:.2f}",
                f"{row.relative_forward:.2f}",
                f"{row.relative_backward:.2f}",
                f"{row.forward_evaluations} + {row.backward_evaluations}",
                str(row.steps),
            )
        )
    return _rows(lines)


def _table(cases: Sequence[tuple[str, Measured]], cell: Callable[[Row, Measured], str]) -> str:
    """A line for each contender that has a figure, a column for each case."""
    lines = [("", *(title for title, _ in cases))]
    for name in _names(case for _, case in cases):
        found = [(case.of(name), case) for _, case in cases]
        cells = ["" if row is None else cell(row, case) for row, case in found]
        if any(cells):
            lines.append((_code(name), *cells))
    return _rows(lines)


def _gains(results: Results) -> Iterable[str]:
    """What the promises come to."""
    for name, label, title in SHOWN:
        if name in ("outputs", "small", "cnf"):
            factor = _ratio(results, name, label, "seconds", ADJOINT, SYMPLECTIC)
            if factor:
                yield f"{title}: `symplectic` takes 1/{factor:.1f} of the upstream adjoint's time."
    factor = _ratio(results, "steps", "100 steps", "peak_bytes", BACKPROPAGATION, SYMPLECTIC)
    if factor:
        own, stages = (
            _ratio(results, "steps", "100 steps", "relative_time", name, BACKPROPAGATION)
            for name in (SYMPLECTIC, STAGES)
        )
        yield (
            f"100 steps of dopri5 in a large network: 1/{factor:.0f} of the memory of backpropagation at {own:.2f} of "
            f"its time; with stages kept {stages:.2f} of its time."
        )
    exact = [case.of(SYMPLECTIC) for case in results.of("tolerance")]
    errors = [row.gradient_error for row in exact if row is not None and row.gradient_error is not None]
    if errors:
        yield f"At every tolerance from 1e-2 to 1e-10 the error of `symplectic` is at most {max(errors):.0e}."


def _losses(cases: Sequence[tuple[str, Measured]]) -> Iterable[str]:
    """Where another way than this package's is faster than all of its modes, or smaller."""
    for quantity, words in (("seconds", "Faster"), ("peak_bytes", "Smaller")):
        found = []
        for title, case in cases:
            own = [getattr(row, quantity) for row in case.rows if is_own(row.contender) and not row.note]
            others = [row for row in case.rows if not row.note and not is_own(row.contender)]
            better = [row.contender for row in others if own and getattr(row, quantity) < min(own)]
            if better:
                found.append(f"{title}: {' · '.join(map(_code, better))}")
        if found:
            yield f"{words} than every mode of this package: {'; '.join(found)}."


def _ratio(results: Results, problem: str, label: str, quantity: str, above: str, below: str) -> float | None:
    case = results.get(problem, label)
    one, other = (case.of(above), case.of(below)) if case is not None else (None, None)
    if one is None or other is None:
        return None
    return float(getattr(one, quantity)) / float(getattr(other, quantity))


def _time(row: Row, case: Measured) -> str:
    del case
    return f"{row.relative_time:.2f}"


def _memory(row: Row, case: Measured) -> str:
    base = case.of(BACKPROPAGATION)
    assert base is not None
    return f"{(row.peak_bytes or 0) / (base.peak_bytes or 1):.2g}"


def _time_and_memory(row: Row, case: Measured) -> str:
    return f"{_time(row, case)} / {_memory(row, case)}"


def _error(row: Row, case: Measured) -> str:
    del case
    return f"{row.gradient_error:.0e}"


def _names(cases: Iterable[Measured]) -> list[str]:
    return list(dict.fromkeys(row.contender for case in cases for row in case.rows))


def _code(contender: str) -> str:
    mode, comma, rest = contender.partition(",")
    return f"`{mode}`{comma}{rest}" if is_own(mode) else contender


def _rows(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
