"""The tape of a solve: its accepted steps, each a map from one carry to the next and to the outputs inside it.

A host's adapter fills a `Recording` while the host's own solver runs. Its tensors go through ``save_for_backward`` of
the one autograd function; what stays on the recording are integers. In backward a `Tape` joins the two again and hands
out one `Step` after the other.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Keep", "Linear", "Recording", "Step", "Stepper", "Tape", "Times", "norm_of"]


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


class Times(NamedTuple):
    """The times of a solve, as differentiable functions of whatever the host computed them from.

    Attributes:
        start, size, end: of each accepted step, shape ``(N,)``.
        inside: of the outputs inside steps, shape ``(M,)``, in the order of the outputs.
    """

    start: Tensor
    size: Tensor
    end: Tensor
    inside: Tensor


@dataclasses.dataclass(slots=True)
class Step:
    """One accepted step, as backward sees it.

    Attributes:
        number: from 0.
        note: what the host's adapter noted of it.
        start, size, end: times, 0-d; times: of the outputs inside the step, 0-d each.
        carry: what it starts from: the parts of the state, then further tensors; None for one that is evaluated again.
        after: the parts of the state after it; their norms, where only these are kept, or None.
        calls: the number of its field evaluations.
        draws: the random state before each evaluation, or empty.
        draw: the random state before the evaluation that a carried slope is, or None.
        slopes: the slopes, where they are kept, or None.
        inside: numbers of the outputs inside the step.
        at_end: the output that is the new state itself, or None.
    """

    number: int
    note: Any
    start: Tensor
    size: Tensor
    end: Tensor
    times: Sequence[Tensor]
    carry: list[Tensor | None]
    after: list[Tensor] | None
    calls: int
    draws: Sequence[Tensor]
    draw: Tensor | None
    slopes: Sequence[Any] | None
    inside: range
    at_end: int | None


class Linear(Protocol):
    """A shorter way through some steps, see `Stepper.linear`."""

    def takes(self, step: Step) -> bool:
        """Whether it goes through ``step``."""
        ...

    def pull_back(
        self, step: Step, of_after: list[Tensor | None], inside: Sequence[Sequence[Tensor | None]]
    ) -> list[Tensor | None]:
        """The cotangents of the carry, given those of the next carry and of the outputs inside, None for zero."""
        ...


class Stepper(Protocol):
    """What a host's adapter gives: how the steps of a solve are done again. It holds no tensor of the solve.

    Attributes:
        has_tensors: whether its steps use tensors that need a gradient besides those that the field uses.
        sums_steps: whether the products of a step are summed before they are added to the others', which rounds less;
            else they are added one by one, as backpropagation does.
    """

    has_tensors: bool
    sums_steps: bool

    def advance(self, step: Step, field: Any, carry: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The host's own step: the next carry, and the parts of each output inside the step."""
        ...

    def evaluated(self, step: Step, field: Any, state: Sequence[Tensor]) -> Tensor:
        """The slope that ``step`` carries in, where it is the field at the carried state."""
        ...

    def linear(self, tape: Tape, field: Any, check: Any) -> Linear | None:
        """A shorter way through steps whose coefficients are known, where no time needs a gradient."""
        ...


@dataclasses.dataclass(slots=True)
class _Entry:
    """A step, its tensors replaced by their positions among the saved ones."""

    note: Any
    carry: list[int | None]
    rest: int
    calls: int
    draws: list[int]
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
        first_reached: captured tensors by the step and the evaluation in it that reached them first.
    """

    def __init__(self, keep: Keep, initial: Sequence[Tensor]) -> None:
        self.keep = keep
        self.initial = [part.detach() for part in initial]
        self.saved: list[Tensor] = []
        self.at_start: list[int] = []
        self.entries: list[_Entry] = []
        self.final: list[int | None] = []
        self.solution: list[int] = []
        self.first_reached: dict[tuple[int, int], list[Tensor]] = {}
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
        draws = [self._keep(call.draw) for call in calls] if drew else []
        kept = None
        if slopes is not None:
            leaves, structure = pytree.tree_flatten(list(slopes))
            kept = [self._keep(leaf) for leaf in leaves], structure
        self.entries.append(_Entry(note, [*states, *carry], len(states), len(calls), draws, kept))
        for i, call in enumerate(calls):
            if call.new:
                self.first_reached[number, i] = call.new

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
            self.solution = [self._keep(part) for part in solution]
        self._positions = {}

    def _is_row(self, entry: _Entry) -> bool:
        return entry.at_end is not None and self.keep is not Keep.NORMS

    def _kept_state(self, state: Sequence[Tensor]) -> list[int | None]:
        if self.keep is Keep.NORMS:
            return [self._keep(norm_of(part)) for part in state]
        entry = self.entries[-1]
        if self._is_row(entry) and all(
            part.is_contiguous() and part.dtype == first.dtype for part, first in zip(state, self.initial, strict=True)
        ):
            return [None for _ in state]
        if self.keep is Keep.OUTPUTS:
            return [None for _ in state]
        return [self.save(part) for part in state]


_FORGETFUL = (Keep.NORMS, Keep.OUTPUTS)


class Tape:
    """A recording joined with its saved tensors and its times.

    Args:
        recording: what the host's adapter recorded.
        saved: its tensors, as autograd gave them back.
        initial: the parts of the state at the start.
        times: of its steps and outputs.

    Attributes:
        keep: what is kept of each step; at_start: the outputs that are the initial state itself.
        times: without their graph.
        dtype: of the first part of the last state, where the host promotes it on its way.
        is_random: whether the field drew random numbers.
    """

    def __init__(self, recording: Recording, saved: Sequence[Tensor], initial: Sequence[Tensor], times: Times) -> None:
        self.keep = recording.keep
        self.at_start = recording.at_start
        self.initial = list(initial)
        self.dtype = recording.dtype or self.initial[0].dtype
        self.is_random = any(entry.draws for entry in recording.entries)
        self._entries = recording.entries
        self._final = recording.final
        self._solution = [saved[position] for position in recording.solution]
        self._saved = saved
        self._row: tuple[int, list[Tensor]] | None = None  # the latest
        self.times = Times(*(vector.detach() for vector in times))
        self._start, self._size, self._end = (vector.unbind() for vector in self.times[:3])
        self._inside = self.times.inside.split([len(entry.inside) for entry in self._entries])

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, n: int) -> Step:
        """Step number ``n``."""
        entry = self._entries[n]
        before = self._entries[n - 1] if n else None
        return Step(
            number=n,
            note=entry.note,
            start=self._start[n],
            size=self._size[n],
            end=self._end[n],
            times=self._inside[n].unbind(),
            carry=[*self.state(n), *(self._at(position) for position in entry.carry[entry.rest :])],
            after=self._after(n),
            calls=entry.calls,
            draws=[self._saved[position] for position in entry.draws],
            draw=self._saved[before.draws[-1]] if before is not None and before.draws else None,
            slopes=self._slopes(entry),
            inside=entry.inside,
            at_end=entry.at_end,
        )

    def _slopes(self, entry: _Entry) -> Sequence[Any] | None:
        if entry.slopes is None:
            return None
        positions, structure = entry.slopes
        slopes: Sequence[Any] = pytree.tree_unflatten([self._saved[position] for position in positions], structure)
        return slopes

    def rows_of_state(self, n: int) -> Sequence[int]:
        """The outputs that are the state before step ``n``."""
        if n == 0:
            return self.at_start
        row = self._entries[n - 1].at_end
        return () if row is None else (row,)

    def state(self, n: int) -> list[Tensor | None]:
        """The parts of the state before step ``n``, as kept, or None."""
        if n == 0:
            return [*self.initial]
        if self.keep is Keep.NORMS:
            return [None for _ in self.initial]
        return self._kept(n)

    def _kept(self, n: int) -> list[Tensor | None]:
        positions = self._final if n == len(self) else self._entries[n].carry[: len(self.initial)]
        row = self._entries[n - 1].at_end
        if self._solution and row is not None and None in positions:
            if self._row is None or self._row[0] != row:
                # A copy, which lies in memory as the state did: kernels may round another way at an odd address.
                self._row = row, [part[row].clone() for part in self._solution]
            return [*self._row[1]]
        return [self._at(position) for position in positions]

    def _after(self, n: int) -> list[Tensor] | None:
        parts = self._kept(n + 1)
        return None if any(part is None for part in parts) else parts  # type: ignore[return-value]

    def _at(self, position: int | None) -> Tensor | None:
        return None if position is None else self._saved[position]
