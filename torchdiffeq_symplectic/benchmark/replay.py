"""The gradient by which a package with a solver of its own is measured, and a field in the form that it takes.

Such a package is measured by the gradient of its own discrete solve: the steps that it accepted are recorded, and
repeated in float64 by its own formula. Their times and lengths stay in the dtype that the package has them in, for to
that it rounds their products with the coefficients, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.problem import Problem, Solver, State, flatten
from torchdiffeq_symplectic.benchmark.reference import Reference, check_repeated, in_float64

__all__ = ["Flat", "Step", "Taken", "accepted", "recorded", "repeated", "without_equal"]

Step: TypeAlias = tuple[Any, Any]  # the time at which it begins, and its length


class Flat(nn.Module):
    """A field of one tensor, from one whose state may be a tuple: its parts then lie in a row, shape ``(1, D)``.

    Args:
        field: ``field(t, y)``, with ``y`` like ``example``.
        example: a state.
    """

    def __init__(self, field: nn.Module, example: State) -> None:
        super().__init__()
        self.field = field
        self._shapes = [part.shape for part in example] if isinstance(example, tuple) else None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The slope, like ``x``. Packages give ``t`` a dimension, or another dtype than that of the state."""
        return self.pack(self.field(t.reshape(()).to(x.dtype), self.unpack(x)))

    def pack(self, y: State) -> Tensor:
        """The tensor of a state or a slope."""
        return y if isinstance(y, Tensor) else torch.cat([part.reshape(1, -1) for part in y], dim=1)

    def unpack(self, x: Tensor) -> State:
        """The state of a tensor, or the solution if that has a dimension more."""
        if self._shapes is None:
            return x
        parts = x.split([shape.numel() for shape in self._shapes], dim=-1)
        return tuple(part.reshape(*x.shape[:-2], *shape) for part, shape in zip(parts, self._shapes, strict=True))


@dataclass(frozen=True)
class Taken:
    """The accepted steps of one solve.

    Attributes:
        steps: in their order.
        outputs: how many of them come before each output time; none before the first.
    """

    steps: Sequence[Step]
    outputs: Sequence[int]


def recorded(solver: Any, position: int) -> list[Step]:
    """A list that will get the time and the length of each step that ``solver`` tries.

    Args:
        solver: an object of torchdyn or TorchDiffEqPack with a method ``step``.
        position: of the time among the arguments of ``step``; the length comes next.
    """
    calls: list[Step] = []
    step = solver.step

    def recording(*arguments: Any, **keywords: Any) -> Any:
        calls.append((arguments[position], arguments[position + 1]))
        return step(*arguments, **keywords)

    solver.step = recording
    return calls


def accepted(calls: Sequence[Step]) -> list[Step]:
    """The last of those in a row that begin at the same time; once one is accepted, the time is another object."""
    return [one for one, other in pairwise(calls) if other[0] is not one[0]] + list(calls[-1:])


def repeated(
    problem: Problem,
    record: Callable[..., tuple[Tensor, Taken]],
    repeat: Callable[..., Iterable[Tensor]],
) -> Reference:
    """The gradient in float64 of the discrete solve that another package makes, with its steps held constant.

    Args:
        problem: what is solved.
        record: ``record(field, x, t, **settings)``, the solution of a :class:`Flat` field, and the steps taken.
        repeat: ``repeat(taken, field, x, t, **settings)``, the state after each of the steps, a function that autograd
            can follow.
    """
    solves: list[Taken] = []

    def recording(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        field = Flat(func, y0)
        solution, taken = record(field, field.pack(y0), t, **settings)
        solves.append(taken)
        return field.unpack(solution)

    def repeating() -> Solver:
        remaining = iter(solves)

        def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
            field, taken = Flat(func, y0), next(remaining)
            x = field.pack(y0)
            states = [x, *repeat(taken, field, x, t, **settings)]
            return field.unpack(torch.stack([states[number] for number in taken.outputs]))

        return solve

    with torch.no_grad():
        solution = problem.solve(recording)
    double = in_float64(problem)
    with torch.no_grad():
        check_repeated(solution, double.solve(repeating()))
    return Reference(flatten(double.gradient(repeating())), sum(len(taken.steps) for taken in solves))


def without_equal(options: Mapping[str, Any], *known: str) -> str | None:
    """A refusal of those of torchdiffeq's ``options`` that are not ``known``, or None if all are.

    A first step is advice that may be ignored, and a limit to the number of steps changes none of them.
    """
    unknown = [name for name in options if name not in ("first_step", "max_num_steps", *known)]
    return f"has no {', '.join(unknown)}" if unknown else None
