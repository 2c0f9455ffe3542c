"""The field in the place where torchdiffeq's wrapper of it stands, listened to while a solver runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.listening import Evaluations
from torchdiffeq_symplectic.hosts.torchdiffeq._captured import Captured
from torchdiffeq_symplectic.hosts.torchdiffeq._host import Perturb
from torchdiffeq_symplectic.surroundings import RandomState

__all__ = ["Listener"]


class Listener(Evaluations):
    """Calls the field at the times at which torchdiffeq's ``_PerturbFunc`` would, bit for bit, with less ado.

    Args:
        func: torchdiffeq's wrapped field; its attributes (the callbacks) are passed through.
        random: the generators that it may draw from.
        slopes: whether to collect the slopes.
        captured: evaluates the field and finds what it uses; None where that is known.
    """

    def __init__(self, func: Any, random: RandomState, slopes: bool, captured: Captured | None = None) -> None:
        super().__init__(random, slopes)
        self._captured = captured
        self._wrapper = func
        self._func = func.base_func

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        dtype = y.dtype.to_real()
        if t.is_complex():
            t = t.real
        if t.dtype != dtype:
            t = t.to(dtype)
        if perturb is not Perturb.NONE:
            t = torch.nextafter(t, t + 1 if perturb is Perturb.NEXT else t - 1)
        self.before()
        slope: Tensor = self._func(t, y) if self._captured is None else self._captured.evaluate(self._func, t, y)
        self.after(slope)
        return slope

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)
