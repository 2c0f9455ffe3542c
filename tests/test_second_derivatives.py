"""Gradients of gradients are exact in every mode, and cost no more than they must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from harness import (
    BACKPROPAGATION,
    KINDS,
    METHODS,
    OF_TORCHDYN,
    Net,
    arguments_of,
    each_mode,
    error,
    initial,
    loss_of,
    over,
    solve,
    times,
)
from torch import Tensor, nn

EXACT = 1e-11


@over(KINDS)
def test_gradient_penalty(mode: str, method: str) -> None:
    net, y0, t = Net(), initial(), times(0.1, 0.2, 0.4, 0.6).requires_grad_()
    wanted = [y0, t, *net.parameters()]
    if method == "torchdyn-hyper-euler":
        pytest.skip("each call has a solver, and parameters, of its own")

    def run(mode: str) -> list[Tensor]:
        loss = loss_of(solve(mode, net, y0, t, method))
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        penalty = sum((loss_of(gradient) for gradient in first), loss)
        return [*first, *torch.autograd.grad(penalty, wanted)]

    assert error(run(mode), run(BACKPROPAGATION)) < EXACT


@each_mode
def test_penalty_where_the_incoming_gradient_is_a_constant(mode: str) -> None:
    """Upstream's adjoint drops this term without a word."""
    net, y0, t = Net(), initial(), times(0.1, 0.5)

    def run(mode: str) -> list[Tensor]:
        solution = solve(mode, net, y0, t)
        (first,) = torch.autograd.grad(solution[-1].sum(), y0, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [y0, *net.parameters()], allow_unused=True))

    assert error(run(mode)[:-1], run(BACKPROPAGATION)[:-1]) < EXACT


@each_mode
def test_hessian_vector_product_and_third_derivative(mode: str) -> None:
    net, y0, t = Net(), initial(), times(0.1, 0.4)
    direction = torch.linspace(-1, 2, y0.numel(), dtype=y0.dtype).reshape(y0.shape)

    def run(mode: str) -> list[Tensor]:
        product: Tensor = torch.autograd.functional.hvp(lambda y: loss_of(solve(mode, net, y, t)), y0, direction)[1]
        (first,) = torch.autograd.grad(loss_of(solve(mode, net, y0, t)), y0, create_graph=True)
        (second,) = torch.autograd.grad(loss_of(first), y0, create_graph=True)
        return [product, torch.autograd.grad(loss_of(second), y0)[0]]

    assert error(run(mode), run(BACKPROPAGATION)) < EXACT


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@over(["rk4"])
def test_finite_differences_of_the_gradient(mode: str, method: str, interp: str) -> None:
    net, y0 = Net(2, 2), initial(2)
    t, options = times(0.1, 0.25, 0.4).requires_grad_(), {"step_size": 0.2, "interp": interp}

    def run(y0: Tensor, t: Tensor, *_: Tensor) -> Any:
        return solve(mode, net, y0, t, method, options=options)

    assert torch.autograd.gradgradcheck(run, (y0, t, *net.parameters()), fast_mode=True)


# What it costs. A backward whose cotangent is absent ran all the same, on zeros: K solves in a row cost 2^K.


class Encloses(nn.Module):
    """A field that solves inside."""

    def __init__(self, field: nn.Module, mode: str) -> None:
        super().__init__()
        self.field, self.own = field, arguments_of(mode)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        ends = times(0.0, 0.1)
        result: Tensor = torchdiffeq.odeint_adjoint(self.field, y, ends, method="euler", **self.own)[-1]
        return result - y


def evaluations(mode: str, method: str, solves: int, *, nested: bool) -> int:
    net, y0 = Net(), initial()
    field: Any = net
    if nested:
        for _ in range(solves - 1):
            field = Encloses(field, mode)
        state = solve(mode, field, y0, times(0.0, 0.1), method, options={"step_size": None})[-1]
    else:
        state = y0
        own: dict[str, Any] = {} if method in OF_TORCHDYN else {"options": {"step_size": None}}
        for _ in range(solves):
            state = solve(mode, net, state, times(0.0, 0.1, 0.2), method, **own)[-1]
    (first,) = torch.autograd.grad(state.square().sum(), y0, create_graph=True)
    torch.autograd.grad(first.square().sum(), [y0, *net.parameters()])
    return net.evaluations


@over([name for name in ("euler", "torchdyn-euler") if name in METHODS])
def test_double_backward_through_solves_in_a_row_costs_in_proportion(mode: str, method: str) -> None:
    """15, 34, 61, 104, 179, ... 1,108 evaluations for 1 to 8 solves, where the host takes 32."""
    few, twice, four_times = (evaluations(mode, method, solves, nested=False) for solves in (2, 4, 8))
    assert twice <= 2 * few
    assert four_times <= 2 * twice
    assert four_times <= 8 * 2 * 8  # solves, steps, evaluations of a step


@pytest.mark.parametrize("mode", ["symplectic", "baseline"])
def test_double_backward_through_nested_solves(mode: str) -> None:
    """Each level evaluates the one inside anew, a fixed number of times."""
    one, two, three = (evaluations(mode, "euler", levels, nested=True) for levels in (1, 2, 3))
    assert three / two <= 1.5 * two / one
