"""The symplectic adjoint method: one stage's graph at a time.

Exact: the gradient of the discrete solve, its step sizes held constant. With ``N`` steps of ``s`` stages, ``M`` entries
of a state and ``L`` of memory for the graph of one field evaluation, memory is ``N M + s M + L``; a step costs
``s - 1`` evaluations to recompute its slopes and ``s`` with their graphs. With ``checkpoint="stages"`` the slopes are
kept: memory ``N (s + 1) M + 2 s M + L``, and ``s`` evaluations a step.

T. Matsubara, Y. Miyatake, T. Yaguchi, Symplectic Adjoint Method for Exact Gradient of Neural ODE with Minimal Memory,
NeurIPS 2021, https://arxiv.org/abs/2102.09750.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.modes._adjoint import StageReplay, sweep
from torchdiffeq_symplectic.modes._mode import Mode
from torchdiffeq_symplectic.trajectory import Keep, Trajectory

__all__ = ["Symplectic", "evaluated_twice"]

_KEEPS = {"steps": Keep.STATES, "stages": Keep.SLOPES}


@dataclasses.dataclass(frozen=True)
class Symplectic(Mode):
    """``adjoint_method="symplectic"``, with ``adjoint_options={"checkpoint": "steps" or "stages"}``."""

    name = "symplectic"

    checkpoint: str = "steps"

    def __post_init__(self) -> None:
        if self.checkpoint not in list(_KEEPS):
            raise ValueError(
                f'adjoint_options["checkpoint"] must be one of {{"steps", "stages"}} for adjoint_method="symplectic", '
                f"but is {self.checkpoint!r}"
            )

    @property
    def keep(self) -> Keep:
        """What the recording must keep."""
        return _KEEPS[self.checkpoint]

    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        """Sweep back, evaluating each stage once for its slope and once with its graph."""
        return sweep(trajectory, field, outputs, check, evaluated_twice)


def evaluated_twice(replay: StageReplay) -> Callable[[int], Linearisation]:
    """All slopes but the last first, without their graphs; then each with its graph, when it is asked for."""
    for i in range(replay.stages - 1):
        if i not in replay.kept:
            replay.evaluate(i)
    return replay.linearise
