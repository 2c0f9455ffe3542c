"""The memory-free adjoint in torchdyn: for its euler, and for solvers whose step is Euler's or Heun's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from old_harness import Net, error, loss_of
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE
from torchdyn.numerics import Euler, RungeKutta4
from torchdyn.numerics.solvers.templates import DiffEqSolver

from torchdiffeq_symplectic.experiments.memory import live_bytes

# Upstream says so to everyone whose tolerances are not odeint's defaults, its own adjoint among them.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning")


class Field(Net):
    """The same network as torchdyn calls it."""

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return super().forward(t, x)


class Heun(DiffEqSolver):  # type: ignore[misc]
    """A solver of a user's own."""

    def __init__(self) -> None:
        super().__init__(order=2, stepping_class="fixed")

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> Any:
        first = f(t, x) if k1 is None else k1
        return None, x + dt / 2 * (first + f(t + dt, x + dt * first)), None


def state() -> Tensor:
    return torch.tensor([[0.4, -0.9, 0.2], [1.1, 0.3, -0.6]], dtype=torch.float64, requires_grad=True)


def gradients(solver: Any, sensitivity: str, t: Tensor, saved: Any = (), **settings: Any) -> list[Tensor]:
    x, model = state(), NeuralODE(Field(), solver=solver, sensitivity=sensitivity)
    if settings:
        model.adjoint_options = settings
    _, solution = model(x, t, save_at=saved)
    return list(torch.autograd.grad(loss_of(solution), [x, *model.vf.vf.parameters()]))


def recovered(t: Tensor) -> list[Tensor]:
    """The paper's recursion for Euler, written out: only the last state is known."""
    field, x = Field(), state()
    end = x.detach()
    for start, stop in itertools.pairwise(t):
        end = (end + (stop - start) * field(start, end)).detach()
    solution = end[None].requires_grad_()
    (cotangent,) = torch.autograd.grad(loss_of(solution), solution)[0]
    parameters = list(field.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for n in reversed(range(len(t) - 1)):
        size = t[n + 1] - t[n]
        before = x.detach() if n == 0 else (end - size * field(t[n], end)).detach()
        end = before.requires_grad_()
        cotangent, *products = torch.autograd.grad(end + size * field(t[n], end), [end, *parameters], cotangent)
        totals = [total + product for total, product in zip(totals, products, strict=True)]
    return [cotangent, *totals]


@pytest.mark.parametrize("solver", ["euler", Euler()], ids=["name", "object"])
def test_gradient_is_that_of_the_papers_recursion(solver: Any) -> None:
    t = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.45, 0.62, 0.8, 1.0], dtype=torch.float64)
    found, expected = gradients(solver, "memory_free", t, t[-1:]), recovered(t)
    assert error(found, expected) < 1e-13
    assert error(found, gradients(solver, "autograd", t, t[-1:])) > 1e-5


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
def test_gradient_is_exact_where_every_state_is_an_output(direction: str) -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    t = t if direction == "increasing" else t.flip(0)
    assert error(gradients("euler", "memory_free", t), gradients("euler", "autograd", t)) < 1e-12


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), (Heun(), 2)])
def test_error_falls_with_the_number_of_steps(solver: Any, order: int) -> None:
    errors = []
    for steps in (64, 256):
        t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        errors.append(error(gradients(solver, "memory_free", t, t[-1:]), gradients(solver, "aca", t, t[-1:])))
    assert errors[1] < errors[0] / 4**order * 1.3, errors


def test_integral_of_a_running_cost_is_added() -> None:
    """Its value is no part of the state that is recovered."""
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    found, reports = [], list[float]()
    for sensitivity in ("memory_free", "symplectic"):
        x = state()
        model = NeuralODE(
            Field(), solver="euler", sensitivity=sensitivity, integral_loss=lambda t, x: x.square().mean(-1)
        )
        if sensitivity == "memory_free":
            model.adjoint_options = {"report": reports.append}
        loss = loss_of(model(x, t, save_at=t[[0, 200, 400]])[1])
        found.append(torch.autograd.grad(loss, [x, *model.vf.vf.parameters()]))
    assert 0 < error(*found) < 1e-2
    assert 0 < reports[0] < 1e-2


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(-0.5))

        def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            return self.rate * x

    x, model = torch.ones(4096, 64, requires_grad=True), NeuralODE(Decay(), "euler", sensitivity="memory_free")

    def kept(steps: int) -> int:
        t = torch.linspace(0, 1, steps + 1)
        return live_bytes(lambda: model(x, t, save_at=t[-1:])[1], "cpu")

    kept(10)
    assert abs(kept(1000) / kept(10) - 1) < 0.1
    assert kept(1000) < 1.2 * x.nbytes


@pytest.mark.parametrize("solver", ["rk4", "midpoint", "dopri5", "tsit5", RungeKutta4(), "alf"])
def test_other_solvers_are_refused(solver: Any) -> None:
    model = NeuralODE(Field(), solver=solver, sensitivity="memory_free")
    x = torch.cat([state(), state()], dim=1) if solver == "alf" else state()
    with pytest.raises(ValueError, match=r'sensitivity="memory_free" is for solvers.*euler, heun2'):
        model(x, torch.linspace(0, 1, 4, dtype=torch.float64))
