"""``cnf``: continuous normalizing flows, density models whose likelihood solves a differential equation.

The data x = z(0) flows to z(1), which is normally distributed; the log-density changes by the divergence of the field:

    dz/dt = f(t, z)        dl/dt = div f(t, z), l(0) = 0        log p(x) = log N(z(1); 0, 1) + l(1)

The divergence is estimated by Hutchinson's trace estimator, eᵀ (∂f/∂z) e with E[e eᵀ] = 1, whose noise e stays the same
during a solve (Grathwohl et al., FFJORD, ICLR 2019, https://arxiv.org/abs/1810.01367). Matsubara et al. (section 5.1)
learn MINIBOONE, GAS and POWER by M flows in a row. Those tables have to be downloaded; here are one that scikit-learn
ships, and mixtures of correlated normal distributions of the same numbers of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Problem, Series, State
from torchdiffeq_symplectic.experiments.benchmark.problems.network import seeded

__all__ = ["CNF", "FlowField", "initial_state", "loss"]

WIDTH, BATCH = 64, 256


class FlowField(nn.Module):
    """The slopes of z and l: a network of two hidden layers, and the estimate of its divergence.

    A new field is zero, so that its flow is the identity.
    """

    noise: Tensor

    def __init__(self, dimensions: int, width: int = WIDTH) -> None:
        super().__init__()
        sizes = dimensions + 1, width, width
        hidden = [layer for i in range(2) for layer in (nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh())]
        self.network = nn.Sequential(*hidden, nn.Linear(width, dimensions))
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


def loss(solution: State) -> Tensor:
    """The mean of -log p(x) / d in nats, from the solution for ``initial_state(x)`` up to t = 1."""
    z, change = solution[0][-1], solution[1][-1]
    likelihood = change - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)
    return -likelihood.mean() / z.shape[-1]


def breast_cancer(generator: torch.Generator) -> Tensor:
    """Rows of scikit-learn's table of 569 tumours and 30 measures, standardised; shape ``(BATCH, 30)``."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import StandardScaler

    table: Tensor = torch.tensor(StandardScaler().fit_transform(load_breast_cancer().data), dtype=torch.float32)
    return table[torch.randperm(len(table), generator=generator)[:BATCH]]


def mixture(columns: int, generator: torch.Generator) -> Tensor:
    """Rows of a mixture of three normal distributions of full covariance; shape ``(BATCH, columns)``."""
    centres = 2 * torch.randn(3, columns, generator=generator)
    factors = torch.randn(3, columns, columns, generator=generator) / columns**0.5
    component = torch.randint(0, 3, (BATCH,), generator=generator)
    noise = torch.randn(BATCH, columns, 1, generator=generator)
    rows: Tensor = centres[component] + (factors[component] @ noise).squeeze(-1)
    return rows


def _build(rows: Callable[[torch.Generator], Tensor], components: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x = rows(generator)
    with seeded(seed):
        fields = [FlowField(x.shape[1]) for _ in range(components)]
        for field in fields:
            nn.init.normal_(field.network[-1].get_parameter("weight"), std=WIDTH**-0.5)  # not zero, as a new one is
            field.draw_noise(BATCH, generator)
    t = torch.tensor([0.0, 1.0])
    return Problem(nn.ModuleList(fields), initial_state(x), t, loss, "dopri5", 1e-5, 1e-5, {"first_step": 0.05})


TABLES: dict[str, tuple[Callable[[torch.Generator], Tensor], tuple[int, ...]]] = {  # rows, and numbers of flows
    "breast cancer, 30 columns": (breast_cancer, (1, 2, 5)),
    "as MINIBOONE, 43 columns": (partial(mixture, 43), (1,)),
    "as GAS, 8 columns": (partial(mixture, 8), (5,)),
    "as POWER, 6 columns": (partial(mixture, 6), (5,)),
}

CNF = Series(
    "cnf",
    "What does a continuous normalizing flow gain?",
    tuple(
        Case(f"{table}, M = {count}", partial(_build, rows, count))
        for table, (rows, counts) in TABLES.items()
        for count in counts
    ),
    budget=5_000,
)
