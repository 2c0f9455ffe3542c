"""``benchmark``: error, memory, time and field evaluations of every way to a gradient, side by side on one problem."""

from torchdiffeq_symplectic.experiments.benchmark.compare import compare
from torchdiffeq_symplectic.experiments.benchmark.contenders import Contender
from torchdiffeq_symplectic.experiments.benchmark.peers import installed
from torchdiffeq_symplectic.experiments.benchmark.problem import Problem

__all__ = ["Contender", "Problem", "compare", "installed"]
