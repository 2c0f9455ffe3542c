"""Residual networks as discretised neural ODEs: their vector field, and the measurement of how far they are from one.

Sander, Ablin, Peyré, *Do Residual Neural Networks discretize Neural Ordinary Differential Equations?*, NeurIPS 2022,
https://arxiv.org/abs/2205.14612
"""

from torchdiffeq_symplectic.resnet.field import ResidualField
from torchdiffeq_symplectic.resnet.report import EquivalenceReport, equivalence_report

__all__ = [
    # the vector field
    "ResidualField",
    # is it the field of an ODE?
    "EquivalenceReport",
    "equivalence_report",
]
