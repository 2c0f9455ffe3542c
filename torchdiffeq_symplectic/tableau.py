"""Explicit steps as numbers, and reading those numbers off a step function.

A step from ``(t, y)`` of size ``h`` is linear in its slopes,

    Y_i = y + h * sum_j a[i][j] * k_j,      k_i = f(t + c[i] * h, Y_i),
    y1  = y + h * sum_j b[j] * k_j,         u(theta) = y + h * sum_j W_j(theta) * k_j,

where the slopes are those *carried* in from earlier steps followed by the step's *own*. Hence one run on a probe
(``t = 0``, ``h = 1``, ``y = 0``, and a field that answers its i-th call with the i-th unit vector) shows every
coefficient: what the probe is called with is a row of ``a`` and a node, what comes back is ``b`` and ``W``. What a host
really computes is thereby what is differentiated, whatever its documentation says.

A host may also round the products ``h * a[i][j]`` to a narrower dtype than the state's. Then a second run, at an uneven
size, shows which. A step that is of no such form is a `Whole`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchdiffeq_symplectic.graph import reachable

__all__ = ["NO_SLOPES", "Narrow", "Outcome", "Tableau", "UnknownFormError", "Whole", "measure"]

_ROUNDING = 1e-12


class UnknownFormError(Exception):
    """A step that is not a fixed linear combination of explicitly computed slopes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Narrow:
    """Which products of the step size with a coefficient a host rounds to a narrower dtype than the state's.

    Attributes:
        dtype: that dtype; in it the product of the rounded size and the rounded coefficient is taken.
        a, b: of the form of `Tableau.a` and `Tableau.b`, true where the product is rounded.
    """

    dtype: torch.dtype
    a: tuple[tuple[bool, ...], ...]
    b: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """A step of no known form, which is evaluated again and differentiated as a whole, with all of its graph.

    Attributes:
        advance: ``advance(t, h, y)``, the state after the step, a function that autograd can follow.
    """

    advance: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Tableau:
    """Coefficients of one explicit step with ``s`` own stages and ``q`` carried slopes.

    Compared by identity: a tableau lives as long as its solver class, and what is derived from it is remembered.

    Attributes:
        a: ``s`` rows; row ``i`` has ``q + i`` weights, of the carried slopes and of the own ones before ``i``.
        b: ``q + s`` weights of the new state.
        c: ``s`` nodes, in units of the step size; the node 1.0 stands for the end of the step itself.
        sides: ``s`` numbers: -1 or +1 where the host evaluates at the neighbouring float below or above, else 0.
        dense: weights of outputs inside the step; ``dense[p]`` multiplies ``theta ** p`` and has ``q + s`` entries,
            and one more for the closing slope where there is one.
        carried: ``q``, the number of slopes that come from earlier steps, latest first.
        passes: the own stage whose slope later steps carry in, or None.
        closing: None, or the side from which the slope at the new state, ``f(t + h, y1)``, is taken for ``dense``.
            If the next step begins with that slope it is evaluated there, once.
        narrow: the products that are rounded, or None.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    sides: tuple[int, ...]
    dense: tuple[tuple[float, ...], ...]
    carried: int = 0
    passes: int | None = None
    closing: int | None = None
    narrow: Narrow | None = None

    def __post_init__(self) -> None:
        columns = self.carried + self.stages
        if [len(row) for row in self.a] != list(range(self.carried, columns)) or len(self.b) != columns:
            raise ValueError(f"Tableau: a and b must describe {self.carried} carried and {self.stages} own slopes")

    @property
    def stages(self) -> int:
        """Number of own stages, each one field evaluation."""
        return len(self.c)

    @property
    def layout(self) -> tuple[int, int]:
        """Numbers of carried and own slopes."""
        return self.carried, self.stages

    @functools.cached_property
    def weight(self) -> float:
        """The sum of the absolute weights of the new state: how much rounding errors of slopes are amplified."""
        return sum(map(abs, self.b))

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def starting(self, side: int) -> Tableau:
        """The same step with its first own stage evaluated from ``side``."""
        return dataclasses.replace(self, sides=(side, *self.sides[1:]))

    @functools.cached_property
    def closed(self) -> Tableau:
        """The same step with the closing slope as an own last stage, for a step that no other begins from."""
        if self.closing is None:
            return self
        narrow = self.narrow
        return dataclasses.replace(
            self,
            a=(*self.a, self.b),
            b=(*self.b, 0.0),
            c=(*self.c, 1.0),
            sides=(*self.sides, self.closing),
            closing=None,
            narrow=narrow and Narrow(narrow.dtype, (*narrow.a, narrow.b), (*narrow.b, False)),
        )

    def continues(self, earlier: Tableau) -> bool:
        """Whether this step's first slope is the closing slope of ``earlier``, the step before it."""
        return (
            earlier.closing is not None and self.carried == 0 and (self.c[0], self.sides[0]) == (0.0, earlier.closing)
        )

    def first_same_as_last(self) -> Tableau:
        """Turn a last stage ``f(t + h, y1)`` that only ``dense`` uses into the closing slope.

        Returns the tableau itself where its last stage is not of that kind.
        """
        *a, last = self.a
        narrow = self.narrow
        if not a or self.c[-1] != 1.0 or self.b != (*last, 0.0) or (narrow and narrow.a[-1] != narrow.b[:-1]):
            return self
        return dataclasses.replace(
            self,
            a=tuple(a),
            b=last,
            c=self.c[:-1],
            sides=self.sides[:-1],
            passes=None,
            closing=self.sides[-1],
            narrow=narrow and Narrow(narrow.dtype, narrow.a[:-1], narrow.a[-1]),
        )


NO_SLOPES = Tableau(a=(), b=(), c=(), sides=(), dense=())
"""The tableau of a step that is replayed as a `Whole`."""


class Outcome(NamedTuple):
    """What one step of a host returns: the new state, the slope handed on (or None), ascending powers of ``dense``."""

    y1: Tensor
    slope: Tensor | None
    dense: Sequence[Tensor]


class ProbeField(Protocol):
    """A field that the host's step can call; ``side`` is -1, 0 or +1."""

    def __call__(self, t: float, y: Tensor, side: int) -> Tensor: ...


Step = Callable[[ProbeField, float, float, Tensor, Sequence[Tensor]], Outcome]
"""``step(field, t, h, y, carried)``: one step of the host from ``(t, y)``, given the carried slopes."""


_PROBE_SIZE = 0.71


def measure(step: Step, carried: int = 0, rounding: torch.dtype | None = None) -> Tableau:
    """Read the tableau of ``step`` off its own behaviour.

    Args:
        step: runs one step of the host, its states in float64.
        carried: the number of slopes that the step takes over from earlier ones.
        rounding: a narrower dtype that times and sizes have, in which products of size and coefficient may be rounded.

    Returns:
        The tableau; ``passes`` is the own stage that ``Outcome.slope`` equals.

    Raises:
        UnknownFormError: if the step is not linear in explicitly computed slopes with constant coefficients. That is
            checked by a second run, on a nonlinear field at another time, size and state.
    """
    calls: list[int] = []

    def count(t: float, y: Tensor, side: int) -> Tensor:
        calls.append(side)
        return torch.zeros_like(y)

    step(count, 0.0, 1.0, torch.zeros(1, dtype=torch.float64), [torch.zeros(1, dtype=torch.float64)] * carried)
    stages = len(calls)
    if stages == 0:
        raise UnknownFormError("it never evaluates the field")
    a, nodes, outcome = _read(step, 1.0, carried, stages)
    passes = None
    if outcome.slope is not None:
        passes = int(outcome.slope.argmax()) - carried
        if passes < 0 or not torch.equal(
            outcome.slope, torch.eye(carried + stages, dtype=torch.float64)[carried + passes]
        ):
            raise UnknownFormError("the slope that it hands on is not one that it evaluated")
    tableau = Tableau(
        a=a,
        b=tuple(outcome.y1.tolist()),
        c=tuple(t for t, _ in nodes),
        sides=tuple(side for _, side in nodes),
        dense=tuple(tuple(power.tolist()) for power in outcome.dense),
        carried=carried,
        passes=passes,
    )
    if rounding is not None:
        tableau = dataclasses.replace(tableau, narrow=_find_narrow(tableau, step, rounding))
    _verify(tableau, step, rounding)
    with torch.enable_grad():
        _verify_derivatives(tableau, step)
    return tableau


def _read(
    step: Step, h: float, carried: int, stages: int
) -> tuple[tuple[tuple[float, ...], ...], list[tuple[float, int]], Outcome]:
    """What a step from zero shows if its slopes are unit vectors: rows of ``a``, times and sides, outcome."""
    units = torch.eye(carried + stages, dtype=torch.float64)
    rows: list[tuple[float, ...]] = []
    nodes: list[tuple[float, int]] = []

    def answer(t: float, y: Tensor, side: int) -> Tensor:
        if len(nodes) == stages:
            raise UnknownFormError("the number of its field evaluations depends on their values")
        rows.append(tuple(y[: carried + len(nodes)].tolist()))
        nodes.append((float(t), side))
        return units[carried + len(nodes) - 1].clone()

    outcome = step(answer, 0.0, h, torch.zeros(carried + stages, dtype=torch.float64), list(units[:carried]))
    return tuple(rows), nodes, outcome


def _verify_derivatives(tableau: Tableau, step: Step) -> None:
    """See that the step does not stop the gradients of its slopes, nor brings in tensors that want some themselves."""
    columns = tableau.carried + tableau.stages
    y = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    leaves = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(columns)]
    states: list[Tensor] = []

    def answer(t: float, y: Tensor, side: int) -> Tensor:
        states.append(y)
        return leaves[tableau.carried + len(states) - 1].clone()

    outcome = step(answer, 0.0, 1.0, y.clone(), [leaf.clone() for leaf in leaves[: tableau.carried]])
    expected = [(state, (1.0, *row)) for state, row in zip([*states, outcome.y1], [*tableau.a, tableau.b], strict=True)]
    expected += [
        (result, (float(power == 0), *row))
        for power, (result, row) in enumerate(zip(outcome.dense, tableau.dense, strict=True))
    ]
    if outcome.slope is not None and tableau.passes is not None:
        passed = tableau.carried + tableau.passes
        expected.append((outcome.slope, (0.0, *(float(i == passed) for i in range(columns)))))
    for result, weights in expected:
        found: Sequence[Tensor | None] = [None] * (columns + 1)
        if result.requires_grad:
            _, used = reachable([result.grad_fn], {})
            if any(all(leaf is not known for known in (y, *leaves)) for leaf in used):
                raise UnknownFormError("it uses tensors of its own that require gradients")
            found = torch.autograd.grad(result, [y, *leaves], torch.ones_like(result), True, allow_unused=True)
        for gradient, weight in zip(found, weights, strict=False):
            if abs((0.0 if gradient is None else float(gradient)) - weight) > _ROUNDING * (1 + abs(weight)):
                raise UnknownFormError("it stops gradients of its slopes")


def _find_narrow(tableau: Tableau, step: Step, rounding: torch.dtype) -> Narrow | None:
    """Which products the step rounds to ``rounding``; None if it does not round any."""
    size = torch.tensor(_PROBE_SIZE, dtype=rounding)
    a, _, outcome = _read(step, float(size), tableau.carried, tableau.stages)

    def rounded(product: float, weight: float) -> bool:
        if abs(product - float(size) * weight) <= 1e-15 * abs(product):
            return False
        if product != float(size * torch.tensor(weight, dtype=rounding)):
            raise UnknownFormError("its coefficients are not proportional to its size")
        return True

    found = tuple(
        tuple(rounded(product, weight) for product, weight in zip(products, weights, strict=True))
        for products, weights in zip((*a, outcome.y1.tolist()), (*tableau.a, tableau.b), strict=True)
    )
    return Narrow(rounding, found[:-1], found[-1]) if any(map(any, found)) else None


def _verify(tableau: Tableau, step: Step, rounding: torch.dtype | None) -> None:
    """Compare one step of the host with the tableau's, away from the probe's special values."""
    t, h = (float(torch.tensor(value, dtype=rounding or torch.float64)) for value in (0.37, _PROBE_SIZE))
    late = 1e-12 if rounding is None else 4 * torch.finfo(rounding).eps
    y = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)
    mix = torch.tensor([[0.2, -0.7, 0.1], [0.5, 0.3, -0.4], [-0.6, 0.2, 0.9]], dtype=torch.float64)
    carried = [torch.sin(mix[i % 3] * (i + 1)) for i in range(tableau.carried)]

    def field(t: float, y: Tensor) -> Tensor:
        return torch.tanh(mix @ y) + y.square() * math.cos(3 * t)

    seen: list[tuple[float, Tensor, int]] = []

    def watch(t: float, y: Tensor, side: int) -> Tensor:
        seen.append((t, y.detach().clone(), side))
        return field(t, y)

    outcome = step(watch, t, h, y, carried)
    if len(seen) != tableau.stages:
        raise UnknownFormError("the number of its field evaluations depends on their values")
    narrow = tableau.narrow or Narrow(
        torch.float64, tuple((False,) * len(row) for row in tableau.a), (False,) * len(tableau.b)
    )
    slopes = list(carried)
    for row, rounded, node, side, (time, found, from_side) in zip(
        tableau.a, narrow.a, tableau.c, tableau.sides, seen, strict=True
    ):
        state = y + _combine(_products(h, row, rounded, narrow.dtype), slopes)
        if from_side != side or not _close(found, state) or abs(time - t - node * h) > late:
            raise UnknownFormError("its stages are not linear in the slopes before them")
        slopes.append(field(time, state))
    expected = [
        y + _combine(_products(h, tableau.b, narrow.b, narrow.dtype), slopes),
        *(_combine([h * weight for weight in power], slopes) for power in tableau.dense),
    ]
    expected[1:2] = [y + power for power in expected[1:2]]
    if not all(map(_close, [outcome.y1, *outcome.dense], expected)):
        raise UnknownFormError("its result is not linear in the slopes")


def _products(h: float, weights: Sequence[float], narrow: Sequence[bool], dtype: torch.dtype) -> list[float]:
    return [
        float(torch.tensor(h, dtype=dtype) * torch.tensor(weight, dtype=dtype)) if rounded else h * weight
        for weight, rounded in zip(weights, narrow, strict=True)
    ]


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(3, dtype=torch.float64)
    for weight, slope in zip(weights, slopes, strict=False):
        total = total + weight * slope
    return total


def _close(value: Tensor, expected: Tensor) -> bool:
    return bool(((value - expected).abs() <= _ROUNDING * (1 + expected.abs())).all())
