"""The ways to differentiate a solve that are measured against each other."""

from __future__ import annotations

from torchdiffeq_symplectic.benchmark import peers, torchdiffeqs, torchdyns
from torchdiffeq_symplectic.benchmark.contender import Contender

__all__ = ["installed", "is_own"]


def installed() -> list[Contender]:
    """Those of torchdiffeq, and those of torchdyn and of other packages that are installed."""
    return [*torchdiffeqs.installed(), *torchdyns.installed(), *peers.installed()]


def is_own(name: str) -> bool:
    """Whether a contender of this name is one of this package's modes, in whatever host."""
    return name.removeprefix("torchdyn, ") in torchdiffeqs.OWN
