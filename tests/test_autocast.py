"""Autocast: backward runs the field as the solve's region ran it, and the region is none the worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Net, each_mode, error, initial, loss_of, over, solve, times
from torch import Tensor

EPSILON = torch.finfo(torch.bfloat16).eps
LOOSE: dict[str, dict[str, Any]] = {"rk4": {}, "dopri5": {"rtol": 1e-1, "atol": 1e-1}}


def region(dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, **arguments)


def problem() -> tuple[Net, Tensor, Tensor, list[Tensor]]:
    net, y0 = Net(6, 17, dtype=torch.float32), initial(4, 6, dtype=torch.float32)
    return net, y0, times(dtype=torch.float32), [y0, *net.parameters()]


@over(["rk4", "dopri5"])
def test_backward_outside_of_the_region_is_backpropagation_of_the_solve_in_it(mode: str, method: str) -> None:
    net, y0, t, wanted = problem()

    def run(mode: str) -> tuple[Tensor, list[Tensor]]:
        with region():
            solution = solve(mode, net, y0, t, method, **LOOSE[method])
        return solution, list(torch.autograd.grad(loss_of(solution), wanted))

    (solution, found), (expected_solution, expected) = run(mode), run("backprop")
    assert torch.equal(solution, expected_solution)
    assert solution.dtype == torch.float32
    # Both round every product with a parameter to bfloat16; only the order of additions differs.
    assert error(found, expected) < 4 * EPSILON


@over(["rk4", "dopri5"])
def test_backward_inside_of_the_region_is_the_same_as_outside(mode: str, method: str) -> None:
    net, y0, t, wanted = problem()
    with region():
        loss = loss_of(solve(mode, net, y0, t, method, **LOOSE[method]))
        inside = torch.autograd.grad(loss, wanted, retain_graph=True)
    outside = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, inside, outside))


@each_mode
def test_backward_in_a_region_of_a_solve_that_had_none(mode: str) -> None:
    net, y0, t, wanted = problem()
    loss = loss_of(solve(mode, net, y0, t))
    expected = torch.autograd.grad(loss, wanted, retain_graph=True)
    with region():
        found = torch.autograd.grad(loss, wanted)
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("order", ["before", "after"])
@each_mode
def test_the_cache_of_the_region_still_serves_other_uses_of_the_module(mode: str, order: str) -> None:
    # Weights cast without a graph in a cached region would cut the module off from its parameters.
    net, y0, t, _ = problem()
    parameters = list(net.parameters())

    def direct() -> Tensor:
        result: Tensor = net(t[1], y0.detach()).float().square().sum()
        return result

    with region():
        expected = torch.autograd.grad(direct(), parameters)
    with region():
        other = direct() if order == "before" else None
        solution = solve(mode, net, y0, t)
        other = direct() if other is None else other
        found = torch.autograd.grad(other, parameters)
        assert all(map(torch.equal, found, expected))
        torch.autograd.grad(loss_of(solution), parameters)
        again = torch.autograd.grad(direct(), parameters)
    assert all(map(torch.equal, again, expected))


@pytest.mark.parametrize("backward_in_region", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@each_mode
def test_layers_compute_in_the_replay_in_the_dtype_of_the_solve(
    mode: str, dtype: torch.dtype, backward_in_region: bool
) -> None:
    net, y0, t, wanted = problem()
    seen: set[torch.dtype] = set()
    net.inner.register_forward_hook(lambda _, __, activation: seen.add(activation.dtype))
    with region(dtype):
        loss = loss_of(solve(mode, net, y0, t))
    assert seen == {dtype}
    seen.clear()
    with region(torch.bfloat16, enabled=backward_in_region):
        torch.autograd.grad(loss, wanted)
    assert seen == {dtype}
