"""The benchmark's problems: name -> series. A new one is one file and one entry here."""

from torchdiffeq_symplectic.benchmark.problems.cnf import CNF
from torchdiffeq_symplectic.benchmark.problems.order import ORDER
from torchdiffeq_symplectic.benchmark.problems.outputs import OUTPUTS
from torchdiffeq_symplectic.benchmark.problems.physics import CAHN_HILLIARD, KDV
from torchdiffeq_symplectic.benchmark.problems.precision import PRECISION
from torchdiffeq_symplectic.benchmark.problems.resnet import RESNET
from torchdiffeq_symplectic.benchmark.problems.small import SMALL
from torchdiffeq_symplectic.benchmark.problems.stall import STALL
from torchdiffeq_symplectic.benchmark.problems.steps import STEPS
from torchdiffeq_symplectic.benchmark.problems.tolerance import TOLERANCE
from torchdiffeq_symplectic.benchmark.series import Series

__all__ = ["PROBLEMS"]

PROBLEMS: dict[str, Series] = {
    series.name: series
    for series in (
        CNF,
        KDV,
        CAHN_HILLIARD,
        TOLERANCE,
        PRECISION,
        ORDER,
        STEPS,
        OUTPUTS,
        SMALL,
        RESNET,
        STALL,
    )
}
