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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchdiffeq_symplectic.errors import ReplayError, ReplayWarning
from torchdiffeq_symplectic.held import Held, Place
from torchdiffeq_symplectic.random_state import RandomState

__all__ = ["REPLAY_CHECKS", "Conditions", "ReplayCheck", "version_of"]

REPLAY_CHECKS = ("error", "warn", "ignore")


# A replay puts flags, buffers and attributes of modules as they were: one replay at a time for each module, and for all
# that is held outside of modules.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_lock_of_locks, _lock_of_others = threading.Lock(), threading.RLock()


class _Noted(NamedTuple):
    """A tensor that was seen at a place; weakly, as what an evaluation replaces is not to outlive it.

    Attributes:
        place: where it was.
        tensor: refers to it.
        version: how often it had been changed in place.
    """

    place: Place
    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def at(cls, places: Iterable[Place]) -> list[_Noted]:
        """The tensors at ``places``."""
        found = [(place, _value_at(place)) for place in places]
        return [
            cls(place, weakref.ref(value), version_of(value)) for place, value in found if isinstance(value, Tensor)
        ]

    @property
    def moved(self) -> bool:
        """Whether another tensor is there by now, or this one was changed in place."""
        tensor = self.tensor()
        return tensor is None or _value_at(self.place) is not tensor or version_of(tensor) != self.version


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
        self._places = held.places
        self._noted = _Noted.at(held.places)
        self._constants = [(place, _value_at(place)) for place in held.constants]
        self._moving: list[Place] = []  # whose tensors are replaced or changed by the evaluations themselves
        self._values: list[tuple[Place, Tensor, int]] = []
        self._was_evaluated = False

    def evaluated(self) -> None:
        """Called after the first evaluation, which may have filled what was empty: note what is held where."""
        self._was_evaluated = True
        places = list(self._places)
        # What it set for the first time is held where nothing, or no tensor, was before.
        known = {(id(table), key) for table, key in places}
        for module in self._modules:
            attributes = vars(module)
            new = (name for name, value in attributes.items() if isinstance(value, Tensor))
            places += [(attributes, name) for name in new if (id(attributes), name) not in known]
        self._moving = [noted.place for noted in self._noted if noted.moved]
        self._noted = _Noted.at(places)

    def solved(self) -> None:
        """Called after the solve: note what the evaluations move, and what they do not."""
        if not self._was_evaluated:
            self.evaluated()
        values = [(noted.place, noted.tensor()) for noted in self._noted]
        # A place that each evaluation fills with something new is no input of the field.
        self._values = [(place, v, version_of(v)) for place, v in values if v is not None and _value_at(place) is v]
        self._moving += [noted.place for noted in self._noted if noted.moved]
        for module, training in zip(self._modules, self._training, strict=True):
            if training and getattr(module, "running_mean", None) is not None:  # updated without a new version
                self._moving += [(module._buffers, name) for name in module._buffers]
        self._constants = [(place, value) for place, value in self._constants if _value_at(place) is value]
        self._places, self._noted = [], []
        if self.autocast_dtype is not None:
            # Weights cast under no_grad have lost their graph: they must not stay in the cache of the caller's region.
            torch.clear_autocast_cache()

    def changes(self) -> list[str]:
        """What changed since the solve and is not put back for a replay, in words."""
        moving = {(id(table), key) for table, key in self._moving}
        overwritten = [
            f"{_name_of(place)} was overwritten in place"
            for place, value, version in self._values
            if version_of(value) != version and (id(place[0]), place[1]) not in moving
        ]
        rebound = [
            f"{_name_of(place)} was {value!r} and is {_value_at(place)!r}"
            for place, value in self._constants
            if _value_at(place) is not value and _value_at(place) != value
        ]
        return [*overwritten, *rebound]

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
    def restored(self) -> Iterator[None]:
        """Training flags and tensors as in the solve; afterwards all is as before."""
        with contextlib.ExitStack() as stack:
            if torch.is_autocast_enabled(self._device.type):
                stack.enter_context(torch.autocast(self._device.type, enabled=False))
            for lock in _locks_of(self._modules):
                stack.enter_context(lock)
            for place in self._moving:
                value = _value_at(place)
                if isinstance(value, Tensor):
                    stack.callback(_put_back, place, value, value.detach().clone())
            now = [module.training for module in self._modules]
            if now != self._training:
                stack.callback(_set_training, self._modules, now)
                _set_training(self._modules, self._training)
            for place, value, _ in self._values:
                present = _value_at(place)
                if present is not value and _is_there(place):
                    stack.callback(_put, place, present)
                    _put(place, value)
            yield


def _locks_of(modules: Sequence[nn.Module]) -> list[threading.RLock]:
    """Always in the same order, so that two replays do not wait for each other."""
    if not modules:
        return [_lock_of_others]
    with _lock_of_locks:
        locks = [_locks.setdefault(module, threading.RLock()) for module in modules]
    return sorted(locks, key=id)


def _value_at(place: Place) -> object:
    table, key = place
    if isinstance(table, types.CellType):
        try:
            return table.cell_contents
        except ValueError:  # emptied
            return None
    if isinstance(table, list):
        return table[key] if key < len(table) else None
    return table.get(key)


def _is_there(place: Place) -> bool:
    """Whether the place is still one: a parametrization may have been removed, and its parameter with it."""
    table, key = place
    if isinstance(table, list):
        return bool(key < len(table))
    return isinstance(table, types.CellType) or key in table


def _put(place: Place, value: object) -> None:
    table, key = place
    if isinstance(table, types.CellType):
        table.cell_contents = value
    else:
        table[key] = value


def _put_back(place: Place, tensor: Tensor, value: Tensor) -> None:
    tensor.data.copy_(value)  # .data: no new version, a pending graph may have saved the tensor
    _put(place, tensor)


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place."""
    return 0 if is_lazy(tensor) or tensor.is_inference() else tensor._version


def _name_of(place: Place) -> str:
    table, key = place
    return "a variable of a closure" if isinstance(table, types.CellType) else f"{key!r}"


def _set_training(modules: Sequence[nn.Module], flags: Sequence[bool]) -> None:
    for module, flag in zip(modules, flags, strict=True):
        module.training = flag


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
        changes: what changed since the solve, in words: likely causes of a difference.
    """

    def __init__(self, action: str, precision: float, changes: Callable[[], Sequence[str]] = list) -> None:
        self.active = action != "ignore"
        self._action, self._precision, self._changes = action, precision, changes
        self._disturbed: list[int] = []
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

    def disturbed(self, number: int) -> None:
        """Say that the field drew other random numbers in step ``number`` than it did before."""
        if self.active:
            self._disturbed.append(number)

    def conclude(self) -> None:
        """Raise or warn if a step was not reproduced; the only place that waits for the device."""
        how = self._difference()
        causes = [*self._changes()] if how or self._disturbed else []
        if self._disturbed:
            how = how or f"differs from its forward pass in step {min(self._disturbed)}"
            causes.append(
                "another thread drew random numbers while func was evaluated, in the solve or in the replay (or func "
                "draws another number of them now)"
            )
        if not how:
            return
        seen = f"Seen since: {'; '.join(causes)}. " if causes else ""
        message = (
            f"the replay of this solve {how}. "
            f"The gradient would not be that of the forward pass. {seen}Something that func depends on has changed: "
            "noise drawn again for a second solve, a module in training mode that changes with each call (spectral "
            "norm), tensors overwritten, a closure's variable rebound, an attribute replaced, random numbers drawn by "
            "another thread. Keep it fixed until after backward, "
            'or pass adjoint_options={"replay_check": "warn"} or "ignore" if that is intended.'
        )
        if self._action == "error":
            raise ReplayError(message)
        warnings.warn(message, ReplayWarning, stacklevel=2)

    def _difference(self) -> str:
        """How a step differs, in words; empty if none does."""
        if not self._rows:
            return ""
        deviation, scale = torch.stack(self._rows).detach().view(-1, 2).unbind(1)
        order = torch.tensor(self._steps).argsort()
        largest = torch.empty_like(scale)
        largest[order] = torch.where(scale.isfinite(), scale, 0)[order].cummax(0).values
        # A state that was not finite to begin with proves nothing.
        bad = ~(deviation <= _ROUNDINGS * self._precision * largest) & scale.isfinite()
        if not bool(bad.any()):
            return ""
        worst = int(torch.where(bad, deviation.nan_to_num(torch.inf), -1).argmax())
        steps = len({step for step, wrong in zip(self._steps, bad.tolist(), strict=True) if wrong})
        return (
            f"differs from its forward pass: after step {self._steps[worst]} by {float(deviation[worst]):.3g} where "
            f"the state has size {float(scale[worst]):.3g} (in {steps} steps)"
        )
