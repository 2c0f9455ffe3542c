"""The accepted steps of one solve: what is kept of them, and the sequence that a mode walks.

A host's adapter fills a `Recording` while its own solver runs. The tensors in it go through ``save_for_backward`` of
the one autograd function; what stays on the recording are integers and tableaus. In backward a `Trajectory` joins the
two again and hands out one `Step` after the other.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.tableau import NO_SLOPES, Tableau, Whole

__all__ = ["Keep", "Recording", "Step", "Trajectory", "carriers", "stage_times"]


class Keep(enum.Enum):
    """What a mode needs of every accepted step."""

    OUTPUTS = "outputs"
    """No states but those that are outputs, and the last: the mode finds the others anew."""
    NORMS = "norms"
    """Only the norm of each state: the replay computes the states anew, and is checked by their norms."""
    STATES = "states"
    """The state, and the slopes that later steps carry in."""
    SLOPES = "slopes"
    """The state and all slopes."""


@dataclasses.dataclass
class _Entry:
    """One accepted step, its tensors replaced by their positions among the saved ones."""

    tableau: Tableau
    state: int | None
    slopes: int | None
    passed: int | None
    random: tuple[int, ...]
    whole: Whole | None
    times: tuple[tuple[torch.dtype, torch.Size], ...]
    interpolated: tuple[int, int] = (0, 0)
    at_end: int | None = None


class Recording:
    """Accepted steps in the order in which the host takes them.

    Attributes:
        keep: what of each step is kept.
        saved: the tensors kept, all detached; emptied when they are handed to autograd.
        at_start: indices of outputs that are the initial state itself.
        final: position of the last state, or None where it is an output that is kept.
        solution: position of all outputs where they are kept, or None.
        clock: position of the stages' times as the field saw them, where the host tells them, or None.
        dtype: of the last state; the first one's may be narrower, where the host promotes it.
    """

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.saved: list[Tensor] = []
        self.at_start: list[int] = []
        self.entries: list[_Entry] = []
        self.final: int | None = None
        self.solution: int | None = None
        self.clock: int | None = None
        self.dtype: torch.dtype | None = None
        self._times: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.entries)

    def save(self, tensor: Tensor) -> int:
        """Keep ``tensor``, without its graph; returns its position."""
        self.saved.append(tensor.detach())
        return len(self.saved) - 1

    def step(
        self,
        form: Tableau | Whole,
        state: Tensor,
        *,
        slopes: Tensor | None = None,
        passed: Tensor | None = None,
        random: Sequence[Tensor] = (),
        times: Sequence[Tensor] = (),
    ) -> None:
        """Add an accepted step.

        Args:
            form: its coefficients; or how it is done again, where it has none.
            state: ``y`` at its start.
            slopes: where slopes are kept, those of its own stages, shape ``(s, *y.shape)`` or longer.
            passed: where states are kept and later steps carry a slope of this one in, that slope.
            random: the random state before each own stage (and the closing slope), or empty. Before the step if that
                is done as a whole.
            times: the time of each own stage (and of the closing slope) as the field saw it, of one element, where
                that is not what `stage_times` computes. Time and size if the step is done as a whole.
        """
        whole = form if isinstance(form, Whole) else None
        self._times += times
        self.entries.append(
            _Entry(
                NO_SLOPES if isinstance(form, Whole) else form,
                self._keep_state(state) if self.entries else None,
                None if slopes is None else self.save(slopes),
                None if passed is None else self.save(passed),
                tuple(self.save(bits) for bits in random),
                whole,
                tuple((time.dtype, time.shape) for time in times),
            )
        )

    def interpolate(self, output: int, at_end: bool = False, step: int = -1) -> None:
        """Say that output number ``output`` lies inside a step, the latest if none is named, or is its new state."""
        entry = self.entries[step]
        if at_end:
            entry.at_end = output
        else:
            first = entry.interpolated[0] if entry.interpolated[1] else output
            entry.interpolated = (first, output + 1)

    @property
    def inside(self) -> list[tuple[int, int]]:
        """The interpolated outputs in their order, each with the number of the step that it lies in."""
        return [(n, output) for n, entry in enumerate(self.entries) for output in range(*entry.interpolated)]

    def finish(self, state: Tensor) -> None:
        """Add the last state, and settle which steps evaluate their closing slope themselves."""
        self.final = self._keep_state(state)
        if self.keep is Keep.OUTPUTS and not (self.entries and self.entries[-1].at_end is not None):
            self.final = self.save(state)
        self.dtype = state.dtype
        if self._times:
            widest = functools.reduce(torch.promote_types, {time.dtype for time in self._times})
            self.clock = self.save(torch.stack([time.detach().reshape(()).to(widest) for time in self._times]))
            self._times = []
        for n, entry in enumerate(self.entries):
            following = self.entries[n + 1].tableau if n + 1 < len(self) else None
            if entry.interpolated[1] > 0 and not (following is not None and following.continues(entry.tableau)):
                entry.tableau = entry.tableau.closed

    def keep_outputs(self, solution: Tensor) -> None:
        """Keep the solution itself, where its rows are all that is kept; no copy is made."""
        if self.keep is Keep.OUTPUTS:
            self.solution = self.save(solution)

    def _keep_state(self, state: Tensor) -> int | None:
        if self.keep is Keep.OUTPUTS:
            return None
        if self.keep is Keep.NORMS:
            return self.save(torch.linalg.vector_norm(state.detach()))
        return self.save(state)


@dataclasses.dataclass(slots=True)
class Step:
    """One accepted step as a mode sees it.

    Attributes:
        index: its number, from 0.
        tableau: its coefficients.
        whole: how it is done again, where it has none, or None.
        size: the step size, 0-d.
        times: the time of each own stage, of one element, as the field saw it; of a whole step, time and size.
        state, next_state: ``y`` at its start and end; their norms where only these are kept, but for the first; None
            where a state is to be found anew.
        slopes: kept slopes of the first own stages, shape ``(s, *y.shape)`` or longer, or None.
        passed: the slope that later steps carry in, where that alone is kept, or None.
        carried: kept slopes that are carried in, latest first; empty where states are not kept.
        random: the random state before each own stage (and the closing slope), or empty.
        interpolated: the outputs inside the step, as a range.
        theta: positions of those outputs inside the step, shape ``(len(interpolated),)``.
        at_end: the output that is the step's new state itself, or None.
    """

    index: int
    tableau: Tableau
    whole: Whole | None
    size: Tensor
    times: Sequence[Tensor]
    state: Tensor | None
    next_state: Tensor | None
    slopes: Tensor | None
    passed: Tensor | None
    carried: list[Tensor]
    random: Sequence[Tensor]
    interpolated: range
    theta: Tensor
    at_end: int | None


class Trajectory:
    """A recording joined with its saved tensors and its times.

    Args:
        recording: what the host's adapter recorded.
        saved: its tensors, as autograd gave them back.
        initial: ``y`` at the start of the solve.
        start, size, end: time and size of each step, shape ``(N,)``.
        theta: positions of the interpolated outputs inside their steps, shape ``(M,)``, in the order of the outputs.

    Attributes:
        dtype: the dtype of the states (of the last, if the host promotes a state on its way).
        groups: the tableaus of the solve (`NO_SLOPES` for whole steps), each with the numbers of its steps.
        at_start: the outputs that are the initial state itself.
        has_norms: whether there are norms in the place of states.
        has_slopes: whether the slopes of every step are kept.
        is_random: whether the field drew random numbers.
    """

    def __init__(
        self,
        recording: Recording,
        saved: Sequence[Tensor],
        initial: Tensor,
        start: Tensor,
        size: Tensor,
        end: Tensor,
        theta: Tensor,
    ) -> None:
        self.initial = initial
        self.start, self.size, self.end, self.theta = start, size, end, theta
        self._entries = recording.entries
        self._saved = saved
        self._final = recording.final
        self._clock = recording.clock
        self.at_start = recording.at_start
        self._solution = recording.solution
        self.has_norms = recording.keep is Keep.NORMS
        self.has_slopes = recording.keep is Keep.SLOPES
        self.is_random = any(entry.random for entry in recording.entries)
        self.dtype = recording.dtype or initial.dtype
        self.groups: dict[Tableau, list[int]] = {}
        for n, entry in enumerate(self._entries):
            self.groups.setdefault(entry.tableau, []).append(n)

    def __len__(self) -> int:
        return len(self._entries)

    def forwards(self) -> Iterator[Step]:
        """The steps in the order of the solve."""
        return iter(self._steps)

    def backwards(self, find: Callable[[Step], Tensor] | None = None) -> Iterator[Step]:
        """The steps from the last to the first.

        Where not every state is kept, ``find`` says from which state a step starts, given the step with its
        ``next_state``, and with its ``state`` if that is kept. No more than one step's states are alive here.
        """
        if find is None:
            yield from reversed(self._steps)
            return
        following = self._state(len(self))
        for step in reversed(self._steps):
            found = dataclasses.replace(step, next_state=following)
            found.state = following = find(found)
            yield found

    def before(self, step: Step) -> Step | None:
        """The step before ``step``, or None."""
        return self._steps[step.index - 1] if step.index else None

    def _stage_times(self) -> list[tuple[Tensor, ...]]:
        """The times of each step's own stages: as recorded, or computed for all steps of a tableau at once."""
        if self._clock is not None:
            clock = iter(self._saved[self._clock].unbind(0))
            return [
                tuple(next(clock).to(dtype).reshape(shape) for dtype, shape in entry.times) for entry in self._entries
            ]
        real = self.dtype.to_real()
        result: dict[int, tuple[Tensor, ...]] = {}
        times = [times.detach() for times in (self.start, self.size, self.end)]
        for tableau, members in self.groups.items():
            chosen: slice | Tensor = slice(members[0], members[-1] + 1)
            if members[-1] - members[0] >= len(members):
                chosen = torch.tensor(members, device=self.start.device)
            start, size, end = (vector[chosen] for vector in times)
            rows = stage_times(tableau, start, size, end, real)
            result.update(zip(members, rows, strict=True))
        if result and self.initial.dtype != self.dtype:
            result[0] = (result[0][0].to(self.initial.dtype.to_real()), *result[0][1:])
        return [result[n] for n in range(len(self))]

    @functools.cached_property
    def _steps(self) -> list[Step]:
        stages = self._stage_times()
        states = [self._state(n) for n in range(len(self) + 1)]
        sizes = self.size.detach().unbind(0)
        thetas = self.theta.split([entry.interpolated[1] - entry.interpolated[0] for entry in self._entries])
        return [
            Step(
                index=n,
                tableau=entry.tableau,
                whole=entry.whole,
                size=sizes[n],
                times=stages[n],
                state=states[n],
                next_state=states[n + 1],
                slopes=self._at(entry.slopes),
                passed=self._at(entry.passed),
                carried=[] if self.has_norms else [self._passed(m) for m in carriers(n, entry.tableau)],
                random=[self._saved[position] for position in entry.random],
                interpolated=range(*entry.interpolated),
                theta=thetas[n],
                at_end=entry.at_end,
            )
            for n, entry in enumerate(self._entries)
        ]

    def _at(self, position: int | None) -> Tensor | None:
        return None if position is None else self._saved[position]

    def _passed(self, n: int) -> Tensor:
        entry = self._entries[n]
        slopes, passed, stage = self._at(entry.slopes), self._at(entry.passed), entry.tableau.passes
        assert stage is not None
        if passed is not None:
            return passed
        assert slopes is not None
        return slopes[stage]

    def _state(self, n: int) -> Tensor | None:
        state = self._at(self._final if n == len(self) else self._entries[n].state)
        if state is None and n == 0:
            return self.initial
        if state is None and self._solution is not None:
            output = self._entries[n - 1].at_end
            return None if output is None else self._saved[self._solution][output].to(self.dtype)
        return state


def carriers(n: int, tableau: Tableau) -> range:
    """The numbers of the steps whose passed slope step ``n`` carries in, latest first."""
    return range(n - 1, n - 1 - tableau.carried, -1)


def stage_times(
    tableau: Tableau, start: Tensor, size: Tensor, end: Tensor, dtype: torch.dtype
) -> Iterable[tuple[Tensor, ...]]:
    """Times of the own stages of steps that share a tableau, ``s`` 0-d ones each, in the state's real ``dtype``.

    As the hosts do: computed in the dtype of the times, cast, then moved to the neighbouring float where asked.
    """
    nodes, sides = _clock(tableau, start.dtype, start.device)
    times = torch.where(nodes == 1.0, end[:, None], start[:, None] + nodes * size[:, None]).to(dtype)
    if any(tableau.sides):
        times = torch.where(sides != 0, torch.nextafter(times, times + sides), times)
    return zip(*(column.unbind(0) for column in times.unbind(1)), strict=True)


@functools.lru_cache(maxsize=1024)
def _clock(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tableau's nodes and sides as tensors, shape ``(s,)``."""
    return torch.tensor(tableau.c, dtype=dtype, device=device), torch.tensor(tableau.sides, device=device)
