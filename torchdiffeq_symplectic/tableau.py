"""Explicit steps as numbers, and reading those numbers off a step function.

A step from ``(t, y)`` of size ``h`` is linear in its slopes,

    Y_i = y + h * sum_j a[i][j] * k_j,      k_i = f(t + c[i] * h, Y_i),
    y1  = y + h * sum_j b[j] * k_j,         u(theta) = y + h * sum_j W_j(theta) * k_j,

where the slopes are those *carried* in from earlier steps followed by the step's *own*. Hence one run on a probe
(``t = 0``, ``h = 1``, ``y = 0``, and a field that answers its i-th call with the i-th unit vector) shows every
coefficient: what the probe is called with is a row of ``a`` and a node, what comes back is ``b`` and ``W``. What a host
really computes is thereby what is differentiated, whatever its documentation says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["Outcome", "Tableau", "UnknownFormError", "measure"]

_ROUNDING = 1e-12


class UnknownFormError(Exception):
    """A step that is not a fixed linear combination of explicitly computed slopes."""


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
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    sides: tuple[int, ...]
    dense: tuple[tuple[float, ...], ...]
    carried: int = 0
    passes: int | None = None
    closing: int | None = None

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
        return dataclasses.replace(
            self,
            a=(*self.a, self.b),
            b=(*self.b, 0.0),
            c=(*self.c, 1.0),
            sides=(*self.sides, self.closing),
            closing=None,
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
        if self.carried or self.c[-1] != 1.0 or self.b != (*last, 0.0):
            return self
        return dataclasses.replace(
            self,
            a=tuple(a),
            b=last,
            c=self.c[:-1],
            sides=self.sides[:-1],
            passes=None,
            closing=self.sides[-1],
        )


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


def measure(step: Step, carried: int = 0) -> Tableau:
    """Read the tableau of ``step`` off its own behaviour.

    Args:
        step: runs one step of the host, all in float64.
        carried: the number of slopes that the step takes over from earlier ones.

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
    units = torch.eye(carried + stages, dtype=torch.float64)
    nodes: list[tuple[float, Tensor, int]] = []

    def answer(t: float, y: Tensor, side: int) -> Tensor:
        if len(nodes) == stages:
            raise UnknownFormError("the number of its field evaluations depends on their values")
        nodes.append((t, y.detach().clone(), side))
        return units[carried + len(nodes) - 1].clone()

    outcome = step(answer, 0.0, 1.0, torch.zeros(carried + stages, dtype=torch.float64), list(units[:carried]))
    passes = None
    if outcome.slope is not None:
        passes = int(outcome.slope.argmax()) - carried
        if passes < 0 or not torch.equal(outcome.slope, units[carried + passes]):
            raise UnknownFormError("the slope that it hands on is not one that it evaluated")
    tableau = Tableau(
        a=tuple(tuple(y[: carried + i].tolist()) for i, (_, y, _) in enumerate(nodes)),
        b=tuple(outcome.y1.tolist()),
        c=tuple(float(t) for t, _, _ in nodes),
        sides=tuple(side for _, _, side in nodes),
        dense=tuple(tuple(power.tolist()) for power in outcome.dense),
        carried=carried,
        passes=passes,
    )
    _verify(tableau, step)
    return tableau


def _verify(tableau: Tableau, step: Step) -> None:
    """Compare one step of the host with the tableau's, away from the probe's special values."""
    t, h = 0.37, 0.71
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
    slopes = list(carried)
    for i, (row, node, side) in enumerate(zip(tableau.a, tableau.c, tableau.sides, strict=True)):
        state = y + h * _combine(row, slopes)
        slopes.append(field(t + node * h, state))
        if (
            i >= len(seen)
            or seen[i][2] != side
            or not _close(seen[i][1], state)
            or abs(seen[i][0] - t - node * h) > 1e-12
        ):
            raise UnknownFormError("its stages are not linear in the slopes before them")
    expected = [y + h * _combine(tableau.b, slopes), *(h * _combine(power, slopes) for power in tableau.dense)]
    expected[1:2] = [y + power for power in expected[1:2]]
    if len(seen) != tableau.stages or not all(map(_close, [outcome.y1, *outcome.dense], expected)):
        raise UnknownFormError("its result is not linear in the slopes")


def _combine(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(3, dtype=torch.float64)
    for weight, slope in zip(weights, slopes, strict=False):
        total = total + weight * slope
    return total


def _close(value: Tensor, expected: Tensor) -> bool:
    return bool(((value - expected).abs() <= _ROUNDING * (1 + expected.abs())).all())
