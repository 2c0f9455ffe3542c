"""Rounding: the symplectic adjoint method adds a step's contributions before it adds them to what it carries."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import Net, error, initial, loss_of, solve
from torch import Tensor

STEPS = 1000


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mode", ["symplectic", "stages", "aca"])
def test_rounding_over_a_thousand_steps_is_below_backpropagations(mode: str, seed: int) -> None:
    single = Net(seed=seed, dtype=torch.float32)
    double = copy.deepcopy(single).double()
    start = initial().detach().float()
    t = torch.linspace(0, 4, STEPS + 1, dtype=torch.float64)[[0, -1]]

    def gradients(mode: str, net: Net, dtype: torch.dtype) -> list[Tensor]:
        y0 = start.to(dtype).requires_grad_()
        solution = solve(mode, net, y0, t.to(dtype), options={"step_size": 4 / STEPS})
        found = torch.autograd.grad(loss_of(solution.double()), [y0, *net.parameters()])
        return [gradient.double() for gradient in found]

    exact = gradients("backprop", double, torch.float64)
    assert error(gradients(mode, double, torch.float64), exact) < 1e-11
    backpropagated = gradients("backprop", single, torch.float32)
    found = gradients(mode, single, torch.float32)
    # The gradient of the initial state is what the sums run along; no parameter may be worse either.
    assert error(found[:1], exact[:1]) < error(backpropagated[:1], exact[:1])
    assert error(found, exact) < error(backpropagated, exact)
    assert error(found, exact) < 1e-5
