"""Transforms of ``torch.func`` and forward-mode differentiation: they follow a host's own solve, not a replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

__all__ = ["Rows", "Untransformed", "is_batched", "is_followed", "is_vmapped", "value_of"]


def is_followed() -> bool:
    """Whether a transform of ``torch.func`` is at work in this thread, or forward-mode differentiation is on."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_batched(tensor: Tensor | None) -> bool:
    """Whether it is a batch in disguise, as ``torch.autograd.grad`` with ``is_grads_batched`` makes of cotangents."""
    functorch = torch._C._functorch
    return tensor is not None and (functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor))


def is_vmapped() -> bool:
    """Whether one of the transforms at work is ``vmap``."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == torch._C._functorch.TransformType.Vmap for interpreter in stack)


def value_of(given: Any) -> Any:
    """A tensor without what transforms, forward mode and autograd wrap it in; anything else as it is."""
    if not isinstance(given, Tensor):
        return given
    while torch._C._functorch.is_functorch_wrapped_tensor(given):
        given = torch._C._functorch.get_unwrapped(given)
    return given.detach()


class Untransformed(contextlib.ExitStack):
    """A block in which no transform of ``torch.func`` is at work."""

    def __enter__(self) -> Untransformed:
        super().__enter__()
        self._transforms = self.enter_context(pyfunctorch.temporarily_clear_interpreter_stack())
        return self

    def values_of(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """The values of ``func``, which is called under the transforms, as what it holds may be transformed."""

        def evaluate(*args: Any) -> Any:
            with pyfunctorch.temporarily_restore_interpreter_stack(self._transforms):
                return value_of(func(*args))

        return evaluate


class Rows(TorchFunctionMode):
    """Rows that are assigned to a new tensor are kept apart, and stacked at the end: ``vmap`` can follow that.

    Args:
        count: of the rows of the tensor that is meant.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self._whole: Tensor | None = None
        self._rows: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__setitem__ and args[0] is self._whole:
            self._rows[int(args[1])] = args[2]
            return None
        result = func(*args, **(kwargs or {}))
        if func is torch.empty and self._whole is None and len(result) == self._count:
            self._whole = result
        return result

    def stacked(self, result: Tensor) -> Tensor:
        """``result``, or its rows if it is the tensor meant."""
        return torch.stack([self._rows[i] for i in range(self._count)]) if result is self._whole else result
