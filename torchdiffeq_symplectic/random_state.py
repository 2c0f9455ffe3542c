"""The random state of a field's evaluations."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchdiffeq_symplectic.transforms import Untransformed, value_of

__all__ = ["Draw", "RandomState", "undisturbed"]


class Draw(NamedTuple):
    """The random numbers of an evaluation.

    Attributes:
        state: of the generators before it.
        after: the `RandomState.fingerprint` of their state after it; None where others may have drawn meanwhile.
    """

    state: Tensor
    after: int | None


_lock = threading.RLock()
_PATIENCE = 10.0  # seconds; an evaluation that waits for a thread that waits for it is not to wait for ever


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No other thread's evaluation draws random numbers, or sets the generators, inside."""
    held = _lock.acquire(timeout=_PATIENCE)
    try:
        yield
    finally:
        if held:
            _lock.release()


class RandomState:
    """The generators that a field on ``device`` draws from: the CPU's, and the device's own. Threads share them."""

    def __init__(self, device: torch.device) -> None:
        self._accelerator = None if device.type == "cpu" else getattr(torch, device.type, None)
        self._which = () if device.type == "mps" else (device,)  # there is one such device, and it takes no number

    def get(self) -> Tensor:
        """The present state, shape ``(bytes,)``, uint8, on the CPU."""
        state = torch.get_rng_state()
        if self._accelerator is None:
            return state
        return torch.cat([self._accelerator.get_rng_state(*self._which), state])

    def set(self, state: Tensor) -> None:
        """Go back to ``state``."""
        with Untransformed():
            state = value_of(state)
            if self._accelerator is not None:
                split = len(state) - len(torch.get_rng_state())
                # Copies: PyTorch reads a state from where its memory begins, not its view.
                self._accelerator.set_rng_state(state[:split].clone(), *self._which)
                state = state[split:].clone()
            torch.set_rng_state(state)

    @staticmethod
    def fingerprint(state: Tensor) -> int:
        """A number that differs where the state does."""
        with Untransformed():
            return hash(value_of(state).numpy().tobytes())

    def is_drawn_from(self, evaluate: Callable[[], object]) -> bool:
        """Whether ``evaluate()`` draws from the generators, and not another thread meanwhile; they stay as they are."""
        watch = _Watch(self)
        with watch:
            evaluate()
        if watch.before is not None:
            self.set(watch.before)
        return watch.before is not None


class _Watch(TorchDispatchMode):
    """Notes whether an operation of this thread draws random numbers from the generators that threads share."""

    def __init__(self, random: RandomState) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._random = random
        self.before: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.before is None and torch.Tag.nondeterministic_seeded in func.tags:
            given = pytree.tree_leaves((args, kwargs))
            if not any(isinstance(part, torch.Generator) for part in given):
                self.before = self._random.get()
        return func(*args, **kwargs)
