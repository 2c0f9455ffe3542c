"""A slope in the graph of a step that is tried with its graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.hosts.torchdyn._states import state_of
from torchdiffeq_symplectic.listener import differentiable

__all__ = ["Linked"]


class Linked(torch.autograd.Function):
    """A slope as a function of the time and the state that it was evaluated at; a solver may differentiate it."""

    @staticmethod
    def forward(
        ctx: Any, func: Any, rest: Any, keys: Sequence[str] | None, slope: Sequence[Tensor], t: Tensor, *y: Tensor
    ) -> tuple[Tensor, ...]:
        """The slope, of its parts."""
        ctx.func, ctx.rest, ctx.keys = func, rest, keys
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(t, *y)
        return tuple(part.view_as(part) for part in slope)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The products with time and state, by another evaluation."""
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_(differentiable(part)) for part in ctx.saved_tensors]
            t, *y = leaves
            slope = pytree.tree_leaves(ctx.func(t, state_of(y, ctx.keys), *ctx.rest))
        pairs = [(a, b) for a, b in zip(slope, cotangents, strict=True) if b is not None and a.requires_grad]
        if not pairs:
            return (None,) * (4 + len(leaves))
        values, products = zip(*pairs, strict=True)
        able = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(values, able, products, allow_unused=True))
        return (None, None, None, None, *(next(found) if leaf.requires_grad else None for leaf in leaves))
