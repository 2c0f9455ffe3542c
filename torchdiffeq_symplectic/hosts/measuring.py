"""Running a host's solver on a probe: what the adapters share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from torchdiffeq_symplectic.tableau import UnknownFormError

__all__ = ["measuring"]

T = TypeVar("T")


def measuring(run: Callable[[], T]) -> T:
    """Run a measurement; whatever goes wrong in a step that meets the probe means that its form is not known."""
    with torch.no_grad(), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a host has to say is said in the solve itself
        try:
            return run()
        except UnknownFormError:
            raise
        except Exception as error:
            raise UnknownFormError(f"its step fails on a probe ({type(error).__name__}: {error})") from error
