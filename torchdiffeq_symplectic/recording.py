"""The recording of a solve: the steps that a host accepts, and what is kept of them."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Entry", "Keep", "Recording", "norm_of"]


class Keep(enum.Enum):
    """What a mode needs of every accepted step."""

    NORMS = "norms"
    """Only the norms of the states, which check that a replay computes them again."""
    OUTPUTS = "outputs"
    """The outputs, and the last state."""
    STATES = "states"
    """The carry: the state, and slopes of earlier steps that cannot be evaluated again from it."""
    SLOPES = "slopes"
    """The carry and all slopes."""


def norm_of(part: Tensor) -> Tensor:
    """The 2-norm of a part of a state, which may be of whole numbers; 0-d."""
    part = part.detach()
    norm: Tensor = torch.linalg.vector_norm(part if part.is_floating_point() or part.is_complex() else part.double())
    return norm


@dataclasses.dataclass(slots=True)
class Entry:
    """A step, its tensors replaced by their positions among the saved ones."""

    note: Any
    carry: list[int | None]
    rest: int
    calls: int
    draws: list[tuple[int, int | None] | None]
    slopes: tuple[list[int], Any] | None
    inside: range = range(0)
    at_end: int | None = None


class Recording:
    """Accepted steps in the order in which the host takes them.

    Attributes:
        keep: what of each step is kept.
        initial: the parts of the initial state.
        saved: the tensors kept, without graph; emptied when they are handed to autograd.
        at_start: the outputs that are the initial state itself.
        dtype: of the first part of the last state.
        first_reached: references to captured tensors by the step and the evaluation in it that reached them first.
    """

    def __init__(self, keep: Keep, initial: Sequence[Tensor]) -> None:
        self.keep = keep
        self.initial = [part.detach() for part in initial]
        self.saved: list[Tensor] = []
        self.at_start: list[int] = []
        self.entries: list[Entry] = []
        self.final: list[int | None] = []
        self.solution: list[int] = []
        self.first_reached: dict[tuple[int, int], Sequence[weakref.ref[Tensor]]] = {}
        self.dtype: torch.dtype | None = None
        self._positions: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def save(self, tensor: Tensor) -> int:
        """Keep ``tensor`` without its graph, and a view without the rest of what it is a view of; its position."""
        position = self._positions.get(id(tensor))
        if position is None:
            kept = tensor.detach() if tensor.requires_grad else tensor
            if kept.untyped_storage().nbytes() > kept.numel() * kept.element_size():
                kept = kept.clone()
            position = self._keep(kept)
            if kept is tensor:
                self._positions[id(tensor)] = position
        return position

    def _keep(self, tensor: Tensor) -> int:
        self.saved.append(tensor)
        return len(self.saved) - 1

    def step(
        self,
        state: Sequence[Tensor],
        further: Sequence[Tensor | None],
        calls: Sequence[Any],
        *,
        drew: bool,
        slopes: Sequence[Any] | None = None,
        note: Any = None,
    ) -> None:
        """Add an accepted step.

        Args:
            state: the parts of the state at its start.
            further: what else it starts from; None for a slope that can be evaluated again.
            calls: its field evaluations, see `field.Listener`.
            drew: whether these drew random numbers.
            slopes: their slopes, to be kept.
            note: what the adapter's stepper needs to know of it.
        """
        number = len(self.entries)
        states = self._kept_state(state) if number else [None for _ in state]
        keep = self._keep if self.keep is Keep.SLOPES else self.save
        carry = [None if part is None or self.keep in _FORGETFUL else keep(part) for part in further]
        draws = [self._kept_draw(call) for call in calls] if drew else []
        kept = None
        if slopes is not None:
            plain = all(isinstance(slope, Tensor) for slope in slopes)  # pytree's functions leave reference cycles
            leaves, structure = (slopes, None) if plain else pytree.tree_flatten(list(slopes))
            kept = [self._keep(leaf) for leaf in leaves], structure
        self.entries.append(Entry(note, [*states, *carry], len(states), len(calls), draws, kept))
        for i, call in enumerate(calls):
            if call.new:
                self.first_reached[number, i] = call.new

    def _kept_draw(self, call: Any) -> tuple[int, int | None] | None:
        return None if call.drew is False else (self._keep(call.draw.state), call.draw.after)

    def output(self, output: int, at_end: bool = False, step: int = -1) -> None:
        """Say that output number ``output`` lies inside a step, the latest if none is named, or is its new state."""
        entry = self.entries[step]
        if at_end:
            entry.at_end = output
        else:
            entry.inside = range(entry.inside.start if entry.inside else output, output + 1)

    @property
    def inside(self) -> list[tuple[int, int]]:
        """The outputs inside steps in their order, each with the number of its step."""
        return [(n, output) for n, entry in enumerate(self.entries) for output in entry.inside]

    def finish(self, state: Sequence[Tensor], solution: Sequence[Tensor]) -> None:
        """Add the last state and the solution, whose rows serve as checkpoints where they are states."""
        if self.entries:
            self.dtype = state[0].dtype
            self.final = self._kept_state(state)
            if self.keep is Keep.OUTPUTS and self.entries[-1].at_end is None:
                self.final = [self.save(part) for part in state]
        if any(self._is_row(entry) for entry in self.entries):
            self._forget_rows()
            self.solution = [self._keep(part) for part in solution]
        self._positions, self.initial = {}, []

    def _forget_rows(self) -> None:
        """Keep no states that are outputs, as hosts may say only after the solve."""
        for entry, following in itertools.pairwise(self.entries):
            state = following.carry[: following.rest]
            if self._is_row(entry) and self._serve([self.saved[i] for i in state if i is not None]):
                following.carry[: following.rest] = [None for _ in state]
        moved: dict[int, int] = {}

        def move(position: int) -> int:
            return moved.setdefault(position, len(moved))

        for entry in self.entries:
            entry.carry = [None if i is None else move(i) for i in entry.carry]
            entry.draws = [None if draw is None else (move(draw[0]), draw[1]) for draw in entry.draws]
            if entry.slopes is not None:
                entry.slopes = list(map(move, entry.slopes[0])), entry.slopes[1]
        self.final = [None if i is None else move(i) for i in self.final]
        self.saved = [self.saved[position] for position in moved]

    def _serve(self, state: Sequence[Tensor]) -> bool:
        """Whether rows of the solution can stand for the parts of ``state``: they lie in memory as these do."""
        return all(
            part.is_contiguous() and part.dtype == first.dtype for part, first in zip(state, self.initial, strict=False)
        )

    def _is_row(self, entry: Entry) -> bool:
        return entry.at_end is not None and self.keep is not Keep.NORMS

    def _kept_state(self, state: Sequence[Tensor]) -> list[int | None]:
        if self.keep is Keep.NORMS:
            return [self._keep(norm_of(part)) for part in state]
        if self.keep is Keep.OUTPUTS or (self._is_row(self.entries[-1]) and self._serve(state)):
            return [None for _ in state]
        return [self.save(part) for part in state]


_FORGETFUL = (Keep.NORMS, Keep.OUTPUTS)
