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

__all__ = ["Case", "Problem", "Series", "Solver", "State", "as_tuple", "flatten", "gradient"]

State: TypeAlias = Tensor | tuple[Tensor, ...]  # a state, or a solution, in torchdiffeq's form
Solver: TypeAlias = Callable[..., State]  # called as torchdiffeq's odeint is


@dataclass(frozen=True)
class Problem:
    """The loss of an initial value problem's solution, as a function of the initial state and the field's parameters.

    Attributes:
        field: ``field(t, y)``. An ``nn.ModuleList`` is a stack: each is solved over ``t``, from the last state of the
            one before.
        y0, t, method, rtol, atol: as for ``torchdiffeq.odeint``.
        loss: maps the solution, in any dtype and on any device, to a tensor without dimensions.
        options: the method's. Give an adaptive one ``first_step``: if the solver chooses that itself, backpropagation
            also differentiates the choice. Give one of fixed steps ``step_size``.
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
        return (*self._initial_state, *(p for p in self.field.parameters() if p.requires_grad))

    @cached_property
    def _initial_state(self) -> tuple[Tensor, ...]:
        return tuple(part.detach().clone().requires_grad_() for part in as_tuple(self.y0))

    def solve(self, solver: Solver) -> State:
        """The solution by ``solver``, which is called once for each field, in their order."""
        state: State = self._initial_state if isinstance(self.y0, tuple) else self._initial_state[0]
        solution = state
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        for field in self.field if isinstance(self.field, nn.ModuleList) else [self.field]:
            solution = solver(field, state, self.t, **settings, options=dict(self.options))
            state = tuple(part[-1] for part in solution) if isinstance(solution, tuple) else solution[-1]
        return solution

    def gradient(self, solver: Solver) -> tuple[Tensor, ...]:
        """One forward pass by ``solver`` and one backward pass: the gradients with respect to ``leaves``."""
        return gradient(self.loss(self.solve(solver)), self.leaves)

    def to(self, where: torch.device | str | torch.dtype) -> Problem:
        """A copy on a device, or in a dtype."""
        parts = tuple(part.to(where) for part in as_tuple(self.y0))
        y0 = parts if isinstance(self.y0, tuple) else parts[0]
        field: nn.Module = copy.deepcopy(self.field).to(where)
        return self.replace(field=field, y0=y0, t=self.t.to(where))

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
    axis: str = ""
    shows: tuple[str, ...] = ("gradient_error", "peak_bytes", "relative_time")
    budget: int = 20_000
    rounding: bool = False


def gradient(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``loss`` with respect to ``leaves``, zero for those that it does not depend on."""
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries one after the other in float64."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def as_tuple(state: State) -> tuple[Tensor, ...]:
    """A state's tensors."""
    return state if isinstance(state, tuple) else (state,)
