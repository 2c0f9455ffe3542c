"""What torchdyn's own backpropagation copes with, the modes cope with: unusual slopes, states, args and solvers."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from old_harness import error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.numerics.solvers.ode import RungeKutta4
from torchdyn.numerics.solvers.templates import DiffEqSolver
from torchdyn_cases import MODES, each_mode, first_step_held

# Upstream says so to everyone whose tolerances are not odeint's defaults, its own adjoint among them.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning")

T = torch.linspace(0, 1, 6, dtype=torch.float64)


class EulerOfDictionaries(DiffEqSolver):  # type: ignore[misc]
    """torchdyn takes dictionaries with a solver of the user's only."""

    def __init__(self) -> None:
        super().__init__(order=1, stepping_class="fixed")

    def sync_device_dtype(self, x: Any, t_span: Any) -> Any:
        return x, t_span

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> Any:
        slopes = f(t, x)
        return None, {key: value + dt * slopes[key] for key, value in x.items()}, None


class Field(nn.Module):
    """``function(t, x, weight)``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64))

    def forward(self, t: Tensor, x: Any, args: Any = None) -> Any:
        return self.function(t, x, self.weight)


def state(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.3 + 0.2).reshape(shape).requires_grad_()


def solved(field: nn.Module, x: Any, mode: str, solver: Any = "rk4", args: Any = None, **settings: Any) -> Any:
    """The solution; ``mode`` is one of `MODES` or a sensitivity of torchdyn's own."""
    chosen = dict(MODES.get(mode, {"sensitivity": mode}))
    options = chosen.pop("adjoint_options", None)
    model = NeuralODE(field, solver=solver, **chosen, **settings)
    if options is not None:
        model.adjoint_options = options
    with first_step_held():
        return model(x, T, args={} if args is None else args)[1]


def assert_as_autograd(field: nn.Module, x: Any, mode: str, **settings: Any) -> None:
    leaves = list(x.values()) if isinstance(x, dict) else [x]
    wanted = [*leaves, *field.parameters()]
    found = []
    for sensitivity in (mode, "autograd"):
        solution = solved(field, x, sensitivity, **settings)
        parts = list(solution.values()) if isinstance(solution, dict) else [solution]
        found.append(torch.autograd.grad(sum(part.sin().square().sum() for part in parts), wanted))
    assert error(*found) < 1e-11


@each_mode
@pytest.mark.parametrize("solver", ["midpoint", "rk4", "dopri5", "tsit5"])
@pytest.mark.parametrize("shape", [(3,), (1,), ()])
def test_slopes_that_broadcast(mode: str, solver: str, shape: tuple[int, ...]) -> None:
    def slope(t: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return (weight * x.mean(0).tanh()).sum_to_size(shape) * torch.cos(t)

    assert_as_autograd(Field(slope), state(4, 3), mode, solver=solver)


@each_mode
def test_dictionaries_with_entries_of_rank_zero_and_slopes_that_broadcast(mode: str) -> None:
    def slope(t: Tensor, x: Any, weight: Tensor) -> Any:
        return {"a": (weight * x["a"].mean(0)), "b": x["b"] * weight[0] + x["a"].sum()}

    assert_as_autograd(Field(slope), {"a": state(4, 3), "b": state()}, mode, solver=EulerOfDictionaries())


@each_mode
def test_dictionaries_of_a_class_of_their_own(mode: str) -> None:
    x = collections.defaultdict(state, {"a": state(4, 3), "b": state(2)})
    field = Field(lambda t, x, weight: {"a": weight * x["a"], "b": x["b"] * weight.sum() - x["a"].mean()})
    assert_as_autograd(field, x, mode, solver=EulerOfDictionaries())


@each_mode
def test_integral_of_a_running_cost_over_a_number(mode: str) -> None:
    """A state of rank 0; the truth is the loss carried as a column of the state, written out for Euler's method."""
    field, x = Field(lambda t, x, weight: weight.sum() * x), state()
    solution = solved(field, x, mode, "euler", integral_loss=lambda t, x: x.square())
    found = torch.autograd.grad(solution[-1], [x, field.weight])
    total, y = torch.zeros((), dtype=torch.float64), x
    for start, end in itertools.pairwise(T):
        total, y = total + (end - start) * y.square(), y + (end - start) * field(start, y)
    assert error(found, torch.autograd.grad(y + total, [x, field.weight])) < 1e-12


@each_mode
def test_a_gradient_with_an_integral_is_not_differentiated_again(mode: str) -> None:
    field, x = Field(lambda t, x, weight: weight * x), state(4, 3)
    solution = solved(field, x, mode, integral_loss=lambda t, x: x.square().mean(-1))
    with pytest.raises(NotImplementedError, match=r"integral_loss.*create_graph=True not"):
        torch.autograd.grad(solution[-1].square().sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # torch 2.4's own use of it
@each_mode
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_inside_of_pytorchs_checkpoint(mode: str, solver: str) -> None:
    field, x = Field(lambda t, x, weight: torch.tanh(weight * x)), state(4, 3)
    wanted = [x, field.weight]
    # A solver object of its own, which nothing has measured yet.
    found = torch.autograd.grad(
        checkpoint(lambda x: solved(field, x, mode, solver), x, use_reentrant=False).sin().sum(), wanted
    )
    assert error(found, torch.autograd.grad(solved(field, x, "autograd", solver).sin().sum(), wanted)) < 1e-11


@each_mode
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("args", [torch.ones(3), {"a": 1}, {"a": torch.ones(3)}, [1, 2]], ids=str)
def test_args_of_any_kind(mode: str, solver: str, args: Any) -> None:
    assert_as_autograd(Field(lambda t, x, weight: torch.tanh(weight * x)), state(4, 3), mode, solver=solver, args=args)


class Scaled(DiffEqSolver):  # type: ignore[misc]
    """Euler's method with a factor from ``args``."""

    def __init__(self) -> None:
        super().__init__(order=1, stepping_class="fixed")

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> Any:
        return None, x + args["factor"] * dt * f(t, x), None


@each_mode
def test_a_solver_that_looks_at_args_is_measured_for_each(mode: str) -> None:
    solver, field = Scaled(), Field(lambda t, x, weight: torch.tanh(weight * x))
    for factor in (1.0, 0.5, 2.0):
        assert_as_autograd(field, state(4, 3), mode, solver=solver, args={"factor": factor})


def test_a_solver_is_measured_once_for_all_args_that_it_does_not_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[object] = []
    step = RungeKutta4.step

    def counted(self: Any, *arguments: Any, **settings: Any) -> Any:
        steps.append(arguments)
        return step(self, *arguments, **settings)

    monkeypatch.setattr(RungeKutta4, "step", counted)
    solver, field = RungeKutta4(), Field(lambda t, x, weight: weight * x)
    for args in ({}, {"a": 1}, {"a": torch.ones(2)}):
        before = len(steps)
        solved(field, state(4, 3), "symplectic", solver, args)
        assert (len(steps) - before == len(T) - 1) is bool(args), "more steps than those of the solve: it was measured"


@each_mode
def test_a_solver_that_holds_itself(mode: str) -> None:
    solver: Any = RungeKutta4()
    solver.owner = {"solver": solver}
    solver.others = [solver]
    assert_as_autograd(Field(lambda t, x, weight: weight * x), state(4, 3), mode, solver=solver)


class Branching(DiffEqSolver):  # type: ignore[misc]
    """Euler's method, or the midpoint's where the state is large."""

    def __init__(self) -> None:
        super().__init__(order=1, stepping_class="fixed")

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> Any:
        slope = f(t, x)
        if x.abs().max() > 3:
            slope = f(t + dt / 2, x + dt / 2 * slope)
        return None, x + dt * slope, None


@each_mode
@pytest.mark.parametrize("cost", [None, lambda t, x: x.sum()])
def test_a_solver_whose_steps_change_their_form_is_refused(mode: str, cost: Any) -> None:
    field = Field(lambda t, x, weight: 3 * x)
    with pytest.raises(NotImplementedError, match=r"Branching.*changes from step to step"):
        solved(field, state(4, 3), mode, Branching(), integral_loss=cost)


# What is used at some times only, held at a distance.


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


class Listed(nn.Module):
    """Networks in a list that torch does not see."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nets

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.nets[int(t > 0.3)](x)
        return result


class Plain:
    """A callable object that is no module."""

    def __init__(self, nets: list[nn.Module]) -> None:
        self.nets = {"early": nets[0], "late": nets[1]}

    def __call__(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.nets["late" if t > 0.3 else "early"](x)
        return result


def by_helper(nets: list[nn.Module]) -> Any:
    def helper(t: Tensor, x: Tensor) -> Tensor:
        result: Tensor = nets[int(t > 0.3)](x)
        return result

    return lambda t, x, args=None: helper(t, x)


DISTANT: dict[str, Callable[[list[nn.Module]], Any]] = {
    "list": lambda nets: lambda t, x, args=None: nets[int(t > 0.3)](x),
    "helper": by_helper,
    "default": lambda nets: lambda t, x, args=None, nets=nets: nets[int(t > 0.3)](x),
    "partial": lambda nets: functools.partial(lambda nets, t, x, args=None: nets[int(t > 0.3)](x), nets),
    "object": Plain,
    "module": Listed,
}


@each_mode
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("how", DISTANT)
def test_networks_that_are_used_late_and_held_at_a_distance(mode: str, solver: str, how: str) -> None:
    nets, x = [net(1), net(2), net(3)], state(4, 3)
    unused = next(nets[2].parameters())
    wanted = [x, *nets[0].parameters(), *nets[1].parameters()]
    found = []
    for sensitivity in (mode, "autograd"):
        loss = solved(DISTANT[how](nets), x, sensitivity, solver).sin().sum()
        gradients: Any = torch.autograd.grad(loss, [*wanted, unused], allow_unused=True)
        assert gradients[-1] is None, "what is not used is left alone"
        found.append(gradients[:-1])
    assert error(*found) < 1e-11


@each_mode
def test_tensors_in_attributes_that_are_used_late(mode: str) -> None:
    """A leaf, and one that an encoder computed."""
    encoder, x = net(5), state(4, 3)
    field = Field(lambda t, x, weight: weight * x + (field.leaf if t > 0.3 else 0) + (field.code if t > 0.6 else 0))
    field.leaf = torch.tensor([0.3, -0.1, 0.8], dtype=torch.float64, requires_grad=True)
    found = []
    for sensitivity in (mode, "autograd"):
        field.code = encoder(state(4, 3).detach())
        loss = solved(field, x, sensitivity).sin().sum()
        found.append(torch.autograd.grad(loss, [x, field.weight, field.leaf, *encoder.parameters()]))
    assert error(*found) < 1e-11


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
    x = state(4, 3)
    assert torch.equal(problem.odeint(x, T)[1], x.expand(6, 4, 3) * 2)


def test_trajectory_needs_no_sensitivity_that_is_known() -> None:
    model = NeuralODE(Field(lambda t, x, weight: weight * x), "rk4", sensitivity=None)
    model.sensitivity = model.sensalg = None
    with torch.no_grad():
        assert model.trajectory(state(4, 3), T).shape == (6, 4, 3)


@pytest.mark.parametrize("options", ["stages", ["checkpoint"], 5])
def test_options_that_are_no_dictionary_are_named(options: Any) -> None:
    model = NeuralODE(Field(lambda t, x, weight: weight * x), "rk4", sensitivity="symplectic")
    model.adjoint_options = options
    with pytest.raises(TypeError, match="adjoint_options must be a dictionary"):
        model(state(4, 3), T)
