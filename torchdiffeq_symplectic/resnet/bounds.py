"""A bound of the distance between a network's states and its ODE's solution, from what is measured on each step.

Let ``x_n`` be the network's states, ``x(s)`` the solution from the same ``x_0``, ``h = 1/N``, ``E_n(x) = x + h f_n(x)``
the network's step, and ``e_n = ‖x_n - x(s_n)‖``. The triangle inequality gives::

    e_(n+1) <= ‖E_n(x_n) - E_n(x(s_n))‖ + ‖E_n(x(s_n)) - x(s_(n+1))‖ <= g_n e_n + τ_n

with the amplification ``g_n``, a Lipschitz constant of ``E_n``, and the step's own error ``τ_n``. Proposition 1 of
Sander, Ablin and Peyré (NeurIPS 2022, https://arxiv.org/abs/2205.14612) is the same with their largest values over
depth, ``g_n <= 1 + L h`` and ``τ_n <= C h²/2``, which is larger by far where blocks contract or differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Linearised", "bound", "lipschitz_constant"]

# Golub-Kahan-Lanczos: the most steps, and the residual relative to the singular value, whose own error is its square.
_TOLERANCE = 1e-2
_MOST_STEPS = 60


class Linearised:
    """A function at a point: its value there, and products with its Jacobian ``J``, any number of them.

    One evaluation is made. ``J v`` is the derivative of ``Jᵀ u`` with respect to ``u``, along ``v``: that needs no
    forward mode, only operations that can be differentiated twice.

    Args:
        function: from a tensor to one of the same shape; what else it depends on is taken as constant.
        x: the point.

    Attributes:
        value: ``function(x)``, without graph.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.detach().requires_grad_()
        # The fused kernels of attention cannot be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._result = function(self._x)
            self._cotangent = torch.zeros_like(self._result, requires_grad=True)
            self._pulled_back = _product(self._result, self._x, self._cotangent, create_graph=True)
        self.value = self._result.detach()

    def vjp(self, cotangent: Tensor) -> Tensor:
        """``Jᵀ cotangent``."""
        return _product(self._result, self._x, cotangent)

    def jvp(self, tangent: Tensor) -> Tensor:
        """``J tangent``."""
        return _product(self._pulled_back, self._cotangent, tangent)


def _product(output: Tensor, leaf: Tensor, cotangent: Tensor, create_graph: bool = False) -> Tensor:
    if not output.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(
        output, leaf, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return found


def lipschitz_constant(at: Linearised, generator: torch.Generator) -> float:
    """The largest singular value of the Jacobian: the Lipschitz constant near the point, in the Euclidean norm.

    Power iteration with ``JᵀJ`` from a random start, of whose vectors all are used: the estimate is the largest
    singular value of ``J`` in their span (Golub, Kahan and Lanczos; two vectors are kept, and the coefficients of their
    recurrence are a bidiagonal matrix). It comes from below, and stops when its residual is a hundredth of it.

    Args:
        at: the function at the point. A batch is one vector: its constant is the largest of its members', if these do
            not depend on each other.
        generator: of the start, on the CPU.
    """
    start = torch.randn(at.value.shape, generator=generator, dtype=torch.float64)
    right = _unit(start.to(at.value.dtype).to(at.value.device))[0]
    left, size = _unit(at.jvp(right))
    diagonal, above = [size], [0.0]
    found = size
    while size > 0 and len(diagonal) < _MOST_STEPS:
        right, beyond = _unit(at.vjp(left) - size * right)
        vectors, values, _ = torch.linalg.svd(_bidiagonal(diagonal, above))
        found = float(values[0])
        if beyond * abs(float(vectors[-1, 0])) <= _TOLERANCE * found or not math.isfinite(beyond):
            break
        left, size = _unit(at.jvp(right) - beyond * left)
        diagonal.append(size)
        above.append(beyond)
    return found


def _bidiagonal(diagonal: Sequence[float], above: Sequence[float]) -> Tensor:
    """The square matrix with ``diagonal`` and, beside it, ``above[1:]``."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    matrix[:-1, 1:] += torch.diag(torch.tensor(above[1:], dtype=torch.float64, device="cpu"))
    return matrix


def _unit(vector: Tensor) -> tuple[Tensor, float]:
    size = float(torch.linalg.vector_norm(vector))
    return (vector / size if size > 0 else vector), size


def bound(amplifications: Sequence[float], errors: Sequence[float]) -> list[float]:
    """The bound of ``e_0 ... e_N``, ``N + 1`` numbers, the first 0; from ``g_n`` and ``τ_n``, ``N`` numbers each."""
    bounds = [0.0]
    for amplification, error in zip(amplifications, errors, strict=True):
        bounds.append(amplification * bounds[-1] + error if bounds[-1] else error)
    return bounds
