"""The symplectic adjoint method: one stage's graph at a time.

Exact: the gradient of the discrete solve, its step sizes held constant. With ``N`` steps of ``s`` stages, ``M`` entries
of a state and ``L`` of memory for the graph of one field evaluation, memory is ``N M + s M + L``; a step costs
``s - 1`` evaluations to recompute its slopes and ``s`` with their graphs. With ``checkpoint="stages"`` the slopes are
kept: memory ``N (s + 1) M + 2 s M + L``, and ``s`` evaluations a step.

T. Matsubara, Y. Miyatake, T. Yaguchi, Symplectic Adjoint Method for Exact Gradient of Neural ODE with Minimal Memory,
NeurIPS 2021, https://arxiv.org/abs/2102.09750.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.modes._adjoint import StageReplay, sweep
from torchdiffeq_symplectic.trajectory import Keep, Trajectory

__all__ = ["Symplectic"]

_KEEPS = {"steps": Keep.STATES, "stages": Keep.SLOPES}


class Symplectic:
    """``adjoint_method="symplectic"``, with ``adjoint_options={"checkpoint": "steps" or "stages"}``."""

    name = "symplectic"
    options = frozenset({"checkpoint"})

    def keeps(self, options: Mapping[str, object]) -> Keep:
        """What the recording must keep; ValueError for an unknown checkpoint."""
        checkpoint = options.get("checkpoint", "steps")
        if checkpoint not in list(_KEEPS):
            raise ValueError(
                f'adjoint_options["checkpoint"] must be one of {{"steps", "stages"}} for adjoint_method="symplectic", '
                f"but is {checkpoint!r}"
            )
        return _KEEPS[str(checkpoint)]

    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        """Sweep back, evaluating each stage once for its slope and once with its graph."""
        return sweep(trajectory, field, outputs, check, _stages)


def _stages(replay: StageReplay) -> Callable[[int], Linearisation]:
    for i in range(replay.stages - 1):
        if i not in replay.kept:
            replay.evaluate(i)
    return replay.linearise
