"""The tape of a solve: its accepted steps, each a map from one carry to the next and to the outputs inside it.

A host's adapter fills a `Recording` while the host's own solver runs. Its tensors go through ``save_for_backward`` of
the one autograd function; what stays on the recording are integers. In backward a `Tape` joins the two again and hands
out one `Step` after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.random_state import Draw
from torchdiffeq_symplectic.recording import Entry, Keep, Recording

__all__ = ["Linear", "Step", "Stepper", "Tape", "Times"]


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
        draws: the random numbers of each evaluation, None where it drew none; or empty.
        draw: those of the evaluation that a carried slope is, or None.
        slopes: the slopes, where they are kept, or None.
        inside: numbers of the outputs inside the step.
        at_end: the output that is the new state itself, or None.
        direction: -1 where the step is taken back.
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
    draws: Sequence[Draw | None]
    draw: Draw | None
    slopes: Sequence[Any] | None
    inside: range
    at_end: int | None
    direction: int = 1


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
    """

    def __init__(self, recording: Recording, saved: Sequence[Tensor], initial: Sequence[Tensor], times: Times) -> None:
        self.keep = recording.keep
        self.at_start = recording.at_start
        self.initial = list(initial)
        self.dtype = recording.dtype or self.initial[0].dtype
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
            draws=self._draws(entry),
            draw=self._draws(before)[-1] if before is not None and before.draws else None,
            slopes=self._slopes(entry),
            inside=entry.inside,
            at_end=entry.at_end,
        )

    def _draws(self, entry: Entry) -> list[Draw | None]:
        return [None if draw is None else Draw(self._saved[draw[0]], draw[1]) for draw in entry.draws]

    def _slopes(self, entry: Entry) -> Sequence[Any] | None:
        if entry.slopes is None:
            return None
        positions, structure = entry.slopes
        leaves = [self._saved[position] for position in positions]
        return leaves if structure is None else pytree.tree_unflatten(leaves, structure)

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
