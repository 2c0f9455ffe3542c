"""The benchmark's problems: name -> series. A new one is one function and one entry here."""

from functools import partial

from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Series
from torchdiffeq_symplectic.experiments.benchmark.problems import pde
from torchdiffeq_symplectic.experiments.benchmark.problems.dynamics import TOLERANCE
from torchdiffeq_symplectic.experiments.benchmark.problems.flows import CNF
from torchdiffeq_symplectic.experiments.benchmark.problems.network import (
    ORDER,
    OUTPUTS,
    PRECISION,
    SMALL,
    STALL,
    STEPS,
)
from torchdiffeq_symplectic.experiments.benchmark.problems.resnet import RESNET

__all__ = ["PROBLEMS"]


def _learning(name: str, equation: pde.Equation) -> Series:
    """From a snapshot to the next one, as Matsubara et al. (section 5.2) do, and to the twentieth after it."""
    cases = {"": 1, ", 20 intervals": 20}
    return Series(
        name,
        f"What does learning the energy of the {equation.name} equation gain?",
        tuple(
            Case(f"{equation.name}, dopri8{label}", partial(pde.learning_problem, equation, intervals=intervals))
            for label, intervals in cases.items()
        ),
    )


KDV = _learning("kdv", pde.KDV)
CAHN_HILLIARD = _learning("cahn-hilliard", pde.CAHN_HILLIARD)

PROBLEMS: dict[str, Series] = {
    series.name: series
    for series in (CNF, KDV, CAHN_HILLIARD, TOLERANCE, PRECISION, ORDER, STEPS, OUTPUTS, SMALL, RESNET, STALL)
}
