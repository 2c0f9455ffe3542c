"""Depth and blocks: which block stands at a depth, and a block whose weights lie between those of two others."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["Place", "evaluate_between", "place_of", "require_one_architecture", "step_size"]

# How far from n/N a time may be and still be meant as n/N, in units of the precision of times near 1. Hosts arrive at
# n/N by n * h + t0 with a rounded h, by t + (t1 - t), by casts, and move it to the neighbouring float: 2 units in all.
_ROUNDINGS = 8

_DOUBLE = torch.finfo(torch.float64).eps
_SINGLE = torch.finfo(torch.float32).eps
_FLOAT32 = struct.Struct("f")  # an object, as torch.compile traces struct.pack into an endless recursion


class Place(NamedTuple):
    """Where a depth lies among the blocks.

    Attributes:
        block: the number ``n`` of the block that stands there, or of the one before.
        between: whether it lies strictly between the blocks ``n`` and ``n + 1``.
    """

    block: int
    between: bool


def place_of(t: float, count: int, dtype: torch.dtype = torch.float64) -> Place:
    """The place of depth ``t`` among ``count`` blocks, of which number ``n`` stands at ``n / count``.

    A depth that is ``n / count`` up to the rounding of ``dtype`` *is* ``n / count``, as hosts compute their times in
    several ways. Depths before the first block or after the last one belong to these.

    Raises:
        ValueError: if ``dtype`` is too coarse to tell neighbouring blocks apart.
    """
    precision = _precision(t, dtype)
    if count * precision > 0.5:
        raise ValueError(
            f"times in {dtype} cannot tell {count} blocks apart. Solve with a state in float32 or float64; autocast "
            "around the solve lets the blocks compute in less."
        )
    if t <= 0:
        return Place(0, between=False)
    depth = t * count
    if depth >= count - 1:
        return Place(count - 1, between=False)
    nearest = round(depth)
    if abs(depth - nearest) <= _ROUNDINGS * precision * count:
        return Place(nearest, between=False)
    return Place(math.floor(depth), between=True)


def _precision(t: float, dtype: torch.dtype) -> float:
    """The precision of times near 1 of the dtype that ``t`` was computed in: ``dtype``, or float32 if it shows that."""
    if dtype != torch.float64:
        return torch.finfo(dtype).eps if dtype.is_floating_point else _DOUBLE
    if not 0 < t < 1:
        return _DOUBLE
    # A double that is a float32 number, or next to one, comes from a float32 grid that was cast for a float64 state.
    (single,) = _FLOAT32.unpack(_FLOAT32.pack(t))
    return _SINGLE if abs(t - single) <= _DOUBLE * t else _DOUBLE


def step_size(count: int) -> Tensor:
    """``1 / count`` such that torchdiffeq makes ``count`` steps of it from 0 to 1; 0-d, float64, on the CPU.

    torchdiffeq makes a grid of ``ceil((t1 - t0) / step_size + 1)`` points, which is one too many where ``1 / count`` is
    rounded downwards and the quotient upwards: for 49 blocks in float64, for 61 in float32, for every 15th number in
    both. The float above the rounded ``1 / count`` is never less than ``1 / count``, so its quotient is never more than
    ``count``. As a *tensor* in float64 it makes torchdiffeq divide in float64, where times are float32, too.
    """
    return torch.tensor(math.nextafter(1 / count, 1), dtype=torch.float64, device="cpu")


def evaluate_between(block: nn.Module, following: nn.Module, weight: Tensor | float, x: Tensor) -> Tensor:
    """``block`` at ``x``, its parameters and floating buffers moved by ``weight`` towards those of ``following``.

    ``theta = theta_n + weight * (theta_{n+1} - theta_n)``, differentiable in both and in ``weight``. Neither block
    changes: what an evaluation does to buffers (a batch norm's statistics) happens to the interpolated ones.
    """
    others = dict(_tensors(following))
    state = {}
    for name, tensor in _tensors(block):
        moves = tensor.is_floating_point() or tensor.is_complex()
        state[name] = tensor + weight * (others[name] - tensor) if moves else tensor.clone()
    result: Tensor = functional_call(block, state, (x,))
    return result


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of ``block`` with their names."""
    yield from block.named_parameters()
    yield from block.named_buffers()


def require_one_architecture(blocks: Sequence[tuple[int, nn.Module]]) -> None:
    """ValueError if numbered blocks differ in more than the values of their parameters and buffers; it names two."""
    first, reference = blocks[0]
    expected = _architecture(reference)
    for number, block in blocks[1:]:
        found = _architecture(block)
        if found != expected:
            differing = [(a, b) for a, b in zip(expected, found, strict=False) if a != b]
            there, here = differing[0] if differing else (f"{len(expected)} parts", f"{len(found)} parts")
            raise ValueError(
                f'interpolate="weights" needs blocks of one architecture, but block {first} '
                f"({type(reference).__name__}) has {there} where block {number} ({type(block).__name__}) has {here}. "
                'Use interpolate="outputs", or leave out the blocks that differ.'
            )


def _architecture(block: nn.Module) -> list[str]:
    """The modules, parameters and buffers of ``block`` in words, in their order."""
    parts = [
        f"{type(module).__name__}({module.extra_repr()})" + (f" as {name}" if name else "")
        for name, module in block.named_modules()
    ]
    return parts + [f"a tensor {name} of shape {tuple(tensor.shape)}" for name, tensor in _tensors(block)]
