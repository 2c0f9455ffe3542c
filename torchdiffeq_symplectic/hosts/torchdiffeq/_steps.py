"""torchdiffeq's own steps, done again."""

from __future__ import annotations

import collections
import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.hosts.torchdiffeq._host import (
    Perturb,
    _interp_evaluate,
    _runge_kutta_step,
)
from torchdiffeq_symplectic.hosts.torchdiffeq._linear_adaptive import (
    AdaptiveSweep,
    LinearTableau,
    ends_in_state,
    linear_tableau_of,
)
from torchdiffeq_symplectic.hosts.torchdiffeq._linear_fixed import FixedSweep, coefficients_of
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed
from torchdiffeq_symplectic.tape import Linear, Step, Tape
from torchdiffeq_symplectic.transforms import is_followed

__all__ = ["AdaptiveStepper", "FixedStepper", "Grid", "Jump", "Memory", "copied", "same"]


class Jump(NamedTuple):
    """What an adaptive step notes.

    Attributes:
        before: whether a discontinuity lies at its start, so that the slope it carries in is that behind it.
        after: whether one lies at its end, so that it evaluates the slope behind it.
    """

    before: bool
    after: bool


class AdaptiveStepper:
    """Steps of torchdiffeq's adaptive Runge-Kutta solvers; the carry is the state and the slope at it.

    Args:
        solver: an instance that has finished; what it holds of the solve is dropped.
    """

    has_tensors = False
    sums_steps = True

    def __init__(self, solver: Any) -> None:
        self._solver = _bare(solver)
        self._tableau = solver.tableau
        self._linear_tableau()  # now, while the host waits for its device anyway: backward is not to

    @staticmethod
    def evaluates_carry(solver: Any) -> bool:
        """Whether the last slope of a step is the field at its new state."""
        tableau = solver.tableau
        return bool(tableau.alpha[-1] == 1 and ends_in_state(tableau))

    def evaluated(self, step: Step, field: Any, state: Sequence[Tensor]) -> Tensor:
        """The slope at the carried state."""
        perturb = Perturb.NEXT if step.note.before else Perturb.PREV
        with torch.no_grad():
            slope = Timed(lambda t, y: field.evaluate_as(step.draw, t, y.detach()))(
                step.start, state[0], perturb=perturb
            )
        # As torchdiffeq's assignment to its buffer of slopes does.
        return slope.to(state[0].dtype).expand(state[0].shape)

    def advance(self, step: Step, field: Any, carry: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """A Runge-Kutta step, and its interpolant at the outputs inside."""
        func = Timed(field)
        y, *slopes = carry
        f = slopes[0] if slopes else func(step.start, y)
        take = _followed_step if is_followed() else _runge_kutta_step
        y1, f1, _, k = take(func, y, f, step.start, step.size, step.end, self._tableau)
        outputs = []
        if step.times:
            coefficients = self._solver._interp_fit(y, y1, k, step.size)
            outputs = [[_interp_evaluate(coefficients, step.start, step.end, time)] for time in step.times]
        if step.note.after:
            f1 = func(step.end, y1, perturb=Perturb.NEXT)
        return [y1, f1], outputs

    def _linear_tableau(self) -> LinearTableau | None:
        solver: type = type(self._solver)
        b = self._tableau.c_sol
        return linear_tableau_of(solver, b.device, b.dtype)

    def linear(self, tape: Tape, field: Any, check: Any) -> Linear | None:
        """The adjoint of an explicit tableau by matrix-vector products."""
        tableau = self._linear_tableau()
        return None if tableau is None else AdaptiveSweep(tableau, self, tape, field, check)


def _followed_step(
    func: Timed, y0: Tensor, f0: Tensor, t0: Tensor, dt: Tensor, t1: Tensor, tableau: Any
) -> tuple[Tensor, Tensor, None, Tensor]:
    """``_runge_kutta_step`` without its assignment in place, which transforms cannot follow; bit for bit the same."""
    t0, dt, t1 = (time.to(y0.dtype.to_real()) for time in (t0, dt, t1))
    slopes = [f0, *[torch.zeros_like(f0)] * len(tableau.alpha)]
    k, y = torch.stack(slopes, -1), y0
    for i, (node, row) in enumerate(zip(tableau.alpha, tableau.beta, strict=True)):
        y = y0 + torch.sum(k[..., : i + 1] * (row * dt), dim=-1).view_as(f0)
        slopes[i + 1] = func(t1, y, perturb=Perturb.PREV) if node == 1 else func(t0 + node * dt, y)
        k = torch.stack([slope.to(y0.dtype).expand_as(f0) for slope in slopes], -1)
    if not ends_in_state(tableau):
        y = y0 + torch.sum(k * (dt * tableau.c_sol), dim=-1).view_as(f0)
    return y, k[..., -1], None, k


class Memory(NamedTuple):
    """What a solver remembers of earlier steps.

    Attributes:
        names: the attributes that it is kept in.
        structure: of their values.
        rest: what is no tensor in them; an ellipsis where a tensor stands.
    """

    names: tuple[str, ...]
    structure: Any
    rest: tuple[Any, ...]

    @classmethod
    def of(cls, solver: Any, names: Sequence[str]) -> tuple[Memory, list[Tensor]]:
        """The memory in attributes of these names, and its tensors."""
        leaves, structure = pytree.tree_flatten({name: vars(solver)[name] for name in names})
        rest = tuple(... if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls(tuple(names), structure, rest), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def put(self, solver: Any, tensors: Sequence[Tensor]) -> None:
        """Make ``solver`` remember ``tensors``."""
        given = iter(tensors)
        leaves = [next(given) if leaf is ... else leaf for leaf in self.rest]
        vars(solver).update(pytree.tree_unflatten(leaves, self.structure))


class Grid(NamedTuple):
    """What a step on a fixed grid notes.

    Attributes:
        size: the step size as a number, where it is one; else None.
        memory: what the solver remembers of earlier steps, or None.
        remembers: the attributes that hold what it remembers after the step.
        cubic: whether outputs are interpolated by the cubic, which evaluates the slope at the end.
    """

    size: float | None
    memory: Memory | None
    remembers: tuple[str, ...]
    cubic: bool


class FixedStepper:
    """Steps of torchdiffeq's fixed-grid solvers; the carry is the state, and what the solver remembers.

    Args:
        solver: an instance that has finished; what it holds of the solve is dropped.
        first: what it remembered before the first step, by attribute.
    """

    has_tensors = False
    sums_steps = True

    def __init__(self, solver: Any, first: Mapping[str, Any]) -> None:
        self._solver = _bare(solver)
        self._first = first
        vars(self._solver).update(first)

    def evaluated(self, step: Step, field: Any, state: Sequence[Tensor]) -> Tensor:
        """Never asked: no slope is left out."""
        raise NotImplementedError

    def advance(self, step: Step, field: Any, carry: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """A step of the solver, and its interpolant at the outputs inside."""
        func = Timed(field)
        y, *memory = carry
        note: Grid = step.note
        solver = self._solver
        if note.remembers:
            solver = copy.copy(solver)
            vars(solver).update({name: copy.copy(value) for name, value in self._first.items()})
            if note.memory is not None:
                note.memory.put(solver, memory)
        size: Any = step.size
        if note.size is not None:  # a number, as the solver had it; negative in a step back
            size = step.direction * note.size
        change, f = solver._step_func(func, step.start, size, step.end, y)
        y1 = y + change
        remembered = Memory.of(solver, note.remembers)[1] if note.remembers else []
        outputs = []
        for time in step.times:
            if note.cubic:
                f1 = func(step.end, y1)
                u = solver._cubic_hermite_interp(step.start, y, f, step.end, y1, f1, time)
            else:
                u = solver._linear_interp(step.start, step.end, y, y1, time)
            outputs.append([u])
        return [y1, *remembered], outputs

    def linear(self, tape: Tape, field: Any, check: Any) -> Linear | None:
        """The adjoint of an explicit tableau by matrix-vector products."""
        (initial,) = tape.initial
        coefficients = None
        if initial.dtype.is_floating_point:
            coefficients = coefficients_of(self._solver.__class__, initial.device, tape.dtype)
        if coefficients is None:
            return None
        return FixedSweep(coefficients, self, tape, field, check)


def _bare(solver: Any) -> Any:
    """The host's own solver as it was before its solve, without what is of that alone."""
    bare: Any = object.__new__(type(solver).__bases__[1])  # the first is the recorder
    vars(bare).update(solver.settings)
    return bare


def copied(value: Any) -> Any:
    """A container of its own, as it may be changed in place."""
    return copy.copy(value) if isinstance(value, list | dict | collections.deque) else value


def same(one: Any, other: Any) -> bool:
    """Whether two values are one, or containers of the same."""
    if type(one) is type(other) and isinstance(one, list | tuple | collections.deque):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one is other
