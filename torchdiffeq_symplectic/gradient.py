"""The autograd function of all modes and hosts: joins a recorded solve to the graph of what it was computed from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.modes import Mode
from torchdiffeq_symplectic.modes.baseline import backpropagate
from torchdiffeq_symplectic.surroundings import Surroundings, hooks_silenced
from torchdiffeq_symplectic.switch import Choice, current, restored
from torchdiffeq_symplectic.trajectory import Recording, Trajectory

__all__ = ["Solve", "Times", "attach"]


@dataclasses.dataclass(frozen=True)
class Times:
    """The times of a solve, as differentiable functions of whatever the host computed them from.

    Attributes:
        start, size, end: of each accepted step, shape ``(N,)``.
        theta: positions of the interpolated outputs inside their steps, in [0, 1], shape ``(M,)``.
    """

    start: Tensor
    size: Tensor
    end: Tensor
    theta: Tensor


@dataclasses.dataclass
class Solve:
    """A solve that a host has finished, without a graph.

    Attributes:
        mode: how its gradient is computed.
        recording: its accepted steps.
        func: ``func(t, y)``, the field as the host's solver calls it.
        surroundings: what else the field depends on.
        replay_check: "error", "warn" or "ignore".
        ignore: tensors whose missing gradient is not to be reported; None if all that are used are known.
        choice: what solves inside the field are to use.
    """

    mode: Mode
    recording: Recording
    func: Callable[[Tensor, Tensor], Tensor]
    surroundings: Surroundings
    replay_check: str
    ignore: Sequence[Tensor] | None = ()
    choice: Choice | None = dataclasses.field(default_factory=current)


def attach(solve: Solve, solution: Tensor, initial: Tensor, times: Times, params: Sequence[Tensor]) -> Tensor:
    """The solution as a differentiable function of ``initial``, ``times`` and ``params``.

    Args:
        solve: the recorded solve.
        solution: its result, shape ``(T, *initial.shape)``.
        initial: the state that it started from.
        times: of its steps and outputs.
        params: the tensors that the field depends on and that gradients are wanted for.
    """
    result: Tensor = _Gradient.apply(
        solve, [solution], initial, times.start, times.size, times.theta, times.end.detach(), *params
    )
    return result


class _Gradient(torch.autograd.Function):
    """Everything recorded goes through ``save_for_backward``.

    So backward frees it while the caller still holds the solution, ``retain_graph`` keeps it, hooks on saved tensors
    can offload it, and what was overwritten since raises an error.
    """

    @staticmethod
    def forward(ctx: Any, solve: Solve, solution: list[Tensor], *tensors: Tensor) -> Tensor:
        recording = solve.recording
        ctx.solve = solve
        recording.keep_outputs(solution[0])
        attributes = solve.surroundings.attributes()
        ctx.counts = len(tensors), len(attributes)
        ctx.save_for_backward(*tensors, *attributes, *recording.saved)
        recording.saved = []
        return solution.pop()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        (outputs,) = cotangents
        solve: Solve = ctx.solve
        saved = iter(ctx.saved_tensors)
        (initial, start, size, theta, end, *params), attributes = (list(islice(saved, n)) for n in ctx.counts)
        trajectory = Trajectory(solve.recording, tuple(saved), initial, start, size, end, theta)
        field = Field(
            solve.func,
            params,
            solve.surroundings,
            wants_time=any(ctx.needs_input_grad[3:6]),
            ignore=solve.ignore,
            dtype=trajectory.dtype,
            shape=initial.shape,
        )
        check = ReplayCheck(solve.replay_check, trajectory.dtype)
        leaves = (initial, start, size, theta, *params)
        surroundings = solve.surroundings.restored(trajectory.is_random, attributes)
        with surroundings, hooks_silenced(leaves), restored(solve.choice):
            if torch.is_grad_enabled():
                gradients = backpropagate(trajectory, field, outputs, check, create_graph=True)
            else:
                gradients = solve.mode.backward(trajectory, field, outputs, check)
        check.conclude(field.slope_dtype)
        times_found = (gradients.start, gradients.size, gradients.theta)
        return (None, None, gradients.initial, *times_found, None, *gradients.params)
