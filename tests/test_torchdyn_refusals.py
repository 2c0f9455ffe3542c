"""torchdyn: what cannot be exact is refused or found out, never differentiated wrongly without a word."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from cases import gradients_of, loss_of, uniform
from torch import Tensor, nn
from torchdyn.core import MultipleShootingProblem, ODEProblem
from torchdyn.core.neuralde import MultipleShootingLayer
from torchdyn.numerics.solvers.ode import Euler, ImplicitEuler
from torchdyn.numerics.solvers.templates import DiffEqSolver
from torchdyn_cases import (
    DOUBLE,
    MODES,
    Field,
    FreshHeun,
    State,
    assert_exact,
    each_kind,
    each_mode,
    each_named_kind,
    problem_for,
    weighed,
)

import torchdiffeq_symplectic

NAMES = {mode: settings["sensitivity"] for mode, settings in MODES.items()}


class NewtonEuler(ImplicitEuler):  # type: ignore[misc]
    """A user's own variant."""


IMPLICIT: dict[str, Callable[[], Any]] = {
    "ieuler": lambda: "ieuler",
    "implicit_euler": lambda: "implicit_euler",
    "ImplicitEuler()": ImplicitEuler,
    "a subclass": NewtonEuler,
}


@pytest.mark.parametrize("make", [None, ODEProblem], ids=["NeuralODE", "ODEProblem"])
@pytest.mark.parametrize("solver", IMPLICIT)
@each_mode
def test_implicit_solvers_are_refused(mode: str, solver: str, make: Any) -> None:
    """The message names solver, mode and the way out."""
    problem = problem_for("euler")
    problem.settings = {"solver": IMPLICIT[solver](), "atol": 1e-3, "rtol": 1e-3}
    problem.make = make or problem.make
    pattern = f'(?s)(ImplicitEuler|NewtonEuler).*sensitivity="{NAMES[mode]}".*sensitivity="autograd"'
    with pytest.raises(NotImplementedError, match=pattern):
        problem.solve(mode)


@each_mode
def test_implicit_solvers_are_refused_by_trajectory(mode: str) -> None:
    problem = problem_for("euler")
    problem.settings["solver"] = "ieuler"
    with pytest.raises(NotImplementedError, match="ImplicitEuler"):
        problem.model(mode).trajectory(problem.x, problem.t_span)  # type: ignore[operator]


class NormalisedHeun(DiffEqSolver):  # type: ignore[misc]
    """Chooses its steps, and is nonlinear in the slopes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(order=2, stepping_class="adaptive")
        self.dtype = dtype

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        k1 = f(t, x) if k1 is None else k1
        k2 = f(t + dt, x + dt * k1)
        solution = x + dt / 2 * (k1 + k2) / (1 + (k1 * k2).square())
        return f(t + dt, solution), solution, dt / 2 * (k2 - k1), (k1, k2)


class TrainedHeun(FreshHeun):
    """Has a parameter of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.share = nn.Parameter(torch.tensor(0.5, dtype=dtype))

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        k1 = f(t, x) if k1 is None else k1
        k2 = f(t + dt, x + dt * k1)
        return None, x + dt * (self.share * k1 + (1 - self.share) * k2), dt / 2 * (k2 - k1), (k1, k2)


@pytest.mark.parametrize("solver", [NormalisedHeun, TrainedHeun])
@each_mode
def test_adaptive_solvers_of_another_form_are_refused(mode: str, solver: Any) -> None:
    problem = problem_for("fresh-heun")
    problem.settings["solver"] = solver(DOUBLE)
    pattern = f'(?s){solver.__name__}.*sensitivity="{NAMES[mode]}".*sensitivity="autograd"'
    with pytest.raises(NotImplementedError, match=pattern):
        problem.solve(mode)


def _shoot(make: Any, solver: str, mode: str, *, later: bool) -> Any:
    field, x = Field(6, seed=5), uniform(2, 3, seed=12).requires_grad_()
    model = make(field, solver, sensitivity="autograd" if later else NAMES[mode])
    if later:
        model.sensitivity = NAMES[mode]
    return model(x, torch.linspace(0, 1, 5, dtype=DOUBLE))


@pytest.mark.parametrize("later", [False, True], ids=["constructed", "changed later"])
@pytest.mark.parametrize("solver", ["zero", "backward", "parallel-implicit-euler"])
@pytest.mark.parametrize("make", [MultipleShootingProblem, MultipleShootingLayer])
@each_mode
def test_multiple_shooting_is_refused(mode: str, make: Any, solver: str, later: bool) -> None:
    pattern = f'(?s)shooting.*{solver}.*sensitivity="{NAMES[mode]}".*sensitivity="autograd"'
    with pytest.raises(NotImplementedError, match=pattern):
        _shoot(make, solver, mode, later=later)


# Steps that hide something from whoever looks at one of them alone.


class Remembering(Euler):  # type: ignore[misc]
    """Adams and Bashforth's method of order two: the slope of the step before is in the solver."""

    def __init__(self) -> None:
        super().__init__(DOUBLE)
        self.last: Tensor | None = None

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        before, self.last = self.last, slope
        return None, x + dt * (slope if before is None else 1.5 * slope - 0.5 * before), None


class Alternating(Euler):  # type: ignore[misc]
    """Euler and midpoint in turns."""

    def __init__(self) -> None:
        super().__init__(DOUBLE)
        self.turns = itertools.count()

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        if next(self.turns) % 2:
            slope = f(t + dt / 2, x + dt / 2 * slope)
        return None, x + dt * slope, None


class Momentum(Euler):  # type: ignore[misc]
    """Keeps a velocity of its own from step to step."""

    def __init__(self) -> None:
        super().__init__(DOUBLE)
        self.velocity: Any = 0.0

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        self.velocity = 0.7 * self.velocity + f(t, x)
        return None, x + dt * self.velocity, None


@pytest.mark.parametrize("solver", [Remembering, Alternating, Momentum])
@each_mode
def test_solvers_with_a_memory_are_found_out(mode: str, solver: Any) -> None:
    """Before the solve, or by the check of the replay."""
    problem = problem_for("euler")
    problem.settings["solver"] = solver()
    with pytest.raises((NotImplementedError, torchdiffeq_symplectic.ReplayError)):
        weighed(*problem.solve(mode)).backward()


class Detaching(Euler):  # type: ignore[misc]
    """Stops the gradient of its slope, as a user may want it: the step looks like one of Runge-Kutta form."""

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
def test_gradients_that_a_step_stops_stay_stopped(mode: str, solver: Any) -> None:
    problem = problem_for("euler")
    problem.settings["solver"] = solver(DOUBLE)
    assert_exact(problem, mode)


class Noisy(Field):
    """Draws from a generator that is out of reach, at each evaluation anew."""

    def __init__(self) -> None:
        super().__init__(6, seed=5)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        noise = torch.randn(y.shape, generator=self.generator, dtype=y.dtype)
        return super().forward(t, y) + 0.1 * noise


@each_mode
@pytest.mark.parametrize("solver", ["midpoint", "rk4", "hyper-euler"])
def test_a_replay_that_differs_is_an_error(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.field = Noisy()
    loss = weighed(*problem.solve(mode))
    with pytest.raises(torchdiffeq_symplectic.ReplayError):
        loss.backward()


@each_mode
@each_kind
def test_an_attribute_that_is_replaced_before_backward_is_an_error(mode: str, solver: str) -> None:
    class Controlled(Field):
        control = 1.0

        def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            return self.control * super().forward(t, y)

    problem = problem_for(solver)
    field = problem.field = Controlled(6, seed=5)
    loss = weighed(*problem.solve(mode))
    field.control = 0.9
    with pytest.raises(torchdiffeq_symplectic.ReplayError):
        loss.backward()


@each_mode
@pytest.mark.parametrize("check", ["warn", "ignore"])
def test_the_check_may_warn_or_be_silent(mode: str, check: str) -> None:
    problem = problem_for("midpoint")
    problem.field, problem.options = Noisy(), {"replay_check": check}
    loss = weighed(*problem.solve(mode))
    if check == "ignore":
        loss.backward()
    else:
        with pytest.warns(torchdiffeq_symplectic.ReplayWarning):
            loss.backward()


@each_mode
@pytest.mark.parametrize("part", ["field", "solver"])
def test_a_parameter_that_is_changed_before_backward_raises_pytorchs_error(mode: str, part: str) -> None:
    problem = problem_for("hyper-euler")
    loss = weighed(*problem.solve(mode))
    module: nn.Module = problem.settings["solver"] if part == "solver" else problem.field  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class BudgetError(Exception):
    """The field has been evaluated too often."""


class Limited(Field):
    """Raises when its evaluations are used up."""

    budget = 10**9

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        self.budget -= 1
        if self.budget < 0:
            raise BudgetError
        return super().forward(t, y)


def _globals() -> list[Any]:
    """What of torchdyn anyone could have replaced for the time of a solve."""
    module = sys.modules["torchdyn.numerics.odeint"]
    names = ("init_step", "adapt_step", "hairer_norm", "_adaptive_odeint", "_fixed_odeint", "odeint", "str_to_solver")
    return [getattr(module, name) for name in names]


@each_mode
@each_kind
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_field_that_raises_leaves_nothing_behind(mode: str, solver: str, when: str) -> None:
    problem = problem_for(solver)
    field = problem.field = Limited(6, seed=5)
    before, switched = _globals(), torch.is_grad_enabled()
    if when == "forward":
        field.budget = 3
        with pytest.raises(BudgetError):
            problem.solve(mode)
    else:
        loss = weighed(*problem.solve(mode))
        field.budget = 3
        with pytest.raises(BudgetError):
            loss.backward()
        assert field.weight.grad is None
    assert _globals() == before
    assert torch.is_grad_enabled() == switched
    field.budget = 10**9
    assert_exact(problem, mode)


@each_named_kind
@each_mode
def test_the_solution_may_be_changed_in_place(mode: str, solver: str) -> None:
    """What is recorded is not what the caller holds."""

    def changed(t_eval: Tensor, solution: State) -> Tensor:
        assert isinstance(solution, Tensor)
        copy = solution * 1
        return loss_of(copy.mul_(2))

    assert_exact(problem_for(solver), mode, changed)
    problem = problem_for(solver)
    _, solution = problem.solve(mode)
    assert isinstance(solution, Tensor)
    loss = loss_of(solution.mul_(2))
    truth = problem.gradients("autograd", changed)
    found = gradients_of(loss, problem.wanted())
    for name, expected in truth.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["nonsense", "Symplectic"])
def test_unknown_names_are_errors(name: str) -> None:
    """Upstream calls None for an unknown sensitivity; the names that would have done are worth a sentence."""
    problem = problem_for("rk4")
    model = problem.make(problem.field, solver="rk4", sensitivity=name)
    with pytest.raises(ValueError, match=f"(?s)symplectic.*{name}"):
        model(problem.x, problem.t_span)
    with pytest.raises(KeyError, match=name):
        problem.make(problem.field, solver="rk4", sensitivity="adjoint", solver_adjoint=name)
