"""The three problems by which speed is judged: where the network's arithmetic is all, where there are many outputs, and
where Python's overhead is all. Their networks use tanh, their states are float32.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.problem import Problem, State, as_tuple

__all__ = ["NetworkField", "large_net", "many_outputs", "small_net"]


class NetworkField(nn.Module):
    """``dy/dt = network(y)``, layers of ``sizes`` neurons with tanh between them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for entering, leaving in pairwise(sizes):
            layers += [nn.Linear(entering, leaving), nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope, in the shape of ``y``."""
        slope: Tensor = self.network(y)
        return slope


def large_net(seed: int = 0) -> Problem:
    """A network of 330,000 weights on a batch of 2048, by dopri5, its solution taken at the end alone."""
    return _problem(
        (64, 512, 512, 64), 2048, torch.linspace(0.0, 1.0, 2), seed, rtol=1e-4, atol=1e-4, options={"first_step": 0.1}
    )


def many_outputs(seed: int = 0) -> Problem:
    """20 output times inside a few steps, on a network of medium size."""
    return _problem(
        (32, 128, 128, 32), 512, torch.linspace(0.0, 1.0, 20), seed, rtol=1e-4, atol=1e-4, options={"first_step": 0.1}
    )


def small_net(seed: int = 0) -> Problem:
    """A network of 1,600 weights on a batch of 32, t from 0 to 10 in many steps."""
    return _problem(
        (8, 32, 32, 8), 32, torch.linspace(0.0, 10.0, 2), seed, rtol=1e-7, atol=1e-7, options={"first_step": 0.1}
    )


def _problem(
    sizes: tuple[int, ...], batch: int, t: Tensor, seed: int, rtol: float, atol: float, options: dict[str, float]
) -> Problem:
    """Weights and initial state drawn from ``seed``; torch's global generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        field = NetworkField(*sizes)
        y0 = torch.randn(batch, sizes[0])
    return Problem(field, y0, t, _mean_square, "dopri5", rtol, atol, options)


def _mean_square(solution: State) -> Tensor:
    return torch.stack([part[1:].square().mean() for part in as_tuple(solution)]).sum()
