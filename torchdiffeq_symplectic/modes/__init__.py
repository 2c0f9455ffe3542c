"""The gradient modes: name -> mode. A new one is one file and one entry here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping
from typing import Protocol

from torch import Tensor

from torchdiffeq_symplectic.check import REPLAY_CHECKS, ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.modes.aca import AdaptiveCheckpoint
from torchdiffeq_symplectic.modes.baseline import Baseline
from torchdiffeq_symplectic.modes.symplectic import Symplectic
from torchdiffeq_symplectic.trajectory import Keep, Trajectory

__all__ = ["MODES", "Mode", "chosen"]


class Mode(Protocol):
    """How the gradient of a recorded solve is computed."""

    @property
    def name(self) -> str:
        """What the user types."""
        ...

    @property
    def options(self) -> frozenset[str]:
        """The keys of ``adjoint_options`` that are the mode's own."""
        ...

    def keeps(self, options: Mapping[str, object]) -> Keep:
        """What the recording must keep of every step; ValueError names an option that is wrong."""
        ...

    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        """The gradients, given the cotangent of the solution, shape ``(T, *y0.shape)``."""
        ...


MODES: dict[str, Mode] = {mode.name: mode for mode in (Symplectic(), AdaptiveCheckpoint(), Baseline())}


def chosen(
    mode: Mode, options: Mapping[str, object], hosts: Callable[[], Container[str]] = frozenset
) -> tuple[Keep, str]:
    """What the recording must keep, and how the replay is checked, under ``adjoint_options``.

    Warns of unknown keys as torchdiffeq does; those in ``hosts()`` are the host's own, and have no effect.

    Raises:
        ValueError: if an option that is the mode's own has a wrong value.
    """
    known = mode.options | {"replay_check"}
    unknown = {key: value for key, value in options.items() if key not in known}
    if unknown:
        harmless = hosts()
        unknown = {key: value for key, value in unknown.items() if key not in harmless}
    if unknown:
        warnings.warn(f"{mode.name}: Unexpected arguments {unknown}", stacklevel=5)
    check = options.get("replay_check", "error")
    if check not in list(REPLAY_CHECKS):
        raise ValueError(f'adjoint_options["replay_check"] must be one of {REPLAY_CHECKS}, but is {check!r}')
    return mode.keeps(options), str(check)
