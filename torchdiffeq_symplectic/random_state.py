"""The random state of a field's evaluations."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdiffeq_symplectic.transforms import Untransformed, value_of

__all__ = ["RandomState"]


class RandomState:
    """The generators that a field on ``device`` draws from: the CPU's, and the device's own."""

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
