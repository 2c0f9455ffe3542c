"""Witnesses other than backpropagation: finite differences, closed forms, and what a symplectic adjoint conserves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import (
    ADAPTIVE,
    DOUBLE,
    METHODS,
    OF_TORCHDIFFEQ,
    Mixing,
    arguments_of,
    each_mode,
    over,
    relative_error,
    uniform,
)
from torch import Tensor, nn

# PyTorch says this of its own forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

EXACT = 1e-11

FIXED = [name for name in ("euler", "midpoint", "heun2", "heun3", "rk4") if name in METHODS]
ADAMS = [name for name in OF_TORCHDIFFEQ if name.endswith("adams")]

# Every step of the same size whatever the values: accepted at once, and never made larger or smaller.
CONSTANT_STEPS: dict[str, dict[str, Any]] = {
    **{name: {"method": name, "options": {"step_size": 0.17}} for name in FIXED},
    **{
        name: {
            "method": name,
            "rtol": 1e6,
            "atol": 1e6,
            "options": {"first_step": 0.21, "ifactor": 1.0, "dfactor": 1.0},
        }
        for name in ADAPTIVE
    },
    **{name: {"method": name, "rtol": 1e-3, "options": {"step_size": 0.093}} for name in ADAMS},
}


def solving(mode: str, method: str) -> Callable[..., Tensor]:
    """The solution as a function of state, times and two parameters."""

    def solve(y0: Tensor, t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        def field(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(y @ weight + bias * t) - 0.2 * y * t

        kwargs = CONSTANT_STEPS[method] | arguments_of(mode)
        return torchdiffeq.odeint_adjoint(field, y0, t, adjoint_params=(weight, bias), **kwargs)  # type: ignore[no-any-return]

    return solve


@over(CONSTANT_STEPS)
def test_finite_differences(mode: str, method: str) -> None:
    inputs = (
        uniform(1, 2, seed=1).requires_grad_(),
        torch.tensor([0.1, 0.33, 0.8], dtype=DOUBLE, requires_grad=True),
        uniform(2, 2, seed=2).requires_grad_(),
        uniform(2, seed=3).requires_grad_(),
    )
    torch.autograd.gradcheck(solving(mode, method), inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


# Coefficients of the stability function R(z), the value after one step of y' = z y from 1.
STABILITY: dict[str, list[float]] = {
    "euler": [1, 1],
    "midpoint": [1, 1, 1 / 2],
    "heun2": [1, 1, 1 / 2],
    "heun3": [1, 1, 1 / 2, 1 / 6],
    "rk4": [1, 1, 1 / 2, 1 / 6, 1 / 24],
    "bosh3": [1, 1, 1 / 2, 1 / 6],
    "dopri5": [1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 600],
}


class Linear(nn.Module):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.matrix @ y


@over([name for name in STABILITY if name in METHODS])
def test_linear_field_against_its_discrete_solution(mode: str, method: str) -> None:
    """After N steps ``y = R(h A)^N y0``; its gradients, in A too, by differentiating that formula."""
    steps, h = 5, 0.25
    field = Linear(uniform(3, 3, seed=5))
    y0, weights = uniform(3, seed=6).requires_grad_(), uniform(3, seed=7)
    options = {"step_size": h} if method in FIXED else {"first_step": h, "ifactor": 1.0, "dfactor": 1.0}
    kwargs = {"method": method, "options": options, "rtol": 1e6, "atol": 1e6}
    t = torch.tensor([0.0, steps * h], dtype=DOUBLE)
    found = torchdiffeq.odeint_adjoint(field, y0, t, **kwargs, **arguments_of(mode))[-1]
    powers = [torch.linalg.matrix_power(h * field.matrix, power) for power in range(len(STABILITY[method]))]
    step = sum(weight * power for weight, power in zip(STABILITY[method], powers, strict=True))
    truth = torch.linalg.matrix_power(step, steps) @ y0
    assert relative_error(found.detach(), truth.detach()) < EXACT
    expected = torch.autograd.grad(weights @ truth, (y0, field.matrix))
    for gradient, right in zip(torch.autograd.grad(weights @ found, (y0, field.matrix)), expected, strict=True):
        assert relative_error(gradient, right) < EXACT


@each_mode
def test_quadrature_by_euler_against_the_sum_written_out(mode: str) -> None:
    """``y' = sin t``: the sum of h_n sin t_n, whose derivative in each time is known."""
    t = torch.tensor([0.1, 0.4, 0.5, 1.1, 1.9], dtype=DOUBLE, requires_grad=True)
    y0 = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    func = torchdiffeq.odeint_adjoint(
        lambda t, y: torch.sin(t), y0, t, method="euler", adjoint_params=(), **arguments_of(mode)
    )
    (gradient,) = torch.autograd.grad(func[-1], t)
    with torch.no_grad():
        expected = torch.zeros_like(t)
        expected[:-1] += t.diff() * t.cos()[:-1] - t.sin()[:-1]
        expected[1:] += t.sin()[:-1]
    torch.testing.assert_close(gradient, expected, rtol=EXACT, atol=1e-14)


class Variational(nn.Module):
    """``(y, delta)' = (f, (df/dy) delta)``, by forward-mode differentiation.

    A Runge-Kutta step of this is a step of ``y`` and its derivative in the direction of ``delta``.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        y, delta = state
        result: tuple[Tensor, Tensor] = torch.func.jvp(lambda y: self.inner(t, y), (y,), (delta,))  # type: ignore[assignment]
        return result


GRID = torch.tensor([0.0, 0.12, 0.3, 0.61, 0.75, 1.2], dtype=DOUBLE)
# Each with a grid that is fixed from outside: for adaptive methods every step is cut at the next grid point.
ON_GRID: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in FIXED},
    **{
        name: {"method": name, "rtol": 1e6, "atol": 1e6, "options": {"first_step": 1.0, "step_t": GRID[1:]}}
        for name in ("dopri5", "dopri8", "bosh3")
    },
}


def invariants(field: nn.Module, method: str, adjoint: dict[str, Any]) -> Tensor:
    """``lambda^T delta`` at each grid point, shape ``(N + 1,)``.

    ``delta`` is the derivative of the solution there in a direction of the initial state, by forward mode; ``lambda``
    is the gradient of a loss at the end in the state there, from a solve of the remaining steps alone.
    """
    y0, direction, weights = (uniform(2, 3, seed=seed) for seed in (61, 62, 63))
    kwargs = ON_GRID[method]
    with torch.no_grad():
        states, deltas = torchdiffeq.odeint(Variational(field), (y0, direction), GRID, **kwargs)
    products = [weights.flatten() @ deltas[-1].flatten()]
    for n in reversed(range(len(GRID) - 1)):
        state = states[n].requires_grad_()
        end = torchdiffeq.odeint_adjoint(field, state, GRID[n:], **kwargs, **adjoint)[-1]
        assert relative_error(end.detach(), states[-1]) < EXACT
        (lam,) = torch.autograd.grad((weights * end).sum(), state)
        products.insert(0, lam.flatten() @ deltas[n].flatten())
    return torch.stack(products)


def drift(values: Tensor) -> float:
    """The largest change of any value from the last, relative to it."""
    return float(((values - values[-1]) / values[-1]).abs().max())


@over([name for name in ON_GRID if name in METHODS])
def test_product_of_adjoint_and_variation_is_conserved(mode: str, method: str) -> None:
    """Matsubara et al., NeurIPS 2021, theorem 1: along every step, which makes the gradient exact."""
    values = invariants(Mixing(6, seed=64), method, arguments_of(mode))
    assert float(values[-1].abs()) > 0.1
    assert drift(values) < EXACT


@pytest.mark.parametrize("method", ON_GRID)
def test_upstreams_adjoint_does_not_conserve_it(method: str) -> None:
    """So the test above can fail: with the same method, steps and grid, backwards in time."""
    assert drift(invariants(Mixing(6, seed=64), method, {})) > 1000 * EXACT
