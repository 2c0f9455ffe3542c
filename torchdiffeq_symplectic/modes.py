"""The gradient modes: what each keeps of a solve, and how it treats the field's calls in a step that is replayed.

With ``N`` steps of ``s`` stages, ``M`` entries of a state and ``L`` of memory for the graph of one field evaluation:

================  =====================  ======================  ===========================================
mode              memory                 evaluations a step      the graph that is alive
================  =====================  ======================  ===========================================
symplectic        N M + s M + L          2 s - 1                 of one evaluation
   with stages    N (s + 1) M + L        s                       of one evaluation
aca               N M + s M + s L        s                       of one step
baseline          M before, then N s L   s                       of the solve
memory_free       T M + s M + L          see `stepping_back`     of one evaluation; approximate
================  =====================  ======================  ===========================================

T. Matsubara, Y. Miyatake, T. Yaguchi, Symplectic Adjoint Method for Exact Gradient of Neural ODE with Minimal Memory,
NeurIPS 2021, https://arxiv.org/abs/2102.09750 (symplectic, baseline). J. Zhuang, N. Dvornek, X. Li, S. Tatikonda,
X. Papademetris, J. Duncan, Adaptive Checkpoint Adjoint Method for Gradient Estimation in Neural ODE, ICML 2020,
https://arxiv.org/abs/2006.02493 (aca). M. E. Sander, P. Ablin, G. Peyre, Do Residual Neural Networks discretize Neural
Ordinary Differential Equations?, NeurIPS 2022, https://arxiv.org/abs/2205.14612 (memory_free).
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.recording import Keep
from torchdiffeq_symplectic.replay import REPLAY_CHECKS, ReplayCheck
from torchdiffeq_symplectic.stepping_back import Recovery
from torchdiffeq_symplectic.sweep import Gradients, backpropagate, sweep
from torchdiffeq_symplectic.tape import Stepper, Tape, Times

__all__ = ["MODES", "Mode", "configured"]


@dataclasses.dataclass(frozen=True)
class Mode(abc.ABC):
    """How the gradient of a recorded solve is computed.

    The fields of a mode's dataclass are its own keys of ``adjoint_options``, with their defaults.

    Attributes:
        name: what the user types.
        exact: whether the gradient is that of the discrete solve, to rounding.
        replay_check: what is done about a replay that is not the forward pass, where the user does not say.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    replay_check: ClassVar[str] = "error"

    @property
    def options(self) -> frozenset[str]:
        """The keys of ``adjoint_options`` that are the mode's own."""
        return frozenset(field.name for field in dataclasses.fields(self))

    @property
    def keep(self) -> Keep:
        """What the recording must keep of every step."""
        return Keep.STATES

    @abc.abstractmethod
    def backward(
        self,
        tape: Tape,
        stepper: Stepper,
        field: Field,
        check: ReplayCheck,
        outputs: Sequence[Tensor | None],
        times: Times,
    ) -> Gradients:
        """The gradients, given the cotangent of each part of the solution, shape ``(T, *shape)``."""


@dataclasses.dataclass(frozen=True)
class Symplectic(Mode):
    """Cut every call; with ``checkpoint="stages"``, hand it the slope that the forward pass computed."""

    name = "symplectic"

    checkpoint: str = "steps"

    def __post_init__(self) -> None:
        if self.checkpoint not in list(_CHECKPOINTS):
            raise ValueError(
                f'adjoint_options["checkpoint"] must be one of {{"steps", "stages"}} for "symplectic", but is '
                f"{self.checkpoint!r}"
            )

    @property
    def keep(self) -> Keep:
        """The carry of every step, or its slopes, too."""
        return _CHECKPOINTS[self.checkpoint]

    def backward(
        self,
        tape: Tape,
        stepper: Stepper,
        field: Field,
        check: ReplayCheck,
        outputs: Sequence[Tensor | None],
        times: Times,
    ) -> Gradients:
        """Sweep back, one evaluation's graph at a time."""
        return sweep(tape, stepper, field, check, outputs)


_CHECKPOINTS = {"steps": Keep.STATES, "stages": Keep.SLOPES}


@dataclasses.dataclass(frozen=True)
class AdaptiveCheckpoint(Mode):
    """Cut every call, and keep its graph while the step is pulled back: a step's graphs are alive together."""

    name = "aca"

    def backward(
        self,
        tape: Tape,
        stepper: Stepper,
        field: Field,
        check: ReplayCheck,
        outputs: Sequence[Tensor | None],
        times: Times,
    ) -> Gradients:
        """Sweep back, one step's graph at a time."""
        field.holds = True
        return sweep(tape, stepper, field, check, outputs)


@dataclasses.dataclass(frozen=True)
class Baseline(Mode):
    """Replay the whole solve as one graph."""

    name = "baseline"

    @property
    def keep(self) -> Keep:
        """Nothing but what checks the replay."""
        return Keep.NORMS

    def backward(
        self,
        tape: Tape,
        stepper: Stepper,
        field: Field,
        check: ReplayCheck,
        outputs: Sequence[Tensor | None],
        times: Times,
    ) -> Gradients:
        """Replay, and backpropagate."""
        return backpropagate(tape, stepper, field, check, outputs, times, create_graph=False)


@dataclasses.dataclass(frozen=True)
class MemoryFree(Mode):
    """Cut, and find the carry by stepping back instead of reading it.

    Options: ``tolerance``: the largest reconstruction error, and largest residual of a step times the number of steps,
    that are no error; without it there is a warning above 0.1. ``corrections``: how often a step back is corrected at
    most; 0 is the scheme of the paper, of which the reconstruction error alone counts. ``report``: True prints both to
    stderr after each backward pass, a function is called with the reconstruction error.
    """

    name = "memory_free"
    exact = False
    replay_check = "warn"

    tolerance: float | None = None
    corrections: int | None = None
    report: bool | Callable[[float], object] = False

    def __post_init__(self) -> None:
        if not (isinstance(self.report, bool) or callable(self.report)):
            raise ValueError(
                'adjoint_options["report"] must be True, False or a function that is called with the reconstruction '
                f"error, but is {self.report!r}"
            )
        if self.tolerance is not None and not (_is_number(self.tolerance) and self.tolerance > 0):
            raise ValueError(f'adjoint_options["tolerance"] must be a positive number, but is {self.tolerance!r}')
        if self.corrections is not None and not (
            isinstance(self.corrections, int) and not isinstance(self.corrections, bool) and self.corrections >= 0
        ):
            raise ValueError(
                f'adjoint_options["corrections"] must be an integer from 0 on, but is {self.corrections!r}'
            )

    @property
    def keep(self) -> Keep:
        """The outputs and the last state."""
        return Keep.OUTPUTS

    def backward(
        self,
        tape: Tape,
        stepper: Stepper,
        field: Field,
        check: ReplayCheck,
        outputs: Sequence[Tensor | None],
        times: Times,
    ) -> Gradients:
        """Sweep back, recovering the state that each step started from."""
        recovery = Recovery(stepper, field, check, self.corrections)
        residuals = ReplayCheck("warn" if check.active else "ignore", 0.0)  # of the steps from where stepping back led
        gradients = sweep(tape, stepper, field, residuals, outputs, recovery.start_of)
        recovery.conclude(len(tape), residuals.largest(), self.tolerance, self.report)
        return gradients


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


MODES: dict[str, Mode] = {mode.name: mode for mode in (Symplectic(), AdaptiveCheckpoint(), Baseline(), MemoryFree())}


def configured(
    mode: Mode, options: Mapping[str, object], hosts: Callable[[], Container[str]] = frozenset
) -> tuple[Mode, str]:
    """The mode under ``adjoint_options``, and what is done about a replay that is not the forward pass.

    Warns of unknown keys as torchdiffeq does; those in ``hosts()`` are the host's own, and have no effect.

    Raises:
        TypeError: if ``options`` is no dictionary.
        ValueError: if an option that is the mode's own has a wrong value.
    """
    if not isinstance(options, Mapping):
        raise TypeError(f'adjoint_options must be a dictionary such as {{"checkpoint": "stages"}}, but is {options!r}')
    known = mode.options | {"replay_check"}
    unknown = {key: value for key, value in options.items() if key not in known}
    if unknown:
        harmless = hosts()
        unknown = {key: value for key, value in unknown.items() if key not in harmless}
    if unknown:
        near = {key: match for key in unknown for match in difflib.get_close_matches(str(key), known, n=1)}
        meant = "".join(f' Did you mean "{match}" for "{key}"?' for key, match in near.items())
        warnings.warn(f"{mode.name}: Unexpected arguments {unknown}{meant and '.' + meant}", stacklevel=5)
    check = options.get("replay_check", mode.replay_check)
    if check not in list(REPLAY_CHECKS):
        raise ValueError(f'adjoint_options["replay_check"] must be one of {REPLAY_CHECKS}, but is {check!r}')
    own = {name: value for name, value in options.items() if name in mode.options}
    return dataclasses.replace(mode, **own) if own else mode, str(check)
