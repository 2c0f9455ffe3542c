"""What every adapter notes of the evaluations of a field while a host's solver runs."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_symplectic.surroundings import RandomState

__all__ = ["Evaluations"]


class Evaluations:
    """The evaluations of one step.

    Args:
        random: the generators that the field may draw from.
        slopes: whether to collect the slopes, for solvers that do not show them.

    Attributes:
        draws: the random state before each evaluation.
        slopes: the slopes, if asked for.
    """

    def __init__(self, random: RandomState, slopes: bool) -> None:
        self._random = random
        self._wants_slopes = slopes
        self.draws: list[Tensor] = []
        self.slopes: list[Tensor] = []

    def start_step(self) -> None:
        """Forget the evaluations so far."""
        self.draws.clear()
        self.slopes.clear()

    def before(self) -> None:
        """Called before each evaluation."""
        self.draws.append(self._random.get())

    def after(self, slope: Tensor) -> None:
        """Called after each evaluation, with what it gave."""
        if self._wants_slopes:
            self.slopes.append(slope.detach())

    @property
    def drew(self) -> bool:
        """Whether an evaluation of the present step drew random numbers.

        Asked once a step: reading the random state is quick, comparing it is not.
        """
        return not torch.equal(self.draws[0], self._random.get())
