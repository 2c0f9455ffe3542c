"""The gradient is that of the program that ran: for every mode and method, those unknown to the package included."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torchdiffeq
from cases import (
    ADAMS,
    METHODS,
    MODES,
    assert_exact,
    each_method,
    each_mode,
    mixing_problem,
    of_table,
    register_solver,
)
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _ButcherTableau
from torchdiffeq._impl.solvers import FixedGridODESolver

import torchdiffeq_symplectic


@each_method
@each_mode
def test_gradients_equal_backpropagation(mode: str, method: str) -> None:
    found = assert_exact(mixing_problem(), mode, **METHODS[method])
    assert set(found) == {"y0[0]", "t", "weight", "bias", "frequency"}


@each_method
@each_mode
def test_gradients_of_one_output_inside_the_first_step(mode: str, method: str) -> None:
    problem = mixing_problem()
    problem.t = torch.tensor([0.1, 0.15, 1.1], dtype=torch.float64, requires_grad=True)
    assert_exact(problem, mode, outputs=slice(1, 2), **METHODS[method])


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", of_table(ADAMS))
@each_mode
def test_adams_methods_where_the_corrector_does_not_converge(mode: str, method: str, interp: str) -> None:
    """Then torchdiffeq drops the oldest slope, so the number of slopes that a step uses goes up and down."""
    options = {"step_size": 0.09, "max_iters": 2, "interp": interp}
    with (
        pytest.warns(UserWarning, match="did not converge") if method != "explicit_adams" else contextlib.nullcontext()
    ):
        assert_exact(mixing_problem(), mode, method=method, rtol=1e-12, options=options)


@pytest.mark.parametrize("max_order", [4, 5, 12])
@pytest.mark.parametrize("method", of_table(["explicit_adams", "implicit_adams"]))
@each_mode
def test_adams_methods_of_every_order(mode: str, method: str, max_order: int) -> None:
    options = {"step_size": 0.06, "max_order": max_order, "max_iters": 8}
    assert_exact(mixing_problem(), mode, method=method, rtol=1e-7, options=options)


@each_mode
def test_adams_method_that_reduces_to_rk4(mode: str) -> None:
    with pytest.warns(UserWarning, match="reduces to `rk4`"):
        assert_exact(mixing_problem(), mode, method="explicit_adams", options={"step_size": 0.2, "max_order": 3})


class Tsitouras(RKAdaptiveStepsizeODESolver):  # type: ignore[misc]
    """Tsitouras' 5(4) pair (https://doi.org/10.1016/j.camwa.2011.06.002), with a midpoint rule of no meaning."""

    order = 5
    tableau = _ButcherTableau(
        alpha=torch.tensor([0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0], dtype=torch.float64),
        beta=[
            torch.tensor(row, dtype=torch.float64)
            for row in (
                [0.161],
                [-0.008480655492356989, 0.335480655492357],
                [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
                [5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
                [5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383],
                [
                    0.09646076681806523,
                    0.01,
                    0.4798896504144996,
                    1.379008574103742,
                    -3.290069515436081,
                    2.324710524099774,
                ],
            )
        ],
        c_sol=torch.tensor(
            [
                0.09646076681806523,
                0.01,
                0.4798896504144996,
                1.379008574103742,
                -3.290069515436081,
                2.324710524099774,
                0,
            ],
            dtype=torch.float64,
        ),
        c_error=torch.tensor(
            [
                -0.00178001105222577714,
                -0.0008164344596567469,
                0.007880878010261995,
                -0.1447110071732629,
                0.5823571654525552,
                -0.45808210592918697,
                0.015151515151515152,
            ],
            dtype=torch.float64,
        ),
    )
    mid = torch.tensor([0.1, 0.2, -0.3, 0.4, 0.05, -0.15, 0.2], dtype=torch.float64)


class GenericTwoStage(FixedGridODESolver):  # type: ignore[misc]
    """The one-parameter family of two stages and order two; ``alpha`` is an option of its own."""

    order = 2

    def __init__(self, func: Any, y0: Tensor, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(func, y0, **kwargs)
        self.alpha = alpha

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        k1 = func(t0, y0)
        k2 = func(t0 + self.alpha * dt, y0 + self.alpha * dt * k1)
        share = 1 / (2 * self.alpha)
        return dt * ((1 - share) * k1 + share * k2), k1


@each_mode
def test_adaptive_method_that_the_user_added(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_solver(monkeypatch, "tsitouras", Tsitouras)
    options = {"first_step": 0.3}
    assert_exact(mixing_problem(), mode, method="tsitouras", rtol=1e-5, atol=1e-7, options=options)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@each_mode
def test_fixed_method_that_the_user_added_with_an_option(
    mode: str, interp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coefficients depend on the option, so one measurement must not serve another value of it."""
    register_solver(monkeypatch, "generic", GenericTwoStage)
    for alpha in (0.3, 1.0, 0.8):
        options = {"step_size": 0.2, "alpha": alpha, "interp": interp}
        assert_exact(mixing_problem(), mode, method="generic", options=options)


@each_mode
def test_method_whose_class_is_replaced_under_the_same_name(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_solver(monkeypatch, "rk4", GenericTwoStage)
    assert_exact(mixing_problem(), mode, method="rk4", options={"step_size": 0.2})
    register_solver(monkeypatch, "rk4", SOLVERS["heun3"])
    assert_exact(mixing_problem(), mode, method="rk4", options={"step_size": 0.2})


@each_mode
def test_method_whose_coefficients_are_replaced_in_its_class(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_solver(monkeypatch, "tsitouras", Tsitouras)
    kwargs: dict[str, Any] = {"method": "tsitouras", "rtol": 1e-5, "atol": 1e-7, "options": {"first_step": 0.3}}
    assert_exact(mixing_problem(), mode, **kwargs)
    monkeypatch.setattr(Tsitouras, "mid", Tsitouras.mid.flip(0))
    assert_exact(mixing_problem(), mode, **kwargs)


class ImplicitMidpoint(FixedGridODESolver):  # type: ignore[misc]
    """Iterated until it converges: the number of evaluations depends on the values."""

    order = 2

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = first = func(t0, y0)
        for _ in range(100):
            before, slope = slope, func(t0 + dt / 2, y0 + dt / 2 * slope)
            if float((slope - before).abs().max()) < 1e-12:
                break
        return dt * slope, first


class TwoStepMemory(FixedGridODESolver):  # type: ignore[misc]
    """Adams-Bashforth of order two: the slope of the step before is hidden in the solver."""

    order = 2
    last: Tensor | None = None

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        before, self.last = self.last, slope
        return (dt * slope if before is None else dt * (1.5 * slope - 0.5 * before)), slope


class NormalisedEuler(FixedGridODESolver):  # type: ignore[misc]
    """Nonlinear in the slope."""

    order = 1

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        return dt * slope / (1 + slope.abs()), slope


class DampedEuler(FixedGridODESolver):  # type: ignore[misc]
    """Linear in the slope, with a weight that depends on the step size, as exponential integrators have."""

    order = 1

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        return (1 - torch.exp(-dt)) * slope, slope


class ShrinkingEuler(FixedGridODESolver):  # type: ignore[misc]
    """Scales the state besides adding slopes."""

    order = 1

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        return dt * slope - 0.01 * y0, slope


class EverySecondStep(FixedGridODESolver):  # type: ignore[misc]
    """Euler and midpoint in turns."""

    order = 1

    def __init__(self, func: Any, y0: Tensor, **kwargs: Any) -> None:
        super().__init__(func, y0, **kwargs)
        self.turns = itertools.count()

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        first = func(t0, y0)
        if next(self.turns) % 2:
            return dt * func(t0 + dt / 2, y0 + dt / 2 * first), first
        return dt * first, first


UNKNOWN_FORMS = (ImplicitMidpoint, TwoStepMemory, NormalisedEuler, DampedEuler, ShrinkingEuler)


@pytest.mark.parametrize("solver", UNKNOWN_FORMS)
@each_mode
def test_steps_of_unknown_form_are_refused(
    mode: str, solver: type[FixedGridODESolver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the field is called, naming method and mode."""
    register_solver(monkeypatch, "strange", solver)
    assert _calls_before_refusal("strange", mode) == 0


@each_mode
def test_steps_that_only_seem_to_be_of_known_form_fail_in_backward(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    register_solver(monkeypatch, "strange", EverySecondStep)
    problem = mixing_problem()
    solution = torchdiffeq.odeint_adjoint(
        problem.func, problem.y0, problem.t, method="strange", options={"step_size": 0.2}, **MODES[mode]
    )
    with pytest.raises(torchdiffeq_symplectic.ReplayError):
        solution.sum().backward()


@each_mode
def test_scipy_is_refused(mode: str) -> None:
    assert _calls_before_refusal("scipy_solver", mode) == 0


def _calls_before_refusal(method: str, mode: str) -> int:
    problem = mixing_problem()
    calls = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(t)
        slope: Tensor = problem.func(t, y)
        return slope

    params = tuple(problem.func.parameters())  # type: ignore[attr-defined]
    name = MODES[mode]["adjoint_method"]
    with pytest.raises(NotImplementedError, match=f'(?s)method="{method}".*adjoint_method="{name}"'):
        torchdiffeq.odeint_adjoint(
            func, problem.y0, problem.t, method=method, options={}, adjoint_params=params, **MODES[mode]
        )
    return len(calls)
