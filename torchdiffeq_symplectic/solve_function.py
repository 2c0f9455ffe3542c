"""The autograd function of all modes and hosts: joins a recorded solve to the graph of what it was computed from."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.context import Choice, current, recompute_inside, restored
from torchdiffeq_symplectic.errors import EscapedGraphWarning, MissingGradientWarning
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.graph import edge_of
from torchdiffeq_symplectic.modes import Mode
from torchdiffeq_symplectic.recording import Recording
from torchdiffeq_symplectic.replay import Conditions, ReplayCheck
from torchdiffeq_symplectic.sweep import backpropagate
from torchdiffeq_symplectic.tape import Stepper, Tape, Times
from torchdiffeq_symplectic.transforms import is_batched

__all__ = ["Solve", "attach", "missing_gradients", "warn_of_escaped", "warn_of_missing"]


@dataclasses.dataclass
class Solve:
    """A solve that a host has finished, without a graph.

    Attributes:
        mode: how its gradient is computed.
        recording: its accepted steps.
        stepper: does them again.
        func: the field as the host's solver calls it.
        conditions: what else the field depends on.
        replay_check: "error", "warn" or "ignore".
        retains: whether the graph of an evaluation goes on into graphs made before.
        missing: a warning to give in backward, or None.
        choice: what solves inside the field are to use.
    """

    mode: Mode
    recording: Recording
    stepper: Stepper
    func: Callable[..., Any]
    conditions: Conditions
    replay_check: str
    retains: bool = False
    missing: str | None = None
    choice: Choice | None = dataclasses.field(default_factory=current)


def attach(
    solve: Solve, solution: Sequence[Tensor], initial: Sequence[Tensor], times: Times, targets: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The solution as a differentiable function of ``initial``, ``times`` and ``targets``.

    Args:
        solve: the recorded solve.
        solution: its result: each part of the state at all output times, shape ``(T, *shape)``.
        initial: the parts of the state that it started from.
        times: of its steps and outputs.
        targets: the tensors that the field uses and that gradients are wanted for.
    """
    recompute_inside(solve.choice)
    recording = solve.recording
    edges = {edge_of(target): i for i, target in enumerate(targets) if target.requires_grad}
    expected = {
        key: [
            edges[edge]
            for tensor in (reference() for reference in references)
            if tensor is not None and tensor.requires_grad and (edge := edge_of(tensor)) in edges
        ]
        for key, references in recording.first_reached.items()
    }
    recording.first_reached = {}
    # Where there are no steps, nothing depends on the times: hooks on these are not to be called.
    vectors = [vector if vector.numel() else vector.detach() for vector in times]
    result: tuple[Tensor, ...] = _Gradient.apply(
        solve, expected, [*solution], len(initial), *initial, *vectors, *targets
    )
    return result


class _Gradient(torch.autograd.Function):
    """Everything recorded goes through ``save_for_backward``.

    So backward frees it while the caller still holds the solution, ``retain_graph`` keeps it, hooks on saved tensors
    can offload it, and what was overwritten since raises an error.
    """

    @staticmethod
    def forward(
        ctx: Any, solve: Solve, expected: Any, solution: list[Tensor], parts: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        recording = solve.recording
        ctx.solve, ctx.expected, ctx.parts = solve, expected, parts
        ctx.set_materialize_grads(False)
        # The solution is saved itself where its rows are states; it must be the very tensors that are returned.
        ctx.counts = parts, 4, len(tensors) - parts - 4
        ctx.save_for_backward(*tensors, *recording.saved)
        recording.saved = []
        result = tuple(solution)
        solution.clear()
        return result

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Any, ...]:
        solve: Solve = ctx.solve
        if all(output is None for output in outputs):  # reached from elsewhere, by a pass that stops before it
            return (None,) * len(ctx.needs_input_grad)
        saved = iter(ctx.saved_tensors)
        initial, vectors, targets = (list(islice(saved, n)) for n in ctx.counts)
        times = Times(*vectors)
        tape = Tape(solve.recording, tuple(saved), initial, times)
        warn_of_missing(solve.missing)
        double = torch.is_grad_enabled()
        wants_time = any(ctx.needs_input_grad[4 + ctx.parts : 8 + ctx.parts])
        check = ReplayCheck(solve.replay_check, solve.conditions.precision(initial), solve.conditions.changes)
        with solve.conditions.restored(), restored(solve.choice):
            field = Field(
                solve.func,
                targets,
                solve.conditions,
                check,
                wants_time=wants_time,
                expected=ctx.expected if check.active else {},
                linked=double,
                retains=solve.retains,
                batched=any(map(is_batched, outputs)),
            )
            if double:
                gradients = backpropagate(tape, solve.stepper, field, check, outputs, times, create_graph=True)
            else:
                gradients = solve.mode.backward(tape, solve.stepper, field, check, outputs, times)
        check.conclude()
        initial_found = [
            torch.zeros_like(part) if found is None else found
            for part, found in zip(initial, gradients.initial, strict=True)
        ]
        found = [
            torch.zeros_like(target) if product is None else product
            for target, product in zip(targets, gradients.targets, strict=True)
        ]
        return (None, None, None, None, *initial_found, *gradients.times, *found)


def missing_gradients(tensors: Sequence[Tensor]) -> str | None:
    """What to say of tensors that the field uses and whose gradient nobody asked for."""
    if not tensors:
        return None
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    return (
        f"func uses {len(tensors)} tensor(s) that require a gradient but are not in adjoint_params (shapes: {shapes}), "
        "so they get no gradient from this solve. List them in adjoint_params, or detach them."
    )


def warn_of_missing(message: str | None) -> None:
    """Give a warning that `missing_gradients` made."""
    if message is not None:
        warnings.warn(message, MissingGradientWarning, stacklevel=3)


def warn_of_escaped() -> None:
    """Warn that the graph of an evaluation outlives its slope."""
    warnings.warn(
        "func keeps tensors of its own evaluation with their graph, such as a penalty that it collects in a list or a "
        "hook. Their gradients end at the state that func was given: they do not reach the initial state or earlier "
        "steps. Return such terms as part of the state instead, or detach them.",
        EscapedGraphWarning,
        stacklevel=2,
    )
