"""In the place of the user's solver and interpolator during a solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.torchdyn._recording import Recorder

__all__ = ["RecordingInterpolator", "RecordingSolver"]


class _InPlaceOf:
    """In the place of one of the user's objects, of which it shows every attribute."""

    _original: Any = None  # of an instance that torch.compile makes without `__init__`

    def __init__(self, original: Any, recorder: Recorder) -> None:
        self._original, self._recorder = original, recorder

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # torchdyn asks isinstance(solver, Tsitouras45)
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class RecordingSolver(_InPlaceOf):
    """In the place of a solver."""

    def step(self, f: Any, x: Any, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> Any:
        """As the solver does."""
        return self._recorder.step(f, x, t, dt, k1, args)


class RecordingInterpolator(_InPlaceOf):
    """In the place of an interpolator."""

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As the interpolator does."""
        with torch.no_grad():
            return self._original.fit(*args, **kwargs)

    def evaluate(self, coefs: Any, t0: Tensor, t1: Tensor, t: Tensor) -> Any:
        """As the interpolator does."""
        self._recorder.inside(t)
        with torch.no_grad():
            return self._original.evaluate(coefs, t0, t1, t)
