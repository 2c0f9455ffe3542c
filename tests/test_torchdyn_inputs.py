"""torchdyn: everything that its calls take, meaning what its autograd mode makes of it."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    Mixing,
    Problem,
    assert_equal_values,
    assert_exact,
    assert_same_gradients,
    first_step_held,
    gradients_of,
    loss_of,
    norm_of,
    problem_for,
    uniform,
)
from torch import Tensor, nn
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.numerics.solvers.ode import Euler, RungeKutta4, SolverTemplate
from torchdyn_runs import TOLERANCES, each_kind, each_named_kind, each_way_back, model_for, returned

# Which of the eight times of the fixed-step problems are saved.
SAVED = {"all": [0, 1, 2, 3, 4, 5, 6, 7], "inner": [1, 2, 5], "first": [0], "last": [7], "one": [3]}


def forms_agree(problem: Problem, method: str, mode: str, form: Callable[[Any], Any]) -> dict[str, Tensor | None]:
    """``form(model)`` gives the same in a mode and by backpropagation, to the bit; its gradients nearly."""
    wanted = problem.wanted()
    with first_step_held():
        truth = form(model_for(problem, BACKPROPAGATION, method))
    found = form(model_for(problem, mode, method))
    assert_equal_values(found, truth)
    gradients = gradients_of(loss_of(found), wanted)
    assert_same_gradients(gradients, gradients_of(loss_of(truth), wanted))
    return gradients


# save_at and args.


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("method", ["torchdyn-rk4", "torchdyn-hyper-euler"])
@each_way_back
def test_save_at(mode: str, method: str, saved: str, direction: str) -> None:
    """Of decreasing times torchdyn looks for the negated ones."""
    problem = problem_for(method)
    if direction == "decreasing":
        problem.t = problem.t.detach().flip(0).requires_grad_()
    chosen = problem.t.detach()[SAVED[saved]]
    problem.settings["call"] = {"save_at": -chosen if direction == "decreasing" else chosen}
    found = assert_exact(problem, mode, method)
    assert bool(norm_of(found["weight"])) == (saved != "first")


@each_way_back
def test_save_at_that_is_returned_with_its_gradient(mode: str) -> None:
    problem = problem_for("torchdyn-rk4")
    save_at = problem.t.detach()[2:5].clone().requires_grad_()
    problem.extra = {"save_at": save_at}
    found = forms_agree(problem, "torchdyn-rk4", mode, lambda model: model(problem.y0, problem.t, save_at=save_at))
    assert found["save_at"] is not None


@each_way_back
def test_save_at_that_is_partly_off_the_grid(mode: str) -> None:
    """Upstream returns the time all the same, without a state for it."""
    problem = problem_for("torchdyn-rk4")
    problem.settings["call"] = {"save_at": torch.tensor([0.1, 0.3, 0.9], dtype=DOUBLE)}
    assert_exact(problem, mode, "torchdyn-rk4")
    assert list(map(len, returned(problem, mode, "torchdyn-rk4"))) == [3, 2]


@pytest.mark.parametrize(("save_at", "error"), [([0.9, 0.9], AssertionError), ([0.3], IndexError)])
@each_way_back
def test_save_at_that_fails_upstream_fails_as_there(mode: str, save_at: list[float], error: type[Exception]) -> None:
    problem = problem_for("torchdyn-rk4")
    problem.settings["call"] = {"save_at": torch.tensor(save_at, dtype=DOUBLE)}
    for name in (BACKPROPAGATION, mode):
        with pytest.raises(error):
            returned(problem, name, "torchdyn-rk4")


class Receiving(Mixing):
    """Fails if arguments of the call ever reach it: they do in no mode of torchdyn's."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        assert not args
        return super().forward(t, y)


@pytest.mark.parametrize("args", [{"u": torch.ones(3), "name": "value"}, torch.ones(3), [1, 2]], ids=str)
@each_named_kind
@each_way_back
def test_args_that_no_field_sees(mode: str, method: str, args: Any) -> None:
    problem = problem_for(method)
    problem.field = Receiving(6, seed=5)
    problem.settings["call"] = {"args": args}
    assert_exact(problem, mode, method)


class Scaling(Euler):  # type: ignore[misc]
    """A step that uses an argument of the call."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        return None, x + args["gain"] * dt * f(t + args["node"] * dt, x), None


@pytest.mark.parametrize("kind", ["numbers", "tensors", "tensors with gradients", "an entry a gain"])
@pytest.mark.parametrize("mode", ["symplectic", "aca", pytest.param("baseline", marks=pytest.mark.slow)])
def test_args_that_a_solver_uses(mode: str, kind: str) -> None:
    problem = problem_for("torchdyn-euler")
    gain, node = uniform(3, seed=31).add(1.5) if kind == "an entry a gain" else torch.tensor(0.8, dtype=DOUBLE), 0.3
    args: dict[str, Any] = {"gain": 0.8, "node": node}
    if kind != "numbers":
        args = {"gain": gain, "node": torch.tensor(node, dtype=DOUBLE)}
    if kind not in ("numbers", "tensors"):
        problem.extra = {name: tensor.requires_grad_() for name, tensor in args.items()}
    problem.settings |= {"solver": Scaling(DOUBLE), "call": {"args": args}}
    assert set(assert_exact(problem, mode, "torchdyn-euler")) >= set(problem.extra)


# Dictionaries as states.


class EulerOfDictionaries(SolverTemplate):  # type: ignore[misc]
    """As torchdyn's documentation has it: an own step for an own state."""

    def __init__(self) -> None:
        super().__init__(order=1)
        self.stepping_class = "fixed"

    def sync_device_dtype(self, x: Any, t_span: Any) -> Any:
        return x, t_span

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        return None, x | {name: x[name] + dt * value for name, value in slope.items()}, None


class SymplecticEuler(EulerOfDictionaries):
    """The positions move with the new velocities."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        velocity = x["velocity"] + dt * f(t, x)["velocity"]
        moved = {"position": x["position"], "velocity": velocity}
        return None, {"position": x["position"] + dt * f(t, moved)["position"], "velocity": velocity}, None


class Fields(nn.Module):
    """A slope of a dictionary and a vector of parameters."""

    def __init__(self, slope: Callable[[Tensor, Any, Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.slope = nn.Parameter(uniform(3, seed=74)), slope

    def forward(self, t: Tensor, x: Any, args: Any = None) -> Any:
        return self.slope(t, x, self.weight)


def oscillating(t: Tensor, x: Any, w: Tensor) -> Any:
    return {"position": x["velocity"], "velocity": torch.tanh(x["position"] * w) - 0.4 * torch.cos(t) * x["velocity"]}


def shapes(t: Tensor, x: Any, w: Tensor) -> Any:
    return {"many": torch.sin(x["many"] * w + t), "one": x["many"].sum(-1) * x["one"]}


def dtypes(t: Tensor, x: Any, w: Tensor) -> Any:
    fine = torch.sin(x["fine"] * w + t) * x["coarse"].double().mean()
    return {"fine": fine, "coarse": torch.cos(x["coarse"]) - x["fine"].float().sum()}


def neighbours(t: Tensor, x: Any, w: Tensor) -> Any:
    """Whole numbers, which have no slope."""
    return {"value": torch.sin(x["value"][x["neighbour"]] * w + t) - x["value"]}


def leaf(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return uniform(*shape, seed=seed, dtype=dtype).requires_grad_()


def pendulum() -> dict[str, Tensor]:
    return {"position": leaf(2, 3, seed=72), "velocity": leaf(2, 3, seed=73)}


def by_default() -> dict[str, Tensor]:
    """A dictionary of a class of its own, which must not be made anew."""
    return collections.defaultdict(lambda: leaf(1, seed=1), pendulum())


DICTIONARIES: dict[str, tuple[Any, Any, Callable[[], dict[str, Tensor]]]] = {
    "symplectic euler": (SymplecticEuler, oscillating, pendulum),
    "class of its own": (SymplecticEuler, oscillating, by_default),
    "several shapes": (EulerOfDictionaries, shapes, lambda: {"many": leaf(2, 3, seed=75), "one": leaf(2, seed=76)}),
    "several dtypes": (
        EulerOfDictionaries,
        dtypes,
        lambda: {"fine": leaf(2, 3, seed=75), "coarse": leaf(2, seed=76, dtype=torch.float32)},
    ),
    "whole numbers": (
        EulerOfDictionaries,
        neighbours,
        lambda: {"value": leaf(4, 3, seed=75), "neighbour": torch.tensor([2, 0, 3, 1])},
    ),
}


def of_dictionaries(kind: str) -> Problem:
    solver, slope, state = DICTIONARIES[kind]
    t = torch.tensor([0.0, 0.2, 0.3, 0.6, 1.1], dtype=DOUBLE, requires_grad=True)
    dtype = torch.float32 if kind == "several dtypes" else None
    return Problem(Fields(slope), state(), t, settings={"solver": solver()}, dtype=dtype)


@pytest.mark.parametrize("kind", DICTIONARIES)
@each_way_back
def test_dictionaries(mode: str, kind: str) -> None:
    problem = of_dictionaries(kind)
    assert set(assert_exact(problem, mode, "torchdyn-euler")) == set(problem.wanted())


@each_way_back
def test_dictionaries_of_which_a_part_is_saved_and_one_entry_used(mode: str) -> None:
    problem = of_dictionaries("symplectic euler")
    problem.settings["call"] = {"save_at": problem.t.detach()[[1, 3]]}
    problem.y0["velocity"].requires_grad_(False)
    found = assert_exact(problem, mode, "torchdyn-euler", loss=lambda solution: loss_of(solution["position"][-1]))
    assert set(found) == {"y0[0]", "t", "weight"}


# Models.


class Acceleration(Mixing):
    """Of a state whose second half is the velocity."""

    def __init__(self) -> None:
        super().__init__(6, seed=81)
        self.mass = nn.Parameter(uniform(6, 3, seed=82))

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        return torch.stack([super(Acceleration, self).forward(t, row) @ self.mass for row in y])


@each_named_kind
@each_way_back
def test_second_order(mode: str, method: str) -> None:
    problem = problem_for(method, (2, 6))
    problem.field = Acceleration()
    problem.settings["order"] = 2
    assert "mass" in assert_exact(problem, mode, method)


@each_named_kind
@each_way_back
def test_times_that_are_set_on_the_model(mode: str, method: str) -> None:
    problem = problem_for(method)

    def form(model: Any) -> Any:
        model.t_span = problem.t
        return model(problem.y0)

    forms_agree(problem, method, mode, form)


@pytest.mark.parametrize("form", [tuple, iter], ids=["tuple", "generator"])
@each_named_kind
@each_way_back
def test_optimizable_params(mode: str, method: str, form: Any) -> None:
    weight, idle = nn.Parameter(uniform(3, 3, seed=98)), nn.Parameter(uniform(2, seed=99))
    problem = problem_for(method)
    problem.field = lambda t, x, args=None: torch.tanh(x @ weight) * torch.cos(t)
    problem.extra = {"weight": weight, "idle": idle}
    wanted = problem.wanted()
    found = []
    for name in (mode, BACKPROPAGATION):
        problem.settings["optimizable_params"] = form((weight, idle))
        model = model_for(problem, name, method)
        assert {id(weight), id(idle)} <= {id(parameter) for parameter in model.parameters()}
        found.append(gradients_of(loss_of(returned(problem, name, method, model)[1]), wanted))
    assert_same_gradients(found[0], found[1])
    assert torch.equal(found[0]["idle"], torch.zeros_like(idle))  # type: ignore[arg-type]


# Other entry points.


@each_kind
@each_way_back
def test_ode_problem(mode: str, method: str) -> None:
    """Its field is called as the solver calls it, with no wrapper in between; by a call, and by its method."""
    problem = problem_for(method)
    problem.settings |= {"make": ODEProblem, **TOLERANCES}
    assert_exact(problem, mode, method)
    forms_agree(problem, method, mode, lambda model: model.odeint(problem.y0, problem.t))


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@each_kind
@each_way_back
def test_trajectory(mode: str, method: str, direction: str) -> None:
    """It does not interpolate: upstream does not pass the interpolator on."""
    problem = problem_for(method)
    if direction == "decreasing":
        problem.t = problem.t.detach().flip(0).requires_grad_()
    problem.settings["interpolator"] = "4th"
    forms_agree(problem, method, mode, lambda model: model.trajectory(problem.y0, problem.t))


@each_way_back
def test_a_solver_that_holds_itself(mode: str) -> None:
    solver, problem = RungeKutta4(DOUBLE), problem_for("torchdyn-rk4")
    solver.owner, solver.others = {"solver": solver}, [solver]
    problem.settings["solver"] = solver
    assert_exact(problem, mode, "torchdyn-rk4")


@pytest.mark.parametrize("inner", ["autograd", "symplectic", "aca"])
@each_named_kind
@each_way_back
def test_a_model_inside_the_field_of_another(mode: str, method: str, inner: str) -> None:
    field, t_span = Mixing(6, seed=8), torch.linspace(0, 0.5, 3, dtype=DOUBLE)
    model = NeuralODE(field, solver="rk4", sensitivity=inner, return_t_eval=False)
    problem = problem_for(method)
    problem.field = lambda t, x, args=None: model(x, t_span)[-1] - t * x
    problem.extra = dict(field.named_parameters())
    problem.t = problem.t.detach()[:4].requires_grad_()
    assert set(assert_exact(problem, mode, method)) >= set(problem.extra)
