"""``kdv`` and ``cahn-hilliard``: learning a partial differential equation's energy from its trajectories.

The physical systems of Matsubara et al. (section 5.2), by dopri8.
"""

from __future__ import annotations

from functools import partial

from torchdiffeq_symplectic.benchmark.pde import CAHN_HILLIARD as CAHN_HILLIARD_EQUATION
from torchdiffeq_symplectic.benchmark.pde import KDV as KDV_EQUATION
from torchdiffeq_symplectic.benchmark.pde import learning_problem
from torchdiffeq_symplectic.benchmark.series import Case, Series

__all__ = ["CAHN_HILLIARD", "KDV"]

KDV = Series(
    "kdv",
    "What does learning the energy of the Korteweg-de Vries equation gain?",
    (Case("Korteweg-de Vries, dopri8", partial(learning_problem, KDV_EQUATION)),),
)
CAHN_HILLIARD = Series(
    "cahn-hilliard",
    "What does learning the energy of the Cahn-Hilliard equation gain?",
    (Case("Cahn-Hilliard, dopri8", partial(learning_problem, CAHN_HILLIARD_EQUATION)),),
)
