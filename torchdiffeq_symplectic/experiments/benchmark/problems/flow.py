"""A continuous normalizing flow: a density model whose likelihood is the solution of a differential equation.

The data x = z(0) flows to z(1), which is normally distributed. Along the way the log-density changes by the divergence
of the field:

    dz/dt = f(t, z)        dl/dt = div f(t, z), l(0) = 0        log p(x) = log N(z(1); 0, 1) + l(1)

The divergence is estimated by Hutchinson's trace estimator, eᵀ (∂f/∂z) e with E[e eᵀ] = 1, whose noise e stays the same
during a solve (Grathwohl et al., FFJORD, ICLR 2019, https://arxiv.org/abs/1810.01367).
"""

import math

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import State

__all__ = ["FlowField", "initial_state", "log_likelihood"]


class FlowField(nn.Module):
    """The slopes of z and l: a network of two hidden layers, and the estimate of its divergence.

    A new field is zero, so that its flow is the identity.

    Args:
        dimensions: entries of z, d.
        width: neurons in a hidden layer.
    """

    noise: Tensor

    def __init__(self, dimensions: int, width: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(dimensions + 1, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, dimensions),
        )
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("noise", torch.empty(0, dimensions))

    def draw_noise(self, batch: int, generator: torch.Generator) -> None:
        """Draw the noise e of the next solve, ±1 of shape ``(batch, d)``, from ``generator``, which is the CPU's."""
        signs = torch.randint(0, 2, (batch, self.noise.shape[1]), generator=generator)
        self.noise = (2 * signs - 1).to(self.noise)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Slopes of z, shape ``(batch, d)``, and of l, shape ``(batch,)``."""
        # Without gradients z is a leaf of its own, as it may claim to require a gradient all the same: a view taken
        # inside an autograd.Function does, but leads nowhere.
        z = state[0] if state[0].requires_grad and torch.is_grad_enabled() else state[0].detach().requires_grad_()
        with torch.enable_grad():
            slope = self.network(torch.cat([z, t.expand(len(z), 1)], dim=1))
            (product,) = torch.autograd.grad(slope, z, self.noise, create_graph=True)
            divergence = (product * self.noise).sum(dim=1)
        return slope, divergence


def initial_state(x: Tensor) -> tuple[Tensor, Tensor]:
    """z(0) and l(0) for data ``x`` of shape ``(batch, d)``."""
    return x, x.new_zeros(len(x))


def log_likelihood(solution: State) -> Tensor:
    """The values of log p(x) in nats, shape ``(batch,)``, from the solution for ``initial_state(x)`` up to t = 1."""
    z, change = solution[0][-1], solution[1][-1]
    normal = -0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)
    return normal + change
