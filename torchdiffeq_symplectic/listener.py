"""The field of a solve, listened to while the host solves."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.errors import UnsupportedFieldError
from torchdiffeq_symplectic.random_state import Draw, undisturbed
from torchdiffeq_symplectic.replay import Conditions, version_of
from torchdiffeq_symplectic.uses import Captured

__all__ = ["Call", "Listener", "detached", "differentiable", "with_graph"]


class Call(NamedTuple):
    """An evaluation of the field in the forward pass.

    Attributes:
        draw: its random numbers.
        drew: whether the generators moved meanwhile; None where that was not looked at.
        slope: what it gave, if that is kept.
        new: references to captured tensors that it reached and no evaluation before it.
    """

    draw: Draw
    drew: bool | None
    slope: Any
    new: Sequence[weakref.ref[Tensor]]


class Listener:
    """The field in the place where a host's solver calls it. Once it is `closed`, nothing but the field.

    Args:
        func: ``func(t, y, ...)``.
        conditions: what else it depends on.
        captured: finds the tensors that it uses.
        keeps_slopes: whether slopes are kept.

    Attributes:
        calls: the evaluations since `start_step`.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        conditions: Conditions,
        captured: Captured,
        *,
        keeps_slopes: bool = False,
    ) -> None:
        self._func = func
        self._conditions: Conditions | None = conditions
        self._captured: Captured | None = captured
        self._is_first = True
        self._draws = False  # whether an evaluation was seen to draw random numbers
        self._keeps_slopes = keeps_slopes
        self.calls: list[Call] = []

    def start_step(self) -> None:
        """Forget the evaluations so far."""
        self.calls = []

    @property
    def drew(self) -> bool:
        """Whether an evaluation since `start_step` drew random numbers, or another thread meanwhile.

        Asked once a step: reading the random state is quick, comparing it is not.
        """
        assert self._conditions is not None
        if not self._draws and self.calls:
            self._draws = not torch.equal(self.calls[0].draw.state, self._conditions.random.get())
            return self._draws
        return any(call.drew is not False for call in self.calls)

    def __call__(self, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The slope, as the host is to have it."""
        if self._conditions is None or self._captured is None:
            return self._func(t, y, *args, **kwargs)
        # By then nobody knows whether it draws, but what it drew must be known.
        watched = self._draws or self._is_first
        with undisturbed() if watched else contextlib.nullcontext():
            return self._evaluated(self._conditions, self._captured, watched, t, y, *args, **kwargs)

    def _evaluated(
        self, conditions: Conditions, captured: Captured, watched: bool, t: Tensor, y: Any, *args: Any, **kwargs: Any
    ) -> Any:
        given = [t, *(part for part in pytree.tree_leaves(y) if isinstance(part, Tensor))]
        versions = [version_of(part) for part in given]
        state = conditions.random.get()
        new: Sequence[weakref.ref[Tensor]] = ()
        # A solver may differentiate the field itself: by Newton's method, say.
        linked = torch.is_grad_enabled() and any(
            isinstance(part, Tensor) and part.requires_grad for part in pytree.tree_leaves(y)
        )
        if captured.looks:
            with conditions.autocast():  # without its cache, which would serve later evaluations
                slope, new = captured.evaluate(self._func, t, y, *args, linked=linked, **kwargs)
            if self._is_first:
                conditions.evaluated()
            self._is_first = False
        elif linked:
            slope = self._func(t, y, *args, **kwargs)
        else:
            slope = self._func(t, detached(y), *args, **kwargs)
            slope = slope.detach() if isinstance(slope, Tensor) else detached(slope)
        if versions != [version_of(part) for part in given]:
            raise UnsupportedFieldError(
                "func overwrites the time or the state that it is given, which a replay cannot do again. Let it work "
                "on a copy: y = y.clone()."
            )
        after = drew = None
        if watched:
            moved = conditions.random.get()
            drew = not torch.equal(state, moved)
            after = conditions.random.fingerprint(moved) if drew else None
            self._draws = self._draws or drew
        kept = detached(slope) if self._keeps_slopes else None
        self.calls.append(Call(Draw(state, after), drew, kept, new))
        return slope

    def replace(self, func: Callable[..., Any]) -> None:
        """Call ``func`` from now on."""
        self._func = func

    def close(self) -> None:
        """Listen no more, and keep nothing of what was heard: a replay calls the field through this."""
        self._conditions = self._captured = None
        self.calls = []


def with_graph(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` where gradients are always enabled, as under backpropagation, for callers that have them disabled.

    A field that differentiates something need not enable them itself.
    """

    def evaluate(t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return func(t, y, *args, **kwargs)
        with torch.enable_grad():
            given = pytree.tree_map(
                lambda part: (
                    part.detach().requires_grad_() if isinstance(part, Tensor) and differentiable(part) else part
                ),
                y,
            )
            slope = func(t.detach(), given, *args, **kwargs)
        return detached(slope)

    return evaluate


def differentiable(part: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return part.is_floating_point() or part.is_complex()


def detached(value: Any) -> Any:
    """The same without graphs."""
    if isinstance(value, Tensor):
        return value.detach()
    return pytree.tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, value)
