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
        draws: the random state before each evaluation of the present step; the solver's recorder clears it.
        slopes: the slopes of the present step, if asked for.
    """

    def __init__(self, func: Any, random: RandomState, slopes: bool) -> None:
        self._wrapper = func
        self._func = func.base_func
        self._random = random
        self._wants_slopes = slopes
        self.draws: list[Tensor] = []
        self.slopes: list[Tensor] = []

    def start_step(self) -> None:
        """Forget the evaluations so far."""
        self.draws.clear()
        self.slopes.clear()

    @property
    def drew(self) -> bool:
        """Whether an evaluation of the present step drew random numbers.

        Asked once a step: reading the random state is quick, comparing it is not.
        """
        return not torch.equal(self.draws[0], self._random.get())

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        dtype = y.dtype.to_real()
        if t.is_complex():
            t = t.real
        if t.dtype != dtype:
            t = t.to(dtype)
        if perturb is not Perturb.NONE:
            t = torch.nextafter(t, t + 1 if perturb is Perturb.NEXT else t - 1)
        self.draws.append(self._random.get())
        slope: Tensor = self._func(t, y)
        if self._wants_slopes:
            self.slopes.append(slope.detach())
        return slope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)
