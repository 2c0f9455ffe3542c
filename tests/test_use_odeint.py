"""``odeint`` under `use`: the same values, and the gradients of backpropagation for whatever the field uses."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    METHODS,
    Mixing,
    MixingTuple,
    Problem,
    assert_same_gradients,
    each_family,
    gradients_of,
    loss_of,
    mixing_problem,
    norm_of,
    parts_of,
    uniform,
)
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint, odeint_event

from torchdiffeq_symplectic import MissingGradientWarning, ReplayError, use

SCIPY: dict[str, Any] = {"method": "scipy_solver", "options": {"solver": "LSODA"}}
T = torch.tensor([0.1, 0.34, 0.9, 1.27], dtype=torch.float64)
CHOICES: dict[str, Callable[[], use]] = {
    "symplectic": lambda: use("symplectic"),
    "symplectic-stages": lambda: use("symplectic", checkpoint="stages"),
    "aca": lambda: use("aca"),
    "baseline": lambda: use("baseline"),
}
each_choice = pytest.mark.parametrize("choice", CHOICES)


def assert_exact(problem: Problem, choice: str, **solver: Any) -> dict[str, Tensor | None]:
    """Values bit for bit, gradients to rounding, and None where backpropagation has None. Returns the gradients."""
    wanted = problem.wanted()
    truth = odeint(problem.func, problem.y0, problem.t, **solver)
    true_gradients = gradients_of(loss_of(truth), wanted)
    with use_of(choice):
        found = odeint(problem.func, problem.y0, problem.t, **solver)
    for expected, actual in zip(parts_of(truth), parts_of(found), strict=True):
        assert torch.equal(actual, expected)
    gradients = gradients_of(loss_of(found), wanted)
    assert_same_gradients(gradients, true_gradients, parts_of(truth)[0].dtype)
    for name, gradient in true_gradients.items():
        assert (gradients[name] is None) == (gradient is None), name
    return gradients


def use_of(choice: str) -> use:
    return CHOICES[choice]()


@each_choice
@each_family
def test_every_gradient_is_that_of_backpropagation(method: str, choice: str) -> None:
    assert_exact(mixing_problem(), choice, **METHODS[method])


@each_choice
def test_tuples_and_decreasing_times(choice: str) -> None:
    shapes = [(2, 2), (3,)]
    y0 = tuple(uniform(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    t = T.flip(0).clone().requires_grad_()
    assert_exact(Problem(MixingTuple(shapes), y0, t), choice, **METHODS["dopri5"])


@each_choice
def test_options_with_gradients(choice: str) -> None:
    problem = mixing_problem()
    jump = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    problem.params["jump_t"] = jump
    assert_exact(problem, choice, method="dopri5", rtol=1e-4, atol=1e-6, options={"first_step": 0.07, "jump_t": jump})


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_graph_of_the_solve_is_not_kept(method: str) -> None:
    func, y0 = Mixing(4), uniform(4, seed=2)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    t = torch.linspace(0, 8, 2, dtype=torch.float64)

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

    def saved() -> int:
        alive.clear()
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            solution = odeint(func, y0, t, **METHODS[method])
        assert solution.requires_grad
        gc.collect()
        return sum(kept.tensor.numel() for kept in alive)

    backpropagated = saved()
    with use("symplectic"):
        assert saved() * 10 < backpropagated


# What fields hold, and where.

GLOBAL = torch.nn.Parameter(uniform(3, seed=30))


class Holder:
    """Not a module."""

    def __init__(self, tensor: Tensor, net: nn.Module) -> None:
        self.inner: dict[str, Any] = {"list": [tensor], "nets": (net,)}

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.inner["nets"][0](t, y) + self.inner["list"][0] * torch.cos(t)
        return slope

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.slope(t, y)


class Conditioned(nn.Module):
    """A module that holds the output of another as an attribute."""

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.net, self.context = Mixing(3), context

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.net(t, y) * self.context
        return slope


def field_of(kind: str, leaf: Tensor, computed: Tensor, net: nn.Module) -> Callable[[Tensor, Tensor], Any]:
    controls = [computed, leaf]
    hidden = iter_of(computed)

    def closure(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(leaf * y) + computed * torch.cos(t)

    def argument(t: Tensor, y: Tensor, scale: Tensor = leaf, *, shift: Tensor = computed) -> Tensor:
        return torch.sin(scale * y) + shift * t

    fields: dict[str, Callable[..., Any]] = {
        "closure": closure,
        "lambda that calls a closure": lambda t, y: closure(t, y) * 2,
        "network in a lambda": lambda t, y: net(t, y),
        "network and its parameter": lambda t, y: net(t, y) * next(net.parameters()).sum() + leaf,
        "bound method": Holder(leaf, net).slope,
        "object that is called": Holder(computed, net),
        "partial": functools.partial(lambda c, t, y: torch.sin(c * y), computed),
        "default arguments": argument,
        "global": lambda t, y: torch.sin(GLOBAL * y),
        "attribute of a module": Conditioned(computed),
        "list by time": lambda t, y: torch.sin(controls[int(t > 0.8)] * y),
        "both, one computed from the other": lambda t, y: computed * y + leaf * (t > 0.8),
        "out of sight": lambda t, y: torch.sin(hidden() * y),
        "out of sight beside the rest": lambda t, y: torch.sin(hidden() * y) + computed + net(t, y),
        "a parameter returned": lambda t, y: leaf,
        "nothing": lambda t, y: torch.sin(y),
    }
    return fields[kind]


def iter_of(tensor: Tensor) -> Callable[[], Tensor]:
    """A function that gives ``tensor`` and holds it where a search does not look."""

    class Slots:
        __slots__ = ("tensor",)

    slots = Slots()
    slots.tensor = tensor  # type: ignore[attr-defined]
    return lambda: slots.tensor  # type: ignore[attr-defined]


KINDS = (
    "closure",
    "lambda that calls a closure",
    "network in a lambda",
    "network and its parameter",
    "bound method",
    "object that is called",
    "partial",
    "default arguments",
    "global",
    "attribute of a module",
    "list by time",
    "both, one computed from the other",
    "out of sight",
    "out of sight beside the rest",
    "a parameter returned",
    "nothing",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("y0_grad", [True, False], ids=["y0", "no-y0"])
@pytest.mark.parametrize("choice", ["symplectic", "aca"])
def test_what_a_field_uses_gets_its_gradient_wherever_it_is_held(choice: str, kind: str, y0_grad: bool) -> None:
    encoder, net, unused = nn.Linear(2, 3, dtype=torch.float64), Mixing(3), Mixing(3)
    leaf = uniform(3, seed=9).requires_grad_()
    computed = encoder(uniform(2, seed=8)) * leaf
    y0 = uniform(3, seed=7).requires_grad_(y0_grad)
    named = {"leaf": leaf, "GLOBAL": GLOBAL, **dict(encoder.named_parameters()), "unused": unused.weight}
    named |= {f"net.{name}": parameter for name, parameter in net.named_parameters()}
    field = field_of(kind, leaf, computed, net)
    problem = Problem(field, y0, T, params=named)
    if kind == "attribute of a module":
        named |= {f"own.{name}": parameter for name, parameter in field.named_parameters()}  # type: ignore[attr-defined]
    if kind == "nothing" and not y0_grad:
        with use_of(choice):
            assert not odeint(field, y0, T, method="rk4").requires_grad
        return
    gradients = assert_exact(problem, choice, method="rk4")
    assert gradients["unused"] is None
    assert_exact(problem, choice, **METHODS["dopri5"])


def test_one_of_two_outputs_held_out_of_sight_is_not_forgotten() -> None:
    source = uniform(6, seed=4).requires_grad_()
    seen, other = (source * source).chunk(2)
    hidden = iter_of(other)
    problem = Problem(lambda t, y: torch.sin(seen * y) * hidden(), uniform(3, seed=5), T, {"source": source})
    assert_exact(problem, "aca", method="rk4")


def test_what_is_used_at_late_times_alone_is_found() -> None:
    late = [uniform(3, seed=i).requires_grad_() for i in range(2)]
    hidden = iter_of(late[1])

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y) + (hidden() if t > 1.0 else late[0] if t > 0.6 else 0.0)

    problem = Problem(func, uniform(3, seed=5), T, params={"seen": late[0], "hidden": late[1]})
    gradients = assert_exact(problem, "symplectic", method="rk4")
    assert all(gradient is not None and norm_of(gradient) > 0 for gradient in gradients.values())


def test_leaves_that_an_evaluation_makes_are_neither_kept_nor_reported() -> None:
    weight = uniform(3, seed=1).requires_grad_()
    made: list[weakref.ref[Tensor]] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        x = y.detach().requires_grad_()
        made.append(weakref.ref(x))
        (score,) = torch.autograd.grad((weight * x).sin().sum(), x, create_graph=True)
        return score + y

    problem = Problem(func, uniform(3, seed=2).requires_grad_(), T, {"weight": weight})
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingGradientWarning)
        assert_exact(problem, "symplectic", method="euler", options={"step_size": 0.1})
    made.clear()
    with use("symplectic"):
        solution = odeint(func, problem.y0, T, method="euler", options={"step_size": 0.1})
    gc.collect()
    assert solution.requires_grad
    assert len(made) == 12
    assert sum(reference() is not None for reference in made) <= 1


def test_fields_that_ask_for_gradients_themselves() -> None:
    net = nn.Linear(3, 1, dtype=torch.float64)

    def func(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = state[0].requires_grad_(True)
        (force,) = torch.autograd.grad(torch.tanh(net(x)).sum(), x, create_graph=True)
        return force, force.square().sum(1)

    for grad in (True, False):
        y0 = (uniform(2, 3, seed=3).requires_grad_(grad), torch.zeros(2, dtype=torch.float64))
        problem = Problem(func, y0, T, params=dict(net.named_parameters()))
        for choice in CHOICES:
            assert_exact(problem, choice, **METHODS["dopri5"])


def test_events_through_odeint_event() -> None:
    problem = mixing_problem((3,))
    t0 = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def event_fn(t: Tensor, y: Tensor) -> Tensor:
        return t - 0.9 + 0.1 * y[0]

    def solve() -> tuple[Tensor, Tensor]:
        event_t, solution = odeint_event(problem.func, problem.y0, t0, event_fn=event_fn, **METHODS["rk4"])
        return event_t, solution

    wanted = {name: tensor for name, tensor in problem.wanted().items() if name != "t"} | {"t": t0}
    truth = solve()
    with use("symplectic"):
        found = solve()
    assert all(map(torch.equal, found, truth))
    losses = [loss_of(solution) + event_t for event_t, solution in (found, truth)]
    assert_same_gradients(gradients_of(losses[0], wanted), gradients_of(losses[1], wanted), torch.float64)


def test_double_backward() -> None:
    problem = mixing_problem((3,))
    results = []
    for switch in (use(None), use("symplectic")):
        with switch:
            solution = odeint(problem.func, problem.y0, problem.t, **METHODS["rk4"])
        (gradient,) = torch.autograd.grad(loss_of(solution), problem.y0, create_graph=True)
        results.append(gradients_of(gradient.square().sum(), problem.wanted()))
    assert_same_gradients(results[1], results[0], torch.float64)


@pytest.mark.parametrize("inner", [odeint, odeint_adjoint], ids=["odeint", "odeint_adjoint"])
def test_solves_inside_of_the_field_are_under_the_same_choice_when_replayed_outside(inner: Any) -> None:
    rate = Mixing(3)

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = rate

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            solve = inner if nested_in_use else odeint
            result: Tensor = solve(self.rate, y, T[:2], method="euler", options={"step_size": 0.1})[-1]
            return result

    problem = Problem(Nested(), uniform(3, seed=3).requires_grad_(), T)
    results = []
    for nested_in_use in (False, True):
        with use("symplectic" if nested_in_use else None):
            solution = odeint(problem.func, problem.y0, problem.t, method="rk4")
        results.append(gradients_of(loss_of(solution), problem.wanted()))
    assert_same_gradients(results[1], results[0], torch.float64)


# What needs no gradient, and what cannot have one.


def test_without_gradients_everything_runs_as_upstream() -> None:
    matrix = uniform(3, 3, seed=1).numpy()

    def numpy_field(t: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(matrix @ y.numpy())

    y0 = uniform(3, seed=2)
    for arguments in ({"method": "rk4"}, {"method": "dopri5"}, SCIPY):
        truth = odeint(numpy_field, y0, T, **arguments)
        with use("symplectic"):
            found = odeint(numpy_field, y0, T, **arguments)
            with torch.no_grad():
                parameters = odeint(Mixing(3), y0, T, **arguments)
        assert torch.equal(found, truth)
        assert not found.requires_grad
        assert not parameters.requires_grad


@pytest.mark.parametrize("what", ["y0", "t", "parameter", "closure"])
def test_a_method_that_cannot_be_replayed_is_refused_if_a_gradient_is_needed(what: str) -> None:
    weight = uniform(3, seed=1).requires_grad_(what == "closure")
    func: Any = Mixing(3) if what == "parameter" else lambda t, y: weight * y
    y0, t = uniform(3, seed=2).requires_grad_(what == "y0"), T.clone().requires_grad_(what == "t")
    with use("symplectic"), pytest.raises(NotImplementedError, match=r'"scipy_solver".*use\(None\)'):
        odeint(func, y0, t, **SCIPY)


def test_a_replay_that_differs_is_found_out_and_the_option_is_heeded() -> None:
    problem = mixing_problem((3,))
    calls: list[int] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        calls.append(0)
        slope: Tensor = problem.func(t, y) * (1 + 0.01 * len(calls))
        return slope

    for options, expected in (({}, pytest.raises(ReplayError)), ({"replay_check": "warn"}, pytest.warns())):
        with use("symplectic", **options):
            solution = odeint(func, problem.y0, problem.t, method="rk4")
        with expected:
            loss_of(solution).backward()


@each_choice
def test_several_solves_at_once_and_each_twice(choice: str) -> None:
    problem = mixing_problem((3,))
    truth = gradients_of(2 * loss_of(odeint(problem.func, problem.y0, problem.t, method="rk4")), problem.wanted())
    with use_of(choice):
        losses = [loss_of(odeint(problem.func, problem.y0, problem.t, method="rk4")) for _ in range(2)]
    for _ in range(2):
        assert_same_gradients(gradients_of(losses[0] + losses[1], problem.wanted()), truth, torch.float64)
