"""What ``torchdiffeq-symplectic check`` takes for granted of torchdyn besides the modes' own seams.

Each failure says what a new torchdyn does otherwise; where it is used stands in
``torchdiffeq_symplectic/experiments/check/methods.py``.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from torch import Tensor
from torchdyn.core import MultipleShootingProblem, ODEProblem
from torchdyn.numerics import odeint
from torchdyn.numerics.solvers import hyper
from torchdyn.numerics.solvers.ode import MS_SOLVER_DICT, SOLVER_DICT

from torchdiffeq_symplectic.experiments.check.methods import torchdyn_methods

MODULE = sys.modules["torchdyn.numerics.odeint"]  # the package has a function of this name as well
TOLERANCES = {"atol": 1e-3, "rtol": 1e-3}  # those that torchdyn's odeint says nothing of
T = torch.tensor([0.0, 0.3, 1.0])
X = torch.tensor([[0.2, -1.0, 0.5], [1.5, 0.1, -0.7]])


class Field(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(-0.5))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.rate * x


@pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
def test_the_function_that_chooses_the_first_step_is_looked_up_at_each_solve(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose, seen = MODULE.init_step, []

    def watching(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(choose(*args, **kwargs))
        return seen[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(MODULE, "init_step", watching)
    odeint(Field(), X, T, solver)
    assert len(seen) == 1, "the first step is chosen elsewhere: it is to be a constant for what modes are compared with"


def test_every_class_of_solvers_is_measured() -> None:
    names = [method.name for method in torchdyn_methods()]
    assert len(set(names)) == len(names)
    for table in (SOLVER_DICT, MS_SOLVER_DICT):
        for solver in set(table.values()):
            assert {name for name, other in table.items() if other is solver} & set(names), f"{solver} is left out"
    assert {"HyperEuler", "HyperMidpoint", "HyperRungeKutta4"} <= set(names)


def test_hypersolvers_are_made_of_a_network() -> None:
    x = ODEProblem(Field(), hyper.HyperEuler(Field()), **TOLERANCES)(X, T)[1]
    assert x.shape == (3, 2, 3)


def test_problems_give_times_and_solution() -> None:
    span = torch.linspace(0, 1, 8)  # multiple shooting needs more times than iterations
    for problem in (ODEProblem(Field(), "rk4", **TOLERANCES), MultipleShootingProblem(Field(), "mszero")):
        times, solution = problem(X, span)
        assert times.shape == span.shape
        assert solution.shape == (8, 2, 3)
