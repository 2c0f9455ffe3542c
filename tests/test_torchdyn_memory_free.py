"""The memory-free mode in torchdyn: for every explicit solver whose step can be taken back."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    OF_TORCHDYN,
    Net,
    error,
    initial,
    loss_of,
    neural_ode,
    solve,
)
from torch import Tensor, nn
from torchdyn.numerics import Euler

import torchdiffeq_symplectic
from torchdiffeq_symplectic.experiments.memory import live_bytes

EXPLICIT = [name for name in OF_TORCHDYN if METHODS[name].stages and "()" not in name]
STALE = ["torchdyn-stale-heun"]  # the slope that it starts from is lost


def gradients(mode: str, t: Tensor, method: str = "torchdyn-euler", **settings: Any) -> list[Tensor]:
    x, field = initial(), Net()
    solution = solve(mode, field, x, t, method, **settings)
    return list(torch.autograd.grad(loss_of(solution[-1]), [x, *field.parameters()]))


def recovered(t: Tensor) -> list[Tensor]:
    """The paper's recursion for Euler, written out: only the last state is known."""
    field, x = Net(), initial()
    end = x.detach()
    for start, stop in itertools.pairwise(t):
        end = (end + (stop - start) * field(start, end)).detach()
    solution = end.requires_grad_()
    (cotangent,) = torch.autograd.grad(loss_of(solution), solution)
    parameters = list(field.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for n in reversed(range(len(t) - 1)):
        size = t[n + 1] - t[n]
        before = x.detach() if n == 0 else (end - size * field(t[n], end)).detach()
        end = before.requires_grad_()
        cotangent, *products = torch.autograd.grad(end + size * field(t[n], end), [end, *parameters], cotangent)
        totals = [total + product for total, product in zip(totals, products, strict=True)]
    return [cotangent, *totals]


@pytest.mark.parametrize("solver", ["euler", Euler(DOUBLE)], ids=["name", "object"])
def test_without_corrections_the_gradient_is_that_of_the_papers_recursion(solver: Any) -> None:
    t = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.45, 0.62, 0.8, 1.0], dtype=DOUBLE)
    settings = {
        "solver": solver,
        "call": {"save_at": t[-1:]},
        "adjoint_options": {"corrections": 0, "replay_check": "ignore"},
    }
    assert error(gradients("memory_free", t, **settings), recovered(t)) < 1e-13


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("method", [name for name in EXPLICIT if name not in STALE])
def test_with_corrections_the_gradient_is_exact_on_smooth_fields(method: str, direction: str) -> None:
    t = torch.linspace(0, 1, 25, dtype=DOUBLE)
    t = t if direction == "increasing" else t.flip(0)
    last = {} if METHODS[method].adaptive else {"call": {"save_at": t[-1:] if direction == "increasing" else -t[-1:]}}
    found = gradients("memory_free", t, method, **last)
    assert error(found, gradients(BACKPROPAGATION, t, method)) < 1e-9


def test_the_integral_of_a_running_cost_is_added() -> None:
    """Its value is no part of the state that is recovered."""
    t, reports = torch.linspace(0, 1, 41, dtype=DOUBLE), list[float]()
    found = []
    for mode in ("memory_free", "symplectic"):
        x, field = initial(), Net()
        model = neural_ode(mode, field, solver="euler", integral_loss=lambda t, x: x.square().mean(-1))
        if mode == "memory_free":
            model.adjoint_options = {"report": reports.append}
        loss = loss_of(model(x, t, save_at=t[[0, 20, 40]])[1])
        found.append(torch.autograd.grad(loss, [x, *field.parameters()]))
    assert error(*found) < 1e-9
    assert 0 < reports[0] < 1e-9


class Decay(nn.Module):
    """Contracts by ``exp(rate)``."""

    def __init__(self, rate: float = -0.5) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.rate * x


def test_what_cannot_be_recovered_is_reported() -> None:
    """In float32, a contraction by exp(-40)."""
    x, t = torch.randn(5, 4).requires_grad_(), torch.linspace(0, 1, 81)
    field: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def contracting(t: Tensor, x: Tensor, args: Any = None) -> Any:
        return field(x) - 40 * x

    for options, raised in (({}, "warns"), ({"tolerance": 1e-3}, "raises")):
        model = neural_ode("memory_free", contracting, solver="rk4", adjoint_options=options)
        loss = model(x, t, save_at=t[-1:])[1].sum()
        if raised == "warns":
            with pytest.warns(torchdiffeq_symplectic.ReplayWarning, match="did not recover"):
                loss.backward()
        else:
            with pytest.raises(torchdiffeq_symplectic.ReplayError, match="did not recover"):
                loss.backward()


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    x, model = torch.ones(4096, 64, requires_grad=True), neural_ode("memory_free", Decay(), solver="rk4")

    def kept(steps: int) -> int:
        t = torch.linspace(0, 1, steps + 1)
        return live_bytes(lambda: model(x, t, save_at=t[-1:])[1], "cpu")

    kept(10)
    few, many = kept(10), kept(300)
    assert abs(many / few - 1) < 0.1
    assert many < 1.2 * x.nbytes


@pytest.mark.parametrize("method", ["torchdyn-hyper-euler", "torchdyn-projecting", *STALE])
def test_a_step_that_cannot_be_taken_back_is_refused_or_shows_in_the_reconstruction(method: str) -> None:
    t, reports = torch.linspace(0, 1, 9, dtype=DOUBLE), list[float]()
    solver: Any = METHODS[method].solver(DOUBLE, 6)
    settings = {"solver": solver, "adjoint_options": {"report": reports.append, "replay_check": "ignore"}}
    if not METHODS[method].adaptive:
        settings["call"] = {"save_at": t[-1:]}
    try:
        found = gradients("memory_free", t, method, **settings)
    except (NotImplementedError, ValueError):
        return
    truth = gradients(BACKPROPAGATION, t, method, solver=solver)
    assert error(found, truth) <= 5.5 * max(reports[0], 1e-12)
