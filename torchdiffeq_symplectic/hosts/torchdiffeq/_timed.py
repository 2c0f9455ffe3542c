"""The field in the place of torchdiffeq's outermost wrapper: at the times at which that evaluates it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.torchdiffeq._host import Perturb, _nextafter
from torchdiffeq_symplectic.transforms import is_followed, value_of

__all__ = ["Timed"]


class Timed:
    """Casts and perturbs the time as ``_PerturbFunc`` does.

    Args:
        evaluate: ``evaluate(t, y)``.
        wrapper: torchdiffeq's wrapped field, whose attributes (the callbacks) are passed through; or None.
    """

    def __init__(self, evaluate: Callable[[Tensor, Tensor], Tensor], wrapper: Any = None) -> None:
        self._evaluate, self._wrapper = evaluate, wrapper

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        dtype = y.dtype.to_real()
        if t.is_complex():
            t = t.real
        if t.dtype != dtype:
            t = t.to(dtype)
        if perturb is not Perturb.NONE:
            to = t + 1 if perturb is Perturb.NEXT else t - 1
            if is_followed():
                t = t + (torch.nextafter(value_of(t), value_of(to)) - value_of(t))
            else:
                t = _nextafter(t, to) if t.requires_grad else torch.nextafter(t, to)
        return self._evaluate(t, y)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)
