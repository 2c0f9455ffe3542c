"""The gradient of a residual network by backpropagation, block by block, and that of the hosts' solves beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.resnet.field import ResidualField

__all__ = ["Agreement", "Loss", "agreement", "network_gradient", "network_states", "solve_gradient"]

Loss = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a gradient ``g``, with respect to x and all parameters, agrees with the exact one, ``g*``.

    Attributes:
        relative: ``‖g - g*‖ / ‖g*‖``, infinite if ``g`` is not finite.
        cosine: of the angle between the two, None if it has none.
        by_block: ``relative`` for the parameters of each block by itself; empty where blocks are tied or have none.
    """

    relative: float
    cosine: float | None
    by_block: list[float]


@torch.no_grad()
def network_states(field: ResidualField, x: Tensor) -> list[Tensor]:
    """``x_0 ... x_N`` of the network itself: a loop over its blocks, without the field and without a solver."""
    states = [x]
    for block in field:
        states.append(_advance(field, block, states[-1]))
    return states


def network_gradient(field: ResidualField, states: Sequence[Tensor], loss: Loss) -> list[Tensor]:
    """The gradient of ``loss(x_N)`` with respect to ``x_0`` and the parameters that need one.

    The chain rule from the last block to the first, each evaluated again at its state, so that one block's graph is
    alive at a time. It is what backpropagation through all of them gives, as they do not draw random numbers.
    """
    parameters = _trainable(field)
    totals = {parameter: torch.zeros_like(parameter) for parameter in parameters}
    cotangent = _cotangent(states[-1], loss)
    for block, state in zip(reversed(list(field)), reversed(states[:-1]), strict=True):
        own = _trainable(block)
        with torch.enable_grad():
            x = state.detach().requires_grad_()
            after = _advance(field, block, x)
        cotangent, *products = torch.autograd.grad(after, (x, *own), cotangent, materialize_grads=True)
        for parameter, product in zip(own, products, strict=True):
            totals[parameter] += product
    return [cotangent, *totals.values()]


def solve_gradient(
    field: ResidualField, x: Tensor, loss: Loss, method: str, adjoint_method: str, **adjoint_options: Any
) -> list[Tensor]:
    """The same by torchdiffeq's solve of one step a block, between two output times, in one of the gradient modes."""
    ends = field.grid(method, dtype=torch.float64, device="cpu")[[0, -1]]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        states = odeint_adjoint(
            field,
            leaf,
            ends.to(leaf),
            method=method,
            options={"step_size": field.step_size},
            adjoint_method=adjoint_method,
            adjoint_options=adjoint_options,
        )
        return list(torch.autograd.grad(loss(states[-1]), (leaf, *_trainable(field)), materialize_grads=True))


def agreement(field: ResidualField, gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> Agreement:
    """Compare two gradients of one form, that of `network_gradient`."""
    position = {parameter: i for i, parameter in enumerate(_trainable(field), 1)}
    by_block = []
    if len(field.blocks) == len(field):
        for block in field.blocks:
            own = [position[parameter] for parameter in _trainable(block)]
            if own:
                by_block.append(_relative([gradient[i] for i in own], [exact[i] for i in own]))
    return Agreement(
        _relative(gradient, exact), _cosine(gradient, exact), by_block if len(by_block) == len(field) else []
    )


def _advance(field: ResidualField, block: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = block(x.clone())  # it may work in place
    return x + value / len(field) if field.residual else value


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _cotangent(state: Tensor, loss: Loss) -> Tensor:
    with torch.enable_grad():
        x = state.detach().requires_grad_()
        (cotangent,) = torch.autograd.grad(loss(x), x, materialize_grads=True)
    return cotangent


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(tensor)) for tensor in tensors))


def _relative(gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    error, size = _norm(a - b for a, b in zip(gradient, exact, strict=True)), _norm(exact)
    if error == 0:
        return 0.0
    return error / size if size > 0 and math.isfinite(error) else math.inf


def _cosine(gradient: Sequence[Tensor], exact: Sequence[Tensor]) -> float | None:
    sizes = _norm(gradient), _norm(exact)
    if min(sizes) == 0 or not all(map(math.isfinite, sizes)):
        return None
    # Divided first: a product of two norms may exceed a float.
    pairs = zip(gradient, exact, strict=True)
    cosine = math.fsum(float(((a / sizes[0]) * (b / sizes[1])).sum()) for a, b in pairs)
    return max(-1.0, min(1.0, cosine))  # beyond by rounding
