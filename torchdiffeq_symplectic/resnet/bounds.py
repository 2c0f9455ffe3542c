"""The constants of the approximation error's bound, measured, and the bound.

Proposition 1 of Sander, Ablin and Peyré (NeurIPS 2022, https://arxiv.org/abs/2205.14612): let ``φ(s, x)`` be the
vector field, ``L`` a Lipschitz constant of ``φ(s, ·)`` and ``C`` the largest ``‖∂_s φ + ∂_x φ[φ]‖``, the second
derivative of a solution. Then the network's states ``x_n`` and the solution ``x(s)`` from the same ``x_0`` are, at
``s_n = n/N``, no further apart than::

    ‖x_n - x(s_n)‖ <= C (e^(L s_n) - 1) / (2 N L)

as an Euler step of size ``h = 1/N`` errs by at most ``C h²/2`` and enlarges what erred before by at most ``1 + L h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Linearised", "curvature", "lipschitz_constant", "proposition_1"]

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


def curvature(field: Callable[[float, Tensor], Tensor], s: float, x: Tensor, delta: float) -> float:
    """``‖∂_s φ + ∂_x φ[φ]‖`` at ``(s, x)``: how fast the slope of the solution through that point changes.

    ``∂_s φ`` is the difference quotient between ``s - delta`` and ``s + delta``: exact where ``φ`` is linear in ``s``
    between them, as with outputs interpolated between two blocks. No block may stand between the two, as the derivative
    jumps there.
    """
    at = Linearised(lambda y: field(s, y), x)
    in_depth = (field(s + delta, x) - field(s - delta, x)) / (2 * delta)
    return float(torch.linalg.vector_norm(in_depth + at.jvp(at.value)))


def proposition_1(lipschitz: Sequence[float], curvatures: Sequence[float]) -> list[float]:
    """The bound at ``s_0 ... s_N``, from the constants that were measured on each of the ``N`` steps.

    At ``s_n`` the constants are the largest on the steps before it, as nothing that follows matters there. For
    ``e^(L s_n)`` stands ``(1 + L/N)^n``, which is what the proof has, and smaller, by a lot if the blocks are few.

    Returns:
        ``N + 1`` numbers, the first 0; infinite where they exceed a float.
    """
    count = len(lipschitz)
    largest = zip(accumulate(lipschitz, max), accumulate(curvatures, max), strict=True)
    return [0.0, *(_bound(n, count, *constants) for n, constants in enumerate(largest, 1))]


def _bound(n: int, count: int, lipschitz: float, largest_curvature: float) -> float:
    if math.isinf(lipschitz) or math.isinf(largest_curvature):
        return math.inf
    if lipschitz == 0:
        return largest_curvature * n / (2 * count**2)
    try:
        growth = math.expm1(n * math.log1p(lipschitz / count))
    except OverflowError:
        return math.inf
    return largest_curvature * growth / (2 * count * lipschitz)
