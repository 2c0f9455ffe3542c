"""What a run showed, and how two runs of the same call differ: values, errors, words, warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["differences", "is_replayed"]


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where two outcomes differ, to the bit; a NaN is like another."""
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and found.dtype == expected.dtype
        return [] if same and torch.equal(found.nan_to_num(7.5), expected.nan_to_num(7.5)) else [where]
    if isinstance(expected, Mapping):
        if found.keys() != expected.keys():
            return [f"{where}: {sorted(found)} for {sorted(expected)}"]
        return [line for key in expected for line in differences(found[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, Sequence) and not isinstance(expected, str):
        if len(found) != len(expected):
            return [f"{where}: {len(found)} entries for {len(expected)}"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{where}/{i}")]
    return [] if found == expected else [f"{where}: {found!r} for {expected!r}"]


def is_replayed(loss: Tensor) -> bool:
    """Whether ``loss`` comes from a solve that this package differentiates."""
    stack, met = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        if node.name() == "_GradientBackward":
            return True
        met.add(node)
        stack += [following for following, _ in node.next_functions]
    return False
