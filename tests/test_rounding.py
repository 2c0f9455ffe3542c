"""Rounding: a step's contributions are summed before they are added to what is carried.

The claim of the paper: sum a step first, then add. float32, rk4, a thousand steps; the truth is backpropagation in
float64 on the same states as float32 has them.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness import error, initial, solve
from torch import Tensor, nn

STEPS = 1024
SIZE = 2.0**-7  # a power of two, so that the grid is the same in float32 and float64
SEEDS = range(3)


class Linear(nn.Module):
    """Linear in the state: its gradient does not depend on the states, so only backward's own rounding is seen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        values = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
        self.matrix = nn.Parameter(values - values.T + 0.1 * values)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.matrix


class Network(nn.Module):
    """16, 32, 32, 16, smooth: as in the benchmark."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.layers(y)
        return slope


@functools.cache
def gradients(kind: str, mode: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Those of the initial state and of all parameters, each as one float64 vector."""
    field = (Linear(seed) if kind == "linear" else Network(seed)).to(dtype)
    y0 = initial(16, 5 if kind == "linear" else 16).detach().float().to(dtype).requires_grad_()
    t = torch.tensor([0.0, STEPS * SIZE], dtype=dtype)
    options = {"step_size": SIZE}
    solution = solve(mode, field, y0, t, options=options)[-1].double()
    loss = (solution * torch.linspace(-1, 2, solution.numel()).view_as(solution)).sum()
    state, *parameters = torch.autograd.grad(loss, [y0, *field.parameters()])
    return state.double().flatten(), torch.cat([part.double().flatten() for part in parameters])


def rounding(kind: str, mode: str) -> tuple[float, float]:
    """The mean error of the float32 gradient of the state, and of the parameters."""
    pairs = [(gradients(kind, mode, s, torch.float32), gradients(kind, "backprop", s, torch.float64)) for s in SEEDS]
    return tuple(sum(error([f[i]], [t[i]]) for f, t in pairs) / len(SEEDS) for i in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["symplectic", "stages", "aca"])
def test_backward_of_a_linear_field_rounds_less_than_backpropagation(mode: str) -> None:
    """Backpropagation adds five numbers to the cotangent in each step of rk4, one after the other; here it is one."""
    assert rounding("linear", mode)[0] < rounding("linear", "backprop")[0] / 1.5


@pytest.mark.parametrize("mode", ["symplectic", "stages", "aca"])
def test_rounding_of_a_network_over_a_thousand_steps(mode: str) -> None:
    """Parameters were at 1.2e-6, where summing a step first gives 7e-7; backpropagation has 1.7e-6 and 1.3e-6."""
    state, parameters = rounding("network", mode)
    others = rounding("network", "backprop")
    print(f"{mode}: {state:.2e} {parameters:.2e}; backpropagation: {others[0]:.2e} {others[1]:.2e}")
    assert state <= 0.75 * others[0]
    assert parameters <= 0.65 * others[1]
