"""Exact gradients at minimal memory for torchdiffeq: ``adjoint_method="symplectic"``, ``"aca"`` and ``"baseline"``."""

from torchdiffeq_symplectic.check import ReplayError, ReplayWarning
from torchdiffeq_symplectic.field import MissingGradientWarning
from torchdiffeq_symplectic.hosts.torchdiffeq import odeint_adjoint
from torchdiffeq_symplectic.modes import MODES
from torchdiffeq_symplectic.registry import register, unregister

__version__ = "0.1.0"

__all__ = [
    # solving
    "odeint_adjoint",
    # the modes and the hosts
    "MODES",
    "register",
    "unregister",
    # what may be reported
    "MissingGradientWarning",
    "ReplayError",
    "ReplayWarning",
]

register()
