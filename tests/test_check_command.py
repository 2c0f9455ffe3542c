"""The command ``check``: it finds what is wrong, by how much, and tells it from what is refused or approximate."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
from cases import register_solver
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver

from torchdiffeq_symplectic import MODES
from torchdiffeq_symplectic.__main__ import main
from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.modes import Mode
from torchdiffeq_symplectic.modes._adjoint import StageReplay, sweep
from torchdiffeq_symplectic.trajectory import Trajectory
from torchdiffeq_symplectic.verify import HOSTS, THRESHOLDS, measure, variants

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason='needs the extra "demo"')
needs_torchdyn = pytest.mark.skipif(importlib.util.find_spec("torchdyn") is None, reason="needs torchdyn")

VARIANTS = ["symplectic", "symplectic, stages", "aca", "baseline", "memory_free"]
FAULT = 1e-6  # relative, of one product: far above rounding, far below what training would show


class Sound(Mode):
    """A mode of the test's own, as "aca" is; the others differ from it in one thing."""

    name = "own"

    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        return sweep(trajectory, field, outputs, check, self.stages)

    def stages(self, replay: StageReplay) -> Callable[[int], Linearisation]:
        with torch.enable_grad():
            graphs = [replay.linearise(i) for i in range(replay.stages)]
        return lambda i: graphs[i]


class Scaled(Linearisation):
    """Its products are off by `FAULT`."""

    def pull_back(self, cotangent: Tensor) -> Any:
        return super().pull_back(cotangent * (1 + FAULT))


class Faulty(Sound):
    """One stage of one step has a wrong product."""

    def stages(self, replay: StageReplay) -> Callable[[int], Linearisation]:
        sound = super().stages(replay)

        def linearise(i: int) -> Linearisation:
            graph = sound(i)
            last = i == replay.stages - 1 and replay.step.index == 0
            return Scaled(graph._field, graph.value, graph.y, graph.times) if last else graph

        return linearise


class FaultyParameter(Sound):
    """The gradient of the first parameter, the weight, is off by `FAULT` in all of its entries."""

    def backward(self, *arguments: Any) -> Gradients:
        found = super().backward(*arguments)
        first, *others = found.params
        assert first is not None
        return Gradients(found.initial, [first * (1 + FAULT), *others], found.start, found.size, found.theta)


class FaultyOutputs(Sound):
    """The positions of outputs inside their steps have no gradient."""

    def backward(self, *arguments: Any) -> Gradients:
        found = super().backward(*arguments)
        return Gradients(found.initial, found.params, found.start, found.size, None)


class Crashing(Sound):
    def backward(self, *arguments: Any) -> Gradients:
        raise ValueError("a number was not to its liking")


class Refusing(Sound):
    """Takes no method at all."""

    def configured(self, options: Mapping[str, object]) -> Mode:
        raise ValueError('adjoint_method="own" supports "euler" and "heun2" only')


class Muddled(Sound):
    """Raises the same kind of error, which is no refusal."""

    def configured(self, options: Mapping[str, object]) -> Mode:
        raise ValueError("not enough values to unpack")


class Approximate(FaultyParameter):
    exact = False


class ApproximateRefusing(Refusing):
    exact = False


class Outcome:
    """What a run of the command gave."""

    def __init__(self, *arguments: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as terminal:
            self.status = main(["check", *arguments])
        self.text = terminal.getvalue()
        self.flat = " ".join(self.text.split())

    def line(self, method: str) -> list[str]:
        """The cells of a method in the first table that has it."""
        rows = [re.split(r"\s{2,}", line.strip()) for line in self.text.splitlines()]
        return next(row[1:] for row in rows if row[0] == method)


def check_with(monkeypatch: pytest.MonkeyPatch, mode: Any) -> Outcome:
    """The command for one mode of the test's own on torchdiffeq."""
    monkeypatch.setitem(MODES, "own", mode)
    return Outcome("--host", "torchdiffeq", "--mode", "own")


def measured(
    host: str, modes: list[str] | None = None, dtype: torch.dtype = torch.float64
) -> dict[tuple[str, str], Any]:
    """The rows by method and variant."""
    return {(row.method, row.variant): row for row in measure([HOSTS[host]], variants(modes), dtype)}


def exit_status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as exit_:
        main(["check", *arguments])
    return exit_.value.code


@needs_rich
def test_every_method_and_mode_of_torchdiffeq_is_exact_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "made" / "by it" / "found.json"
    outcome = Outcome("--host", "torchdiffeq", "--json", str(path))
    assert outcome.status == 0, outcome.text
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["exact"] is True
    assert (found["dtype"], found["threshold"]) == ("float64", 1e-11)
    assert found["versions"]["torch"] == torch.__version__
    assert {"Python", "torchdiffeq", "torchdyn", "torchdiffeq_symplectic"} < set(found["versions"])
    rows = found["rows"]
    assert [(row["method"], row["mode"]) for row in rows] == [(name, mode) for name in SOLVERS for mode in VARIANTS]
    for row in rows:
        assert row["host"] == "torchdiffeq"
        if row["method"] == "scipy_solver":
            assert (row["outcome"], row["error"], row["errors"]) == ("refused", None, {})
            assert "scipy_solver" in row["reason"]
            continue
        if row["mode"] == "memory_free":
            kind = "approximate" if row["method"] in ("euler", "heun2") else "refused"
            assert row["outcome"] == kind
            assert row["reason"] is None if kind == "approximate" else '"euler" or "heun2"' in row["reason"]
            continue
        assert (row["outcome"], row["reason"]) == ("exact", None)
        assert set(row["errors"]) == {"y0", "t", "weight", "bias", "frequency"}
        assert row["error"] == max(row["errors"].values()) < 1e-11
        assert f"{row['error']:.1e}" in outcome.line(row["method"])


@needs_rich
def test_a_wrong_product_of_one_stage_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_with(monkeypatch, Sound()).status == 0
    outcome = check_with(monkeypatch, Faulty())
    assert outcome.status == 1
    assert "NOT exact" in outcome.text
    for method in ("dopri8", "adaptive_heun", "rk4", "explicit_adams"):
        (error,) = outcome.line(method)
        assert 1e-11 < float(error) <= 2 * FAULT


@needs_rich
def test_the_error_is_that_of_the_tensor_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = check_with(monkeypatch, FaultyParameter())
    assert outcome.status == 1
    assert outcome.line("dopri5") == ["1.0e-06"]
    assert "weight by 1.0e-06" in outcome.flat
    rows = measured("torchdiffeq", ["own"])
    for (method, _), row in rows.items():
        if method != "scipy_solver":
            assert row.errors.pop("weight") == pytest.approx(FAULT, rel=1e-4)
            assert max(row.errors.values()) < 1e-11


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_outputs_lie_inside_of_steps(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODES, "own", FaultyOutputs())
    row = measured("torchdiffeq", ["own"])[method, "own"]
    assert row.outcome == "inexact"
    assert row.errors["t"] > 0.1
    assert row.errors["y0"] < 1e-11


@needs_rich
def test_another_forward_solution_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    odeint = torchdiffeq.odeint
    monkeypatch.setattr(torchdiffeq, "odeint", lambda *args, **kwargs: odeint(*args, **kwargs) * (1 + 2.0**-52))
    outcome = Outcome("--host", "torchdiffeq", "--mode", "aca")
    assert outcome.status == 1
    assert outcome.line("rk4") == ["failed"]
    assert "the solution is not the host's own" in outcome.flat


@needs_rich
def test_what_raises_is_named_and_does_not_end_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = check_with(monkeypatch, Crashing())
    assert outcome.status == 1
    assert outcome.line("euler") == outcome.line("implicit_adams") == ["failed"]
    assert outcome.flat.count("ValueError: a number was not to its liking") == 1


class Nonlinear(FixedGridODESolver):  # type: ignore[misc]
    """A step that is no explicit Runge-Kutta step."""

    order = 1

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        return dt * slope / (1 + slope.abs()), slope


@needs_rich
def test_a_refused_method_is_shown_with_its_reason_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    register_solver(monkeypatch, "nonlinear", Nonlinear)
    outcome = Outcome("--host", "torchdiffeq")
    assert outcome.status == 0, outcome.text
    assert outcome.line("nonlinear") == outcome.line("scipy_solver") == ["refused"] * len(VARIANTS)
    reason = 'method="nonlinear" cannot be differentiated exactly by adjoint_method="symplectic"'
    assert outcome.flat.count(reason) == 1, "once for all modes"
    assert "torchdiffeq nonlinear, by symplectic; symplectic, stages; aca; baseline" in outcome.flat


@needs_rich
def test_a_mode_that_refuses_everything_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = check_with(monkeypatch, Refusing())
    assert outcome.status == 1
    assert outcome.line("dopri5") == ["refused"]
    assert "own refuses every method of torchdiffeq" in outcome.flat


@needs_rich
def test_an_error_that_does_not_name_the_mode_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = check_with(monkeypatch, Muddled())
    assert outcome.status == 1
    assert outcome.line("dopri5") == ["failed"]


@needs_rich
def test_an_approximate_mode_is_shown_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = check_with(monkeypatch, Approximate())
    assert outcome.status == 0, outcome.text
    assert outcome.line("dopri5") == ["~1.0e-06"]
    assert "Exact" not in outcome.text


@needs_rich
def test_an_approximate_mode_may_refuse_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = check_with(monkeypatch, ApproximateRefusing())
    assert outcome.status == 0, outcome.text
    assert outcome.flat.count('supports "euler" and "heun2" only') == 1


@needs_rich
def test_an_approximate_mode_that_raises_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = Crashing()
    monkeypatch.setattr(mode, "exact", False, raising=False)
    assert check_with(monkeypatch, mode).status == 1


def test_a_gradient_that_is_not_finite_is_not_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MODES, "own", FaultyParameter())
    monkeypatch.setitem(globals(), "FAULT", float("nan"))
    path = tmp_path / "found.json"
    pytest.importorskip("rich")
    assert Outcome("--host", "torchdiffeq", "--mode", "own", "--json", str(path)).status == 1
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["exact"] is False
    assert found["rows"][0]["outcome"] == "inexact"
    assert found["rows"][0]["error"] == found["rows"][0]["errors"]["weight"] == "nan"


def test_single_precision_has_a_threshold_of_its_own() -> None:
    rows = measured("torchdiffeq", ["aca"], torch.float32)
    assert {row.outcome for (method, _), row in rows.items() if method != "scipy_solver"} == {"exact"}
    assert 1e-9 < max(row.error for row in rows.values() if row.error is not None) < THRESHOLDS[torch.float32]


@needs_rich
def test_the_process_is_left_as_it_was() -> None:
    random, threads, solvers = torch.get_rng_state(), torch.get_num_threads(), dict(SOLVERS)
    dtype = torch.get_default_dtype()
    Outcome("--host", "torchdiffeq", "--mode", "symplectic")
    assert torch.equal(torch.get_rng_state(), random)
    assert (torch.get_num_threads(), torch.get_default_dtype(), dict(SOLVERS)) == (threads, dtype, solvers)


@needs_torchdyn
def test_every_solver_of_torchdyn_is_exact_or_refused() -> None:
    rows = measured("torchdyn")
    refused = {method for (method, _), row in rows.items() if row.outcome == "refused"}
    judged = {variant for variant in VARIANTS if variant != "memory_free"}
    assert {row.outcome for row in rows.values() if row.variant in judged} == {"exact", "refused"}, rows
    assert rows["euler", "memory_free"].outcome == "approximate"
    assert refused >= {"ieuler", "mszero", "msbackward"}
    for method in ("euler", "midpoint", "rk4", "dopri5", 'dopri5 with "4th"', "tsit5", "alf", "HyperEuler"):
        for variant in judged:
            assert rows[method, variant].outcome == "exact"
            assert rows[method, variant].error < 1e-11


@needs_torchdyn
@pytest.mark.parametrize("fault", [Faulty, FaultyParameter])
def test_faults_are_found_through_torchdyn_too(fault: type[Sound], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODES, "own", fault())
    rows = measured("torchdyn", ["own"])
    for method in ("rk4", "dopri5", "tsit5"):
        assert rows[method, "own"].outcome == "inexact"
        assert 1e-9 < rows[method, "own"].error < 2 * FAULT


@needs_torchdyn
def test_the_choice_of_torchdyns_first_step_is_held_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchdiffeq_symplectic.hosts.torchdyn import _methods

    choose = _methods._odeint_module.init_step
    assert measured("torchdyn", ["aca"])["dopri5", "aca"].outcome == "exact"
    assert _methods._odeint_module.init_step is choose
    monkeypatch.setattr(_methods, "_first_step_held", contextlib.nullcontext)
    # Where backpropagation goes through the choice, its gradient is another one.
    assert measured("torchdyn", ["aca"])["dopri5", "aca"].outcome == "inexact"


@needs_rich
def test_torchdyn_that_is_not_installed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchdyn", None)
    outcome = Outcome("--mode", "aca")
    assert outcome.status == 0
    assert "torchdyn not installed" in outcome.flat
    assert "torchdyn:" not in outcome.flat
    assert exit_status("--host", "torchdyn") == 2
    assert "argument --host: torchdyn is not installed; pip install torchdyn" in capsys.readouterr().err


@needs_rich
def test_a_host_that_cannot_be_imported_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def methods() -> Any:
        raise ImportError("cannot import name 'ODEProblem'")

    broken = HOSTS["torchdiffeq"]._replace(methods=methods)
    monkeypatch.setitem(HOSTS, "torchdiffeq", broken)
    outcome = Outcome("--host", "torchdiffeq", "--mode", "aca", "--mode", "baseline")
    assert outcome.status == 1
    assert outcome.line("all methods") == ["failed", "failed"]
    assert outcome.flat.count("ImportError: cannot import name 'ODEProblem'") == 1


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (("--host", "diffrax"), "torchdiffeq"),
        (("--mode", "adjoint"), "symplectic"),
        (("--dtype", "float16"), "float32"),
    ],
)
def test_a_bad_value_names_its_argument_and_the_known_ones(
    arguments: tuple[str, str], known: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(*arguments) == 2
    error = capsys.readouterr().err
    assert f"argument {arguments[0]}" in error
    assert arguments[1] in error
    assert known in error.partition("argument")[2]


@needs_rich
@pytest.mark.parametrize("name", ["", "file/below"])
def test_a_file_that_cannot_be_written_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert exit_status("--json", str(tmp_path / name)) == 2
    assert "argument --json" in capsys.readouterr().err


def test_a_missing_extra_is_named_before_anything_is_measured() -> None:
    code = (
        "import sys\nfrom torchdiffeq_symplectic.__main__ import main\n"
        "sys.modules['rich'] = None  # as if it were not installed\nsys.exit(main(['check']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: rich" in result.stderr
    assert 'is missing; pip install "torchdiffeq-symplectic[demo]"' in result.stderr
    assert result.stdout == ""
