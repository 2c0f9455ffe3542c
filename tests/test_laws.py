"""Laws that need no oracle: whatever the gradient is, these must hold of it."""

from __future__ import annotations

from typing import Any

import torch
from harness import (
    DOUBLE,
    EXPLICIT,
    KINDS,
    METHODS,
    OF_TORCHDYN,
    Net,
    Problem,
    error,
    initial,
    loss_of,
    over,
    problem_for,
    relative_error,
    solve,
    times,
    uniform,
)
from torch import Tensor

EXACT = 1e-12
FIXED = [name for name in EXPLICIT if not METHODS[name].adaptive and not callable(METHODS[name].solver)]


def pulled_back(mode: str, method: str, problem: Problem, *cotangents: Tensor) -> list[list[Tensor]]:
    """The gradients for each cotangent of one solution."""
    solution = solve(mode, problem.field, problem.y0, problem.t, method, **problem.settings)
    wanted = list(problem.wanted().values())
    return [list(torch.autograd.grad(solution, wanted, cotangent, retain_graph=True)) for cotangent in cotangents]


@over(KINDS)
def test_the_gradient_is_linear_in_the_cotangent(mode: str, method: str) -> None:
    problem = problem_for(method)
    shape = (len(problem.t), 2, 3)
    one, other = uniform(*shape, seed=1), uniform(*shape, seed=2)
    first, second, both = pulled_back(mode, method, problem, one, other, 0.3 * one - 2.5 * other)
    assert error(both, [0.3 * a - 2.5 * b for a, b in zip(first, second, strict=True)]) < EXACT


@over(KINDS)
def test_a_cotangent_of_zero_gives_zeros(mode: str, method: str) -> None:
    problem = problem_for(method)
    (found,) = pulled_back(mode, method, problem, torch.zeros(len(problem.t), 2, 3, dtype=DOUBLE))
    assert not any(gradient.any() for gradient in found)


@over(FIXED)
def test_a_solve_that_is_split_at_a_step_has_the_gradient_of_the_whole(mode: str, method: str) -> None:
    field, y0 = Net(), initial()
    grid = torch.linspace(0, 1, 9, dtype=DOUBLE)
    wanted = [y0, *field.parameters()]
    settings: dict[str, Any] = {} if method in OF_TORCHDYN else {"options": {"step_size": None}}
    whole = solve(mode, field, y0, grid, method, **settings)
    first = solve(mode, field, y0, grid[:6], method, **settings)
    second = solve(mode, field, first[-1], grid[5:], method, **settings)
    assert relative_error(second[-1], whole[-1]) < EXACT  # times of the halves are sums of other numbers
    expected = torch.autograd.grad(loss_of(whole[[2, 5, 8]]), wanted)
    assert error(torch.autograd.grad(loss_of(torch.stack([first[2], first[5], second[3]])), wanted), expected) < EXACT


@over(FIXED)
def test_a_batch_that_is_permuted_has_the_permuted_gradient(mode: str, method: str) -> None:
    field, y0, order = Net(), initial(5, 3), torch.tensor([3, 0, 4, 1, 2])
    t = times(0.0, 0.4, 0.7, 1.0)
    plain = torch.autograd.grad(solve(mode, field, y0, t, method)[-1].square().sum(), [y0, *field.parameters()])
    moved = y0.detach()[order].requires_grad_()
    found = torch.autograd.grad(solve(mode, field, moved, t, method)[-1].square().sum(), [moved, *field.parameters()])
    assert error(found, [plain[0][order], *plain[1:]]) < EXACT


@over(["rk4", "dopri5", "dopri8", "adaptive_heun", "explicit_adams"])
def test_outputs_that_the_loss_does_not_use_change_nothing(mode: str, method: str) -> None:
    """The host steps past them: more rows, the same steps."""
    field, y0 = Net(), initial()
    wanted = [y0, *field.parameters()]
    few, many = times(0.0, 0.5, 1.0), times(0.0, 0.12, 0.13, 0.5, 0.77, 1.0)
    expected = torch.autograd.grad(loss_of(solve(mode, field, y0, few, method)[[1, 2]]), wanted)
    assert error(torch.autograd.grad(loss_of(solve(mode, field, y0, many, method)[[3, 5]]), wanted), expected) < EXACT


@over(KINDS)
def test_a_tensor_that_scales_the_loss_scales_the_gradient(mode: str, method: str) -> None:
    """By a power of two, to the bit: nothing in backward depends on the size of what arrives."""
    problem = problem_for(method)
    cotangent = uniform(len(problem.t), 2, 3, seed=4)
    small, large = pulled_back(mode, method, problem, cotangent, 1024 * cotangent)
    assert all(torch.equal(1024 * one, other) for one, other in zip(small, large, strict=True))


@over(KINDS)
def test_the_gradient_is_the_same_in_every_run(mode: str, method: str) -> None:
    problem = problem_for(method)
    cotangent = uniform(len(problem.t), 2, 3, seed=4)
    first, second = (pulled_back(mode, method, problem, cotangent)[0] for _ in range(2))
    assert all(map(torch.equal, first, second))
