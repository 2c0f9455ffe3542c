"""torchdyn: everything that its entry points take, meaning what its autograd mode makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from cases import assert_same_gradients, gradients_of, loss_of, norm_of, uniform
from torch import Tensor, nn
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.numerics.solvers.ode import Euler, SolverTemplate
from torchdyn_cases import (
    DOUBLE,
    MODES,
    Field,
    Problem,
    State,
    assert_equal_values,
    assert_exact,
    each_kind,
    each_mode,
    each_named_kind,
    first_step_held,
    problem_for,
    weighed,
)

ignores_tolerances = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect:UserWarning")

# Which of the eight times of `problem_for`'s fixed-step problems are saved.
SAVED = {"all": [0, 1, 2, 3, 4, 5, 6, 7], "inner": [1, 2, 5], "first": [0], "last": [7], "ends": [0, 7], "one": [3]}


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("solver", ["rk4", "hyper-euler"])
@each_mode
def test_save_at(mode: str, solver: str, saved: str, direction: str) -> None:
    """Of decreasing times torchdyn looks for the negated ones."""
    problem = problem_for(solver)
    if direction == "decreasing":
        problem.t_span = problem.t_span.detach().flip(0).requires_grad_()
    chosen = problem.t_span.detach()[SAVED[saved]]
    problem.call = {"save_at": -chosen if direction == "decreasing" else chosen}
    found = assert_exact(problem, mode)
    assert ("field.weight" in found) == (saved != "first") or norm_of(found["field.weight"]) == 0


@each_mode
def test_save_at_as_a_list_of_numbers(mode: str) -> None:
    problem = problem_for("midpoint")
    problem.t_span = torch.linspace(0, 1, 9, requires_grad=True)
    problem.call = {"save_at": [0.25, 0.75, 1.0]}
    assert_exact(problem, mode)


@each_mode
def test_save_at_that_is_returned_with_its_gradient(mode: str) -> None:
    def loss(t_eval: Tensor, solution: State) -> Tensor:
        return loss_of(t_eval) + weighed(t_eval, solution)

    problem = problem_for("rk4")
    save_at = problem.t_span.detach()[2:5].clone().requires_grad_()
    problem.call, problem.params = {"save_at": save_at}, {"save_at": save_at}
    assert "save_at" in assert_exact(problem, mode, loss)


@each_mode
def test_save_at_that_is_partly_off_the_grid(mode: str) -> None:
    """Upstream returns the time all the same, without a state for it."""
    problem = problem_for("rk4")
    problem.call = {"save_at": torch.tensor([0.1, 0.3, 0.9], dtype=DOUBLE)}
    assert_exact(problem, mode)
    t_eval, solution = problem.solve(mode)
    assert isinstance(solution, Tensor)
    assert (len(t_eval), len(solution)) == (3, 2)


@pytest.mark.parametrize(("save_at", "error"), [([0.9, 0.9], AssertionError), ([0.3], IndexError)])
@each_mode
def test_save_at_that_fails_upstream_fails_as_there(mode: str, save_at: list[float], error: type[Exception]) -> None:
    problem = problem_for("rk4")
    problem.call = {"save_at": torch.tensor(save_at, dtype=DOUBLE)}
    for name in ("autograd", mode):
        with pytest.raises(error):
            problem.solve(name)


@pytest.mark.filterwarnings("ignore:Setting save_at has no effect on adaptive-step methods:UserWarning")
@each_mode
def test_save_at_has_no_effect_on_adaptive_solvers(mode: str) -> None:
    problem = problem_for("dopri5")
    problem.call = {"save_at": problem.t_span.detach()[1:3]}
    assert_exact(problem, mode)
    with pytest.warns(UserWarning, match="Setting save_at has no effect"):
        problem.solve(mode)


class Receiving(Field):
    """Fails if arguments of the call ever reach it: they do in no mode of torchdyn's."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        assert not args
        return super().forward(t, y)


@each_kind
@each_mode
def test_args_that_no_field_sees(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.field = Receiving(6, seed=5)
    problem.call = {"args": {"u": torch.ones(3), "name": "value"}}
    assert_exact(problem, mode)


class Scaling(Euler):  # type: ignore[misc]
    """A step that uses an argument of the call."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        return None, x + args["gain"] * dt * f(t + args["node"] * dt, x), None


@pytest.mark.parametrize("kind", ["numbers", "tensors", "tensors with gradients", "an entry a gain"])
@each_mode
def test_args_that_a_solver_uses(mode: str, kind: str) -> None:
    problem = problem_for("euler")
    gain, node = uniform(3, seed=31).add(1.5) if kind == "an entry a gain" else torch.tensor(0.8, dtype=DOUBLE), 0.3
    args: dict[str, Any] = {"gain": 0.8, "node": node}
    if kind != "numbers":
        args = {"gain": gain, "node": torch.tensor(node, dtype=DOUBLE)}
    if kind not in ("numbers", "tensors"):
        problem.params = {name: tensor.requires_grad_() for name, tensor in args.items()}
    problem.settings["solver"], problem.call = Scaling(DOUBLE), {"args": args}
    assert set(assert_exact(problem, mode)) >= set(problem.params)


@each_mode
def test_args_that_change_from_call_to_call(mode: str) -> None:
    """What is measured with one gain must not serve another, nor one solve's arguments the other's backward pass."""
    problem, solver = problem_for("euler"), Scaling(DOUBLE)
    problem.settings["solver"] = solver
    model, wanted = problem.model(mode), problem.wanted()
    solutions = [
        model(problem.x, problem.t_span, args={"gain": gain, "node": node})[1]
        for gain, node in ((0.5, 0.1), (1.2, 0.6), (0.7, 0.0))
    ]
    truths = []
    for gain, node in ((0.5, 0.1), (1.2, 0.6), (0.7, 0.0)):
        problem.call = {"args": {"gain": gain, "node": node}}
        truths.append(problem.solve("autograd")[1])
    found = gradients_of(loss_of(tuple(solutions)), wanted)
    assert_same_gradients(
        found, gradients_of(loss_of(tuple(t for t in truths if isinstance(t, Tensor))), wanted), DOUBLE
    )


class Oscillator(nn.Module):
    """Positions and velocities by name, with friction that changes with time."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(uniform(3, 3, seed=71))
        self.friction = nn.Parameter(torch.tensor(0.4, dtype=DOUBLE))

    def forward(self, t: Tensor, x: dict[str, Tensor], args: Any = None) -> dict[str, Tensor]:
        force = torch.tanh(x["position"] @ self.stiffness) - self.friction * torch.cos(t) * x["velocity"]
        return {"position": x["velocity"], "velocity": force}


class EulerOfDictionaries(SolverTemplate):  # type: ignore[misc]
    """As torchdyn's documentation has it: an own step for an own state."""

    def __init__(self) -> None:
        super().__init__(order=1)
        self.stepping_class = "fixed"

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        return None, {name: value + dt * slope[name] for name, value in x.items()}, None


class SymplecticEuler(EulerOfDictionaries):
    """The positions move with the new velocities."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        velocity = x["velocity"] + dt * f(t, x)["velocity"]
        moved = {"position": x["position"], "velocity": velocity}
        return None, {"position": x["position"] + dt * f(t, moved)["position"], "velocity": velocity}, None


def _of_dictionaries(solver: type[EulerOfDictionaries]) -> Problem:
    x: dict[str, Tensor] = {
        "position": uniform(2, 3, seed=72).requires_grad_(),
        "velocity": uniform(2, 3, seed=73).requires_grad_(),
    }
    t_span = torch.tensor([0.0, 0.2, 0.3, 0.6, 1.1], dtype=DOUBLE, requires_grad=True)
    return Problem(Oscillator(), x, t_span, {"solver": solver()})


@pytest.mark.parametrize("save", ["all", "some"])
@pytest.mark.parametrize("solver", [EulerOfDictionaries, SymplecticEuler], ids=["euler", "symplectic-euler"])
@each_mode
def test_states_that_are_dictionaries(mode: str, solver: type[EulerOfDictionaries], save: str) -> None:
    problem = _of_dictionaries(solver)
    if save == "some":
        problem.call = {"save_at": problem.t_span.detach()[[1, 3]]}
    found = assert_exact(problem, mode)
    assert set(found) == {"position", "velocity", "t", "field.stiffness", "field.friction"}


@each_mode
def test_dictionaries_of_which_one_entry_is_used(mode: str) -> None:
    problem = _of_dictionaries(SymplecticEuler)

    def loss(t_eval: Tensor, solution: State) -> Tensor:
        assert isinstance(solution, dict)
        return loss_of(solution["position"][-1])

    assert isinstance(problem.x, dict)
    problem.x["velocity"].requires_grad_(False)
    assert "velocity" not in assert_exact(problem, mode, loss)


@each_mode
def test_dictionaries_of_entries_of_several_shapes(mode: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(uniform(3, seed=74))

        def forward(self, t: Tensor, x: dict[str, Tensor], args: Any = None) -> dict[str, Tensor]:
            return {"many": torch.sin(x["many"] * self.weight + t), "one": x["many"].sum(-1) * x["one"]}

    problem = _of_dictionaries(EulerOfDictionaries)
    problem.field = Sum()
    problem.x = {"many": uniform(2, 3, seed=75).requires_grad_(), "one": uniform(2, seed=76).requires_grad_()}
    assert set(assert_exact(problem, mode)) == {"many", "one", "t", "field.weight"}


class Backwards(EulerOfDictionaries):
    """Gives its entries in another order."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        _, moved, _ = super().step(f, x, t, dt)
        return None, dict(reversed(moved.items())), None


@each_mode
def test_dictionaries_whose_order_changes(mode: str) -> None:
    assert_exact(_of_dictionaries(Backwards), mode)


@each_mode
def test_dictionaries_of_entries_of_several_dtypes(mode: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(uniform(3, seed=74))

        def forward(self, t: Tensor, x: dict[str, Tensor], args: Any = None) -> dict[str, Tensor]:
            fine = torch.sin(x["fine"] * self.weight + t) * x["coarse"].double().mean()
            return {"fine": fine, "coarse": torch.cos(x["coarse"]) - x["fine"].float().sum()}

    problem = _of_dictionaries(EulerOfDictionaries)
    problem.field = Sum()
    coarse = uniform(2, seed=76, dtype=torch.float32).requires_grad_()
    problem.x = {"coarse": coarse, "fine": uniform(2, 3, seed=75).requires_grad_()}
    assert set(assert_exact(problem, mode)) == {"fine", "coarse", "t", "field.weight"}


class Passing(EulerOfDictionaries):
    """Moves what has a slope and hands on the rest."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        return None, x | {name: x[name] + dt * value for name, value in slope.items()}, None


@each_mode
def test_dictionaries_with_an_entry_of_whole_numbers(mode: str) -> None:
    """The neighbours in a graph, say."""

    class Spreading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(uniform(3, seed=74))

        def forward(self, t: Tensor, x: dict[str, Tensor], args: Any = None) -> dict[str, Tensor]:
            return {"value": torch.sin(x["value"][x["neighbour"]] * self.weight + t) - x["value"]}

    problem = _of_dictionaries(Passing)
    problem.field = Spreading()
    problem.x = {"value": uniform(4, 3, seed=75).requires_grad_(), "neighbour": torch.tensor([2, 0, 3, 1])}
    assert set(assert_exact(problem, mode)) == {"value", "t", "field.weight"}


class Acceleration(Field):
    """Of a state whose second half is the velocity."""

    def __init__(self) -> None:
        super().__init__(6, seed=81)
        self.mass = nn.Parameter(uniform(6, 3, seed=82))

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return torch.stack([super(Acceleration, self).forward(t, row) @ self.mass for row in y])


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5", "tsit5"])
@each_mode
def test_second_order(mode: str, solver: str) -> None:
    problem = problem_for(solver, (2, 6))
    problem.field = Acceleration()
    problem.settings["order"] = 2
    assert "field.mass" in assert_exact(problem, mode)


class Last(nn.Module):
    """The state at the last time."""

    def forward(self, solution: Tensor) -> Tensor:
        return solution[-1]


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_models_in_a_sequence(mode: str, solver: str) -> None:
    """With ``return_t_eval=False``, and times by default from 0 to 1, in float32."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 3, dtype=DOUBLE), nn.Linear(3, 2, dtype=DOUBLE)
    fields = Field(15, seed=1), Field(15, seed=2)
    x = uniform(5, 4, seed=3).requires_grad_()
    wanted = {"x": x}
    for name, part in {"first": first, "last": last, "one": fields[0], "other": fields[1]}.items():
        wanted |= {f"{name}.{key}": value for key, value in part.named_parameters()}

    def run(mode: str) -> dict[str, Tensor | None]:
        one, other = (
            Problem(field, x, None, {"solver": solver, "return_t_eval": False}).model(mode) for field in fields
        )
        with first_step_held():
            return gradients_of(loss_of(nn.Sequential(first, one, Last(), other, Last(), last)(x)), wanted)

    assert_same_gradients(run(mode), run("autograd"), DOUBLE)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_times_that_are_set_on_the_model(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    t_span, problem.t_span = problem.t_span, None
    problem.params = {"t": t_span}

    def run(mode: str) -> tuple[Tensor, Tensor]:
        model = problem.model(mode)
        model.t_span = t_span
        with first_step_held():
            found: tuple[Tensor, Tensor] = model(problem.x)
        return found

    truth, found = run("autograd"), run(mode)
    assert_equal_values(found, truth)
    wanted = problem.wanted()
    assert_same_gradients(gradients_of(weighed(*found), wanted), gradients_of(weighed(*truth), wanted), DOUBLE)


# Fields that are no modules. Each row makes one, and says which tensors its gradients are for.


def _leaf() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    weight = uniform(3, 3, seed=91).requires_grad_()
    return lambda t, x, args=None: torch.tanh(x @ weight) * torch.cos(t), {"weight": weight}


def _leaf_without_time() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    weight = uniform(3, 3, seed=91).requires_grad_()
    return lambda x: torch.tanh(x @ weight), {"weight": weight}


def _not_a_leaf() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    root = uniform(3, 3, seed=92).requires_grad_()
    weight = torch.sin(2 * root)
    return lambda t, x, args=None: torch.tanh(x @ weight) * torch.cos(t), {"root": root}


def _network() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5, dtype=DOUBLE), nn.Tanh(), nn.Linear(5, 3, dtype=DOUBLE))

    def field(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = net(x) - t * x
        return slope

    return field, dict(net.named_parameters())


def _partial() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    weight = uniform(3, 3, seed=93).requires_grad_()

    def field(matrix: Tensor, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return torch.tanh(x @ matrix) * torch.cos(t)

    return functools.partial(field, weight), {"weight": weight}


def _partial_of_a_network() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    net = nn.Linear(3, 3, dtype=DOUBLE)

    def field(net: nn.Module, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = net(x).tanh() * torch.cos(t)
        return slope

    return functools.partial(field, net), dict(net.named_parameters())


def _bound_method() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    class Drift(nn.Linear):
        def drift(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            return self(x).tanh() * torch.cos(t)  # type: ignore[no-any-return]

    net = Drift(3, 3, dtype=DOUBLE)
    return net.drift, dict(net.named_parameters())


def _network_and_a_context() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    class Conditioned(nn.Linear):
        context: Tensor

        def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:  # type: ignore[override]
            return super().forward(x).tanh() * self.context

    net, code = Conditioned(3, 3, dtype=DOUBLE), uniform(2, 3, seed=94).requires_grad_()
    net.context = torch.exp(code)
    return net, dict(net.named_parameters()) | {"code": code}


def _first_time_only() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    early, late = uniform(3, seed=95).requires_grad_(), uniform(3, seed=96).requires_grad_()
    return lambda t, x, args=None: x * early if t < 0.5 else torch.sin(x * late), {"early": early, "late": late}


def _through_one_graph() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    root = uniform(3, seed=97).requires_grad_()
    hidden = torch.exp(root)
    one, other = hidden.sin(), hidden.cos()
    return lambda t, x, args=None: x * one - torch.tanh(x) * other, {"root": root}


def _callable_object() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    class Drift:
        def __init__(self) -> None:
            self.weight = uniform(3, 3, seed=91).requires_grad_()

        def __call__(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            return torch.tanh(x @ self.weight) * torch.cos(t)

    drift = Drift()
    return drift, {"weight": drift.weight}


def _leaf_itself() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    drift = uniform(2, 3, seed=91).requires_grad_()
    return lambda t, x, args=None: drift, {"drift": drift}


def _state_itself() -> tuple[Callable[..., Any], dict[str, Tensor]]:
    return lambda t, x, args=None: x, {}


def _inner_model(mode: str) -> Callable[[], tuple[Callable[..., Any], dict[str, Tensor]]]:
    def make() -> tuple[Callable[..., Any], dict[str, Tensor]]:
        field = Field(6, seed=8)
        inner = NeuralODE(field, solver="rk4", sensitivity=mode, return_t_eval=False)
        t_span = torch.linspace(0, 0.5, 3, dtype=DOUBLE)

        def outer(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            slope: Tensor = inner(x, t_span)[-1] - t * x
            return slope

        return outer, dict(field.named_parameters())

    return make


FIELDS: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Tensor]]]] = {
    "a leaf": _leaf,
    "a leaf, no time": _leaf_without_time,
    "a tensor that is not a leaf": _not_a_leaf,
    "a network": _network,
    "a partial": _partial,
    "a partial of a network": _partial_of_a_network,
    "a bound method": _bound_method,
    "a module with a context": _network_and_a_context,
    "tensors used at some times": _first_time_only,
    "two tensors of one graph": _through_one_graph,
    "a callable object": _callable_object,
    "a leaf that is the slope": _leaf_itself,
    "the state itself": _state_itself,
    "a model solved by autograd": _inner_model("autograd"),
    "a model solved by symplectic": _inner_model("symplectic"),
    "a model solved by aca": _inner_model("aca"),
}


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("row", FIELDS)
@each_mode
def test_tensors_that_a_field_closes_over(mode: str, row: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.field, problem.params = FIELDS[row]()
    found = assert_exact(problem, mode)
    assert all(norm_of(found[name]) > 0 for name in problem.params)


@each_mode
def test_a_closed_over_tensor_that_wants_no_gradient(mode: str) -> None:
    weight = uniform(3, 3, seed=91)
    problem = problem_for("rk4")
    problem.field = lambda t, x, args=None: torch.tanh(x @ weight)
    assert set(assert_exact(problem, mode)) == {"x", "t"}


@each_named_kind
@each_mode
def test_two_backward_passes_through_what_is_not_a_leaf(mode: str, solver: str) -> None:
    """The graph behind the closed-over tensor is the user's: every solve walks it, and frees it as autograd would."""
    problem = problem_for(solver)
    problem.field, problem.params = _not_a_leaf()
    truth = problem.gradients("autograd")["root"]
    solutions = [problem.solve(mode)[1] for _ in range(2)]
    root = problem.params["root"]
    (first,) = torch.autograd.grad(weighed(torch.empty(0), solutions[0]), root, retain_graph=True)
    (second,) = torch.autograd.grad(weighed(torch.empty(0), solutions[1]), root)
    assert truth is not None
    assert_same_gradients({"first": first, "second": second}, {"first": truth, "second": truth}, DOUBLE)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_optimizable_params(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    weight, idle = nn.Parameter(uniform(3, 3, seed=98)), nn.Parameter(uniform(2, seed=99))
    problem.field = lambda t, x, args=None: torch.tanh(x @ weight) * torch.cos(t)
    problem.settings["optimizable_params"] = (weight, idle)
    problem.params = {"weight": weight, "idle": idle}
    found = assert_exact(problem, mode)
    assert torch.equal(found["idle"], torch.zeros_like(idle))
    model = problem.model(mode)
    assert {id(weight), id(idle)} <= {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_optimizable_params_from_a_generator(mode: str, solver: str) -> None:
    net, problem = nn.Linear(3, 3, dtype=DOUBLE), problem_for(solver)
    problem.field = lambda x: torch.tanh(net(x))
    weight, bias = net.weight, net.bias
    problem.params = {"weight": weight, "bias": bias}
    truth = problem.solve("autograd")
    problem.settings["optimizable_params"] = net.parameters()
    found = problem.solve(mode)
    assert_equal_values(found, truth)
    wanted = {"weight": weight, "bias": bias}
    assert_same_gradients(gradients_of(weighed(*found), wanted), gradients_of(weighed(*truth), wanted), DOUBLE)


class Partly(Field):
    """Of whose parameters one is not used and one is frozen."""

    def __init__(self) -> None:
        super().__init__(6, seed=5)
        self.idle = nn.Parameter(torch.ones(4, dtype=DOUBLE))
        self.bias.requires_grad_(False)


@each_kind
@each_mode
def test_unused_parameters_get_zeros_and_frozen_ones_nothing(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    field = problem.field = Partly()
    assert_exact(problem, mode)
    weighed(*problem.solve(mode)).backward()
    assert field.idle.grad is not None
    assert torch.equal(field.idle.grad, torch.zeros(4, dtype=DOUBLE))
    assert field.bias.grad is None


@each_named_kind
@each_mode
def test_a_field_that_does_not_depend_on_the_state(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    strength = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    problem.field, problem.params = lambda t, x, args=None: strength * t.cos().expand_as(x), {"strength": strength}
    assert_exact(problem, mode)


@each_named_kind
@each_mode
def test_a_field_without_any_graph(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.field = lambda t, x, args=None: torch.full_like(x, 0.3)
    assert_exact(problem, mode)


@each_kind
@each_mode
def test_dropout_is_the_same_in_the_replay(mode: str, solver: str) -> None:
    class Dropping(Field):
        def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            return nn.functional.dropout(super().forward(t, y), 0.3)

    problem = problem_for(solver)
    problem.field = Dropping(6, seed=5)
    wanted = problem.wanted()
    torch.manual_seed(3)
    truth = problem.solve("autograd")
    drawn = torch.rand(4)
    torch.manual_seed(3)
    found = problem.solve(mode)
    assert torch.equal(torch.rand(4), drawn)
    assert_equal_values(found, truth)
    assert_same_gradients(gradients_of(weighed(*found), wanted), gradients_of(weighed(*truth), wanted), DOUBLE)


@each_kind
@each_mode
def test_running_statistics_move_as_in_autograd(mode: str, solver: str) -> None:
    class Normalising(Field):
        def __init__(self) -> None:
            super().__init__(6, seed=5)
            self.norm = nn.BatchNorm1d(3, dtype=DOUBLE)

        def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            return super().forward(t, self.norm(y))

    def moved(mode: str) -> list[Tensor]:
        problem = problem_for(solver)
        field = problem.field = Normalising()
        weighed(*problem.solve(mode)).backward()
        return list(field.norm.buffers())

    assert all(torch.equal(one, other) for one, other in zip(moved(mode), moved("autograd"), strict=True))


@each_mode
def test_a_field_that_enables_gradients_itself(mode: str) -> None:
    """As energy models and traces do; what torchdyn solves under no_grad would then have a graph."""

    class Descent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(uniform(3, 3, seed=83))

        def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            with torch.enable_grad():
                x = x if x.requires_grad else x.requires_grad_()
                energy = torch.cos(x @ self.weight + t).sum()
                return -torch.autograd.grad(energy, x, create_graph=True)[0]

    problem = problem_for("rk4")
    problem.field = Descent()
    assert_exact(problem, mode)


# Ways to ask for a mode; each gives a model that has it.


def _constructed(field: Any, solver: str, mode: str) -> nn.Module:
    model: nn.Module = NeuralODE(field, solver=solver, sensitivity=mode)
    return model


def _beside_an_adjoint_solver(field: Any, solver: str, mode: str) -> nn.Module:
    """As of code in which the one word is changed and nothing else."""
    model: nn.Module = NeuralODE(field, solver=solver, sensitivity=mode, solver_adjoint="dopri5", atol_adjoint=1e-5)
    return model


def _by_position(field: Any, solver: str, mode: str) -> nn.Module:
    model: nn.Module = NeuralODE(field, solver, 1, 1e-3, 1e-3, mode)
    return model


def _as_adjoint_solver_by_position(field: Any, solver: str, mode: str) -> nn.Module:
    model: nn.Module = NeuralODE(field, solver, 1, 1e-3, 1e-3, "interpolated_adjoint", mode)
    return model


def _problem_by_position(field: Any, solver: str, mode: str) -> nn.Module:
    model: nn.Module = ODEProblem(field, solver, None, 1, 1e-3, 1e-3, mode)
    return model


def _subclass(field: Any, solver: str, mode: str) -> nn.Module:
    class Learner(NeuralODE):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(field, solver, sensitivity=mode)

    model: nn.Module = Learner()
    return model


def _as_adjoint_solver(field: Any, solver: str, mode: str) -> nn.Module:
    model: nn.Module = NeuralODE(field, solver=solver, sensitivity="adjoint", solver_adjoint=mode)
    return model


def _changed_from(before: str) -> Callable[[Any, str, str], nn.Module]:
    def change(field: Any, solver: str, mode: str) -> nn.Module:
        model: nn.Module = NeuralODE(field, solver=solver, sensitivity=before)
        model.sensitivity = mode  # type: ignore[assignment]
        return model

    return change


def _dispatched(field: Any, solver: str, mode: str) -> nn.Module:
    model: nn.Module = NeuralODE(field, solver=solver)
    model.sensalg = mode  # type: ignore[assignment]
    return model


def _after_a_solve(field: Any, solver: str, mode: str) -> nn.Module:
    model: nn.Module = NeuralODE(field, solver=solver)
    model(uniform(2, 3, seed=12), torch.linspace(0, 1, 3))
    model.sensitivity = mode  # type: ignore[assignment]
    return model


SPELLINGS: dict[str, Callable[[Any, str, str], nn.Module]] = {
    "sensitivity": _constructed,
    "solver_adjoint": _as_adjoint_solver,
    "beside an adjoint solver": _beside_an_adjoint_solver,
    "by position": _by_position,
    "solver_adjoint by position": _as_adjoint_solver_by_position,
    "ODEProblem by position": _problem_by_position,
    "a subclass": _subclass,
    "changed from autograd": _changed_from("autograd"),
    "changed from adjoint": _changed_from("adjoint"),
    "changed from interpolated_adjoint": _changed_from("interpolated_adjoint"),
    "changed from another mode": _changed_from("aca"),
    "sensalg": _dispatched,
    "changed after a solve": _after_a_solve,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@each_named_kind
@pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])
def test_ways_to_ask_for_a_mode(mode: str, solver: str, spelling: str) -> None:
    """Exact; and it is this package's, as an unused parameter gets zeros."""
    problem = problem_for(solver)
    problem.field = Partly()
    wanted, truth = problem.wanted(), problem.solve("autograd")
    model = SPELLINGS[spelling](problem.field, solver, mode)
    found = model(problem.x, problem.t_span)
    assert_equal_values(found, truth)
    gradients = gradients_of(weighed(*found), wanted)
    assert_same_gradients(gradients, gradients_of(weighed(*truth), wanted), DOUBLE)
    assert gradients["field.idle"] is not None


@each_named_kind
@pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])
@pytest.mark.parametrize("attribute", ["sensitivity", "sensalg"])
def test_a_model_goes_back_to_autograd(attribute: str, mode: str, solver: str) -> None:
    """Then the graph is torchdyn's own again, and the unused parameter has no gradient."""
    problem = problem_for(solver)
    problem.field = Partly()
    model = problem.model(mode)
    setattr(model, attribute, "autograd")
    with first_step_held():
        found = model(problem.x, problem.t_span)
    gradients = gradients_of(weighed(*found), problem.wanted())
    assert_same_gradients(gradients, problem.gradients("autograd"), DOUBLE)
    assert gradients["field.idle"] is None


@pytest.mark.parametrize("upstream", ["adjoint", "interpolated_adjoint"])
@pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])
def test_a_model_goes_over_to_a_mode_of_torchdyn(mode: str, upstream: str) -> None:
    """The gradient is then the one that a model has which never knew of anything else."""
    problem = problem_for("dopri5")
    problem.t_span = torch.linspace(0, 1, 3)
    wanted = problem.wanted()
    fresh = NeuralODE(problem.field, solver="dopri5", sensitivity=upstream)
    moved = problem.model(mode)
    moved.sensitivity = upstream  # type: ignore[assignment]
    expected, found = (model(problem.x, problem.t_span) for model in (fresh, moved))
    assert_equal_values(found, expected)
    truth, gradients = (gradients_of(weighed(*solution), wanted) for solution in (expected, found))
    for name, gradient in truth.items():
        assert (gradient is None) == (gradients[name] is None)
        assert gradient is None or torch.equal(gradient, gradients[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_a_moved_model_says_what_it_is(mode: str) -> None:
    model = NeuralODE(Field(6))
    name = MODES[mode]["sensitivity"]
    model.sensitivity = name
    assert (model.sensitivity, model.sensalg, model.vf.sensitivity) == (name, name, name)
    model.sensitivity = "autograd"
    assert (model.sensitivity, model.sensalg, model.vf.sensitivity) == ("autograd", "autograd", "autograd")


# Options


@pytest.mark.parametrize("check", ["error", "warn", "ignore"])
@each_kind
@each_mode
def test_replay_check_does_not_change_the_gradient(mode: str, solver: str, check: str) -> None:
    problem = problem_for(solver)
    problem.options = {"replay_check": check}
    assert_exact(problem, mode)


@each_mode
def test_unknown_options_warn(mode: str) -> None:
    problem = problem_for("rk4")
    problem.options = {"checkpoints": 3}
    with pytest.warns(UserWarning, match="Unexpected arguments .*checkpoints"):
        problem.solve(mode)


@pytest.mark.parametrize("name", ["replay_check", "checkpoint"])
def test_wrong_values_of_options_name_the_argument(name: str) -> None:
    problem = problem_for("rk4")
    problem.options = {name: "sometimes"}
    with pytest.raises(ValueError, match=f"(?s){name}.*sometimes"):
        problem.solve("symplectic")


def test_options_may_change_between_two_calls() -> None:
    problem = problem_for("dopri5")
    model, truth = problem.model("symplectic"), problem.gradients("autograd")
    for checkpoint in ("stages", "steps", "stages"):
        model.adjoint_options = {"checkpoint": checkpoint}  # type: ignore[assignment]
        found = gradients_of(weighed(*model(problem.x, problem.t_span)), problem.wanted())
        assert_same_gradients(found, truth, DOUBLE)


# Other entry points


@each_kind
@each_mode
def test_ode_problem(mode: str, solver: str) -> None:
    """Its field is called as the solver calls it, with no wrapper in between."""
    problem = problem_for(solver)
    problem.make = ODEProblem
    problem.settings |= {"atol": 1e-3, "rtol": 1e-3}
    assert_exact(problem, mode)


@each_kind
@each_mode
def test_ode_problem_by_its_method(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.make = ODEProblem
    problem.settings |= {"atol": 1e-3, "rtol": 1e-3}
    truth = problem.solve("autograd")
    found = problem.model(mode).odeint(problem.x, problem.t_span)  # type: ignore[operator]
    assert_equal_values(found, truth)
    wanted = problem.wanted()
    assert_same_gradients(gradients_of(weighed(*found), wanted), gradients_of(weighed(*truth), wanted), DOUBLE)


@ignores_tolerances
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_ode_problem_with_its_own_default_tolerances(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.make = ODEProblem
    assert_exact(problem, mode)


@pytest.mark.parametrize("row", ["a leaf", "a leaf, no time", "a network", "a tensor that is not a leaf"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_ode_problem_of_a_plain_function(mode: str, solver: str, row: str) -> None:
    problem = problem_for(solver)
    problem.make = ODEProblem
    problem.settings |= {"atol": 1e-3, "rtol": 1e-3}
    problem.field, problem.params = FIELDS[row]()
    assert set(assert_exact(problem, mode)) >= set(problem.params)


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5", "tsit5", "hyper-euler"])
@each_mode
def test_trajectory(mode: str, solver: str, direction: str) -> None:
    problem = problem_for(solver)
    if direction == "decreasing":
        problem.t_span = problem.t_span.detach().flip(0).requires_grad_()
    wanted = problem.wanted()
    with first_step_held():
        truth = problem.model("autograd").trajectory(problem.x, problem.t_span)  # type: ignore[operator]
    found = problem.model(mode).trajectory(problem.x, problem.t_span)  # type: ignore[operator]
    assert torch.equal(found, truth)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted), DOUBLE)


@each_mode
def test_trajectory_does_not_interpolate(mode: str) -> None:
    """So upstream: it does not pass the interpolator on."""
    problem = problem_for("dopri5")
    problem.settings["interpolator"] = "4th"
    problem.t_span = torch.linspace(0.1, 1.27, 20, dtype=DOUBLE, requires_grad=True)
    wanted = problem.wanted()
    with first_step_held():
        truth = problem.model("autograd").trajectory(problem.x, problem.t_span)  # type: ignore[operator]
    found = problem.model(mode).trajectory(problem.x, problem.t_span)  # type: ignore[operator]
    assert torch.equal(found, truth)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted), DOUBLE)


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "hyper-euler"])
@each_mode
def test_trajectory_without_gradients(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    with torch.no_grad():
        found = problem.model(mode).trajectory(problem.x, problem.t_span)  # type: ignore[operator]
    assert not found.requires_grad
    assert torch.equal(found, problem.model("autograd").trajectory(problem.x, problem.t_span))  # type: ignore[operator]


@each_mode
def test_arguments_by_position(mode: str) -> None:
    problem = problem_for("rk4")
    model, wanted = problem.model(mode), problem.wanted()
    save_at = problem.t_span.detach()[2:4]
    problem.call = {"save_at": save_at}
    truth = problem.solve("autograd")
    found = model(problem.x, problem.t_span, save_at, {"u": 1})
    assert_equal_values(found, truth)
    assert_same_gradients(gradients_of(weighed(*found), wanted), gradients_of(weighed(*truth), wanted), DOUBLE)
