"""torchdyn's states: a tensor, or a dictionary of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["State", "parts_of", "state_of", "tensors_in"]

State = Tensor | Mapping[str, Tensor]


def parts_of(state: State) -> list[Tensor]:
    """The tensors of a state."""
    return [state] if isinstance(state, Tensor) else list(state.values())


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
