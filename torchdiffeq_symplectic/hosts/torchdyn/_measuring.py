"""Reading the coefficients of torchdyn's solvers off their own `step`.

A solver is an object that may be changed at any time (its tableau is cast to the dtype of each state, and may be
trained), so what is measured is remembered only as long as nothing in it changes. torchdyn's functional `odeint` makes
a new solver at each call, so what is measured of one of torchdyn's that is made of numbers alone serves all its equals.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.hosts.measuring import measuring
from torchdiffeq_symplectic.tableau import Outcome, ProbeField, Tableau, UnknownFormError, measure

__all__ = ["Clock", "Measured"]

_REMEMBERED = 64
_FEW = 256  # coefficients of one kind


class Clock(NamedTuple):
    """How times come to a step: PyTorch's rules of promotion tell 0-d tensors from those of shape (1,).

    Attributes:
        t_dim, h_dim: number of dimensions of time and step size.
        rounding: their dtype, where that is narrower than the state's, or None.
    """

    t_dim: int
    h_dim: int
    rounding: torch.dtype | None

    @classmethod
    def of(cls, t: Tensor, h: Tensor, state: torch.dtype) -> Clock:
        """The clock of a step from ``t`` of size ``h``."""
        precision = torch.finfo(state).eps
        narrow = h.dtype.is_floating_point and torch.finfo(h.dtype).eps > precision
        return cls(t.dim(), h.dim(), h.dtype if narrow else None)

    def times(self, t: float, h: float) -> tuple[Tensor, Tensor]:
        """Time and size as such a step gets them."""
        dtype = self.rounding or torch.float64
        return tuple(  # type: ignore[return-value]
            torch.tensor(value, dtype=dtype).reshape((1,) * dim) for value, dim in ((t, self.t_dim), (h, self.h_dim))
        )


class Measured:
    """The tableaus of one solver as it is now.

    Args:
        solver: the solver, synchronised with the state.
        interpolator: of the solve, or None.
        args: what `step` is given besides.
        keys: the keys of a state that is a dictionary, or None.
    """

    def __init__(
        self, solver: nn.Module, interpolator: Any, args: Mapping[str, Any], keys: Sequence[str] | None
    ) -> None:
        self._solver, self._interpolator, self._args, self._keys = solver, interpolator, args, keys
        marks = (_mark(vars(solver)), None if interpolator is None else _mark(vars(interpolator)))
        step = getattr(type(solver), "step", None)
        self._key = (marks, id(step), type(interpolator), tuple(keys or ()))
        self._step = step
        self._parts = step, *_values(vars(solver)), *([] if interpolator is None else _values(vars(interpolator)))
        self._tableaus = functools.cache(self._measure)

    def start(self, clock: Clock) -> Tableau:
        """A step of an adaptive solver whose first slope is that at its start; UnknownFormError if there is none."""
        return self._tableaus(clock, "start")

    def carrying(self, clock: Clock) -> Tableau:
        """A step of an adaptive solver whose first slope is the one that the step before handed on."""
        return self._tableaus(clock, "carrying")

    def alone(self, clock: Clock) -> Tableau:
        """A step that evaluates all of its slopes."""
        return self._tableaus(clock, "alone")

    def _measure(self, clock: Clock, first: str) -> Tableau:
        known = _cache.setdefault(self._solver, {})
        key = (*self._key, clock, first)
        if key not in known:
            numbers = self._numbers()
            equal = None if numbers is None else (numbers, clock, first)
            tableau = _equal.get(equal)
            if tableau is None:
                args = _Watched(self._args) if isinstance(self._args, Mapping) and self._args else self._args
                tableau = self._read(clock, first, args)
                unread = not args.was_read if isinstance(args, _Watched) else args is None or isinstance(args, Mapping)
                if not unread:
                    return tableau  # it may depend on their values
                if equal is not None:
                    _remember(_equal, equal, tableau)
            _remember(known, key, (self._parts, tableau))
        return known[key][1]

    def _numbers(self) -> Hashable:
        """All that the step of one of torchdyn's own solvers is made of, None if that is not numbers alone.

        A class of somebody else's may have steps that depend on more than its instances hold.
        """
        if not (_is_torchdyns(self._solver) and (self._interpolator is None or _is_torchdyns(self._interpolator))):
            return None
        try:
            contents = _contents(vars(self._solver)), _contents(vars(self._interpolator or _NOTHING))
        except _OtherError:
            return None
        return type(self._solver), self._step, type(self._interpolator), tuple(self._keys or ()), contents

    def _read(self, clock: Clock, first: str, args: Any) -> Tableau:
        def run() -> Tableau:
            probe = _Probe(copy.deepcopy(self._solver), self._interpolator, args, self._keys, clock, first == "start")
            tableau = measure(probe.step, int(first == "carrying"), clock.rounding)
            probe.verify_times(tableau)
            return tableau.first_same_as_last()

        return measuring(run)


# The parts are kept alive so that their ids stay theirs.
_cache: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[object, Tableau]]] = weakref.WeakKeyDictionary()
_equal: dict[Hashable, Tableau] = {}
_NOTHING = types.SimpleNamespace()

Key = TypeVar("Key")
Value = TypeVar("Value")


def _remember(cache: dict[Key, Value], key: Key, value: Value) -> None:
    while len(cache) >= _REMEMBERED:
        del cache[next(iter(cache))]
    cache[key] = value


class _Watched(Mapping[str, Any]):
    """Arguments that know whether a step looked at them. Those of torchdyn do not: they hand them on at best."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self._args = args
        self.was_read = False

    def __getitem__(self, name: str) -> Any:
        self.was_read = True
        return self._args[name]

    def __iter__(self) -> Iterator[str]:
        self.was_read = True
        return iter(self._args)

    def __len__(self) -> int:
        self.was_read = True
        return len(self._args)


class _Probe:
    """A solver whose step meets a probe.

    Args:
        solver: a copy of the solver.
        interpolator, args, keys: as for `Measured`.
        clock: how times come to it.
        starts: whether it is given the slope at its start.
    """

    def __init__(
        self,
        solver: Any,
        interpolator: Any,
        args: Mapping[str, Any],
        keys: Sequence[str] | None,
        clock: Clock,
        starts: bool,
    ) -> None:
        self._solver, self._interpolator, self._args, self._clock = solver, interpolator, args, clock
        self._starts = starts
        # Entries of a dictionary differ by these factors, so that a step that mixes them betrays itself.
        self._factors = None if keys is None else {key: 2.0**i for i, key in enumerate(keys)}

    def step(self, field: ProbeField, t: float, h: float, y: Tensor, carried: Sequence[Tensor]) -> Outcome:
        """One step of the solver, for `measure`."""

        def func(t: Tensor, y: Any) -> Any:
            return self._spread(field(float(t), self._gathered(y), 0))

        time, size = self._clock.times(t, h)
        state, first, handed, new, rest = self._run(func, time, size, y, carried)
        dense: Sequence[Tensor] = []
        if self._interpolator is not None:
            dense = _interpolant(self._interpolator, time, size, (first, handed), (state, new), rest[1])
        return Outcome(self._gathered(new), None if handed is None else self._gathered(handed), dense)

    def verify_times(self, tableau: Tableau) -> None:
        """See that the step lets gradients of its time and size through; UnknownFormError if it does not."""
        stages: list[tuple[Tensor, Tensor]] = []

        def func(t: Tensor, y: Any) -> Any:
            stages.append((t, self._gathered(y)))
            return self._spread(torch.ones(1, dtype=torch.float64))

        carried = [torch.ones(1, dtype=torch.float64)] * tableau.carried
        with torch.enable_grad():
            leaves = self._clock.times(0.0, 1.0)
            time, size = (leaf.requires_grad_() for leaf in leaves)
            *_, new, _ = self._run(func, time, size, torch.zeros(1, dtype=torch.float64), carried)
            expected = [(t, (1.0, node)) for (t, _), node in zip(stages, tableau.c, strict=True)]
            expected += [(y, (0.0, sum(row))) for (_, y), row in zip(stages, tableau.a, strict=True)]
            expected.append((self._gathered(new), (0.0, sum(tableau.b))))
        for result, rates in expected:
            found: Sequence[Tensor | None] = (None, None)
            if result.requires_grad:
                found = torch.autograd.grad(result, leaves, torch.ones_like(result), True, allow_unused=True)
            for gradient, rate in zip(found, rates, strict=True):
                if abs((0.0 if gradient is None else float(gradient)) - rate) > 1e-5 * (1 + abs(rate)):
                    raise UnknownFormError("it stops gradients of its times")

    def _run(
        self, func: Any, time: Tensor, size: Tensor, y: Tensor, carried: Sequence[Tensor]
    ) -> tuple[Any, Any, Any, Any, Sequence[Any]]:
        state = self._spread(y)
        self._solver.sync_device_dtype(state, time.detach())
        first = self._spread(carried[0]) if carried else func(time, state) if self._starts else None
        handed, new, *rest = self._solver.step(func, state, time, size, k1=first, args=self._args)
        return state, first, handed, new, rest

    def _spread(self, y: Tensor) -> Any:
        return y if self._factors is None else {key: y * factor for key, factor in self._factors.items()}

    def _gathered(self, state: Any) -> Tensor:
        if self._factors is None:
            tensor: Tensor = state
            return tensor
        values: list[Tensor] = [state[key] / factor for key, factor in self._factors.items()]
        if not all(torch.allclose(value, values[0], rtol=1e-14, atol=1e-14) for value in values):
            raise UnknownFormError("it does not treat the entries of the state alike")
        return values[0]


def _interpolant(
    interpolator: Any, t: Tensor, h: Tensor, slopes: Sequence[Any], states: Sequence[Any], stages: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The coefficients of the interpolating polynomial, as torchdyn's own solve has them computed."""
    weights = interpolator.bmid.to(torch.float64)
    middle = states[0] + h * sum(weights[i] * stages[i] for i in range(len(stages)))
    coefficients: list[Tensor] = interpolator.fit(h, *slopes, *states, middle)
    at = 0.3
    shown = interpolator.evaluate([c.clone() for c in coefficients], t, t + h, t + at * h)
    powers = sum((c * at**power for power, c in enumerate(coefficients)), torch.zeros_like(middle))
    if not torch.allclose(shown, powers, rtol=1e-5, atol=1e-5):
        raise UnknownFormError("its interpolation is not the polynomial that it fits")
    return coefficients


def _is_torchdyns(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torchdyn"


class _OtherError(Exception):
    """Something is no number, and holds others than numbers."""


def _contents(value: object) -> Hashable:
    """Something that is equal for what is made of equal numbers, of the same types; _OtherError if it has other parts.

    Numbers on another device than the CPU are not looked at, which would wait for it.
    """
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return type(value), value
    if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad and value.numel() <= _FEW:
        return value.dtype, tuple(value.shape), tuple(value.flatten().tolist())
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_contents, value))
    if isinstance(value, dict):
        return tuple((name, _contents(part)) for name, part in value.items())
    if isinstance(value, set) and not value:
        return set
    raise _OtherError


def _mark(value: object, inside: tuple[int, ...] = ()) -> Hashable:
    """Something that changes when ``value`` or a part of it does; ``inside`` are the ids of what it is a part of."""
    if isinstance(value, Tensor):
        return id(value), value._version, value.requires_grad
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if id(value) in inside:
        return id(value)
    inside = (*inside, id(value))
    if isinstance(value, list | tuple):
        return tuple(_mark(part, inside) for part in value)
    if isinstance(value, dict):
        return tuple((name, _mark(part, inside)) for name, part in value.items())
    if isinstance(value, nn.Module):
        return id(value), _mark(vars(value), inside)
    return id(value)


def _values(value: object, inside: tuple[int, ...] = ()) -> list[object]:
    """The parts whose ids a mark is made of."""
    if id(value) in inside:
        return []
    inside = (*inside, id(value))
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [found for part in value for found in _values(part, inside)]
    return [value, *(_values(vars(value), inside) if isinstance(value, nn.Module) else [])]
