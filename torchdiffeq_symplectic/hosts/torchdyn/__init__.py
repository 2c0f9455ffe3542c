"""The adapter of torchdyn: how its solve is recorded, and which of its names are patched.

torchdyn is slow to import, so nothing here imports it: the names are patched when the user's code does. They are
attributes of classes, so that it does not matter who imported the classes earlier.
"""

from __future__ import annotations

import sys
import warnings

from torchdiffeq_symplectic.hosts.late import forget, when_imported

__all__ = ["register", "unregister"]

_HOST = "torchdyn.core.neuralde"
_PROBLEMS = "torchdiffeq_symplectic.hosts.torchdyn._problems"


def register() -> None:
    """Make ``sensitivity="symplectic"`` and the other modes known to torchdyn, once that is imported."""
    when_imported(_HOST, _patch)


def unregister() -> None:
    """Put back what `register` replaced."""
    forget(_HOST)
    if _PROBLEMS in sys.modules:
        sys.modules[_PROBLEMS].unpatch()


def _patch() -> None:
    try:
        from torchdiffeq_symplectic.hosts.torchdyn import _problems
    except ImportError as error:
        warnings.warn(
            f"torchdiffeq_symplectic does not know this release of torchdyn, which gets no gradient modes: {error}",
            stacklevel=2,
        )
        return
    _problems.patch()
