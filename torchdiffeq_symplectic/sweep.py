"""The discrete adjoint: the cotangent of the carry is pulled back through one replayed step after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.cut import DifferentiatedTwice
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.graph import Gated
from torchdiffeq_symplectic.recording import Keep, norm_of
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.tape import Step, Stepper, Tape, Times

__all__ = ["Gradients", "backpropagate", "replayed", "sweep"]

Cotangents = list[Tensor | None]


@dataclasses.dataclass
class Gradients:
    """The cotangents of everything that a solve was computed from, None for zero.

    Attributes:
        initial: of the parts of the initial state.
        targets: of the tensors that the field uses.
        times: of start, size and end of the steps and of the outputs inside them.
    """

    initial: Cotangents
    targets: Sequence[Tensor | None]
    times: Sequence[Tensor | None] = (None, None, None, None)


def sweep(
    tape: Tape,
    stepper: Stepper,
    field: Field,
    check: ReplayCheck,
    outputs: Sequence[Tensor | None],
    find: Callable[[Step], list[Tensor]] | None = None,
) -> Gradients:
    """Carry the cotangents of the outputs back to the initial state, the tensors used, and the times.

    Args:
        tape: the solve.
        stepper: does its steps again.
        field: evaluates the field, and sums the products with the tensors used.
        check: is told how well each step was reproduced.
        outputs: the cotangent of each part of the solution, shape ``(T, *shape)``, or None.
        find: where not every state is kept: finds the one that a step starts from. Its ``carry`` holds that if it is
            kept, its ``after`` the state that was found after it.
    """
    of_carry: Cotangents = _of_rows(tape.rows_of_state(len(tape)), outputs)
    times = _TimeCotangents(tape) if field.wants_time else None
    # Its buffers have no room for a batch of cotangents.
    linear = None if field.wants_time or field.batched else stepper.linear(tape, field, check)
    found: list[Tensor] | None = None
    for n in reversed(range(len(tape))):
        step = tape[n]
        of_state = _of_rows(tape.rows_of_state(n), outputs)
        inside = [[None if part is None else part[row] for part in outputs] for row in step.inside]
        field.start_step(step)
        if find is not None:
            step.after = step.after if found is None else found
            found = find(step)
            step.carry[: len(found)] = found
        elif not any(part is not None for row in (of_carry, *inside) for part in row):
            of_carry = of_state
            continue
        if linear is not None and linear.takes(step):
            of_carry = linear.pull_back(step, of_carry, inside)
            of_carry[: len(of_state)] = map(_sum, of_carry, of_state)
        else:
            if step.carry[-1] is None:
                state = [part for part in step.carry if part is not None]
                step.carry = [*state, stepper.evaluated(step, field, state)]
            of_carry = _pull_back(step, stepper, field, check, of_carry, inside, of_state, times)
        if stepper.sums_steps:
            field.products.close_step()
    of_initial = [
        part if part is None or part.dtype == initial.dtype else part.to(initial.dtype)
        for part, initial in zip(of_carry, tape.initial, strict=False)
    ]
    return Gradients(of_initial, field.products.totals(), (None,) * 4 if times is None else times.stacked())


def _pull_back(
    step: Step,
    stepper: Stepper,
    field: Field,
    check: ReplayCheck,
    of_after: Cotangents,
    inside: Sequence[Cotangents],
    of_state: Cotangents,
    times: _TimeCotangents | None,
) -> Cotangents:
    """Differentiate the host's own step: the cotangents of the carry that it starts from.

    Those of the state from elsewhere, ``of_state``, come first, in the order in which backpropagation adds them.
    """
    carry = [_leaf(part) for part in step.carry if part is not None]
    moving = dataclasses.replace(step) if times is None else times.leaves_of(step)
    after, outputs = _advanced(stepper, moving, field, carry)
    if step.after is not None:
        for part, recorded in zip(after, step.after, strict=False):
            check.step(step.number, part.detach(), recorded)
    values = [*carry[: len(of_state)], *after, *(part for output in outputs for part in output)]
    # The state after the last step carries nothing else on.
    of_after = [*of_after, *[None] * (len(after) - len(of_after))]
    cotangents = [*of_state, *of_after, *(part for row in inside for part in row)]
    able = [i for i, part in enumerate(carry) if part.requires_grad]
    wanted = [carry[i] for i in able]
    if times is not None:
        wanted += times.leaves(moving)
    numbers: list[int] = []
    if stepper.has_tensors or not field.cuts:
        numbers, tensors = field.direct()
        wanted += tensors
    found = _gradients(values, wanted, cotangents, retain_graph=field.retains)
    field.products.add(numbers, found[len(found) - len(numbers) :])
    if times is not None:
        times.add(step, found[len(able) : len(found) - len(numbers)])
    result: Cotangents = [None for _ in carry]
    for i, product in zip(able, found, strict=False):
        result[i] = product
    return result


def _advanced(
    stepper: Stepper, step: Step, field: Field, carry: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The step with its graph, without that of the field's evaluations where these can be cut out."""
    field.advancing = True
    try:
        with torch.enable_grad():
            try:
                return stepper.advance(step, field, carry)
            except DifferentiatedTwice:
                field.cuts = False
                field.start_step(step)
                return stepper.advance(step, field, carry)
    finally:
        field.advancing = False


def backpropagate(
    tape: Tape,
    stepper: Stepper,
    field: Field,
    check: ReplayCheck,
    outputs: Sequence[Tensor | None],
    times: Times,
    *,
    create_graph: bool,
) -> Gradients:
    """Replay the whole solve with its graph, and backpropagate; with ``create_graph`` differentiably.

    Args:
        tape: as for `sweep`.
        stepper: as for `sweep`.
        field: as for `sweep`.
        check: as for `sweep`.
        outputs: as for `sweep`.
        times: of the solve.
        create_graph: whether the gradients are to be functions of initial state, times and the tensors used.
    """
    field.cuts = False
    gate = field.gate
    with torch.enable_grad():
        if create_graph:
            initial = [Gated.apply(part, gate) for part in tape.initial]
            vectors = [Gated.apply(vector, gate) for vector in times]
        else:
            initial = [_leaf(part) for part in tape.initial]
            vectors = [vector.detach().requires_grad_(field.wants_time) for vector in times]
        rows = replayed(tape, stepper, field, check, initial, vectors)
        values, cotangents = [], []
        for output, parts in rows.items():
            values += parts
            cotangents += [None if part is None else part[output] for part in outputs]
        numbers, tensors = field.direct()
        able = [tensor for tensor in (*initial, *vectors) if tensor.requires_grad]
        gate.closed = True
        found = _gradients(
            values, [*able, *tensors], cotangents, retain_graph=create_graph or field.retains, create_graph=create_graph
        )
        gate.closed = False
    of = {id(tensor): product for tensor, product in zip(able, found, strict=False)}
    targets = dict(zip(numbers, found[len(able) :], strict=True))
    return Gradients(
        [of.get(id(part)) for part in initial],
        [targets.get(i) for i in range(field.count)],
        [of.get(id(vector)) for vector in vectors],
    )


def replayed(
    tape: Tape, stepper: Stepper, field: Field, check: ReplayCheck, initial: list[Tensor], vectors: Sequence[Tensor]
) -> dict[int, list[Tensor]]:
    """The parts of each output by its number, of a solve done again in the present gradient mode."""
    start, size, end = (vector.unbind() for vector in vectors[:3])
    inside = iter(vectors[3].unbind())
    carry = list(initial)
    rows = dict.fromkeys(tape.at_start, carry)
    for n in range(len(tape)):
        step = tape[n]
        times = [next(inside) for _ in step.inside]
        field.start_step(step)
        moving = dataclasses.replace(step, start=start[n], size=size[n], end=end[n], times=times)
        carry, outputs = stepper.advance(moving, field, carry)
        state = carry[: len(initial)]
        for part, recorded in zip(state, step.after or (), strict=False):
            if tape.keep is Keep.NORMS:
                check.norm(n, norm_of(part), recorded)
            else:
                check.step(n, part.detach(), recorded)
        rows |= zip(step.inside, outputs, strict=True)
        if step.at_end is not None:
            rows[step.at_end] = state
    return rows


class _TimeCotangents:
    """The cotangents of the times of the steps, and the leaves that they are taken at."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._rows: dict[int, Sequence[Tensor | None]] = {}

    def leaves_of(self, step: Step) -> Step:
        """The step with leaves as its times."""
        start, size, end, *times = (
            time.detach().requires_grad_() for time in (step.start, step.size, step.end, *step.times)
        )
        return dataclasses.replace(step, start=start, size=size, end=end, times=times)

    def leaves(self, step: Step) -> list[Tensor]:
        """These leaves."""
        return [step.start, step.size, step.end, *step.times]

    def add(self, step: Step, found: Sequence[Tensor | None]) -> None:
        """Note the cotangents of the times of ``step``."""
        self._rows[step.number] = found

    def stacked(self) -> list[Tensor | None]:
        """Of start, size and end of all steps, and of the outputs inside them."""
        columns: list[list[Tensor]] = [[], [], [], []]
        for n in range(len(self._tape)):
            step = self._tape[n]
            times = self.leaves(step)
            found = self._rows.get(n, [None] * len(times))
            for i, (time, product) in enumerate(zip(times, found, strict=True)):
                columns[min(i, 3)].append(torch.zeros_like(time) if product is None else product)
        return [torch.stack(column) if column else None for column in columns]


def _gradients(
    values: Sequence[Tensor],
    wanted: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Cotangents:
    """``torch.autograd.grad`` of those values that have a graph and a cotangent; None for zero."""
    pairs = [
        (value, cotangent if cotangent.dtype == value.dtype else cotangent.to(value.dtype))
        for value, cotangent in zip(values, cotangents, strict=True)
        if cotangent is not None and value.requires_grad
    ]
    if not pairs or not wanted:
        return [None] * len(wanted)
    ends, products = zip(*pairs, strict=True)
    return list(torch.autograd.grad(ends, wanted, products, retain_graph, create_graph, allow_unused=True))


def _leaf(part: Tensor) -> Tensor:
    part = part.detach()
    return part.requires_grad_() if part.is_floating_point() or part.is_complex() else part


def _of_rows(rows: Sequence[int], outputs: Sequence[Tensor | None]) -> Cotangents:
    """The cotangents of a state that is these outputs."""
    result: Cotangents = [None for _ in outputs]
    for row in rows:
        result = [
            _sum(part, None if output is None else output[row]) for part, output in zip(result, outputs, strict=True)
        ]
    return result


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
