"""The check that a replay was the forward pass again.

Recomputing a step gives the state after it. Comparing that with the recorded one costs no evaluation and finds what
would otherwise be a silently wrong gradient. The deviations are collected on the device and looked at once, after the
backward pass, so no step waits for the device.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["REPLAY_CHECKS", "ReplayCheck", "ReplayError", "ReplayWarning"]

REPLAY_CHECKS = ("error", "warn", "ignore")

# Roundings that may lie between a state and its recomputation, in units of the dtype's precision; fewer where slopes
# are coarser than the state (autocast), as their roundings are not amplified by cancellation in the state.
_ROUNDINGS = 256.0
_COARSE_ROUNDINGS = 8.0


class ReplayError(RuntimeError):
    """The replay in backward did not reproduce the forward pass, so its gradient would be that of something else."""


class ReplayWarning(UserWarning):
    """The same, where the caller asked for a warning only."""


class ReplayCheck:
    """Collects the deviation of every replayed step.

    Args:
        action: "error", "warn" or "ignore".
        dtype: of the states.
    """

    def __init__(self, action: str, dtype: torch.dtype) -> None:
        self.active = action != "ignore"
        self.action = action
        self._precision = torch.finfo(dtype).eps
        self._rows: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._weights: list[float] = []
        self._indices: list[int] = []

    def step(self, index: int, replayed: Tensor, recorded: Tensor, size: Tensor, slopes: Tensor, weight: float) -> None:
        """Compare the state after step ``index``, made of ``size`` times ``slopes`` of a total ``weight``."""
        if self.active and recorded.numel():
            self._rows += torch._foreach_norm((replayed - recorded, recorded, slopes), torch.inf)
            self._sizes.append(size)
            self._weights.append(weight)
            self._indices.append(index)

    def whole(self, index: int, replayed: Tensor, recorded: Tensor, before: Tensor) -> None:
        """Compare the state after step ``index``, which led there from ``before``."""
        one = torch.ones((), dtype=before.dtype.to_real(), device=before.device)
        self.step(index, replayed, recorded, one, recorded - before, 1.0)

    def norm(self, index: int, replayed: Tensor, recorded: Tensor) -> None:
        """Compare a replayed state with the recorded norm of the true one."""
        if self.active and replayed.numel():
            self._rows += ((torch.linalg.vector_norm(replayed) - recorded).abs(), recorded, recorded)
            self._sizes.append(torch.ones_like(recorded))
            self._weights.append(1.0)
            self._indices.append(index)

    def conclude(self, slope_dtype: torch.dtype | None) -> None:
        """Raise or warn if a step was not reproduced; the only place that waits for the device.

        ``slope_dtype`` is what the field computes in, where that is not the dtype of the states, else None.
        """
        if not self._rows:
            return
        deviation, scale, slope = torch.stack(self._rows).view(-1, 3).unbind(1)
        weights = torch.tensor(self._weights, dtype=slope.dtype, device=slope.device)
        increment = torch.stack(self._sizes).abs() * weights * slope
        coarse = 0.0 if slope_dtype is None else _COARSE_ROUNDINGS * torch.finfo(slope_dtype).eps
        allowed = _ROUNDINGS * self._precision * (scale + increment) + coarse * increment
        # A state that was not finite to begin with proves nothing.
        bad = ~(deviation <= allowed) & torch.isfinite(scale)
        if not bool(bad.any()):
            return
        worst = int(torch.where(bad, deviation / allowed, torch.zeros_like(allowed)).nan_to_num(torch.inf).argmax())
        message = (
            f"the replay of this solve differs from its forward pass: after step {self._indices[worst]} by "
            f"{float(deviation[worst]):.3g} where the state has size {float(scale[worst]):.3g} (seen in "
            f"{int(bad.sum())} of {len(self._sizes)} steps). The gradient would not be that of the forward pass. "
            "Something that func depends on has changed since: noise drawn anew for a second solve, a module in "
            "training mode that changes with each call (spectral norm), attributes or tensors replaced or overwritten. "
            'Keep it fixed until after backward, or pass adjoint_options={"replay_check": "warn"} or "ignore" if that '
            "is intended."
        )
        if self.action == "error":
            raise ReplayError(message)
        warnings.warn(message, ReplayWarning, stacklevel=2)
