"""Listening to the field while a solver runs: random numbers that it draws, slopes that the solver does not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.surroundings import RandomState

__all__ = ["Listener"]


class Listener:
    """Stands for the solver's field.

    Args:
        func: torchdiffeq's wrapped field; its attributes (the callbacks) are passed through.
        random: the generators that it may draw from.
        slopes: whether to collect the slopes.

    Attributes:
        draws: the random state before each evaluation, once the first one is seen to draw; else empty.
        slopes: the slopes, if asked for, until the solver's recorder takes them.
    """

    def __init__(self, func: Callable[..., Tensor], random: RandomState, slopes: bool) -> None:
        self.func = func
        self._random = random
        self._wants_slopes = slopes
        self._draws: bool | None = None
        self.draws: list[Tensor] = []
        self.slopes: list[Tensor] = []

    @property
    def idle(self) -> bool:
        """Whether there is nothing to listen to any more."""
        return self._draws is False and not self._wants_slopes

    def __call__(self, t: Tensor, y: Tensor, **perturb: Any) -> Tensor:
        before = None if self._draws is False else self._random.get()
        slope = self.func(t, y, **perturb)
        if before is not None:
            if self._draws is None:
                self._draws = not torch.equal(before, self._random.get())
            if self._draws:
                self.draws.append(before)
        if self._wants_slopes:
            self.slopes.append(slope.detach())
        return slope

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)
