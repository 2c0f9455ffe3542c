"""torchdyn under `use`: exact whatever `sensitivity` says, by NeuralODE, ODEProblem and the functional ``odeint``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
import torchdyn.numerics
from harness import (
    DOUBLE,
    arguments_of,
    assert_equal_values,
    assert_same_gradients,
    each_mode,
    first_step_held,
    gradients_of,
    loss_of,
    over,
    uniform,
)
from outcomes import is_replayed
from torch import Tensor, nn
from torchdyn.core import MultipleShootingLayer, NeuralODE, ODEProblem
from torchdyn.numerics import Euler

from torchdiffeq_symplectic import use

SPAN = torch.linspace(0.0, 1.0, 5, dtype=DOUBLE)
ENTRIES: dict[str, Callable[[Any, Tensor, str], Any]] = {
    "NeuralODE": lambda field, x, solver: NeuralODE(field, solver=solver, return_t_eval=False)(x, SPAN),
    "trajectory": lambda field, x, solver: NeuralODE(field, solver=solver).trajectory(x, SPAN),
    "ODEProblem": lambda field, x, solver: ODEProblem(field, solver, atol=1e-3, rtol=1e-3)(x, SPAN)[1],
    "odeint": lambda field, x, solver: torchdyn.numerics.odeint(field, x, SPAN, solver)[1],
    "odeint by names": lambda field, x, solver: torchdyn.numerics.odeint(
        f=field, x=x, t_span=SPAN.flip(0), solver=Euler(DOUBLE) if solver == "rk4" else solver
    )[1],
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(torch.cat([x, t.expand(len(x), 1)], dim=1))
        return result


class Force(nn.Module):
    """Differentiates without enabling gradients: under torchdyn's autograd they are enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        (force,) = torch.autograd.grad(torch.tanh(self.net(t, x)).sum(), x, create_graph=True)
        return force


def state() -> Tensor:
    return uniform(4, 2, seed=3).requires_grad_()


def under(mode: str) -> use:
    own = arguments_of(mode)
    return use(own["adjoint_method"], **own.get("adjoint_options", {}))


def assert_as_autograd(run: Callable[[], Tensor], wanted: dict[str, Tensor], mode: str) -> None:
    """``run()`` under ``mode`` gives the values and the gradients of torchdyn's backpropagation."""
    with first_step_held():
        truth = run()
    with under(mode):
        found = run()
    assert is_replayed(found)
    assert not is_replayed(truth)
    assert_equal_values(found, truth)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted))


@pytest.mark.parametrize("field", [Net, Force])
@pytest.mark.parametrize("entry", ENTRIES)
@over(["rk4", "dopri5"])
def test_every_entry_is_reached(mode: str, method: str, entry: str, field: type[nn.Module]) -> None:
    func, x = field(), state()
    assert_as_autograd(lambda: ENTRIES[entry](func, x, method), {"x": x} | dict(func.named_parameters()), mode)


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
@each_mode
def test_neural_odes_are_exact_whatever_their_sensitivity(mode: str, sensitivity: str) -> None:
    net, x = Net(), state()
    wanted = {"x": x} | dict(net.named_parameters())
    truth = NeuralODE(net, solver="rk4", return_t_eval=False)(x, SPAN)
    with under(mode):
        found = NeuralODE(net, solver="rk4", sensitivity=sensitivity, return_t_eval=False)(x, SPAN)
    assert_equal_values(found, truth)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted))


def test_a_model_that_names_a_mode_keeps_it() -> None:
    model = NeuralODE(Net(), solver="rk4", sensitivity="symplectic", return_t_eval=False)
    model.adjoint_options = {"checkpoint": "sages"}
    with use("aca"), pytest.raises(ValueError, match="checkpoint"):
        model(state(), SPAN)


class Linear(nn.Linear):
    """Takes states of any shape, as multiple shooting has them."""

    def __init__(self, trained: bool) -> None:
        super().__init__(2, 2, dtype=DOUBLE)
        self.requires_grad_(trained)

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_what_needs_no_gradient_runs_as_upstream() -> None:
    x = state().detach()
    for model in (
        NeuralODE(Linear(trained=False), solver="ieuler", return_t_eval=False),
        NeuralODE(lambda t, x, args=None: -x, solver="ieuler", return_t_eval=False),
        MultipleShootingLayer(Linear(trained=False), solver="zero"),
    ):
        solution = model(x, SPAN)
        with use("symplectic"):
            assert_equal_values(model(x, SPAN), solution)


def test_what_cannot_be_replayed_is_refused_where_a_gradient_is_needed() -> None:
    implicit = NeuralODE(Net(), solver="ieuler", return_t_eval=False)
    for model in (implicit, MultipleShootingLayer(Linear(trained=True), solver="zero")):
        with use("symplectic"):
            with pytest.raises(NotImplementedError):
                model(state(), SPAN)
            with torch.no_grad():
                model(state(), SPAN)
            with use(None):
                model(state(), SPAN)


def test_arguments_of_the_function_that_no_mode_knows_leave_the_solve_to_torchdyn() -> None:
    with use("symplectic"):
        _, solution = torchdyn.numerics.odeint(Net(), state(), SPAN, "dopri5", return_all_eval=True)
    assert solution.requires_grad
    assert not is_replayed(solution)
