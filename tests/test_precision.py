"""Rounding: the symplectic adjoint method adds a step's contributions before it adds them to what it carries."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from old_harness import Net, error, initial, loss_of, solve
from torch import Tensor, nn

STEPS = 1024
SIZE = 2.0**-8  # a power of two, so that the grid is the same in float32 and float64


class Linear(nn.Module):
    """Linear in the state, so the gradient does not depend on it: what is seen is the rounding of backward alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        values = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
        self.matrix = nn.Parameter(values - values.T + 0.1 * values)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix


def last_entries(solution: Tensor) -> Tensor:
    """A linear function of the last state."""
    last = solution[-1]
    return (last * torch.linspace(-1, 2, last.numel(), dtype=last.dtype).view_as(last)).sum()


@functools.cache
def gradient(kind: str, mode: str, seed: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a solve in ``dtype``, all of it in one float64 vector."""
    linear = kind == "linear"
    field: nn.Module = (Linear(seed) if linear else Net(seed=seed, dtype=torch.float32)).to(dtype)
    y0 = (initial(2, 5) if linear else initial()).detach().float().to(dtype).requires_grad_()
    t = torch.tensor([0.0, STEPS * SIZE], dtype=dtype)
    solution = solve(mode, copy.deepcopy(field), y0, t, options={"step_size": SIZE}).double()
    found = torch.autograd.grad(last_entries(solution) if linear else loss_of(solution), y0)
    return found[0].double().flatten()


def rounding(kind: str, mode: str, seeds: range) -> float:
    """The error of the float32 gradient of y0, summed over ``seeds``."""
    return sum(
        error([gradient(kind, mode, seed, torch.float32)], [gradient(kind, "backprop", seed, torch.float64)])
        for seed in seeds
    )


@pytest.mark.parametrize("mode", ["symplectic", pytest.param("aca", marks=pytest.mark.slow)])
def test_backward_of_a_linear_field_rounds_less_than_backpropagation(mode: str) -> None:
    # Backpropagation adds five numbers to the cotangent in each step of rk4, one after the other; here it is one.
    assert rounding("linear", mode, range(3)) < rounding("linear", "backprop", range(3)) / 1.5


@pytest.mark.parametrize("mode", ["symplectic", pytest.param("aca", marks=pytest.mark.slow)])
def test_gradient_of_a_network_rounds_less_than_backpropagations(mode: str) -> None:
    # Both share the rounding of the states.
    assert rounding("network", mode, range(3)) < rounding("network", "backprop", range(3))
