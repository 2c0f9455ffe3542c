"""What a gradient mode is: one class, whose attributes are its options and what it asks of a recording."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.tableau import Tableau
from torchdiffeq_symplectic.trajectory import Keep, Trajectory

__all__ = ["Mode"]


@dataclasses.dataclass(frozen=True)
class Mode(abc.ABC):
    """How the gradient of a recorded solve is computed.

    The fields of a mode's dataclass are its own keys of ``adjoint_options``, with their defaults.

    Attributes:
        name: what the user types.
        exact: whether the gradient is that of the discrete solve, to rounding.
        replay_check: what is done about a replay that is not the forward pass, where the user does not say.
        methods: the methods that the mode is for, as torchdiffeq names them; empty if it is for all.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    replay_check: ClassVar[str] = "error"
    methods: ClassVar[tuple[str, ...]] = ()

    @property
    def options(self) -> frozenset[str]:
        """The keys of ``adjoint_options`` that are the mode's own."""
        return frozenset(field.name for field in dataclasses.fields(self))

    @property
    def keep(self) -> Keep:
        """What the recording must keep of every step."""
        return Keep.STATES

    def configured(self, options: Mapping[str, object]) -> Mode:
        """The mode under those of ``options`` that are its own.

        Raises:
            ValueError: if one of them has a wrong value.
        """
        own = {name: value for name, value in options.items() if name in self.options}
        return dataclasses.replace(self, **own) if own else self

    def admits(self, tableau: Tableau) -> bool:
        """Whether the mode is for steps of this form."""
        del tableau
        return True

    @abc.abstractmethod
    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        """The gradients, given the cotangent of the solution, shape ``(T, *y0.shape)``."""
