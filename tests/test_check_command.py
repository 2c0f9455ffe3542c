"""The command ``check``: it finds what is wrong, by how much, and tells it from what is refused or approximate.

Faults are put into ``torchdiffeq.odeint_adjoint``, which ``check`` looks up at each call, under the name of a mode of
the tests' own; what is not faulty is backpropagation.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

pytest.importorskip("typer", reason='needs the extra "cli"')
from typer.testing import CliRunner

from torchdiffeq_symplectic import MODES
from torchdiffeq_symplectic.cli import app
from torchdiffeq_symplectic.experiments.check import HOSTS, measure, variants

needs_torchdyn = pytest.mark.skipif(importlib.util.find_spec("torchdyn") is None, reason="needs torchdyn")

VARIANTS = ["symplectic", "symplectic, stages", "aca", "baseline", "memory_free"]
FAULT = 1e-6  # relative: far above rounding, far below what training would show
Way = Callable[..., Tensor]


class Outcome:
    """What a run of the command gave."""

    def __init__(self, *arguments: str) -> None:
        result = CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "140"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        self.status, self.text = result.exit_code, result.output
        self.flat = " ".join(re.sub("[│╭╮╰╯─]", " ", self.text).split())

    def line(self, method: str) -> list[str]:
        """The cells of a method in the first table that has it."""
        rows = [re.split(r"\s{2,}", line.strip()) for line in self.text.splitlines()]
        return next(row[1:] for row in rows if row[0] == method)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Register a mode "own" whose solves are ``way``'s."""

    def install(way: Way, exact: bool = True) -> None:
        real = torchdiffeq.odeint_adjoint

        def odeint_adjoint(field: Any, y0: Tensor, t: Tensor, *, adjoint_method: str, **settings: Any) -> Any:
            if adjoint_method != "own":
                return real(field, y0, t, adjoint_method=adjoint_method, **settings)
            settings.pop("adjoint_options")
            if settings["method"] == "scipy_solver":  # which has no gradient
                raise NotImplementedError('adjoint_method="own" takes no method="scipy_solver"')
            return way(field, y0, t, **settings)

        monkeypatch.setattr(torchdiffeq, "odeint_adjoint", odeint_adjoint)
        monkeypatch.setitem(MODES, "own", SimpleNamespace(exact=exact, options=frozenset(), methods=()))

    return install


def sound(field: Any, y0: Tensor, t: Tensor, **settings: Any) -> Tensor:
    solution: Tensor = torchdiffeq.odeint(field, y0, t, **settings)
    return solution


def faulty_parameter(field: Any, y0: Tensor, t: Tensor, **settings: Any) -> Tensor:
    """The gradient of the weight is off by `FAULT` in all of its entries."""
    field.weight.register_hook(lambda gradient: gradient * (1 + FAULT))
    return sound(field, y0, t, **settings)


def other_values(field: Any, y0: Tensor, t: Tensor, **settings: Any) -> Tensor:
    return sound(field, y0, t, **settings) * (1 + 2.0**-52)


def crashing(field: Any, y0: Tensor, t: Tensor, **settings: Any) -> Tensor:
    raise ValueError("a number was not to its liking")


def refusing(field: Any, y0: Tensor, t: Tensor, **settings: Any) -> Tensor:
    raise ValueError('adjoint_method="own" supports "euler" and "heun2" only')


def check_own() -> Outcome:
    return Outcome("--host", "torchdiffeq", "--mode", "own")


def measured(host: str, modes: list[str] | None = None, dtype: torch.dtype = torch.float64) -> dict[Any, Any]:
    """The findings by method and variant."""
    return {(row.method, row.variant): row for row in measure([HOSTS[host]], variants(modes), dtype)}


def test_every_method_and_mode_of_torchdiffeq_is_exact_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "made" / "by it" / "found.json"
    outcome = Outcome("--host", "torchdiffeq", "--json", str(path))
    assert outcome.status == 0, outcome.text
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["exact"] is True
    assert (found["dtype"], found["threshold"]) == ("float64", 1e-11)
    assert found["versions"]["torch"] == torch.__version__
    assert {"Python", "torchdiffeq", "torchdyn", "torchdiffeq_symplectic"} < set(found["versions"])
    rows = {(row["method"], row["mode"]): row for row in found["rows"]}
    assert list(rows) == [(name, mode) for name in SOLVERS for mode in VARIANTS]
    for method in ("dopri8", "dopri5", "bosh3", "euler", "midpoint", "rk4", "explicit_adams"):
        for mode in VARIANTS[:-1]:
            row = rows[method, mode]
            assert (row["outcome"], row["reason"]) == ("exact", None)
            assert set(row["errors"]) == {"y0", "t", "weight", "bias", "frequency"}
            assert row["error"] == max(row["errors"].values()) < 1e-11
            assert f"{row['error']:.1e}" in outcome.line(method)
    assert rows["euler", "memory_free"]["outcome"] == "approximate"
    assert rows["dopri5", "memory_free"]["outcome"] == "approximate"
    assert rows["adaptive_heun", "memory_free"]["outcome"] == "refused"


def test_the_error_is_that_of_the_tensor_that_is_wrong(own: Callable[..., None]) -> None:
    own(sound)
    assert check_own().status == 0
    own(faulty_parameter)
    outcome = check_own()
    assert outcome.status == 1
    assert "NOT exact" in outcome.text
    assert outcome.line("dopri5") == ["1.0e-06"]
    assert "weight by 1.0e-06" in outcome.flat
    row = measured("torchdiffeq", ["own"])["rk4", "own"]
    errors = dict(row.errors)
    assert errors.pop("weight") == pytest.approx(FAULT, rel=1e-4)
    assert max(errors.values()) < 1e-11


def test_another_forward_solution_is_found(own: Callable[..., None]) -> None:
    own(other_values)
    outcome = check_own()
    assert outcome.status == 1
    assert outcome.line("rk4") == ["failed"]
    assert "the solution is not the host's own" in outcome.flat


def test_what_raises_is_named_and_does_not_end_the_check(own: Callable[..., None]) -> None:
    own(crashing)
    outcome = check_own()
    assert outcome.status == 1
    assert outcome.line("euler") == outcome.line("implicit_adams") == ["failed"]
    assert outcome.flat.count("ValueError: a number was not to its liking") == 1


def test_a_mode_that_refuses_everything_is_not_exact(own: Callable[..., None]) -> None:
    own(refusing)
    outcome = check_own()
    assert outcome.status == 1
    assert outcome.line("dopri5") == ["refused"]
    assert "own refuses every method of torchdiffeq" in outcome.flat


@pytest.mark.parametrize(("way", "cell"), [(faulty_parameter, "~1.0e-06"), (refusing, "refused")])
def test_an_approximate_mode_is_shown_and_not_judged(way: Way, cell: str, own: Callable[..., None]) -> None:
    own(way, exact=False)
    outcome = check_own()
    assert outcome.status == 0, outcome.text
    assert outcome.line("dopri5") == [cell]
    assert "Exact" not in outcome.text


def test_a_gradient_that_is_not_finite_is_not_exact(
    own: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own(faulty_parameter)
    monkeypatch.setitem(globals(), "FAULT", float("nan"))
    path = tmp_path / "found.json"
    assert Outcome("--host", "torchdiffeq", "--mode", "own", "--json", str(path)).status == 1
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["exact"] is False
    assert found["rows"][0]["outcome"] == "inexact"
    assert found["rows"][0]["error"] == found["rows"][0]["errors"]["weight"] == "nan"


@needs_torchdyn
def test_every_solver_of_torchdyn_is_exact_or_refused() -> None:
    rows = measured("torchdyn")
    assert {row.outcome for row in rows.values() if row.variant != "memory_free"} <= {"exact", "refused"}, rows
    for method in ("euler", "midpoint", "rk4", "dopri5", 'dopri5 with "4th"', "tsit5", "alf", "HyperEuler"):
        for variant in VARIANTS[:-1]:
            assert rows[method, variant].outcome == "exact"
            assert rows[method, variant].error < 1e-11


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "torchdif"), "Did you mean 'torchdiffeq'"),
        (("--mode", "sympletic"), "Did you mean 'symplectic'"),
        (("--dtype", "float16"), "'float64', 'float32'"),
    ],
)
def test_a_bad_value_names_its_argument_and_the_known_ones(arguments: tuple[str, str], words: str) -> None:
    outcome = Outcome(*arguments)
    assert outcome.status == 2
    assert arguments[0] in outcome.flat
    assert arguments[1] in outcome.flat
    assert words in outcome.flat


@pytest.mark.parametrize("name", ["", "file/below"])
def test_a_file_that_cannot_be_written_is_refused_first(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Outcome("--json", str(tmp_path / name)).status == 2
