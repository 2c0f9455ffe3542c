"""Learning a partial differential equation's energy: the data against closed forms, the model against its structure."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor

import torchdiffeq_symplectic  # noqa: F401  registers the gradient modes
from torchdiffeq_symplectic.experiments.benchmark.problem import Problem, flatten, gradient
from torchdiffeq_symplectic.experiments.benchmark.problems.pde import (
    CAHN_HILLIARD,
    KDV,
    EnergyField,
    Equation,
    initial_states,
    learning_problem,
    trajectories,
)

EQUATIONS = pytest.mark.parametrize("equation", [KDV, CAHN_HILLIARD], ids=lambda equation: equation.name)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
NOW = torch.zeros(())


def grid(equation: Equation) -> Tensor:
    return equation.length / equation.points * torch.arange(equation.points, dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def small_problem(equation: Equation, seed: int = 0, dtype: torch.dtype = torch.float32) -> Problem:
    return learning_problem(equation, seed, batch=4, width=16, dtype=dtype)


@cache
def snapshots(equation: Equation, count: int = 25) -> Tensor:
    initial = initial_states(equation, 4, generator())
    return trajectories(equation, initial, equation.interval * torch.arange(count + 1, dtype=torch.float64))


def relative(error: Tensor, size: Tensor) -> float:
    return float((error.norm() / size.norm()).detach())


@pytest.mark.parametrize("kappa", [0.8, 1.2])
def test_kdv_soliton_travels_at_its_speed_in_its_shape(kappa: float) -> None:
    equation = replace(KDV, length=40.0, points=256)
    t = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    place = grid(equation) - 25.0 + 4 * kappa**2 * t[:, None, None]
    exact = 2 * kappa**2 / torch.cosh(kappa * place) ** 2
    solution = trajectories(equation, exact[0], t)
    assert solution.dtype == torch.float64
    torch.testing.assert_close(solution, exact, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("waves", [1, 5, 7, 8, 12])
def test_small_waves_in_the_cahn_hilliard_equation_grow_at_their_rate(waves: int) -> None:
    k = 2 * math.pi * waves / CAHN_HILLIARD.length
    rate = k**2 * (1 - CAHN_HILLIARD.gradient_energy * k**2)
    wave = 1e-6 * torch.sin(k * grid(CAHN_HILLIARD))[None]
    t = torch.tensor([0.0, 4e-4], dtype=torch.float64)
    solution = trajectories(CAHN_HILLIARD, wave, t)
    assert relative(solution[1] - math.exp(rate * 4e-4) * wave, solution[1]) < 3e-6
    assert (rate > 0) == (waves < 8)


@EQUATIONS
def test_random_draws_repeat_and_leave_the_global_generator_alone(equation: Equation) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (small_problem(equation, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    for repeated, differing, leaf in zip(again.leaves, other.leaves, first.leaves, strict=True):
        assert torch.equal(repeated, leaf)
        assert not torch.equal(differing, leaf)


@pytest.mark.parametrize("changes", [{"order": 3}, {"potential": (0.0,) * 6}], ids=str)
def test_an_equation_out_of_scope_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="order must be 1 or 2, and potential have at most 5"):
        replace(KDV, **changes)


@EQUATIONS
def test_slopes_keep_or_lower_the_learned_energy_and_keep_the_mass(equation: Equation) -> None:
    field, u = EnergyField(equation, 16).double(), snapshots(equation)[-1].clone().requires_grad_()
    slope = field(NOW, u)
    (force,) = torch.autograd.grad(field.energy(u).sum(), u)
    change, size = (force * slope).sum(dim=1), force.norm(dim=1) * slope.norm(dim=1)
    if equation.order == 1:
        assert bool((change.abs() < 1e-14 * size).all())
    else:
        assert bool((change < -0.01 * size).all())
    assert bool((slope.sum(dim=1).abs() < 1e-13 * slope.abs().sum(dim=1)).all())


@EQUATIONS
@DTYPES
def test_symplectic_gradient_is_that_of_backpropagation(equation: Equation, dtype: torch.dtype) -> None:
    problem = small_problem(equation, dtype=dtype)
    expected, found = (
        flatten(gradient(problem.loss(problem.solve(solver)), problem.leaves))
        for solver in (torchdiffeq.odeint, partial(torchdiffeq.odeint_adjoint, adjoint_method="symplectic"))
    )
    assert relative(found - expected, expected) < (1e-12 if dtype == torch.float64 else 1e-5)
