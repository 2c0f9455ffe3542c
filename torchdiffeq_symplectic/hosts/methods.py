"""A host's method as something that can be solved by the host itself and in every gradient mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["Method", "Solve"]


class Solve(Protocol):
    """A solve with steps that do not depend on who differentiates it."""

    def __call__(
        self, field: nn.Module, y0: Tensor, t: Tensor, mode: str | None, options: Mapping[str, object]
    ) -> Tensor:
        """The solution, shape ``(T, *y0.shape)``.

        Args:
            field: ``field(t, y)``, which computes in the dtype of ``y`` on its last dimension.
            y0: initial state.
            t: at least three output times, increasing, shape ``(T,)``; the third lies on the end of a step.
            mode: the gradient mode, or None for the host's own solve, which autograd follows, the choice of its first
                step held constant.
            options: of the mode.
        """
        ...


class Method(NamedTuple):
    """A method of a host.

    Attributes:
        name: what the user types.
        solve: solves by it.
        halves: whether its state is that of the field and as many velocities, side by side.
    """

    name: str
    solve: Solve
    halves: bool = False
