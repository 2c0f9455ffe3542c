"""Gradients of gradients are exact in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from old_harness import Net, each_mode, each_solver, error, initial, loss_of, solve, times
from torch import Tensor

EXACT = 1e-11


@each_solver
@each_mode
def test_gradient_penalty(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times().requires_grad_()
    wanted = [y0, t, *net.parameters()]

    def run(mode: str) -> list[Tensor]:
        loss = loss_of(solve(mode, net, y0, t, solver))
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        penalty = sum((loss_of(gradient) for gradient in first), loss)
        return [*first, *torch.autograd.grad(penalty, wanted)]

    assert error(run(mode), run("backprop")) < EXACT


@pytest.mark.parametrize("name", ["y0", "t", "parameters"])
@each_mode
def test_gradient_penalty_of_one_input(mode: str, name: str) -> None:
    net, y0, t = Net(), initial(), times().requires_grad_()
    inputs: dict[str, list[Tensor]] = {"y0": [y0], "t": [t], "parameters": list(net.parameters())}

    def run(mode: str) -> list[Tensor]:
        loss = loss_of(solve(mode, net, y0, t))
        first = torch.autograd.grad(loss, inputs[name], create_graph=True)
        penalty = sum((loss_of(gradient) for gradient in first), torch.zeros(()))
        return list(torch.autograd.grad(penalty, [y0, t, *net.parameters()]))

    assert error(run(mode), run("backprop")) < EXACT


@each_mode
def test_penalty_where_the_incoming_gradient_is_a_constant(mode: str) -> None:
    # Upstream's adjoint drops this term without a word.
    net, y0, t = Net(), initial(), times()

    def run(mode: str) -> list[Tensor]:
        solution = solve(mode, net, y0, t)
        (first,) = torch.autograd.grad(solution[-1].sum(), y0, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [y0, *net.parameters()], allow_unused=True))

    assert error(run(mode)[:-1], run("backprop")[:-1]) < EXACT


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_penalty_added_to_the_gradients_by_backward(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times()

    def run(mode: str) -> list[Any]:
        net.zero_grad()
        loss = loss_of(solve(mode, net, y0, t, solver))
        (first,) = torch.autograd.grad(loss, y0, create_graph=True)
        (loss + first.square().sum()).backward()
        return [parameter.grad for parameter in net.parameters()]

    assert error(run(mode), run("backprop")) < EXACT


@each_mode
def test_hessian_vector_product(mode: str) -> None:
    net, y0, t = Net(), initial(), times()
    direction = torch.linspace(-1, 2, y0.numel(), dtype=y0.dtype).reshape(y0.shape)

    def run(mode: str) -> Tensor:
        product: Tensor = torch.autograd.functional.hvp(lambda y: loss_of(solve(mode, net, y, t)), y0, direction)[1]
        return product

    assert error([run(mode)], [run("backprop")]) < EXACT


@each_mode
def test_third_derivative(mode: str) -> None:
    net, y0, t = Net(), initial(), times()

    def run(mode: str) -> Tensor:
        (first,) = torch.autograd.grad(loss_of(solve(mode, net, y0, t)), y0, create_graph=True)
        (second,) = torch.autograd.grad(loss_of(first), y0, create_graph=True)
        return torch.autograd.grad(loss_of(second), y0)[0]

    assert error([run(mode)], [run("backprop")]) < EXACT


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@each_mode
def test_finite_differences_of_the_gradient(mode: str, interp: str) -> None:
    net, y0 = Net(2, 3), initial(2)
    t = times(0.1, 0.25, 0.6).requires_grad_()
    options = {"step_size": 0.2, "interp": interp}

    def run(y0: Tensor, t: Tensor, *_: Tensor) -> Any:
        return solve(mode, net, y0, t, options=options)

    parameters = tuple(net.parameters())
    assert torch.autograd.gradcheck(run, (y0, t, *parameters))
    assert torch.autograd.gradgradcheck(run, (y0, t, *parameters))
