"""Steps that iterate: what autograd can follow is differentiated as it ran, iterations and all.

torchdiffeq's releases have no such methods, so two small ones are put into its table: a one-stage method solved by
fixed-point iterations, and a two-stage one solved by Newton's method with a Jacobian that autograd makes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from harness import (
    Net,
    assert_exact,
    count,
    each_mode,
    initial,
    loss_of,
    over,
    problem_for,
    register_solver,
    solve,
    times,
)
from torch import Tensor
from torchdiffeq._impl.solvers import FixedGridODESolver

from torchdiffeq_symplectic import ReplayError


class ImplicitMidpoint(FixedGridODESolver):  # type: ignore[misc]
    """One stage, by fixed-point iterations: how many there are depends on the values."""

    order = 2
    iterations = 0

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = first = func(t0, y0)
        for _ in range(100):
            type(self).iterations += 1
            before, slope = slope, func(t0 + dt / 2, y0 + dt / 2 * slope)
            if float((slope - before).detach().abs().max()) < 1e-10:
                break
        return dt * slope, first


class ImplicitEuler(FixedGridODESolver):  # type: ignore[misc]
    """One stage at the end of the step; the slope at its start is never asked for."""

    order = 1

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        y1 = y0
        for _ in range(8):
            y1 = y0 + dt * func(t1, y1)
        slope = func(t1, y1)
        return dt * slope, slope


class GaussLegendre(FixedGridODESolver):  # type: ignore[misc]
    """Two stages of order four, solved by three steps of Newton's method, whose Jacobian comes from autograd."""

    order = 4

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        root = 3**0.5
        nodes = (0.5 - root / 6, 0.5 + root / 6)
        matrix = torch.tensor([[0.25, 0.25 - root / 6], [0.25 + root / 6, 0.25]], dtype=y0.dtype)
        size = y0.numel()

        def residual(slopes: Tensor) -> Tensor:
            states = [y0 + dt * torch.tensordot(row, slopes.view(2, *y0.shape), 1) for row in matrix]
            found = torch.stack([func(t0 + node * dt, state) for node, state in zip(nodes, states, strict=True)])
            return slopes - found.reshape(-1)

        slopes = torch.stack([func(t0, y0)] * 2).reshape(-1)
        for _ in range(3):
            with torch.enable_grad():
                point = slopes.detach().requires_grad_()
                value = residual(point)
                rows = [torch.autograd.grad(value[i], point, retain_graph=True)[0] for i in range(2 * size)]
            slopes = slopes - torch.linalg.solve(torch.stack(rows), residual(slopes))
        first, second = slopes.view(2, *y0.shape)
        return dt * (first + second) / 2, first


class ExponentialEuler(FixedGridODESolver):  # type: ignore[misc]
    """Linear in the slope, with a weight that is no multiple of the step size."""

    order = 1

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        return (1 - torch.exp(-dt)) * slope - 0.01 * y0, slope


class NormalisedEuler(FixedGridODESolver):  # type: ignore[misc]
    """Nonlinear in the slope."""

    order = 1

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        return dt * slope / (1 + slope.abs()), slope


class Remembering(FixedGridODESolver):  # type: ignore[misc]
    """Adams-Bashforth of order two: the slope of the step before is hidden in the solver."""

    order = 2
    last: Tensor | None = None

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        slope = func(t0, y0)
        before, self.last = self.last, slope
        return (dt * slope if before is None else dt * (1.5 * slope - 0.5 * before)), slope


IMPLICIT = {"implicit_midpoint": ImplicitMidpoint, "implicit_euler": ImplicitEuler, "gauss_legendre": GaussLegendre}
SOLVERS: dict[str, type] = {**IMPLICIT, "exponential": ExponentialEuler, "normalised": NormalisedEuler}


@pytest.fixture(autouse=True)
def solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solvers are in torchdiffeq's table, and in the harness's, for one test."""
    for name, solver in {**SOLVERS, "remembering": Remembering}.items():
        register_solver(monkeypatch, name, solver)
    monkeypatch.setattr(ImplicitMidpoint, "iterations", 0)


@over(SOLVERS)
def test_gradients_of_state_parameters_and_times_are_backpropagations(mode: str, method: str) -> None:
    found = assert_exact(problem_for(), mode, method)
    assert {"y0[0]", "t", "weight", "bias", "frequency"} <= set(found)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@over(SOLVERS, ["symplectic", "stages", "aca"])
def test_outputs_between_the_steps(mode: str, method: str, interp: str) -> None:
    assert_exact(problem_for(), mode, method, options={"step_size": 0.3, "interp": interp})


@pytest.mark.parametrize("mode", ["symplectic", "aca"])
def test_one_evaluation_of_the_field_is_replayed_for_each_of_the_solve(mode: str) -> None:
    """`symplectic` evaluates each stage twice, `aca` once."""
    field, solutions = Net(), list[Tensor]()
    y0 = initial()
    forward = count(field, lambda: solutions.append(solve(mode, field, y0, times(0.0, 1.0), "implicit_midpoint")))
    backward = count(field, lambda: loss_of(solutions[0]).backward())
    assert backward <= (2 if mode == "symplectic" else 1) * forward


@each_mode
def test_a_solver_with_a_hidden_memory_is_never_silently_wrong(mode: str) -> None:
    """Exact, or refused before the solve, or found out in backward."""
    problem = problem_for()
    with contextlib.suppress(NotImplementedError, ReplayError):
        assert_exact(problem, mode, "remembering")
