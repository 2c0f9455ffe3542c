"""How smooth a residual network's weights are in depth."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.resnet.field import ResidualField

__all__ = ["Weights", "weights_over_depth"]

_SHOWN = 5  # parameters of which an entry is followed


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights ``θ_n`` of the blocks ``n = 0 ... N - 1``, Euclidean norms.

    Attributes:
        smoothness: ``N max_n ‖θ_{n+1} - θ_n‖``, over all parameters; None where blocks differ in their architecture.
        by_layer: the same for each parameter by itself, by its name inside the block.
        reason: why there is no smoothness, or None.
        size: the root mean square of ``‖θ_n‖`` over the blocks.
        followed: for the parameters that change most, the values over depth of the entry that varies most, by name.
    """

    smoothness: float | None
    by_layer: dict[str, float]
    reason: str | None
    size: float
    followed: dict[str, list[float]]


@torch.no_grad()
def weights_over_depth(field: ResidualField) -> Weights:
    """Measure the weights of ``field``'s blocks."""
    blocks = [dict(block.named_parameters()) for block in field]
    reason = _difference(blocks)
    if reason is not None:
        return Weights(None, {}, reason, math.nan, {})
    by_name = {name: [block[name] for block in blocks] for name in blocks[0]}
    steps = {name: [_norm(b - a) for a, b in itertools.pairwise(values)] for name, values in by_name.items()}
    by_layer = {name: len(blocks) * max(sizes) for name, sizes in steps.items()}
    moving = [name for name in by_layer if by_layer[name] > 0] or list(by_layer)
    followed = sorted(moving, key=by_layer.__getitem__, reverse=True)[:_SHOWN]
    return Weights(
        smoothness=len(blocks) * max((math.hypot(*step) for step in zip(*steps.values(), strict=True)), default=0.0),
        by_layer=by_layer,
        reason=None,
        size=math.hypot(*(_norm(value) for values in by_name.values() for value in values)) / math.sqrt(len(blocks)),
        followed={name: _most_varying_entry(by_name[name]) for name in followed},
    )


def _difference(blocks: Sequence[Mapping[str, Tensor]]) -> str | None:
    """What the first block with other parameters than block 0 has, or lacks; None if there is no such block."""
    expected = {name: tuple(value.shape) for name, value in blocks[0].items()}
    for n, block in enumerate(blocks):
        found = {name: tuple(value.shape) for name, value in block.items()}
        for name in (*expected, *found):
            if expected.get(name) != found.get(name):
                here, there = (f"of shape {has[name]}" if name in has else "missing" for has in (found, expected))
                return f"blocks are of different architectures: {name} is {here} in block {n}, but {there} in block 0"
    return None


def _most_varying_entry(values: Sequence[Tensor]) -> list[float]:
    low, high = values[0], values[0]
    for value in values[1:]:
        low, high = torch.minimum(low, value), torch.maximum(high, value)
    place = int((high - low).argmax())
    return [float(value.flatten()[place]) for value in values]


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))
