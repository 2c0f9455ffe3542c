"""Running a host's solver on a probe: what the adapters share."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from torchdiffeq_symplectic.tableau import UnknownFormError

__all__ = ["measuring"]

T = TypeVar("T")


def measuring(run: Callable[[], T]) -> T:
    """Run a measurement; whatever goes wrong in a step that meets the probe means that its form is not known."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("cpu"))
        # A measurement is no part of what a caller's hooks offload, or of what torch.utils.checkpoint counts.
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # what a host has to say is said in the solve itself
        try:
            return run()
        except UnknownFormError:
            raise
        except Exception as error:
            raise UnknownFormError(f"its step fails on a probe ({type(error).__name__}: {error})") from error
