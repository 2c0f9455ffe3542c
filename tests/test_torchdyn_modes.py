"""Every way to ask torchdyn for a mode and its options, and to leave it again."""

from __future__ import annotations

import gc
import pickle
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
    Net,
    assert_equal_values,
    assert_same_gradients,
    each_mode,
    error,
    gradients_of,
    initial,
    loss_of,
    neural_ode,
    problem_for,
    times,
    uniform,
)
from torch import Tensor, nn
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn_runs import each_named_kind, model_for, returned

each_name = pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])


class Partly(Mixing):
    """Of whose parameters one is not used: it gets zeros from this package, and nothing from torchdyn."""

    def __init__(self) -> None:
        super().__init__(6, seed=5)
        self.idle = nn.Parameter(torch.ones(4, dtype=DOUBLE))


class Learner(NeuralODE):  # type: ignore[misc]
    def __init__(self, field: Any, solver: str, mode: str) -> None:
        super().__init__(field, solver, sensitivity=mode)


def _changed_from(before: str, attribute: str = "sensitivity") -> Callable[[Any, str, str], Any]:
    def change(field: Any, solver: str, mode: str) -> Any:
        model = NeuralODE(field, solver=solver, sensitivity=before)
        setattr(model, attribute, mode)
        return model

    return change


def _after_a_solve(field: Any, solver: str, mode: str) -> Any:
    model = NeuralODE(field, solver=solver)
    model(uniform(2, 3, seed=12), torch.linspace(0, 1, 3))
    model.sensitivity = mode
    return model


SPELLINGS: dict[str, Callable[[Any, str, str], Any]] = {
    "sensitivity": lambda field, solver, mode: NeuralODE(field, solver=solver, sensitivity=mode),
    "solver_adjoint": lambda f, solver, mode: NeuralODE(f, solver=solver, sensitivity="adjoint", solver_adjoint=mode),
    "beside an adjoint solver": lambda field, solver, mode: NeuralODE(
        field, solver=solver, sensitivity=mode, solver_adjoint="dopri5", atol_adjoint=1e-5
    ),
    "by position": lambda field, solver, mode: NeuralODE(field, solver, 1, 1e-3, 1e-3, mode),
    "solver_adjoint by position": lambda field, solver, mode: NeuralODE(
        field, solver, 1, 1e-3, 1e-3, "interpolated_adjoint", mode
    ),
    "ODEProblem by position": lambda field, solver, mode: ODEProblem(field, solver, None, 1, 1e-3, 1e-3, mode),
    "a subclass": Learner,
    "changed from autograd": _changed_from("autograd"),
    "changed from adjoint": _changed_from("adjoint"),
    "changed from interpolated_adjoint": _changed_from("interpolated_adjoint"),
    "changed from another mode": _changed_from("aca"),
    "sensalg": _changed_from("autograd", "sensalg"),
    "changed after a solve": _after_a_solve,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@each_named_kind
@each_name
def test_ways_to_ask_for_a_mode(mode: str, method: str, spelling: str) -> None:
    """Exact; and it is this package's, as an unused parameter gets zeros."""
    problem = problem_for(method)
    problem.field, problem.settings = Partly(), {"atol": 1e-3, "rtol": 1e-3}
    wanted, truth = problem.wanted(), returned(problem, BACKPROPAGATION, method)
    found = SPELLINGS[spelling](problem.field, method.removeprefix("torchdyn-"), mode)(problem.y0, problem.t)
    assert_equal_values(found, truth)
    gradients = gradients_of(loss_of(found[1]), wanted)
    assert_same_gradients(gradients, gradients_of(loss_of(truth[1]), wanted))
    assert gradients["idle"] is not None


@pytest.mark.parametrize("attribute", ["sensitivity", "sensalg"])
@each_named_kind
@each_name
def test_a_model_goes_back_to_autograd(mode: str, method: str, attribute: str) -> None:
    """Then the graph is torchdyn's own again, and the unused parameter has no gradient."""
    problem = problem_for(method)
    problem.field = Partly()
    truth = gradients_of(loss_of(returned(problem, BACKPROPAGATION, method)[1]), problem.wanted())
    model = model_for(problem, mode, method)
    setattr(model, attribute, "autograd")
    found = gradients_of(loss_of(returned(problem, BACKPROPAGATION, method, model)[1]), problem.wanted())
    assert_same_gradients(found, truth)
    assert found["idle"] is None


# Options.


@pytest.mark.parametrize("mode", MODES)
def test_unknown_options_warn(mode: str) -> None:
    problem = problem_for("torchdyn-rk4")
    problem.adjoint = {"adjoint_options": {"checkpoints": 3}}
    with pytest.warns(UserWarning, match="Unexpected arguments .*checkpoints"):
        returned(problem, mode, "torchdyn-rk4")


@pytest.mark.parametrize("name", ["replay_check", "checkpoint"])
def test_wrong_values_of_options_name_the_argument(name: str) -> None:
    problem = problem_for("torchdyn-rk4")
    problem.adjoint = {"adjoint_options": {name: "sometimes"}}
    with pytest.raises(ValueError, match=f"(?s){name}.*sometimes"):
        returned(problem, "symplectic", "torchdyn-rk4")


@pytest.mark.parametrize("options", ["stages", ["checkpoint"], 5])
def test_options_that_are_no_dictionary_are_named(options: Any) -> None:
    problem = problem_for("torchdyn-rk4")
    model = model_for(problem, "symplectic", "torchdyn-rk4")
    model.adjoint_options = options
    with pytest.raises(TypeError, match="adjoint_options must be a dictionary"):
        model(problem.y0, problem.t)


# What others build upon torchdyn.


class OwnName(ODEProblem):  # type: ignore[misc]
    """A subclass that knows a sensitivity of its own."""

    def _autograd_func(self) -> Any:
        return self.own if self.sensalg == "own" else super()._autograd_func()

    def own(self, vf_params: Any, x: Tensor, t_span: Tensor, B: Any = None, save_at: Any = ()) -> Any:  # noqa: N803
        return t_span, x.expand(len(t_span), *x.shape) * 2


def test_a_subclass_may_know_names_of_its_own() -> None:
    problem = OwnName(nn.Linear(3, 3).double(), "rk4", sensitivity="autograd")
    problem.sensalg = "own"
    x, t = uniform(4, 3, seed=1), torch.linspace(0, 1, 6, dtype=DOUBLE)
    assert torch.equal(problem.odeint(x, t)[1], x.expand(6, 4, 3) * 2)


def test_the_function_is_pickled_by_its_name() -> None:
    odeint = sys.modules["torchdyn.numerics"].odeint
    assert pickle.loads(pickle.dumps(odeint)) is odeint


@each_mode
def test_a_call_leaves_no_reference_cycles(mode: str) -> None:
    field = Net()

    def run() -> None:
        neural_ode(mode, field, solver="rk4")(initial(), times())[1].sum().backward()

    run()
    gc.collect()
    gc.disable()
    try:
        run()
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_a_solve_inside_of_a_compiled_function() -> None:
    model, x = neural_ode("symplectic", Net(), solver="rk4"), initial()

    def loss(x: Tensor) -> Tensor:
        return loss_of(model(x, times())[1])

    compiled = torch.compile(loss, backend="eager")
    (expected,), (found,) = (torch.autograd.grad(function(x), x) for function in (loss, compiled))
    assert error([found], [expected]) < 1e-12
