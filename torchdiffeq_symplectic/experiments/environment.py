"""What the commands share: versions, errors that are findings, threads."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import torchdiffeq_symplectic

__all__ = ["ERRORS", "first_step_held", "one_thread", "versions"]

# What a library may raise of an input that it does not take. It is a finding, not the end of a command.
ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def versions(*others: str) -> dict[str, str]:
    """The versions of what is measured: name -> version, or "not installed".

    Args:
        others: further distributions, which are left out where they are not installed.
    """
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchdiffeq", "torchdyn", *others):
        if importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
        elif name not in others:
            found[name] = "not installed"
    return found | {torchdiffeq_symplectic.__name__: torchdiffeq_symplectic.__version__}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the CPU's operators run on one thread: with tiny matrices, more would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def first_step_held() -> Iterator[None]:
    """Make torchdyn's choice of the first step a constant: an exact gradient does not go through it."""
    # By its path, as an attribute of the package this name is a function.
    module: Any = importlib.import_module("torchdyn.numerics.odeint")
    choose = module.init_step
    module.init_step = torch.no_grad()(choose)
    try:
        yield
    finally:
        module.init_step = choose
