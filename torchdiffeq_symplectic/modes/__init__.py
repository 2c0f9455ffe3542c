"""The gradient modes: name -> mode. A new one is one file and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.modes.aca import AdaptiveCheckpoint
from torchdiffeq_symplectic.modes.baseline import Baseline
from torchdiffeq_symplectic.modes.symplectic import Symplectic
from torchdiffeq_symplectic.trajectory import Keep, Trajectory

__all__ = ["MODES", "Mode"]


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
