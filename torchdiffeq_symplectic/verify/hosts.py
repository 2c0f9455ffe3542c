"""The hosts that there may be, and what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import torchdiffeq_symplectic
from torchdiffeq_symplectic.hosts import torchdiffeq, torchdyn
from torchdiffeq_symplectic.hosts.methods import Method

__all__ = ["HOSTS", "Host", "versions"]


class Host(NamedTuple):
    """A library whose solves get gradient modes.

    Attributes:
        name: of its module and its distribution.
        methods: gives its methods, and imports it if need be.
    """

    name: str
    methods: Callable[[], Sequence[Method]]

    @property
    def installed(self) -> bool:
        """Whether it can be found, without importing it."""
        return importlib.util.find_spec(self.name) is not None


HOSTS = {host.name: host for host in (Host("torchdiffeq", torchdiffeq.methods), Host("torchdyn", torchdyn.methods))}


def versions() -> dict[str, str]:
    """What a finding holds for: name -> version, or "not installed"."""
    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(host) for name, host in HOSTS.items()},
        torchdiffeq_symplectic.__name__: torchdiffeq_symplectic.__version__,
    }


def _version(host: Host) -> str:
    if not host.installed:
        return "not installed"
    try:
        return importlib.metadata.version(host.name)
    except importlib.metadata.PackageNotFoundError:
        return "of no known version"
