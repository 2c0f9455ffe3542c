"""Making the modes known to the hosts, and taking them back."""

from __future__ import annotations

from torchdiffeq_symplectic.hosts import torchdiffeq

__all__ = ["register", "unregister"]


def register() -> None:
    """Make ``adjoint_method="symplectic"`` and the other modes known to torchdiffeq.

    Importing the package does it. Doing it again changes nothing. Code that imported ``odeint_adjoint`` from
    torchdiffeq earlier gets the modes, too, but keeps upstream's check that ``options`` comes with ``adjoint_options``.
    """
    torchdiffeq.register()


def unregister() -> None:
    """Put back what `register` replaced. ``torchdiffeq_symplectic.odeint_adjoint`` works all the same."""
    torchdiffeq.unregister()
