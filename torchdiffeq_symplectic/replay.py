"""A replay must be the forward pass again: what the field depends on is put back, and the result is checked.

Random state, autocast, training flags, buffers, and the tensors that modules, objects and closures held during the
solve can be put back, and are. What cannot (noise that the field draws by itself, a power iteration that moves with
every call) shows in the check: a replayed state that differs from the recorded one.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.errors import ReplayError, ReplayWarning
from torchdiffeq_symplectic.held import Held, Place
from torchdiffeq_symplectic.random_state import RandomState

__all__ = ["REPLAY_CHECKS", "Conditions", "ReplayCheck"]

REPLAY_CHECKS = ("error", "warn", "ignore")


# Held while something that threads share differs from what they left there.
_shared = threading.RLock()


class Conditions:
    """What a field depends on besides its arguments. Taken before a solve; `restored` brings it back for the replay.

    Args:
        held: what the field holds.
        device: where its state lives.

    Attributes:
        random: the generators that the field may draw from.
        autocast_dtype: the dtype of the autocast region around the solve, or None.
    """

    def __init__(self, held: Held, device: torch.device) -> None:
        self.random = RandomState(device)
        self.autocast_dtype = _autocast_dtype(device.type)
        self._device = device
        self._modules = held.modules
        self._training = [module.training for module in held.modules]
        self._buffers = [_versions(module) for module in held.modules]
        self._moving: list[nn.Module] = []
        self._places = held.places
        self._noted: list[tuple[Place, weakref.ref[Tensor]]] | None = None
        self._values: list[tuple[Place, Tensor]] = []

    def evaluated(self) -> None:
        """Called after the first evaluation, which may have filled what was empty: note what is held where."""
        places = list(self._places)
        # What it set for the first time is held where nothing, or no tensor, was before.
        known = {(id(table), key) for table, key in places}
        for module in self._modules:
            attributes = vars(module)
            new = (name for name, value in attributes.items() if isinstance(value, Tensor))
            places += [(attributes, name) for name in new if (id(attributes), name) not in known]
        found = [(place, _value_at(place)) for place in places]
        # Weakly: what the next evaluation replaces is not to outlive it.
        self._noted = [(place, weakref.ref(value)) for place, value in found if isinstance(value, Tensor)]

    def solved(self) -> None:
        """Called after the solve: note which modules have buffers that an evaluation moves."""
        if self._noted is None:
            self.evaluated()
        # A place that each evaluation fills with something new is no input of the field.
        noted = [(place, reference()) for place, reference in self._noted or ()]
        self._values = [(place, value) for place, value in noted if value is not None and _value_at(place) is value]
        self._places, self._noted = [], []
        for module, versions, training in zip(self._modules, self._buffers, self._training, strict=True):
            # Batch statistics are updated without a new version, so a norm in training counts as moving, too.
            if _moved(module, versions) or (training and getattr(module, "running_mean", None) is not None):
                self._moving.append(module)
        self._buffers = []
        if self.autocast_dtype is not None:
            # Weights cast under no_grad have lost their graph: they must not stay in the cache of the caller's region.
            torch.clear_autocast_cache()

    def precision(self, state: Sequence[Tensor]) -> float:
        """The coarsest in which slopes of such a state are computed."""
        dtypes = [part.dtype for part in state if part.is_floating_point() or part.is_complex()]
        if self.autocast_dtype is not None:
            dtypes.append(self.autocast_dtype)
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The autocast region of the solve, without its cache, for the same reason."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self.autocast_dtype, cache_enabled=False)

    @contextlib.contextmanager
    def restored(self, random: bool) -> Iterator[None]:
        """Training flags and tensors as in the solve; afterwards all is as before, buffers, too.

        Args:
            random: whether the field draws random numbers: the generators are put back in the end.
        """
        now = [module.training for module in self._modules]
        replaced = [(place, _value_at(place), value) for place, value in self._values if _value_at(place) is not value]
        replaced = [(place, present, value) for place, present, value in replaced if _is_there(place)]
        flipped = now != self._training
        with contextlib.ExitStack() as stack:
            if torch.is_autocast_enabled(self._device.type):
                stack.enter_context(torch.autocast(self._device.type, enabled=False))
            if flipped or replaced or self._moving or random:
                stack.enter_context(_shared)
            if random:
                stack.callback(self.random.set, self.random.get())
            for module in self._moving:
                stack.callback(_put_back_buffers, module, _copies(module))
            if flipped:
                stack.callback(_set_training, self._modules, now)
                _set_training(self._modules, self._training)
            for place, present, value in replaced:
                stack.callback(_put, place, present)
                _put(place, value)
            yield


def _value_at(place: Place) -> object:
    table, key = place
    if isinstance(table, types.CellType):
        try:
            return table.cell_contents
        except ValueError:  # emptied
            return None
    return table.get(key)


def _is_there(place: Place) -> bool:
    """Whether the place is still one: a parametrization may have been removed, and its parameter with it."""
    table, key = place
    return isinstance(table, types.CellType) or key in table


def _put(place: Place, value: object) -> None:
    table, key = place
    if isinstance(table, types.CellType):
        table.cell_contents = value
    else:
        table[key] = value


def _set_training(modules: Sequence[nn.Module], flags: Sequence[bool]) -> None:
    for module, flag in zip(modules, flags, strict=True):
        module.training = flag


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]


def _versions(module: nn.Module) -> list[tuple[str, Tensor, int]]:
    return [(name, buffer, buffer._version) for name, buffer in _buffers(module) if not buffer.is_inference()]


def _moved(module: nn.Module, versions: list[tuple[str, Tensor, int]]) -> bool:
    present = dict(_buffers(module))
    return any(present.get(name) is not buffer or buffer._version != version for name, buffer, version in versions)


def _copies(module: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    return [(name, buffer, buffer.detach().clone()) for name, buffer in _buffers(module)]


def _put_back_buffers(module: nn.Module, copies: list[tuple[str, Tensor, Tensor]]) -> None:
    for name, buffer, value in copies:
        buffer.data.copy_(value)  # .data: no new version, a pending graph may have saved the buffer
        module._buffers[name] = buffer


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


# Roundings of a step that a replay may add where it is not bit for bit the forward pass (a device that is not
# deterministic, a kernel that differs with and without a graph), in units of the precision of the largest state so far.
_ROUNDINGS = 64.0


class ReplayCheck:
    """Compares every replayed state with the recorded one; it must be the same, bit for bit.

    Where a device's kernels are not deterministic, or differ with and without a graph, a state may differ by rounding:
    then it is compared with the largest state so far. The comparison costs no evaluation; it is looked at once, after
    the backward pass, so no step waits for the device.

    Args:
        action: "error", "warn" or "ignore".
        precision: the coarsest in which states and slopes are computed.
    """

    def __init__(self, action: str, precision: float) -> None:
        self.active = action != "ignore"
        self._action, self._precision = action, precision
        self._rows: list[Tensor] = []
        self._steps: list[int] = []

    def step(self, number: int, replayed: Tensor, recorded: Tensor) -> None:
        """Compare the state after step ``number`` with the recorded one."""
        if not self.active or not recorded.numel():
            return
        if recorded.device.type == "cpu" and torch.equal(replayed, recorded):
            return
        deviation, scale = torch._foreach_norm((replayed - recorded, recorded), torch.inf)
        self._add(number, deviation, scale)

    def slope(self, number: int, replayed: Tensor, recorded: Tensor, size: Tensor) -> None:
        """Compare a slope that is evaluated with its graph with the one that was kept of step ``number``."""
        if not self.active or not recorded.numel() or not recorded.is_floating_point():
            return
        if recorded.device.type == "cpu" and torch.equal(replayed, recorded):
            return
        replayed, recorded = torch.broadcast_tensors(replayed.to(recorded.dtype), recorded)
        deviation, scale = torch._foreach_norm((replayed - recorded, recorded), torch.inf)
        self._add(number, deviation * size.abs(), scale * size.abs())

    def norm(self, number: int, replayed: Tensor, recorded: Tensor) -> None:
        """Compare the norm of the state after step ``number`` with that of the recorded one."""
        if self.active and not (recorded.device.type == "cpu" and torch.equal(replayed, recorded)):
            self._add(number, (replayed - recorded).abs(), recorded)

    def _add(self, number: int, deviation: Tensor, scale: Tensor) -> None:
        self._rows += (deviation, scale)
        self._steps.append(number)

    def largest(self) -> float:
        """The largest deviation of a step, relative to its state."""
        if not self._rows:
            return 0.0
        deviation, scale = torch.stack(self._rows).detach().view(-1, 2).unbind(1)
        return float(torch.where(deviation == 0, deviation, deviation / scale).max())

    def conclude(self) -> None:
        """Raise or warn if a step was not reproduced; the only place that waits for the device."""
        if not self._rows:
            return
        deviation, scale = torch.stack(self._rows).detach().view(-1, 2).unbind(1)
        order = torch.tensor(self._steps).argsort()
        largest = torch.empty_like(scale)
        largest[order] = torch.where(scale.isfinite(), scale, 0)[order].cummax(0).values
        # A state that was not finite to begin with proves nothing.
        bad = ~(deviation <= _ROUNDINGS * self._precision * largest) & scale.isfinite()
        if not bool(bad.any()):
            return
        worst = int(torch.where(bad, deviation.nan_to_num(torch.inf), -1).argmax())
        steps = len({step for step, wrong in zip(self._steps, bad.tolist(), strict=True) if wrong})
        message = (
            f"the replay of this solve differs from its forward pass: after step {self._steps[worst]} by "
            f"{float(deviation[worst]):.3g} where the state has size {float(scale[worst]):.3g} (in {steps} steps). "
            "The gradient would not be that of the forward pass. Something that func depends on has changed since: "
            "noise drawn again for a second solve, a module in training mode that changes with each call (spectral "
            "norm), tensors overwritten, random numbers drawn by another thread. Keep it fixed until after backward, "
            'or pass adjoint_options={"replay_check": "warn"} or "ignore" if that is intended.'
        )
        if self._action == "error":
            raise ReplayError(message)
        warnings.warn(message, ReplayWarning, stacklevel=2)
