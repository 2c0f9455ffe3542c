"""Calls of the field that are cut out of the graph of their step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.listener import detached
from torchdiffeq_symplectic.tape import Step

if TYPE_CHECKING:
    from torchdiffeq_symplectic.field import Field, Linearisation

__all__ = ["Cut", "CutCall", "DifferentiatedTwice"]


class CutCall:
    """A call that is cut out of the graph of its step."""

    __slots__ = ("args", "field", "kwargs", "linearisation", "number", "rebuild", "slope", "step", "wants_time")

    def __init__(self, field: Field, step: Step, number: int, wants_time: bool, args: Any, kwargs: Any) -> None:
        self.field, self.step, self.number, self.args, self.kwargs = field, step, number, args, kwargs
        self.wants_time = wants_time
        self.rebuild: Any = None
        self.slope: Any = None
        self.linearisation: Linearisation | None = None

    def pack(self, parts: Sequence[Tensor]) -> Any:
        """The state, of its parts."""
        return parts[0] if self.rebuild is None else pytree.tree_unflatten(parts, self.rebuild)

    def unpack(self, parts: Any) -> Any:
        """The slope, of its parts."""
        return parts if self.slope is None else pytree.tree_unflatten(parts, self.slope)

    def value(self, t: Tensor, *y: Tensor) -> Any:
        """The slope, without its graph, or with it if it is wanted first: that of the last call of a step."""
        if self.step.slopes is not None:
            return self.step.slopes[self.number]
        if self.field.holds or self.number == self.step.calls - 1:
            self.linearisation = self.field.linearise(self.number, t, *y, call=self)
            return self.linearisation.value
        with torch.no_grad():
            y = tuple(part.detach() for part in y)
            return self.field.evaluate(self.number, t.detach(), self.pack(y), *self.args, **self.kwargs)


class DifferentiatedTwice(Exception):  # noqa: N818 (caught: no error)
    """A step differentiates the field, and is a function of the result: such an evaluation cannot be cut out."""


class Cut(torch.autograd.Function):
    """One evaluation whose graph lives only while it is pulled back."""

    @staticmethod
    def forward(ctx: Any, call: CutCall, t: Tensor, *y: Tensor) -> Any:
        """The parts of the slope."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(t, *y)
        value = call.value(t, *y)
        if isinstance(value, Tensor):
            return value.detach()
        parts, call.slope = pytree.tree_flatten(detached(value))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The products with time and state; those with the targets are summed on the field."""
        call: CutCall = ctx.call
        if call.field.advancing and torch.is_grad_enabled():
            raise DifferentiatedTwice
        linearisation, call.linearisation = call.linearisation, None
        if linearisation is None:
            linearisation = call.field.linearise(call.number, *ctx.saved_tensors, call=call)
        values = [part for part in pytree.tree_leaves(linearisation.value) if isinstance(part, Tensor)]
        cotangents = tuple(  # a slope that broadcasts may have been recorded with another number of dimensions
            part if part is None or part.shape == value.shape else part.view_as(value)
            for value, part in zip(values, cotangents, strict=True)
        )
        products = call.field.products_in if call.field.advancing else call.field.pull_back
        found = products(linearisation, values, cotangents)
        t = found.pop() if call.wants_time else None
        return (None, t, *found)
