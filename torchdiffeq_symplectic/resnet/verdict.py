"""From the figures to words: does a residual network discretise an ODE?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from torchdiffeq_symplectic.resnet.gradients import Agreement
from torchdiffeq_symplectic.resnet.reference import Comparison
from torchdiffeq_symplectic.resnet.weights import Weights

__all__ = ["DISCRETISES", "EXPLAINED", "NOT_AN_ODE", "SMALL_JUMP", "SMOOTH_GROWTH", "TOO_SHALLOW", "Evidence", "judge"]

DISCRETISES = "discretises an ODE"
TOO_SHALLOW = "smooth weights, too shallow"
NOT_AN_ODE = "not an ODE"

# The ODE explains a network if the two end no further apart than this part of the way that the network went.
EXPLAINED = 0.1

# Residual functions are smooth in depth if from one block to the next they change by at most this part of their size,
# as smooth ones do where the network is deep enough; independent ones change by √2 of it at every depth. Or if ...
SMALL_JUMP = 0.25
# ... over two blocks they change by at least this many times what they change over one. In the limit of depth that is 2
# for smooth functions, √2 for a random walk, 1 for independent ones.
SMOOTH_GROWTH = 1.7


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The figures that decide, of ``N`` blocks with residual functions ``f_n``.

    Attributes:
        blocks: ``N``.
        relative_distance: ``‖x_N - x(1)‖ / ‖x_N - x_0‖``, zero if both are, infinite if one of them is not finite.
        jump: the root mean square of ``‖f_{n+1}(x_n) - f_n(x_n)‖`` over that of ``‖f_n(x_n)‖``, None if that is zero.
        growth: the root mean square of ``‖f_{n+2}(x_n) - f_n(x_n)‖`` over that of ``‖f_{n+1}(x_n) - f_n(x_n)‖``, None
            if that is zero or there are two blocks only.
        trouble: why there is no distance, or None.
    """

    blocks: int
    relative_distance: float
    jump: float | None
    growth: float | None
    trouble: str | None

    @property
    def smooth(self) -> bool:
        """Whether the residual functions are smooth in depth."""
        return (
            self.jump is None or self.jump <= SMALL_JUMP or (self.growth is not None and self.growth >= SMOOTH_GROWTH)
        )

    @classmethod
    def of(cls, found: Comparison) -> Evidence:
        """What ``found`` comes down to."""
        return cls(
            blocks=len(found.errors),
            relative_distance=_ratio(found.distance[-1], found.change) or 0.0,
            jump=_ratio(_root_mean_square(found.jumps), _root_mean_square(found.slopes)),
            growth=_ratio(_root_mean_square(found.double_jumps), _root_mean_square(found.jumps))
            if found.double_jumps
            else None,
            trouble=found.trouble,
        )


def judge(evidence: Evidence, weights: Weights, memory_free: Mapping[str, Agreement]) -> tuple[str, list[str]]:
    """The verdict, one of three, and its reasons, with their figures.

    A network *discretises an ODE* if it ends where the solution does, by the measure of `EXPLAINED`. If not, it is
    *too shallow* if its residual functions are smooth in depth: with more blocks of that kind the distance falls as
    1/N. Else it is *not an ODE*.
    """
    close = evidence.relative_distance <= EXPLAINED
    verdict = DISCRETISES if close else TOO_SHALLOW if evidence.smooth else NOT_AN_ODE
    reasons = [_of_distance(evidence), _of_smoothness(evidence), _of_weights(weights), _of_memory_free(memory_free)]
    if verdict == TOO_SHALLOW and math.isfinite(evidence.relative_distance):
        enough = math.ceil(evidence.blocks * evidence.relative_distance / EXPLAINED)
        reasons.append(f"the distance falls as 1/N: roughly {enough} blocks on the same smooth weights would do")
    if close and not evidence.smooth:
        reasons.append(
            "what its residual functions differ by averages out over the depth, so the two are close all the same"
        )
    return verdict, reasons


def _of_distance(evidence: Evidence) -> str:
    if evidence.trouble is not None:
        return evidence.trouble
    relation = "no further than" if evidence.relative_distance <= EXPLAINED else "further than"
    return (
        f"network and ODE end {evidence.relative_distance:.2g} of the network's own way apart, {relation} the "
        f"{EXPLAINED:g} up to which the ODE explains it"
    )


def _of_smoothness(evidence: Evidence) -> str:
    if evidence.jump is None:
        return "the residual functions are zero"
    words = f"from one block to the next, residual functions change by {evidence.jump:.2g} of their size"
    if evidence.growth is not None:
        words += f", over two blocks by {evidence.growth:.2g} times that"
    kind = "smooth" if evidence.smooth else "not smooth"
    return f"{words}: {kind} in depth (smooth: up to {SMALL_JUMP:g}, or at least {SMOOTH_GROWTH:g} times)"


def _of_weights(weights: Weights) -> str:
    if weights.smoothness is None:
        return f"no smoothness of weights: {weights.reason}"
    return f"N max ‖θ_n+1 - θ_n‖ is {weights.smoothness:.3g}, where ‖θ_n‖ is {weights.size:.3g}"


def _of_memory_free(memory_free: Mapping[str, Agreement]) -> str:
    errors = ", ".join(f"{method} {found.relative:.2g}" for method, found in memory_free.items())
    return f"relative error of the memory-free gradient: {errors}"


def _root_mean_square(values: Sequence[float]) -> float:
    return math.hypot(*values) / math.sqrt(len(values)) if values else 0.0


def _ratio(part: float, whole: float) -> float | None:
    """None if both are zero; infinite if they are not numbers."""
    if whole == 0:
        return None if part == 0 else math.inf
    ratio = part / whole
    return ratio if math.isfinite(ratio) and math.isfinite(whole) else math.inf
