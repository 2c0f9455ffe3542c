"""``odeint`` and ``odeint_adjoint`` under `use`: exact, whatever the arguments ask for and a name was bound to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import (
    DOUBLE,
    KINDS,
    METHODS,
    Mixing,
    Problem,
    assert_equal_values,
    assert_exact,
    assert_same_gradients,
    gradients_of,
    loss_of,
    over,
    problem_for,
    solve,
    uniform,
)
from torch import Tensor

import torchdiffeq_symplectic
from torchdiffeq_symplectic import register, unregister, use

Solver = Callable[..., Any]
SCIPY: dict[str, Any] = {"method": "scipy_solver", "options": {"solver": "LSODA"}}
T = torch.tensor([0.1, 0.34, 0.9, 1.27], dtype=DOUBLE)
USED = ["use:symplectic", "use:stages", "use:aca", "use:baseline"]


@over(KINDS, USED)
def test_gradients_are_none_where_backpropagation_has_none(mode: str, method: str) -> None:
    problem = problem_for(method, time_grad=False)
    problem.extra = {"elsewhere": torch.nn.Parameter(uniform(2, seed=1))}
    assert "elsewhere" not in assert_exact(problem, mode, method)


def test_leaves_that_an_evaluation_makes_are_not_kept() -> None:
    weight, y0 = uniform(3, seed=1).requires_grad_(), uniform(3, seed=2).requires_grad_()
    made: list[weakref.ref[Tensor]] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        x = y.detach().requires_grad_()
        made.append(weakref.ref(x))
        (score,) = torch.autograd.grad((weight * x).sin().sum(), x, create_graph=True)
        return score + y

    solution = solve("use:symplectic", func, y0, T, "euler", options={"step_size": 0.1})
    gc.collect()
    assert solution.requires_grad
    assert len(made) == 12
    assert sum(reference() is not None for reference in made) <= 1


# What needs no gradient, and what cannot have one.


def test_without_gradients_everything_runs_as_upstream() -> None:
    matrix = uniform(3, 3, seed=1).numpy()

    def numpy_field(t: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(matrix @ y.numpy())

    for arguments in ({"method": "rk4"}, {"method": "dopri5"}, SCIPY):
        truth = torchdiffeq.odeint(numpy_field, uniform(3, seed=2), T, **arguments)
        with use("symplectic"):
            found = torchdiffeq.odeint(numpy_field, uniform(3, seed=2), T, **arguments)
            with torch.no_grad():
                assert not torchdiffeq.odeint(Mixing(3), uniform(3, seed=2), T, **arguments).requires_grad
        assert torch.equal(found, truth)
        assert not found.requires_grad


@pytest.mark.parametrize("what", ["y0", "t", "parameter", "closure"])
def test_a_method_that_cannot_be_replayed_is_refused_if_a_gradient_is_needed(what: str) -> None:
    weight = uniform(3, seed=1).requires_grad_(what == "closure")
    func: Any = Mixing(3) if what == "parameter" else lambda t, y: weight * y
    y0, t = uniform(3, seed=2).requires_grad_(what == "y0"), T.clone().requires_grad_(what == "t")
    with use("symplectic"), pytest.raises(NotImplementedError, match=r'"scipy_solver".*use\(None\)'):
        torchdiffeq.odeint(func, y0, t, **SCIPY)


# odeint_adjoint under a choice, by every name of it.


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


def assert_exact_by(solver: Solver, problem: Problem, choice: use, **arguments: Any) -> None:
    """Values and gradients are those of backpropagation; ``adjoint_`` arguments are left out of that."""
    plain = {name: value for name, value in arguments.items() if not name.startswith("adjoint_")}
    truth = torchdiffeq.odeint(problem.field, problem.y0, problem.t, **plain)
    with choice:
        found = solver(problem.field, problem.y0, problem.t, **arguments)
    assert_equal_values(found, truth)
    wanted = problem.wanted()
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun"])
@pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])
def test_every_method_is_exact_under_every_mode(method: str, mode: str, odeint_adjoint: Solver) -> None:
    settings = METHODS[method].settings
    assert_exact_by(
        odeint_adjoint, problem_for(), use(mode), method=method, **settings, adjoint_options=settings["options"]
    )


def test_refusals_are_upstreams(odeint_adjoint: Solver) -> None:
    y0, t = uniform(3, seed=3), torch.tensor([0.0, 1.0])
    with use("symplectic"):
        with pytest.raises(ValueError, match=r"must be an instance of nn\.Module"):
            odeint_adjoint(lambda t, y: y, y0, t)
        with pytest.raises(ValueError, match='Invalid method "symplektik"'):
            odeint_adjoint(Mixing(3), y0, t, adjoint_method="symplektik")
        with pytest.raises(NotImplementedError, match=r"use\(None\)"):
            odeint_adjoint(Mixing(3), y0, t, **SCIPY)
        with torch.no_grad():
            odeint_adjoint(Mixing(3), y0, t, **SCIPY)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_upstreams_adjoint_solves_are_the_same_bit_for_bit_beside_a_choice(method: str) -> None:
    """Before, after, and where it is taken back; a backward pass inside does not change whose solve it is."""
    problem = problem_for()

    def gradients(during: use) -> dict[str, Tensor | None]:
        loss = loss_of(torchdiffeq.odeint_adjoint(problem.field, problem.y0, problem.t, method=method))
        with during:
            return gradients_of(loss, problem.wanted())

    unregister()
    truth = gradients(use(None))
    register()
    results = [gradients(use(None)), gradients(use("symplectic"))]
    with use("aca"), use(None):
        results.append(gradients(use("aca")))
    for found in results:
        assert all(torch.equal(found[name], truth[name]) for name in truth)  # type: ignore[arg-type]
