"""Calling autograd's engine for vector-Jacobian products.

``torch.autograd.grad`` checks its arguments in Python at every call. For the small networks that most people train
that is a tenth of an evaluation's time, so where PyTorch has the function behind it, that one is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["vector_jacobian_products"]

_engine = getattr(torch.autograd.Variable, "_execution_engine", None)  # in every release so far


def vector_jacobian_products(
    outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], retain_graph: bool = False
) -> Sequence[Tensor | None]:
    """``cotangents`` times the Jacobian of ``outputs`` in each of ``inputs``, None for zero.

    Args:
        outputs: tensors with a graph.
        inputs: tensors in that graph.
        cotangents: of the shapes and dtypes of ``outputs``.
        retain_graph: whether the graph is kept.
    """
    if _engine is None or any(
        a.shape != b.shape or a.dtype != b.dtype for a, b in zip(outputs, cotangents, strict=True)
    ):
        return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=retain_graph, allow_unused=True)
    products: Sequence[Tensor | None] = _engine.run_backward(
        outputs, cotangents, retain_graph, False, inputs, allow_unreachable=True, accumulate_grad=False
    )
    return products
