"""Making the modes known to the hosts, and taking them back."""

from __future__ import annotations

from torchdiffeq_symplectic import context
from torchdiffeq_symplectic.hosts import torchdiffeq, torchdyn

__all__ = ["register", "unregister"]


def register() -> None:
    """Make the modes known to the hosts: ``adjoint_method="symplectic"`` to torchdiffeq, ``sensitivity=`` to torchdyn.

    Importing the package does it. Doing it again changes nothing. Code that imported ``odeint_adjoint`` from
    torchdiffeq earlier gets the modes, too, but keeps upstream's check that ``options`` comes with ``adjoint_options``.
    torchdyn is not imported by this: it gets the modes when it is.
    """
    torchdiffeq.register()
    torchdyn.register()
    context.connect(True)


def unregister() -> None:
    """Put back what `register` replaced, and the default of `set_default`.

    ``torchdiffeq_symplectic.odeint_adjoint`` works all the same.
    """
    context.connect(False)
    torchdiffeq.unregister()
    torchdyn.unregister()
