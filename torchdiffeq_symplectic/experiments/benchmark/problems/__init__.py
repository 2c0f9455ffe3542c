"""The benchmark's problems: name -> series. A new one is one function and one entry here."""

from torchdiffeq_symplectic.experiments.benchmark.problem import Series
from torchdiffeq_symplectic.experiments.benchmark.problems import network
from torchdiffeq_symplectic.experiments.benchmark.problems.dynamics import TOLERANCE
from torchdiffeq_symplectic.experiments.benchmark.problems.flow import CNF
from torchdiffeq_symplectic.experiments.benchmark.problems.pde import EQUATIONS

__all__ = ["PROBLEMS"]

_NETWORKS = (
    network.PRECISION,
    network.ORDER,
    network.STEPS,
    network.OUTPUTS,
    network.SMALL,
    network.RESNET,
    network.STALL,
)
PROBLEMS: dict[str, Series] = {series.name: series for series in (CNF, *EQUATIONS, TOLERANCE, *_NETWORKS)}
