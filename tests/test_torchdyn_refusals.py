"""torchdyn: what cannot be exact is refused or found out, never differentiated wrongly without a word."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    MODES,
    Mixing,
    assert_exact,
    assert_same_gradients,
    gradients_of,
    loss_of,
    problem_for,
    uniform,
)
from torch import Tensor, nn
from torchdyn.core import MultipleShootingProblem, NeuralODE, ODEProblem
from torchdyn.core.neuralde import MultipleShootingLayer
from torchdyn.numerics.solvers.ode import Euler, ImplicitEuler
from torchdyn.numerics.solvers.templates import DiffEqSolver
from torchdyn_runs import TOLERANCES, each_kind, each_named_kind, each_way_back, model_for, returned

from torchdiffeq_symplectic import ReplayError, ReplayWarning

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


# Steps of other forms that used to be refused, and are followed.


class NormalisedHeun(DiffEqSolver):  # type: ignore[misc]
    """Chooses its steps, and is nonlinear in the slopes."""

    def __init__(self) -> None:
        super().__init__(order=2, stepping_class="adaptive")

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        k1 = f(t, x) if k1 is None else k1
        k2 = f(t + dt, x + dt * k1)
        solution = x + dt / 2 * (k1 + k2) / (1 + (k1 * k2).square())
        return f(t + dt, solution), solution, dt / 2 * (k2 - k1), (k1, k2)


class TrainedHeun(DiffEqSolver):  # type: ignore[misc]
    """Has a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(order=2, stepping_class="adaptive")
        self.share = nn.Parameter(torch.tensor(0.5, dtype=DOUBLE))

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        k1 = f(t, x) if k1 is None else k1
        k2 = f(t + dt, x + dt * k1)
        return None, x + dt * (self.share * k1 + (1 - self.share) * k2), dt / 2 * (k2 - k1), (k1, k2)


class Branching(Euler):  # type: ignore[misc]
    """Euler's method, or the midpoint's where the state is large."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        if x.abs().max() > 1.1:
            slope = f(t + dt / 2, x + dt / 2 * slope)
        return None, x + dt * slope, None


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


@pytest.mark.parametrize("solver", [NormalisedHeun, TrainedHeun, Branching, Detaching, Blind])
@each_mode
def test_steps_of_other_forms_are_followed(mode: str, solver: Any) -> None:
    method = "torchdyn-fresh-heun" if issubclass(solver, DiffEqSolver) else "torchdyn-euler"
    problem = problem_for(method)
    problem.settings |= {"solver": solver(), **TOLERANCES}
    assert_exact(problem, mode, method)


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
    problem = problem_for("torchdyn-euler")
    problem.settings["solver"] = solver()
    with pytest.raises((NotImplementedError, ReplayError)):
        loss_of(returned(problem, mode, "torchdyn-euler")[1]).backward()


class Noisy(Mixing):
    """Draws from a generator that is out of reach, at each evaluation anew."""

    def __init__(self) -> None:
        super().__init__(6, seed=5)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        return super().forward(t, y) + 0.1 * torch.randn(y.shape, generator=self.generator, dtype=y.dtype)


@pytest.mark.parametrize("check", ["error", "warn", "ignore"])
@pytest.mark.parametrize("method", ["torchdyn-midpoint", "torchdyn-hyper-euler"])
@each_mode
def test_a_replay_that_differs_is_reported_as_asked_for(mode: str, method: str, check: str) -> None:
    problem = problem_for(method)
    problem.field, problem.adjoint = Noisy(), {"adjoint_options": {"replay_check": check}}
    loss = loss_of(returned(problem, mode, method)[1])
    if check == "error":
        with pytest.raises(ReplayError):
            loss.backward()
    elif check == "warn":
        with pytest.warns(ReplayWarning):
            loss.backward()
    else:
        loss.backward()


class Controlled(Mixing):
    control: Any = 1.0

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        return self.control * super().forward(t, y)


@each_kind
@each_mode
def test_a_number_that_is_replaced_before_backward_is_an_error_and_a_tensor_is_put_back(mode: str, method: str) -> None:
    problem = problem_for(method)
    field = problem.field = Controlled(6, seed=5)
    loss = loss_of(returned(problem, mode, method)[1])
    field.control = 0.9
    with pytest.raises(ReplayError):
        loss.backward()
    field.control = torch.tensor(1.1, dtype=DOUBLE)
    wanted = problem.wanted()
    truth = gradients_of(loss_of(returned(problem, BACKPROPAGATION, method)[1]), wanted)
    loss = loss_of(returned(problem, mode, method)[1])
    field.control = torch.tensor(0.9, dtype=DOUBLE)
    assert_same_gradients(gradients_of(loss, wanted), truth)


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
@each_kind
@each_mode
def test_a_field_that_raises_leaves_nothing_behind(mode: str, method: str, when: str) -> None:
    problem = problem_for(method)
    field = problem.field = Limited(6, seed=5)
    before, switched = _globals(), torch.is_grad_enabled()
    if when == "forward":
        field.budget = 3
        with pytest.raises(BudgetError):
            returned(problem, mode, method)
    else:
        loss = loss_of(returned(problem, mode, method)[1])
        field.budget = 3
        with pytest.raises(BudgetError):
            loss.backward()
        assert field.weight.grad is None
    assert _globals() == before
    assert torch.is_grad_enabled() == switched
    field.budget = 10**9
    assert_exact(problem, mode, method)


@each_named_kind
@each_way_back
def test_a_solution_that_is_changed_in_place_is_right_or_pytorchs_error(mode: str, method: str) -> None:
    """Its rows serve as checkpoints where every step is an output."""
    problem = problem_for(method)
    truth = gradients_of(loss_of(returned(problem, BACKPROPAGATION, method)[1] * 2), problem.wanted())
    loss = loss_of(returned(problem, mode, method)[1].mul_(2))
    try:
        found = gradients_of(loss, problem.wanted())
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert_same_gradients(found, truth)


@pytest.mark.parametrize("name", ["nonsense", "Symplectic"])
def test_unknown_names_are_errors(name: str) -> None:
    """Upstream calls None for an unknown sensitivity; the names that would have done are worth a sentence."""
    problem = problem_for("torchdyn-rk4")
    model = NeuralODE(problem.field, solver="rk4", sensitivity=name)
    with pytest.raises(ValueError, match=f"(?s)symplectic.*{name}"):
        model(problem.y0, problem.t)
    with pytest.raises(KeyError, match=name):
        NeuralODE(problem.field, solver="rk4", sensitivity="adjoint", solver_adjoint=name)
