"""Exact gradients at minimal memory for torchdiffeq and torchdyn, by the modes "symplectic", "aca" and "baseline".

"memory_free" is that of residual networks, approximate and in memory that does not grow with the number of steps.
``adjoint_method="symplectic"`` in torchdiffeq, ``sensitivity="symplectic"`` in torchdyn, and for code that exposes
neither: ``with use("symplectic"):``.
"""

from torchdiffeq_symplectic.check import ReplayError, ReplayWarning
from torchdiffeq_symplectic.field import MissingGradientWarning
from torchdiffeq_symplectic.hosts.torchdiffeq import odeint_adjoint
from torchdiffeq_symplectic.modes import MODES
from torchdiffeq_symplectic.registry import register, unregister
from torchdiffeq_symplectic.switch import set_default, use

__version__ = "0.2.0"

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
    "MissingGradientWarning",
    "ReplayError",
    "ReplayWarning",
]

register()
