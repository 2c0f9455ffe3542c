"""Exact gradients at minimal memory for torchdiffeq and torchdyn, by the modes "symplectic", "aca" and "baseline".

"memory_free" is that of residual networks, approximate and in memory that does not grow with the number of steps.
``adjoint_method="symplectic"`` in torchdiffeq, ``sensitivity="symplectic"`` in torchdyn, and for code that exposes
neither: ``with use("symplectic"):``.
"""

from torchdiffeq_symplectic.context import set_default, use
from torchdiffeq_symplectic.errors import (
    EscapedGraphWarning,
    MissingGradientWarning,
    ReplayError,
    ReplayWarning,
    UnsupportedFieldError,
    UnsupportedSolverError,
)
from torchdiffeq_symplectic.hosts.torchdiffeq import odeint_adjoint
from torchdiffeq_symplectic.modes import MODES
from torchdiffeq_symplectic.registry import register, unregister

__version__ = "0.3.0"

__all__ = [
    # solving
    "odeint_adjoint",
    # solving in code that takes no arguments of this package
    "set_default",
    "use",
    # the modes and the hosts
    "MODES",
    "register",
    "unregister",
    # what may be reported
    "EscapedGraphWarning",
    "MissingGradientWarning",
    "ReplayError",
    "ReplayWarning",
    "UnsupportedFieldError",
    "UnsupportedSolverError",
]

register()
