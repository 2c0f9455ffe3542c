"""With a gradient mode on, the forward pass is the host's own: values, calls, words and errors, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import (
    BACKPROPAGATION,
    FEW,
    METHODS,
    OF_TORCHDIFFEQ,
    Mixing,
    each_mode,
    initial,
    over,
    problem_for,
    solve,
    times,
    uniform,
)
from torch import Tensor

import torchdiffeq_symplectic

of_torchdiffeq = pytest.mark.parametrize("method", OF_TORCHDIFFEQ)


class Recorded(Mixing):
    """Notes each time and state it is asked for, whether gradients were enabled, and what the solver reports."""

    def __init__(self, size: int) -> None:
        super().__init__(size, seed=5)
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.reports: list[tuple[str, float, float]] = []

    def forward(self, t: Tensor, y: Any, args: Any = None) -> Any:
        self.calls.append((t.detach().clone(), y.detach().clone()))
        return super().forward(t, y)

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.reports.append(("step", float(t0.detach()), float(dt.detach())))

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.reports.append(("accept", float(t0.detach()), float(dt.detach())))

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.reports.append(("reject", float(t0.detach()), float(dt.detach())))


def observed(mode: str, method: str) -> tuple[Tensor, Recorded]:
    problem = problem_for(method)
    field = Recorded(6)
    with warnings.catch_warnings():  # a solver that knows no callback says so, in every mode
        warnings.filterwarnings("ignore", message="Solver .* does not support callbacks|.*callback")
        return solve(mode, field, problem.y0, problem.t, method, **problem.settings), field


@pytest.mark.whole
@over(METHODS, every=2)
def test_values_calls_and_reports_are_those_of_the_host(mode: str, method: str) -> None:
    truth, expected = observed(BACKPROPAGATION, method)
    found, field = observed(mode, method)
    assert torch.equal(found, truth)
    assert found.requires_grad
    assert len(field.calls) == len(expected.calls)
    for (t, y), (true_t, true_y) in zip(field.calls, expected.calls, strict=True):
        assert torch.equal(t, true_t)
        assert torch.equal(y, true_y)
    assert field.reports == expected.reports


@over(FEW)
def test_values_are_the_same_without_gradients(mode: str, method: str) -> None:
    problem = problem_for(method)
    truth = solve(BACKPROPAGATION, problem.field, problem.y0, problem.t, method)
    with torch.no_grad():
        found = solve(mode, problem.field, problem.y0, problem.t, method)
    assert torch.equal(found, truth)
    assert not found.requires_grad


@of_torchdiffeq
def test_the_packages_own_function_is_the_patched_one(method: str) -> None:
    problem = problem_for(method)
    own = torchdiffeq_symplectic.odeint_adjoint(
        problem.field, problem.y0, problem.t, method=method, adjoint_method="symplectic", **METHODS[method].settings
    )
    assert torch.equal(own, solve("symplectic", problem.field, problem.y0, problem.t, method))


@each_mode
def test_all_defaults_are_torchdiffeqs(mode: str) -> None:
    field, y0 = Mixing(6), uniform(2, 3, seed=4).requires_grad_()
    truth = torchdiffeq.odeint(field, y0, times())
    name = "symplectic" if mode == "stages" else mode
    assert torch.equal(torchdiffeq.odeint_adjoint(field, y0, times(), adjoint_method=name), truth)


# Errors and warnings of the host, which a mode must neither swallow nor replace.

FAULTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no times": lambda call: call | {"t": torch.empty(0, dtype=torch.float64)},
    "times in disorder": lambda call: call | {"t": times(0.0, 0.5, 0.2)},
    "times of rank 2": lambda call: call | {"t": times().reshape(2, 2)},
    "unknown method": lambda call: call | {"method": "no_such_method"},
    "state of whole numbers": lambda call: call | {"y0": torch.ones(2, 3, dtype=torch.int64)},
    "times of whole numbers": lambda call: call | {"t": torch.tensor([0, 1])},
    "two grids": lambda call: call | {"options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}},
    "unknown interpolation": lambda call: call | {"options": {"step_size": 0.3, "interp": "quintic"}},
    "unknown option": lambda call: call | {"options": {"step_size": 0.3, "grid_points": 3}},
    "too many steps": lambda call: call | {"method": "dopri5", "options": {"max_num_steps": 1}, "t": times(0.0, 9.0)},
}


def words(solve: Callable[..., Any], call: dict[str, Any]) -> tuple[str, list[str]]:
    """What an attempt raises and warns."""
    raised = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            solve(**call)
        except Exception as problem:  # noqa: BLE001 (any error of the host is to be compared)
            raised = f"{type(problem).__name__}: {problem}"
    return raised, sorted({str(warning.message) for warning in caught})


@pytest.mark.parametrize("fault", FAULTS)
@each_mode
def test_errors_and_warnings_are_those_of_odeint(mode: str, fault: str) -> None:
    call = FAULTS[fault]({"func": Mixing(6), "y0": initial(), "t": times(), "method": "rk4"})
    expected = words(torchdiffeq.odeint, call)
    assert expected != ("", [])
    name = "symplectic" if mode == "stages" else mode
    assert words(torchdiffeq.odeint_adjoint, call | {"adjoint_method": name}) == expected
