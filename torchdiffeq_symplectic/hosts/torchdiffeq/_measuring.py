"""Measuring torchdiffeq's solvers: what their classes share. The result is kept as long as the class stays as it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.measuring import measuring
from torchdiffeq_symplectic.hosts.torchdiffeq._host import Perturb
from torchdiffeq_symplectic.tableau import ProbeField

__all__ = ["Probe", "cached", "maximum", "options_of", "scalar"]

_SIDES = {Perturb.NONE: 0, Perturb.PREV: -1, Perturb.NEXT: 1}

T = TypeVar("T")


class Probe:
    """A `ProbeField` in the place of torchdiffeq's wrapped field."""

    def __init__(self, field: ProbeField) -> None:
        self._field = field

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        return self._field(float(t), y, _SIDES[perturb])

    def callback_step(self, *args: object) -> None:
        """Ignored, as are all callbacks."""

    callback_accept_step = callback_reject_step = callback_step


def scalar(value: float) -> Tensor:
    """A time as torchdiffeq passes it, 0-d, float64, on the CPU."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def maximum(tensor: Tensor) -> Tensor:
    """A norm for solvers that want one; the user's may depend on the shape of the true state."""
    return tensor.abs().max()


@functools.cache
def options_of(solver: type) -> frozenset[str]:
    """The names of the options that a solver class takes, its bases included."""
    classes = [cls for cls in solver.__mro__ if cls is not object]
    return frozenset(name for cls in classes for name in inspect.signature(cls).parameters)


# How many measurements are remembered; an unknown option that differs with every call must not fill the memory.
_REMEMBERED = 256

_cache: dict[Hashable, tuple[object, Any]] = {}


def cached(solver: type, options: Mapping[str, object], base: type, extra: Hashable, run: Callable[[], T]) -> T:
    """``run()``, remembered for the class, what its steps are made of, and the options that may matter to them.

    Options of ``base``, torchdiffeq's own class, do not change the coefficients, except those named in ``extra``.
    """
    irrelevant = options_of(base) | {"norm"}
    relevant = tuple((name, value) for name, value in options.items() if name not in irrelevant)
    parts = [getattr(solver, name, None) for name in ("tableau", "mid", "_step_func", "_adaptive_step", "_interp_fit")]
    key = (solver, tuple(map(id, parts)), relevant, extra)
    try:
        if key not in _cache:
            while len(_cache) >= _REMEMBERED:
                del _cache[next(iter(_cache))]
            _cache[key] = (parts, measuring(run))  # the parts are kept alive so that their ids stay theirs
    except TypeError:  # an option that cannot be hashed
        return measuring(run)
    result: T = _cache[key][1]
    return result
