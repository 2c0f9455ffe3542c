"""The adaptive checkpoint adjoint: one step's graphs at a time.

Exact: each accepted step is evaluated again from its checkpoint with the graphs of all its stages, and then
differentiated. With ``N`` steps of ``s`` stages, ``M`` entries of a state and ``L`` of memory for the graph of one
field evaluation, memory is ``N M + s M + s L``; a step costs ``s`` evaluations.

J. Zhuang, N. Dvornek, X. Li, S. Tatikonda, X. Papademetris, J. Duncan, Adaptive Checkpoint Adjoint Method for Gradient
Estimation in Neural ODE, ICML 2020, https://arxiv.org/abs/2006.02493.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from torchdiffeq_symplectic.check import ReplayCheck
from torchdiffeq_symplectic.cotangents import Gradients
from torchdiffeq_symplectic.field import Field, Linearisation
from torchdiffeq_symplectic.modes._adjoint import StageReplay, sweep
from torchdiffeq_symplectic.modes._mode import Mode
from torchdiffeq_symplectic.trajectory import Trajectory

__all__ = ["AdaptiveCheckpoint"]


@dataclasses.dataclass(frozen=True)
class AdaptiveCheckpoint(Mode):
    """``adjoint_method="aca"``."""

    name = "aca"

    def backward(self, trajectory: Trajectory, field: Field, outputs: Tensor, check: ReplayCheck) -> Gradients:
        """Sweep back, evaluating each stage once, with its graph, all stages of a step before the first product."""
        return sweep(trajectory, field, outputs, check, _stages)


def _stages(replay: StageReplay) -> Callable[[int], Linearisation]:
    with torch.enable_grad():
        graphs = [replay.linearise(i) for i in range(replay.stages)]
    return lambda i: graphs.pop()
