"""What the adapter takes for granted of torchdyn's problems and models: names, attributes, dispatch, the field.

Each failure says what a new torchdyn does otherwise; where that is used stands in
``torchdiffeq_symplectic/hosts/torchdyn/_host.py``. ``test_torchdyn_solver_seams.py`` has the seams of its solve.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
import torchdyn.core.neuralde
import torchdyn.models
import torchdyn.nn
import torchdyn.numerics
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc
from torchdyn.core.problems import standardize_vf_call_signature
from torchdyn.models.cnf import CNF, hutch_trace

import torchdiffeq_symplectic
from torchdiffeq_symplectic.hosts.torchdyn import _problems, _solving
from torchdiffeq_symplectic.hosts.torchdyn._host import (
    MultipleShootingProblem,
    NeuralODE,
    ODEProblem,
    odeint,
    str_to_solver,
)

T = torch.tensor([0.0, 0.3, 1.0])
X = torch.tensor([[0.2, -1.0, 0.5], [1.5, 0.1, -0.7]])
CLASSES = (ODEProblem, NeuralODE)


class Field(nn.Module):
    """A field with torchdyn's signature."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-0.5, 0.7, width * width).reshape(width, width))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return torch.tanh(x @ self.matrix) + t


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """What is looked at is torchdyn itself."""
    torchdiffeq_symplectic.unregister()
    yield
    torchdiffeq_symplectic.register()


def arguments_of(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Names, kinds and defaults of its arguments, as it takes them itself."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters
    return {name: (parameter.kind, parameter.default) for name, parameter in parameters.items()}


# The methods that are replaced.


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (ODEProblem.odeint, _problems._odeint),
        (MultipleShootingProblem.odeint, _problems._odeint_parallel),
        (NeuralODE.trajectory, _problems._trajectory),
    ],
    ids=["ODEProblem.odeint", "MultipleShootingProblem.odeint", "NeuralODE.trajectory"],
)
def test_arguments_of_the_methods_are_those_of_ours(theirs: Callable[..., Any], ours: Callable[..., Any]) -> None:
    assert arguments_of(theirs) == arguments_of(ours), "the method has other arguments or defaults: ours must follow"


@pytest.mark.parametrize("name", ["sensitivity", "solver_adjoint"])
def test_the_constructor_has_the_arguments_that_may_name_a_mode(name: str) -> None:
    assert name in inspect.signature(ODEProblem.__init__).parameters
    assert name in inspect.signature(NeuralODE.__init__).parameters


def descendants(cls: type) -> set[type]:
    return {cls}.union(*map(descendants, cls.__subclasses__()))


PROBLEMS = sorted(
    (cls for cls in descendants(ODEProblem) if cls.__module__.startswith("torchdyn.")), key=lambda cls: cls.__name__
)


@pytest.mark.parametrize(
    ("name", "holders"),
    [
        ("odeint", {ODEProblem, MultipleShootingProblem}),
        ("trajectory", {NeuralODE}),
        ("sensitivity", set()),
    ],
)
def test_no_further_class_defines_what_is_replaced(name: str, holders: set[type]) -> None:
    found = {cls for cls in PROBLEMS if name in vars(cls)}
    assert found == holders, f"another class of torchdyn has its own {name}: register() must replace it there, too"


def test_every_problem_is_known() -> None:
    assert [cls.__name__ for cls in PROBLEMS] == [
        "MultipleShootingLayer",
        "MultipleShootingProblem",
        "NeuralODE",
        "ODEProblem",
    ], "torchdyn has another kind of ODEProblem: see what it does with a sensitivity"


@pytest.mark.parametrize("cls", PROBLEMS)
def test_every_problem_is_made_by_the_constructor_that_is_replaced(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[inspect.BoundArguments] = []
    constructor = ODEProblem.__init__

    @functools.wraps(constructor)
    def watching(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(inspect.signature(constructor).bind(self, *args, **kwargs))
        constructor(self, *args, **kwargs)

    monkeypatch.setattr(ODEProblem, "__init__", watching)
    solver = "zero" if issubclass(cls, MultipleShootingProblem) else "euler"
    cls(Field(), solver, sensitivity="adjoint", solver_adjoint="rk4")
    assert len(seen) == 1, "ODEProblem.__init__ is no longer looked up at each construction"
    assert seen[0].arguments["solver_adjoint"] == "rk4", "solver_adjoint reaches ODEProblem.__init__ changed"
    assert seen[0].arguments["sensitivity"] == "adjoint"


@pytest.mark.parametrize("cls", PROBLEMS)
def test_a_call_goes_through_the_method_odeint_with_all_arguments(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def instead(self: Any, *args: Any) -> tuple[Tensor, Tensor]:
        seen.append(args)
        return T, X

    parallel = issubclass(cls, MultipleShootingProblem)
    owner = MultipleShootingProblem if parallel else ODEProblem
    monkeypatch.setattr(owner, "odeint", instead)
    further: tuple[Any, ...] = (X,) if parallel else ([0.3], {"some": "thing"})
    cls(Field(), "zero" if parallel else "euler")(X, T, *further)
    assert len(seen) == 1, f"{cls.__name__}.forward no longer calls odeint"
    assert seen[0][0] is X
    assert seen[0][1] is T
    assert seen[0][2:] == further, f"{cls.__name__}.forward hands other arguments to odeint"


# The attributes of a problem.


@pytest.mark.parametrize("cls", CLASSES)
def test_a_problem_holds_what_its_solve_needs(cls: Any) -> None:
    field, loss = Field(), nn.Identity()
    model = cls(field, "dopri5", atol=0.25, rtol=0.5, interpolator="4th", integral_loss=loss, sensitivity="adjoint")
    assert (model.atol, model.rtol, model.interpolator) == (0.25, 0.5, "4th")
    assert model.integral_loss is loss
    assert isinstance(model.solver, nn.Module), "the solver of a problem is no longer an object"
    assert model.solver_adjoint is model.solver
    assert isinstance(model.vf, nn.Module)
    assert list(model.vf.parameters()) == list(field.parameters())


@pytest.mark.parametrize("cls", CLASSES)
def test_sensalg_and_sensitivity_are_plain_attributes_that_differ_only_if_assigned(cls: Any) -> None:
    model = cls(Field(), "euler", sensitivity="adjoint")
    assert vars(model)["sensalg"] == vars(model)["sensitivity"] == "adjoint"
    model.sensitivity = "autograd"
    assert model.sensalg == "adjoint", "torchdyn moves sensalg with sensitivity itself: _Sensitivity is not needed"


@pytest.mark.parametrize("cls", PROBLEMS)
def test_sensitivity_is_assigned_before_sensalg_and_vf(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    class Watching:
        def __get__(self, problem: Any, owner: Any = None) -> Any:
            return vars(problem)["sensitivity"]

        def __set__(self, problem: Any, value: Any) -> None:
            seen.append({"sensalg", "vf"} & (vars(problem).keys() | problem._modules.keys()))
            vars(problem)["sensitivity"] = value

    monkeypatch.setattr(ODEProblem, "sensitivity", Watching(), raising=False)
    cls(Field(), "zero" if issubclass(cls, MultipleShootingProblem) else "euler")
    assert seen == [set()], "the constructor assigns sensitivity later or more often: _Sensitivity.__set__ must know"


def test_the_field_of_a_neural_ode_knows_the_sensitivity_too() -> None:
    assert NeuralODE(Field(), "euler", sensitivity="adjoint").vf.sensitivity == "adjoint"
    assert not hasattr(ODEProblem(Field(), "euler", sensitivity="adjoint").vf, "sensitivity")


def test_solver_adjoint_that_is_a_name_becomes_a_module() -> None:
    model = ODEProblem(Field(), "euler", solver_adjoint="rk4")
    assert "solver_adjoint" in model._modules, "solver_adjoint is no longer a submodule: _init need not delete it first"
    with pytest.raises(KeyError, match="symplectic"):
        ODEProblem(Field(), "euler", solver_adjoint="symplectic")


def test_multiple_shooting_has_its_solver_by_another_name() -> None:
    problem = MultipleShootingProblem(Field(), "zero")
    assert problem.parallel_solver == "zero"
    assert problem.solver is None


# What torchdyn dispatches on.

# Of ODEProblem's own defaults torchdyn says so.
ignores_tolerances = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect:UserWarning")


@ignores_tolerances
@pytest.mark.parametrize("cls", CLASSES)
def test_dispatch_is_on_sensalg(cls: Any) -> None:
    model = cls(Field(), "euler", sensitivity="autograd")
    model.sensalg = "adjoint"
    assert "_ODEProblemFunc" in type(model(X, T)[1].grad_fn).__name__, "dispatch is no longer on sensalg"
    model.sensalg, model.sensitivity = "autograd", "adjoint"
    assert "_ODEProblemFunc" not in type(model(X, T)[1].grad_fn).__name__


@pytest.mark.parametrize("cls", CLASSES)
def test_the_sensitivities_of_torchdyn_are_known(cls: Any) -> None:
    known = []
    for name in ("autograd", "adjoint", "interpolated_adjoint", "symplectic"):
        model = cls(Field(), "euler", sensitivity=name)
        if name == "autograd" or model._autograd_func() is not None:
            known.append(name)
    assert known == list(_problems._OWN), "torchdyn has other sensitivities: _OWN must list them"


# What is done before a solve.


def test_a_neural_ode_prepares_state_and_times_before_each_solve() -> None:
    model = NeuralODE(Field(), "euler")
    assert list(inspect.signature(NeuralODE._prep_integration).parameters) == ["self", "x", "t_span"]
    x, t_span = model._prep_integration(X, T)
    assert x is X
    assert t_span is T
    assert torch.equal(model._prep_integration(X, None)[1], torch.linspace(0, 1, 2))
    model.t_span = T
    assert model._prep_integration(X, None)[1] is T


def test_a_trajectory_is_prepared_and_neither_interpolated_nor_saved_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[inspect.BoundArguments] = []
    prepared: list[Any] = []
    model = NeuralODE(Field(), "dopri5", atol=0.25, rtol=0.5, interpolator="4th", sensitivity="adjoint")

    def instead(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append(inspect.signature(odeint).bind(*args, **kwargs))
        return T, X

    def prepare(x: Tensor, t_span: Tensor) -> tuple[Tensor, Tensor]:
        prepared.append((x, t_span))
        return X, T

    monkeypatch.setattr(torchdyn.core.neuralde, "odeint", instead)
    monkeypatch.setattr(model, "_prep_integration", prepare)
    solution = model.trajectory(2 * X, 2 * T)
    assert solution is X, "trajectory returns something else than the solution"
    assert len(prepared) == 1
    (call,) = seen
    given = call.arguments
    assert (given["f"], given["x"], given["t_span"]) == (model.vf, X, T)
    assert (given["solver"], given["atol"], given["rtol"]) == (model.solver, 0.25, 0.5)
    assert set(given) == {"f", "x", "t_span", "solver", "atol", "rtol"}, "trajectory solves with more: Call must follow"


def test_a_call_solves_with_interpolator_save_at_and_args(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[inspect.BoundArguments] = []

    def instead(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen.append(inspect.signature(odeint).bind(*args, **kwargs))
        return T, X

    monkeypatch.setattr(sys.modules["torchdyn.core.problems"], "odeint", instead)
    model = ODEProblem(Field(), "dopri5", atol=0.25, rtol=0.5, interpolator="4th")
    model(X, T, [0.3], {"some": "thing"})
    given = seen[0].arguments
    assert (given["f"], given["x"], given["t_span"]) == (model.vf, X, T)
    assert (given["solver"], given["atol"], given["rtol"]) == (model.solver, 0.25, 0.5)
    assert (given["interpolator"], given["save_at"], given["args"]) == ("4th", [0.3], {"some": "thing"})
    assert len(given) == 9, "torchdyn solves with more: Call must follow"


class Everything(nn.Module):
    """Every layer of torchdyn that has a state of its own; what they compute does not matter here."""

    def __init__(self) -> None:
        super().__init__()
        noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        self.flow = CNF(nn.Linear(2, 2), trace_estimator=hutch_trace, noise_dist=noise)
        self.exact = CNF(nn.Linear(2, 2))
        self.control = torchdyn.nn.DataControl()
        self.depth = torchdyn.nn.DepthCat(1)
        self.galerkin = nn.Sequential(torchdyn.nn.DepthCat(1), torchdyn.nn.GalLinear(3, 3))
        self.augmenter = torchdyn.nn.Augmenter(1, 2)

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        total: Tensor = self.flow(x) + self.exact(x) + self.galerkin(x) + self.control(x)[:, :3] + self.depth(x)[:, 1:]
        return total


def held(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of the field's modules."""
    return {
        (name, key): value
        for name, module in model.vf.named_modules()  # type: ignore[union-attr]
        for key, value in vars(module).items()
        if not key.startswith("_") or key == "_control"
    }


def changed(before: dict[tuple[str, str], Any], after: dict[tuple[str, str], Any]) -> set[str]:
    return {f"{name}.{key}" for name, key in after if after[name, key] is not before.get((name, key), before)}


# The field.


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint", "symplectic", None])
def test_a_field_carries_the_loss_in_its_first_column_in_autograd_alone(sensitivity: str | None) -> None:
    def loss(t: Tensor, x: Tensor) -> Tensor:
        return x.square().sum(1)

    field = Field()
    defunc = DEFunc(field)
    assert (defunc.integral_loss, defunc.sensitivity) == (None, None)
    defunc.integral_loss, defunc.sensitivity = loss, sensitivity
    if sensitivity == "autograd":
        state = torch.cat([torch.ones(2, 1), X], 1)
        # There DEFunc calls its field with time and state alone.
        expected = torch.cat([loss(T[1], X)[:, None], field(T[1], X)], 1)
        assert torch.equal(defunc(T[1], state), expected), "the running cost is no longer the slope of the first column"
    else:
        assert torch.equal(defunc(T[1], X), field(T[1], X)), "the first column is the loss in other sensitivities, too"


@pytest.mark.parametrize("sensitivity", ["autograd", "symplectic"])
def test_a_model_counts_the_column_of_the_loss_in_autograd_alone(sensitivity: str) -> None:
    model = NeuralODE(Everything(), "euler", sensitivity=sensitivity, integral_loss=lambda t, x: x.sum(1))
    model._prep_integration(X, T)
    columns = model.vf.vf.control._control.shape[1]
    assert columns == 3 - 2 - (sensitivity == "autograd"), "excess dimensions are counted by something else"


def test_the_adjoint_adds_the_sum_of_the_running_cost() -> None:
    """Its meaning of an integral loss, which the modes have: added to the loss, with the sum over the batch."""

    def loss(t: Tensor, x: Tensor) -> Tensor:
        return x[:, :2]

    x = torch.zeros(2, 3, requires_grad=True)
    field = standardize_vf_call_signature(lambda t, x, args=None: 0 * x + 0 * t)  # so that x stays where it is
    problem = ODEProblem(field, "rk4", sensitivity="adjoint", integral_loss=loss)
    problem.atol_adjoint = problem.rtol_adjoint = 1e-3  # the defaults of odeint, of which it says nothing
    problem.atol = problem.rtol = 1e-3
    _, solution = problem(x, 2 * T)
    assert solution.shape == (3, 2, 3), "the solution has a column for the loss"
    (gradient,) = torch.autograd.grad(0.0 * solution.sum(), x)
    expected = torch.tensor([2.0, 2.0, 0.0]).expand(2, 3)
    assert torch.allclose(gradient, expected), "the integral of the loss is no longer added as the sum over the batch"


# The functional odeint, and what a choice must not take for a need of gradients.


def test_the_functional_odeint_is_looked_up_in_the_package_and_takes_what_a_call_holds() -> None:
    """In its own module it reads its own defaults, so that name must stay."""
    assert torchdyn.numerics.odeint is odeint
    parameters = inspect.signature(odeint).parameters
    assert set(parameters) >= _problems._KNOWN
    assert list(parameters)[:4] == ["f", "x", "t_span", "solver"]
    assert _problems._KNOWN - {"f"} <= set(inspect.signature(_solving.Call).parameters)
    assert isinstance(str_to_solver("rk4", torch.float64), nn.Module)


def test_a_field_without_parameters_is_given_one_of_a_known_name(capsys: pytest.CaptureFixture[str]) -> None:
    model = NeuralODE(lambda t, x, args=None: -x, solver="rk4")
    assert "does not have" in capsys.readouterr().out
    assert [name for name, _ in model.vf.named_parameters()] == [_solving._DUMMY]
