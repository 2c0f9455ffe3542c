"""The network that most problems solve, and their loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.problem import Problem, State, as_tuple

__all__ = ["NetworkField", "mean_square", "network", "seeded", "steps_of_size"]


class NetworkField(nn.Module):
    """dy/dt = network(y), layers of ``sizes`` neurons with tanh between them."""

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


def network(
    seed: int,
    sizes: tuple[int, ...],
    batch: int,
    t: Tensor,
    method: str = "dopri5",
    rtol: float = 1e-7,
    atol: float = 1e-9,
    options: Mapping[str, object] | None = None,
) -> Problem:
    """A :class:`NetworkField` in float32 on a normally distributed batch; settings as in torchdiffeq.

    Its loss is the mean square of the solution at all times but the first.
    """
    with seeded(seed):
        field = NetworkField(*sizes)
        y0 = torch.randn(batch, sizes[0])
    return Problem(
        field,
        y0,
        t,
        mean_square,
        method,
        rtol,
        atol,
        dict(options or {"first_step": 0.1}),
    )


def steps_of_size(size: float, adaptive: bool = True) -> dict[str, float]:
    """Options by which each step is ``size`` long, where an adaptive method's tolerance would allow longer ones."""
    return {"first_step": size, "max_step": size} if adaptive else {"step_size": size}


def mean_square(solution: State) -> Tensor:
    """Of the solution at all times but the first, summed over the parts of a tuple."""
    return torch.stack([part[1:].square().mean() for part in as_tuple(solution)]).sum()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator begins at ``seed`` inside, and is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
