"""What `equivalence_report` is given: checked, and refused in words that name the argument."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet.field import ResidualField

__all__ = ["check_device", "checked_batch", "field_of"]


def checked_batch(x: Tensor) -> Tensor:
    """The batch without its graph."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, but is a {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be of dtype float32 or float64, but is of {x.dtype}; convert it and the blocks")
    if x.numel() == 0:
        raise ValueError(f"x must have entries, but is of shape {tuple(x.shape)}")
    return x.detach()


def field_of(blocks: Iterable[nn.Module] | ResidualField, residual: bool, interpolate: str) -> ResidualField:
    """The field of ``blocks``, or ``blocks`` if they are one already."""
    if not isinstance(blocks, ResidualField):
        return ResidualField(blocks, residual=residual, interpolate=interpolate)
    if residual or interpolate != "outputs":
        raise ValueError("residual and interpolate are for blocks; a ResidualField has its own. Leave them out.")
    return blocks


def check_device(field: ResidualField, x: Tensor) -> None:
    """Refuse a batch that is elsewhere than the field."""
    for name, value in (*field.named_parameters(), *field.named_buffers()):
        if value.device != x.device:
            raise ValueError(f"x is on {x.device}, but {name} is on {value.device}; move one of them with .to()")
