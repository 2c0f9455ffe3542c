"""The field in the place where torchdiffeq's wrapper of it stands, listened to while a solver runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.torchdiffeq._host import Perturb
from torchdiffeq_symplectic.surroundings import RandomState

__all__ = ["Listener"]


class Listener:
    """Calls the field at the times at which torchdiffeq's ``_PerturbFunc`` would, bit for bit, with less ado.

    Args:
        func: torchdiffeq's wrapped field; its attributes (the callbacks) are passed through.
        random: the generators that it may draw from.
        slopes: whether to collect the slopes, for solvers that do not show them.

    Attributes:
        draws: the random state before each evaluation, once the first one is seen to draw; else empty.
        slopes: the slopes, if asked for, until the solver's recorder takes them.
    """

    def __init__(self, func: Any, random: RandomState, slopes: bool) -> None:
        self._wrapper = func
        self._func = func.base_func
        self._random = random
        self._wants_slopes = slopes
        self._draws: bool | None = None
        self.draws: list[Tensor] = []
        self.slopes: list[Tensor] = []

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        dtype = y.dtype.to_real()
        if t.is_complex():
            t = t.real
        if t.dtype != dtype:
            t = t.to(dtype)
        if perturb is not Perturb.NONE:
            t = torch.nextafter(t, t + 1 if perturb is Perturb.NEXT else t - 1)
        slope: Tensor = self._func(t, y) if self._draws is False else self._watched(t, y)
        if self._wants_slopes:
            self.slopes.append(slope.detach())
        return slope

    def _watched(self, t: Tensor, y: Tensor) -> Tensor:
        before = self._random.get()
        slope: Tensor = self._func(t, y)
        if self._draws is None:
            self._draws = not torch.equal(before, self._random.get())
        if self._draws:
            self.draws.append(before)
        return slope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)
