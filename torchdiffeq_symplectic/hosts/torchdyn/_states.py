"""torchdyn's states as tensors: a dictionary of tensors is laid out flat, and so is a state with a running cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["Layout", "State", "detached", "tensors_in"]

State = Tensor | Mapping[str, Tensor]

T = TypeVar("T")


def detached(value: T) -> T:
    """The same without its graph; a field may return tensors in dictionaries, tuples and lists."""
    if isinstance(value, Tensor):
        return value.detach()  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {key: detached(part) for key, part in value.items()}  # type: ignore[return-value]
    if type(value) in (tuple, list):
        return type(value)(map(detached, value))  # type: ignore[call-arg, call-overload]
    return value


def tensors_in(value: object) -> list[Tensor]:
    """All tensors of such a value."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, tuple | list) else []


class Layout:
    """How a state of torchdyn lies in the tensor that is recorded.

    A tensor without a running cost is recorded as it is. Else everything lies flat, in the order of the keys, and the
    integral of the running cost so far comes last.

    Args:
        example: a state.
        cost: whether there is a running cost.

    Attributes:
        plain: whether states are recorded as they are.
        uniform: whether all entries are of one floating or complex dtype.
    """

    def __init__(self, example: State, cost: bool) -> None:
        self._parts = None if isinstance(example, Tensor) else _shapes(example)
        self._shape = example.shape if isinstance(example, Tensor) else torch.Size()
        self.cost = cost
        self.plain = self._parts is None and not cost
        dtypes = {tensor.dtype for tensor in tensors_in(example)}
        self.uniform = len(dtypes) == 1 and all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes)

    def pack(self, state: State, total: Tensor | None = None) -> Tensor:
        """The recorded form of a state, or of a slope; ``total`` is the integral, or the running cost, zero if None."""
        if isinstance(state, Tensor) and self.plain:
            return state
        if isinstance(state, Tensor):
            values = [state.expand(self._shape)]
        else:
            values = [state[key].expand(shape) for key, (shape, _) in (self._parts or {}).items()]
        flat = [value.reshape(-1) for value in values]
        if self.cost:
            flat.append(flat[0].new_zeros(1) if total is None else total.reshape(1).to(flat[0].dtype))
        return torch.cat(flat)

    def unpack(self, packed: Tensor) -> State:
        """The state that was packed."""
        if self.plain:
            return packed
        return self._split(packed[: len(packed) - self.cost], ())

    def pack_solution(self, solution: State) -> Tensor:
        """The rows of a solution, each packed."""
        if isinstance(solution, Tensor) and self.plain:
            return solution
        values = [solution] if isinstance(solution, Tensor) else [solution[key] for key in self._parts or ()]
        flat = [value.reshape(len(value), -1) for value in values]
        if self.cost:
            flat.append(flat[0].new_zeros(len(flat[0]), 1))
        return torch.cat(flat, dim=1)

    def unpack_solution(self, rows: Tensor) -> State:
        """The solution that was packed."""
        if self.plain:
            return rows
        return self._split(rows[:, : rows.shape[1] - self.cost], rows.shape[:1])

    def _split(self, flat: Tensor, leading: tuple[int, ...]) -> State:
        if self._parts is None:
            return flat.reshape((*leading, *self._shape))
        pieces = flat.split([shape.numel() for shape, _ in self._parts.values()], dim=-1)
        return {
            key: piece.reshape((*leading, *shape)).to(dtype)
            for piece, (key, (shape, dtype)) in zip(pieces, self._parts.items(), strict=True)
        }


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for key, value in state.items()}
