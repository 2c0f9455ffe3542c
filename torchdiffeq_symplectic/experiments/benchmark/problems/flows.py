"""``cnf``: continuous normalizing flows of M components in a row, on tables of numbers.

The problem of Matsubara et al. (section 5.1), who learn the density of MINIBOONE, GAS and POWER with M = 1 and 5. Those
tables have to be downloaded; here are one that scikit-learn ships, and synthetic ones of the same numbers of columns:
mixtures of correlated normal distributions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Problem, Series, State
from torchdiffeq_symplectic.experiments.benchmark.problems.flow import FlowField, initial_state, log_likelihood
from torchdiffeq_symplectic.experiments.benchmark.problems.network import seeded

__all__ = ["CNF", "breast_cancer", "mixture"]

WIDTH, BATCH = 64, 256
TOLERANCE = 1e-5


def breast_cancer(generator: torch.Generator) -> Tensor:
    """Rows of scikit-learn's table of 569 tumours and 30 measures, standardised; shape ``(BATCH, 30)``."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import StandardScaler

    table: Tensor = torch.tensor(StandardScaler().fit_transform(load_breast_cancer().data), dtype=torch.float32)
    chosen: Tensor = table[torch.randperm(len(table), generator=generator)[:BATCH]]
    return chosen


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
        fields = [_field(x.shape[1], generator) for _ in range(components)]
    t = torch.tensor([0.0, 1.0])
    return Problem(
        nn.ModuleList(fields),
        initial_state(x),
        t,
        _negative_log_likelihood,
        "dopri5",
        TOLERANCE,
        TOLERANCE,
        {"first_step": 0.05},
    )


def _field(columns: int, generator: torch.Generator) -> FlowField:
    """A field that is not zero, as a new one is."""
    field = FlowField(columns, WIDTH)
    weight, _ = field.network[-1].parameters()
    nn.init.normal_(weight, std=WIDTH**-0.5)
    field.draw_noise(BATCH, generator)
    return field


def _negative_log_likelihood(solution: State) -> Tensor:
    return -log_likelihood(solution).mean() / solution[0].shape[-1]


TABLES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "breast cancer, 30 columns": breast_cancer,
    "as MINIBOONE, 43 columns": partial(mixture, 43),
    "as GAS, 8 columns": partial(mixture, 8),
    "as POWER, 6 columns": partial(mixture, 6),
}
COMPONENTS = {
    "breast cancer, 30 columns": (1, 2, 5),
    "as MINIBOONE, 43 columns": (1,),
    "as GAS, 8 columns": (5,),
    "as POWER, 6 columns": (5,),
}

CNF = Series(
    "cnf",
    "What does a continuous normalizing flow gain?",
    tuple(
        Case(f"{table}, M = {components}", partial(_build, rows, components))
        for table, rows in TABLES.items()
        for components in COMPONENTS[table]
    ),
    budget=5_000,
)
