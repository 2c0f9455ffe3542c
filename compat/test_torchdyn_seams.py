"""What the adapter takes for granted of torchdyn's problems and models: names, attributes, dispatch, the field.

Each failure says what a new torchdyn does otherwise; where that is used stands in
``torchdiffeq_symplectic/hosts/torchdyn/_host.py``.
"""

from __future__ import annotations

import copy
import functools
import inspect
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
from torchdyn.numerics.solvers.ode import SOLVER_DICT

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


def test_solver_adjoint_that_is_a_name_becomes_a_module() -> None:
    model = ODEProblem(Field(), "euler", solver_adjoint="rk4")
    assert "solver_adjoint" in model._modules, "solver_adjoint is no longer a submodule: _init need not delete it first"
    with pytest.raises(KeyError, match="symplectic"):
        ODEProblem(Field(), "euler", solver_adjoint="symplectic")


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


# The solvers.


def test_every_solver_of_torchdyn_is_known() -> None:
    kinds: dict[str, set[str]] = {}
    for name, cls in SOLVER_DICT.items():
        kinds.setdefault(cls.__name__, set()).add(name)
    assert set(kinds) == {
        *("Euler", "Midpoint", "RungeKutta4", "DormandPrince45", "Tsitouras45"),  # measured
        "AsynchronousLeapfrog",  # replayed whole
        "ImplicitEuler",  # refused
    }, "torchdyn has another solver: see whether it is measured, replayed whole or refused, and say so in the README"


@pytest.mark.parametrize("name", sorted(SOLVER_DICT))
def test_a_solver_is_a_module_that_can_be_copied_and_says_how_it_steps(name: str) -> None:
    solver: Any = str_to_solver(name)
    assert issubclass(type(solver), nn.Module)
    assert solver.stepping_class in ("fixed", "adaptive")
    assert list(solver.parameters()) == []
    twin: Any = copy.deepcopy(solver)
    state, t = torch.zeros(4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = twin.sync_device_dtype(state, t)
    assert found[0] is state
    if twin.tableau is not None:
        nodes, rows, weights, _ = twin.tableau
        assert {part.dtype for part in (nodes, *rows, weights)} == {torch.float64}, "a tableau keeps its own dtype"
        assert solver.tableau[0].dtype == torch.float32, "a copy shares its tableau"
