"""Runs of torchdyn's models on the harness's problems: what they return besides the solution, and the steps they take.

Import this only after ``pytest.importorskip("torchdyn")``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import BACKPROPAGATION, DOUBLE, METHODS, Mixing, Problem, first_step_held, neural_ode, problem_for
from torch import Tensor, nn

each_kind = pytest.mark.parametrize("method", ["torchdyn-rk4", "torchdyn-dopri5", "torchdyn-hyper-euler"])
each_named_kind = pytest.mark.parametrize("method", ["torchdyn-rk4", "torchdyn-dopri5"])
# torchdyn's loop and its recording are the same in all modes, so the default run takes each test in one.
SLOWER = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("stages", "aca", "baseline")]
each_way_back = pytest.mark.parametrize("mode", ["symplectic", *SLOWER])
TOLERANCES: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-3}  # odeint's defaults, of which it says nothing


def model_for(problem: Problem, mode: str, method: str) -> Any:
    """The model of a problem in a mode of the harness, or by backpropagation."""
    row = METHODS[method]
    settings = {**row.settings, "solver": row.solver, **problem.settings, **problem.adjoint}
    settings.pop("call", None)
    return neural_ode(mode, problem.field, **settings)


def returned(problem: Problem, mode: str, method: str, model: Any = None) -> tuple[Tensor, Any]:
    """Times and solution."""
    model = model_for(problem, mode, method) if model is None else model
    with first_step_held() if mode == BACKPROPAGATION else contextlib.nullcontext():
        found: tuple[Tensor, Any] = model(problem.y0, problem.t, **problem.settings.get("call", {}))
    return found


class Stiffening(Mixing):
    """A field that becomes fast half-way, so that steps are rejected."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        time = t.to(y.dtype)
        fast = 1 + 12 * torch.sigmoid(30 * (time - 0.5))
        slope: Tensor = super().forward(t, y) * fast + torch.sin(25 * time) * y.flip(0)
        return slope


def stiffening(solver: nn.Module) -> Problem:
    """A problem with rejected steps, for an adaptive solver of four entries."""
    problem = problem_for("torchdyn-dopri5", (2, 2))
    problem.field = Stiffening(4, seed=17)
    problem.settings |= {"solver": solver, **TOLERANCES}
    problem.t = torch.tensor([0.0, 0.8, 0.83, 1.3], dtype=DOUBLE, requires_grad=True)
    return problem


@dataclasses.dataclass
class TakenStep:
    """One call of a solver's step: the state and time it starts from, its size, and the state it arrives at."""

    x: Tensor
    t: Tensor
    dt: Tensor
    end: Tensor


@contextlib.contextmanager
def steps_recorded(solver: Any) -> Iterator[list[TakenStep]]:
    """The calls of a solver's step, those that are rejected included."""
    calls: list[TakenStep] = []
    step = type(solver).step

    def recording(self: Any, f: Any, x: Tensor, t: Tensor, dt: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = step(self, f, x, t, dt, **kwargs)
        calls.append(TakenStep(x, t, dt, found[1]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(solver), "step", recording)
        yield calls


def accepted(calls: list[TakenStep]) -> list[TakenStep]:
    """Those that the solver went on from, and the last."""
    followed = [one for one, other in itertools.pairwise(calls) if other.x is one.end]
    return [*followed, calls[-1]]
