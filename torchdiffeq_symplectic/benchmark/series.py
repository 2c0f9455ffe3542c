"""A series of problems: what one of the benchmark's names stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torchdiffeq_symplectic.benchmark.problem import Problem

__all__ = ["Axis", "Case", "Series"]


@dataclass(frozen=True)
class Case:
    """A problem of a series.

    Attributes:
        label: tells it from the others of its series.
        build: makes it on the CPU, given a seed; torch's global generators are left as they are.
        value: what varies along the series, if something does.
        panel: cases of one panel make up one curve for each contender.
        without: contenders that are left out: name -> why.
    """

    label: str
    build: Callable[[int], Problem]
    value: float | None = None
    panel: str = ""
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """What varies along a series; drawn logarithmic."""

    label: str
    falling: bool = False


@dataclass(frozen=True)
class Series:
    """Problems that are measured for one purpose.

    Attributes:
        name: what the user types.
        title: the question that it answers.
        cases: its problems.
        axis: what varies along them; without one each case stands for itself.
        shows: the columns of :class:`Row` that its picture shows.
        budget: evaluations after which a contender is stopped.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    axis: Axis | None = None
    shows: tuple[str, ...] = ("gradient_error", "peak_bytes", "relative_time")
    budget: int = 20_000
