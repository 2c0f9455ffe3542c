"""torchdyn's states: a tensor, or a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["State", "parts_of", "state_of", "tensors_in"]

State = Tensor | Mapping[str, Tensor]


def parts_of(state: State, keys: Sequence[str] | None) -> list[Tensor]:
    """The tensors of a state; ``keys`` are those of a dictionary in their order, or None."""
    if isinstance(state, Tensor) or keys is None:
        return [state]  # type: ignore[list-item]
    return [state[key] for key in keys]


def state_of(parts: Sequence[Tensor], keys: Sequence[str] | None) -> State:
    """The state of these parts; ``keys`` are those of a dictionary, or None."""
    return parts[0] if keys is None else dict(zip(keys, parts, strict=True))


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in containers of any depth."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, tuple | list) else []
