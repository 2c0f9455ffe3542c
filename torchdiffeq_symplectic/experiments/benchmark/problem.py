"""What a benchmark solves and differentiates: problems, and series of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Axis", "Case", "Problem", "Series", "Solver", "State", "as_tuple", "flatten", "gradient"]

State: TypeAlias = Tensor | tuple[Tensor, ...]  # a state, or a solution, in torchdiffeq's form
Solver: TypeAlias = Callable[..., State]  # called as torchdiffeq's odeint is


@dataclass(frozen=True)
class Problem:
    """The loss of an initial value problem's solution, as a function of the initial state and the field's parameters.

    Attributes:
        field: ``field(t, y)``, the slope at time ``t`` (no dimension) and state ``y`` (in the shape of ``y0``). An
            ``nn.ModuleList`` is a stack of fields: each is solved over ``t``, from the last state of the one before.
        y0: state at ``t[0]``, a tensor or a tuple of tensors.
        t: output times, shape ``(T,)``, increasing or decreasing.
        loss: maps the solution (of the last field of a stack), of shape ``(T, *y0.shape)`` or a tuple of such, to a
            tensor without dimensions. It must take a solution of any dtype, on any device.
        method: torchdiffeq's name of the method.
        rtol: relative tolerance.
        atol: absolute tolerance, in the units of the state.
        options: torchdiffeq's options of the method. Give an adaptive one ``first_step``: if the solver chooses the
            first step itself, backpropagation through it also differentiates that choice, which no other mode does.
            Give one of fixed steps ``step_size``.
    """

    field: nn.Module
    y0: State
    t: Tensor
    loss: Callable[[State], Tensor]
    method: str = "dopri5"
    rtol: float = 1e-7
    atol: float = 1e-9
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def has_fixed_steps(self) -> bool:
        """Whether the method does not choose its steps."""
        return "step_size" in self.options

    @cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the loss is differentiated with respect to: the parts of y0, then the field's trainable parameters."""
        parameters = [parameter for parameter in self.field.parameters() if parameter.requires_grad]
        return (*self._initial_state, *parameters)

    @cached_property
    def _initial_state(self) -> tuple[Tensor, ...]:
        return tuple(part.detach().clone().requires_grad_() for part in as_tuple(self.y0))

    def solve(self, solver: Solver) -> State:
        """The solution by ``solver``, which is called once for each field, in their order."""
        state: State = self._initial_state if isinstance(self.y0, tuple) else self._initial_state[0]
        solution = state
        for field in self.field if isinstance(self.field, nn.ModuleList) else [self.field]:
            solution = solver(
                field, state, self.t, rtol=self.rtol, atol=self.atol, method=self.method, options=dict(self.options)
            )
            state = tuple(part[-1] for part in solution) if isinstance(solution, tuple) else solution[-1]
        return solution

    def gradient(self, solver: Solver) -> tuple[Tensor, ...]:
        """One forward pass by ``solver`` and one backward pass: the gradients with respect to ``leaves``."""
        return gradient(self.loss(self.solve(solver)), self.leaves)

    def to(self, device: torch.device | str) -> Problem:
        """The same problem on a device: a copy but for the loss, which must take a solution on any device."""
        y0 = tuple(part.to(device) for part in as_tuple(self.y0))
        return self.replace(
            field=copy.deepcopy(self.field).to(device),
            y0=y0 if isinstance(self.y0, tuple) else y0[0],
            t=self.t.to(device),
        )

    def double(self) -> Problem:
        """The same problem with state, parameters and times in float64."""
        y0 = tuple(part.double() for part in as_tuple(self.y0))
        return self.replace(
            field=copy.deepcopy(self.field).double(),
            y0=y0 if isinstance(self.y0, tuple) else y0[0],
            t=self.t.double(),
        )

    def replace(self, **changes: Any) -> Problem:
        """The same problem but for ``changes``."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Case:
    """A problem of a series.

    Attributes:
        label: tells it from the others of its series.
        build: makes it on the CPU, given a seed; torch's global generators are left as they are.
        value: what varies along the series, if something does.
        panel: cases of one panel make up one curve for each contender.
        without: contenders that are left out: name -> why.
    """

    label: str
    build: Callable[[int], Problem]
    value: float | None = None
    panel: str = ""
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Axis:
    """What varies along a series; drawn logarithmic."""

    label: str
    falling: bool = False


@dataclass(frozen=True)
class Series:
    """Problems that are measured for one purpose.

    Attributes:
        name: what the user types.
        title: the question that it answers.
        cases: its problems.
        axis: what varies along them; without one each case stands for itself.
        shows: the quantities that its picture shows, of :func:`compare`'s columns.
        budget: evaluations after which a contender is stopped.
        rounding: whether errors are those of the problem's own dtype, rounding included; else all is in float64.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    axis: Axis | None = None
    shows: tuple[str, ...] = ("gradient_error", "peak_bytes", "relative_time")
    budget: int = 20_000
    rounding: bool = False


def gradient(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``loss`` with respect to ``leaves``, zero for those that it does not depend on."""
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries one after the other in float64, shape ``(M,)``."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def as_tuple(state: State) -> tuple[Tensor, ...]:
    """A state's tensors."""
    return state if isinstance(state, tuple) else (state,)
