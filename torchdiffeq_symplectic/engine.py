"""Calling autograd's engine for one vector-Jacobian product.

``torch.autograd.grad`` checks its arguments in Python at every call. For the small networks that most people train
that is a tenth of a stage's time, so where PyTorch has the function behind it, that one is called. What the checks
would find cannot happen here: a slope has the state's shape and dtype before it is differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["vector_jacobian_product"]

_engine = getattr(torch.autograd.Variable, "_execution_engine", None)  # in every release so far


def vector_jacobian_product(output: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor) -> Sequence[Tensor | None]:
    """``cotangent`` times the Jacobian of ``output`` in each of ``inputs``, None for zero; the graph is kept.

    Args:
        output: a tensor with a graph.
        inputs: tensors in that graph.
        cotangent: of the shape and dtype of ``output``.
    """
    if _engine is None:
        return torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
    products: Sequence[Tensor | None] = _engine.run_backward(
        (output,), (cotangent,), True, False, inputs, allow_unreachable=True, accumulate_grad=False
    )
    return products
