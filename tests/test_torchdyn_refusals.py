"""torchdyn: what cannot be exact is refused or found out, never differentiated wrongly without a word."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import (
    DOUBLE,
    MODES,
    Mixing,
    assert_exact,
    loss_of,
    over,
    problem_for,
    solve,
    uniform,
)
from torch import Tensor
from torchdyn.core import MultipleShootingProblem, NeuralODE, ODEProblem
from torchdyn.core.neuralde import MultipleShootingLayer
from torchdyn.numerics.solvers.ode import Euler, ImplicitEuler
from torchdyn_runs import TOLERANCES, model_for, returned

from torchdiffeq_symplectic import ReplayError

each_mode = pytest.mark.parametrize("mode", MODES)


class NewtonEuler(ImplicitEuler):  # type: ignore[misc]
    """A user's own variant."""


IMPLICIT: dict[str, Callable[[], Any]] = {"ieuler": lambda: "ieuler", "object": ImplicitEuler, "subclass": NewtonEuler}


@pytest.mark.parametrize("make", [NeuralODE, ODEProblem])
@pytest.mark.parametrize("solver", IMPLICIT)
@each_mode
def test_implicit_solvers_are_refused(mode: str, solver: str, make: Any) -> None:
    """Before the solve: the message names solver, mode and the way out."""
    problem = problem_for("torchdyn-euler")
    problem.settings = {"solver": IMPLICIT[solver](), "make": make, **TOLERANCES}
    name = MODES[mode]["adjoint_method"]
    with pytest.raises(
        NotImplementedError, match=f'(?s)(ImplicitEuler|NewtonEuler).*="{name}".*sensitivity="autograd"'
    ):
        returned(problem, mode, "torchdyn-euler")
    if make is NeuralODE:
        with pytest.raises(NotImplementedError, match=r"ImplicitEuler|NewtonEuler"):
            model_for(problem, mode, "torchdyn-euler").trajectory(problem.y0, problem.t)


@pytest.mark.parametrize("later", [False, True], ids=["constructed", "changed later"])
@pytest.mark.parametrize("solver", ["zero", "backward", "parallel-implicit-euler"])
@pytest.mark.parametrize("make", [MultipleShootingProblem, MultipleShootingLayer])
@each_mode
def test_multiple_shooting_is_refused(mode: str, make: Any, solver: str, later: bool) -> None:
    name = MODES[mode]["adjoint_method"]
    model = make(Mixing(6, seed=5), solver, sensitivity="autograd" if later else name)
    model.sensitivity = name
    with pytest.raises(NotImplementedError, match=f'(?s)shooting.*{solver}.*="{name}".*sensitivity="autograd"'):
        model(uniform(2, 3, seed=12).requires_grad_(), torch.linspace(0, 1, 5, dtype=DOUBLE))


# Steps of other forms, which are followed.


class Detaching(Euler):  # type: ignore[misc]
    """Stops the gradient of its slope, as a user may want it."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        first = f(t, x)
        second = f(t + dt / 2, x + dt / 2 * first.detach())
        return None, x + dt * (0.3 * first.detach() + 0.7 * second), None


class Blind(Euler):  # type: ignore[misc]
    """Half of its step is taken without gradients."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        with torch.no_grad():
            first = f(t, x)
        return None, x + dt * (0.3 * first + 0.7 * f(t + dt / 2, x + dt / 2 * first)), None


@pytest.mark.parametrize("solver", [Detaching, Blind])
@each_mode
def test_steps_that_stop_gradients_are_followed(mode: str, solver: Any) -> None:
    problem = problem_for("torchdyn-euler")
    problem.settings["solver"] = solver()
    assert_exact(problem, mode, "torchdyn-euler")


# Steps that hide something.


class Remembering(Euler):  # type: ignore[misc]
    """Adams and Bashforth's method of order two: the slope of the step before is in the solver."""

    def __init__(self) -> None:
        super().__init__(DOUBLE)
        self.last: Tensor | None = None

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        before, self.last = self.last, slope
        return None, x + dt * (slope if before is None else 1.5 * slope - 0.5 * before), None


@each_mode
def test_a_solver_with_a_memory_is_found_out(mode: str) -> None:
    """Before the solve, or by the check of the replay."""
    problem = problem_for("torchdyn-euler")
    problem.settings["solver"] = Remembering()
    with pytest.raises((NotImplementedError, ReplayError)):
        loss_of(returned(problem, mode, "torchdyn-euler")[1]).backward()


@pytest.mark.parametrize("part", ["field", "solver"])
@each_mode
def test_a_parameter_that_is_changed_before_backward_raises_pytorchs_error(mode: str, part: str) -> None:
    problem = problem_for("torchdyn-hyper-euler")
    loss = loss_of(returned(problem, mode, "torchdyn-hyper-euler")[1])
    module: Any = problem.settings["solver"] if part == "solver" else problem.field
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class BudgetError(Exception):
    """The field has been evaluated too often."""


class Limited(Mixing):
    """Raises when its evaluations are used up."""

    budget = 10**9

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        self.budget -= 1
        if self.budget < 0:
            raise BudgetError
        return super().forward(t, y)


def _globals() -> list[Any]:
    """What of torchdyn anyone could have replaced for the time of a solve."""
    module = sys.modules["torchdyn.numerics.odeint"]
    names = ("init_step", "adapt_step", "hairer_norm", "_adaptive_odeint", "_fixed_odeint", "odeint", "str_to_solver")
    return [getattr(module, name) for name in names]


@pytest.mark.parametrize("when", ["forward", "backward"])
@over(["rk4", "dopri5", "torchdyn-rk4", "torchdyn-dopri5", "torchdyn-hyper-euler"])
def test_a_field_that_raises_leaves_nothing_behind(mode: str, method: str, when: str) -> None:
    problem = problem_for(method)
    field = problem.field = Limited(6, seed=5)
    before, switched = _globals(), torch.is_grad_enabled()
    if when == "forward":
        field.budget = 3
        with pytest.raises(BudgetError):
            solve(mode, field, problem.y0, problem.t, method, **problem.settings)
    else:
        loss = loss_of(solve(mode, field, problem.y0, problem.t, method, **problem.settings))
        field.budget = 3
        with pytest.raises(BudgetError):
            loss.backward()
        assert field.weight.grad is None
    assert _globals() == before
    assert torch.is_grad_enabled() == switched
    field.budget = 10**9
    assert_exact(problem, mode, method)


@pytest.mark.parametrize("name", ["nonsense", "Symplectic"])
def test_unknown_names_are_errors(name: str) -> None:
    """Upstream calls None for an unknown sensitivity; the names that would have done are worth a sentence."""
    problem = problem_for("torchdyn-rk4")
    model = NeuralODE(problem.field, solver="rk4", sensitivity=name)
    with pytest.raises(ValueError, match=f"(?s)symplectic.*{name}"):
        model(problem.y0, problem.t)
    with pytest.raises(KeyError, match=name):
        NeuralODE(problem.field, solver="rk4", sensitivity="adjoint", solver_adjoint=name)
