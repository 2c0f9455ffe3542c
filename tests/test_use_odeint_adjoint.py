"""``odeint_adjoint`` under `use`: exact, whatever its arguments ask for and whenever its name was bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchdiffeq
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
    parts_of,
    uniform,
)
from torch import Tensor

import torchdiffeq_symplectic
from torchdiffeq_symplectic import MissingGradientWarning, register, unregister, use

Solver = Callable[..., Any]


@pytest.fixture(params=["bound early", "bound late", "this package's"])
def odeint_adjoint(request: pytest.FixtureRequest) -> Iterator[Solver]:
    if request.param == "bound late":
        yield torchdiffeq.odeint_adjoint
    elif request.param == "this package's":
        yield torchdiffeq_symplectic.odeint_adjoint
    else:
        unregister()
        upstream = torchdiffeq.odeint_adjoint
        register()
        yield upstream


def assert_exact(problem: Problem, solver: Solver, choice: use, **arguments: Any) -> None:
    """Values and gradients are those of backpropagation; ``adjoint_`` arguments are left out of that."""
    plain = {name: value for name, value in arguments.items() if not name.startswith("adjoint_")}
    wanted = problem.wanted()
    truth = torchdiffeq.odeint(problem.func, problem.y0, problem.t, **plain)
    with choice:
        found = solver(problem.func, problem.y0, problem.t, **arguments)
    assert all(map(torch.equal, parts_of(found), parts_of(truth)))
    dtype = parts_of(truth)[0].dtype
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted), dtype)


@each_family
@pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])
def test_every_method_is_exact_under_every_mode(method: str, mode: str, odeint_adjoint: Solver) -> None:
    options = METHODS[method]["options"]
    assert_exact(mixing_problem(), odeint_adjoint, use(mode), **METHODS[method], adjoint_options=options)


def norm(state: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([part.abs().max() for part in state]).max()


ARGUMENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "options alone": {"options": {"step_size": 0.1}},
    "empty options": {"options": {}},
    "the solver's own name": {"adjoint_method": "rk4", "options": {"step_size": 0.1}},
    "another solver's name": {"adjoint_method": "dopri5"},
    "another solver's name and options": {
        "adjoint_method": "midpoint",
        "adjoint_options": {"step_size": 0.3},
        "options": {},
    },
    "tolerances": {"adjoint_rtol": 1e-1, "adjoint_atol": 1e-1, "rtol": 1e-3},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}, "options": {}},
    "a norm of one's own": {"adjoint_options": {"norm": norm}, "options": {}},
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.filterwarnings("error")
def test_what_the_adjoint_is_asked_to_be_has_no_effect(case: str, odeint_adjoint: Solver) -> None:
    assert_exact(mixing_problem(), odeint_adjoint, use("symplectic"), method="rk4", **ARGUMENTS[case])


def test_the_check_of_adjoint_options_is_waived_where_the_name_can_be_reached() -> None:
    arguments = {"method": "rk4", "options": {}, "adjoint_method": "dopri5"}
    assert_exact(mixing_problem(), torchdiffeq.odeint_adjoint, use("symplectic"), **arguments)


@pytest.mark.filterwarnings("ignore::torchdiffeq_symplectic.MissingGradientWarning")
@pytest.mark.parametrize("kind", ["tuple", "generator", "empty"])
def test_adjoint_params_are_those_that_get_a_gradient(kind: str, odeint_adjoint: Solver) -> None:
    weight, other = uniform(3, 3, seed=1).requires_grad_(), uniform(3, seed=2).requires_grad_()
    y0 = uniform(3, seed=3).requires_grad_()
    t = torch.tensor([0.0, 0.5, 1.1], dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(weight @ y + other * t)

    params: Any = {"tuple": (weight, other), "generator": iter([weight, other]), "empty": ()}[kind]
    problem = Problem(func, y0, t, params={} if kind == "empty" else {"weight": weight, "other": other})
    assert_exact(problem, odeint_adjoint, use("aca"), method="rk4", adjoint_params=params)
    with use("aca"):
        solution = odeint_adjoint(func, y0, t, method="rk4", adjoint_params=())
    assert gradients_of(solution.sum(), {"weight": weight}) == {"weight": None}


def test_a_field_without_a_list_is_refused_as_upstream_does(odeint_adjoint: Solver) -> None:
    with use("symplectic"), pytest.raises(ValueError, match=r"must be an instance of nn\.Module"):
        odeint_adjoint(lambda t, y: y, uniform(3, seed=3), torch.tensor([0.0, 1.0]))


def test_a_tensor_that_is_in_no_list_is_reported(odeint_adjoint: Solver) -> None:
    scale = uniform(3, seed=4).requires_grad_()

    class Scaled(Mixing):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(t, y) * scale

    with use("symplectic"):
        solution = odeint_adjoint(Scaled(3), uniform(3, seed=3), torch.tensor([0.0, 1.0]), method="euler")
    with pytest.warns(MissingGradientWarning):
        solution.sum().backward()


def test_unused_parameters_get_zeros_as_from_upstream(odeint_adjoint: Solver) -> None:
    func = Mixing(3)
    func.unused = torch.nn.Parameter(uniform(2, seed=1))
    with use("symplectic"):
        odeint_adjoint(func, uniform(3, seed=3), torch.tensor([0.0, 1.0]), method="rk4").sum().backward()
    assert func.unused.grad is not None
    assert not func.unused.grad.any()


def test_tuples_with_tolerances_of_their_own(odeint_adjoint: Solver) -> None:
    shapes = [(2, 2), (3,)]
    y0 = tuple(uniform(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    t = torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64, requires_grad=True)
    arguments = {"method": "dopri5", "rtol": [1e-4, 1e20], "atol": [1e-5, 1e20], "options": {"first_step": 0.05}}
    assert_exact(Problem(MixingTuple(shapes), y0, t), odeint_adjoint, use("symplectic"), **arguments)


def test_without_gradients_every_method_runs(odeint_adjoint: Solver) -> None:
    func, y0, t = Mixing(3), uniform(3, seed=3), torch.tensor([0.0, 1.0])
    arguments = {"method": "scipy_solver", "options": {"solver": "LSODA"}}
    with torch.no_grad():
        truth = odeint_adjoint(func, y0, t, **arguments)
        with use("symplectic"):
            assert torch.equal(odeint_adjoint(func, y0, t, **arguments), truth)
    with use("symplectic"), pytest.raises(NotImplementedError, match=r"use\(None\)"):
        odeint_adjoint(func, y0, t, **arguments)


def test_an_unknown_name_is_still_an_error(odeint_adjoint: Solver) -> None:
    with use("symplectic"), pytest.raises(ValueError, match='Invalid method "symplektik"'):
        odeint_adjoint(Mixing(3), uniform(3, seed=3), torch.tensor([0.0, 1.0]), adjoint_method="symplektik")


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_upstreams_adjoint_solves_are_the_same_bit_for_bit_beside_a_choice(method: str) -> None:
    """Before, after, and where it is taken back; a backward pass inside does not change whose solve it is."""
    problem = mixing_problem()

    def gradients(during: use) -> dict[str, Tensor | None]:
        loss = loss_of(torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, method=method))
        with during:
            return gradients_of(loss, problem.wanted())

    unregister()
    truth = gradients(use(None))
    register()
    for found in (gradients(use(None)), gradients(use("symplectic"))):
        assert all(torch.equal(found[name], truth[name]) for name in truth)  # type: ignore[arg-type]
    with use("aca"), use(None):
        found = gradients(use("aca"))
    assert all(torch.equal(found[name], truth[name]) for name in truth)  # type: ignore[arg-type]
