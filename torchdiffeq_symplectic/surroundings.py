"""What a field depends on besides its arguments, as it was during the solve, restored while the solve is replayed.

Random state, autocast, training flags and buffers can be restored, and are. What cannot (noise that the module draws
anew, spectral norm's power iteration) shows in the check of the replay, see `torchdiffeq_symplectic.check`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = ["RandomState", "Surroundings", "hooks_silenced"]


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
        if self._accelerator is not None:
            split = len(state) - len(torch.get_rng_state())
            self._accelerator.set_rng_state(state[:split].contiguous(), *self._which)
            state = state[split:]
        torch.set_rng_state(state.cpu().contiguous())


class Surroundings:
    """Taken before a solve; `restored` brings them back for its replay.

    Args:
        modules: what the field evaluates, see `closures.modules_of`.
        device: where its state lives.
        attributes: tensors that the host sets on modules anew for each solve: module and name.

    Attributes:
        random: the generators that the field may draw from.
        autocast_dtype: the dtype of the autocast region around the solve, or None.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        device: torch.device,
        attributes: Sequence[tuple[nn.Module, str]] = (),
    ) -> None:
        self.random = RandomState(device)
        self._device = device
        self._modules = modules
        self._attributes = [(module, name) for module, name in attributes if isinstance(vars(module)[name], Tensor)]
        self._training = [module.training for module in self._modules]
        self._buffers = [_versions(module) for module in self._modules]
        self._moving: list[nn.Module] = []
        self.autocast_dtype = _autocast_state(device.type)

    def solved(self) -> None:
        """Called after the solve: note which modules have buffers that an evaluation moves."""
        for module, versions, training in zip(self._modules, self._buffers, self._training, strict=True):
            # Batch statistics are updated without a new version, so a norm in training counts as moving, too.
            if _versions(module) != versions or (training and getattr(module, "running_mean", None) is not None):
                self._moving.append(module)
        self._buffers = []
        if self.autocast_dtype is not None:
            # Weights cast under no_grad have lost their graph: they must not stay in the cache of the caller's region.
            torch.clear_autocast_cache()

    def autocast(self) -> torch.autocast:
        """The autocast region of the solve, without its cache, for the same reason."""
        return torch.autocast(self._device.type, dtype=self.autocast_dtype, cache_enabled=False)

    def attributes(self) -> list[Tensor]:
        """The present values of the attributes, to be kept with what the recording saves."""
        return [vars(module)[name].detach() for module, name in self._attributes]

    @contextlib.contextmanager
    def restored(self, random: bool, attributes: Sequence[Tensor]) -> Iterator[None]:
        """Training flags and ``attributes`` as in the solve; afterwards all is as before.

        Buffers, too, and if ``random`` the random state.
        """
        held = [vars(module).get(name) for module, name in self._attributes]
        now = [module.training for module in self._modules]
        buffers = [
            (module, {name: (buffer, buffer.detach().clone()) for name, buffer in _buffers(module)})
            for module in self._moving
        ]
        state = self.random.get() if random else None
        with contextlib.ExitStack() as stack:
            if torch.is_autocast_enabled(self._device.type):
                stack.enter_context(torch.autocast(self._device.type, enabled=False))
            try:
                _set_training(self._modules, self._training, now)
                _set_attributes(self._attributes, attributes)
                yield
            finally:
                _set_attributes(self._attributes, held)
                _set_training(self._modules, now, self._training)
                for module, values in buffers:
                    for name, (buffer, value) in values.items():
                        buffer.data.copy_(value)  # .data: no new version, a pending graph may have saved the buffer
                        module._buffers[name] = buffer
                if state is not None:
                    self.random.set(state)


@contextlib.contextmanager
def hooks_silenced(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep the hooks of ``tensors`` from firing on the products of single stages.

    They fire once, on the whole gradient, when autograd passes it on. PyTorch holds the same dictionary that
    ``Tensor._backward_hooks`` shows, so emptying it in place is enough. What ``retain_grad`` adds up is put back.
    """
    retained = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
    for tensor, _ in retained:
        tensor.grad = None
    hooks = [tensor._backward_hooks for tensor in tensors if tensor._backward_hooks]
    held = [dict(hook) for hook in hooks]
    for hook in hooks:
        hook.clear()
    try:
        yield
    finally:
        for hook, entries in zip(hooks, held, strict=True):
            hook.update(entries)
        for tensor, grad in retained:
            tensor.grad = grad


def _set_training(modules: Sequence[nn.Module], wanted: Sequence[bool], now: Sequence[bool]) -> None:
    if wanted != now:
        for module, flag in zip(modules, wanted, strict=True):
            module.training = flag


def _set_attributes(attributes: Sequence[tuple[nn.Module, str]], values: Sequence[object]) -> None:
    for (module, name), value in zip(attributes, values, strict=True):
        setattr(module, name, value)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


def _versions(module: nn.Module) -> list[tuple[str, int, int]]:
    if not module._buffers:
        return []
    return [(name, id(buffer), buffer._version) for name, buffer in _buffers(module) if not buffer.is_inference()]


def _autocast_state(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
