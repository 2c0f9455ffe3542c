"""Learning a partial differential equation's energy: the data against closed forms, the model against its structure."""

from __future__ import annotations

import math
from functools import cache, partial

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import torchdiffeq_symplectic  # noqa: F401  registers the gradient modes
from torchdiffeq_symplectic.experiments.benchmark.problem import flatten
from torchdiffeq_symplectic.experiments.benchmark.problems import pde
from torchdiffeq_symplectic.experiments.benchmark.problems.pde import (
    CAHN_HILLIARD,
    KDV,
    EnergyField,
    Equation,
    learning_problem,
    trajectories,
)

each_equation = pytest.mark.parametrize("equation", [KDV, CAHN_HILLIARD], ids=lambda equation: equation.name)
NOW = torch.zeros(())


def grid(equation: Equation) -> Tensor:
    return equation.spacing * torch.arange(pde.POINTS, dtype=torch.float64)


@cache
def snapshots(equation: Equation) -> Tensor:
    return trajectories(equation, 25, torch.Generator().manual_seed(0))


class TrueDensity(nn.Module):
    """The density of H over ``equation.scale``, V(u) + (s/2) u_x², in the place of ``EnergyField``'s network."""

    def __init__(self, equation: Equation) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, u: Tensor) -> Tensor:
        potential = u**3 if self.equation is KDV else (u**2 - 1) ** 2 / 4
        gradient = (u.roll(-1, dims=-1) - u) / self.equation.spacing
        return (potential + self.equation.gradient_energy / 2 * gradient**2) / self.equation.scale


def true_field(equation: Equation) -> EnergyField:
    field = EnergyField(equation)
    field.density = TrueDensity(equation)  # type: ignore[assignment]
    return field


def relative(error: Tensor, size: Tensor) -> float:
    return float((error.norm() / size.norm()).detach())


@pytest.mark.parametrize("kappa", [2.2, 2.6])
def test_a_soliton_travels_at_its_speed_in_its_shape(kappa: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """u = 2 κ² sech²(κ (x + 4 κ² t)) but for O(dx²), so u_t = 4 κ² u_x = -16 κ⁵ sech² tanh."""
    errors = []
    for points in (256, 512):
        monkeypatch.setattr(pde, "POINTS", points)
        x = kappa * (grid(KDV) - 5.0)
        expected = -16 * kappa**5 * torch.cosh(x) ** -2 * torch.tanh(x)
        errors.append(relative(KDV.slope(NOW, 2 * kappa**2 * torch.cosh(x)[None] ** -2) - expected, expected))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("waves", [1, 5, 7, 8, 12])
def test_small_waves_in_the_cahn_hilliard_equation_grow_at_their_rate(waves: int) -> None:
    wave = 1e-6 * torch.sin(2 * math.pi * waves / CAHN_HILLIARD.length * grid(CAHN_HILLIARD))[None]
    second = (2 / CAHN_HILLIARD.spacing * math.sin(math.pi * waves / pde.POINTS)) ** 2  # k², of the differences
    rate = second * (1 - CAHN_HILLIARD.gradient_energy * second)
    assert relative(CAHN_HILLIARD.slope(NOW, wave) - rate * wave, rate * wave) < 1e-8
    assert (rate > 0) == (waves < 8)


def test_kdv_keeps_its_energy() -> None:
    energy = true_field(KDV).energy(snapshots(KDV).flatten(0, 1)).unflatten(0, (25, -1))
    torch.testing.assert_close(energy, energy[:1].expand_as(energy), rtol=1e-5, atol=0.0)


def test_cahn_hilliard_loses_energy_always() -> None:
    energy = true_field(CAHN_HILLIARD).energy(snapshots(CAHN_HILLIARD).flatten(0, 1)).unflatten(0, (25, -1))
    assert bool((energy.diff(dim=0) < 0).all())
    assert bool((energy[-1] < 0.9 * energy[0]).all())


@each_equation
def test_data_keep_their_mass_and_differ(equation: Equation) -> None:
    mass = snapshots(equation).sum(dim=-1)
    torch.testing.assert_close(mass, mass[:1].expand_as(mass), rtol=1e-9, atol=1e-9)
    assert float(snapshots(equation).std(dim=1).min(dim=0).values.max()) > 0.01


@each_equation
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


@each_equation
def test_the_field_of_the_true_density_is_the_equation(equation: Equation) -> None:
    u = snapshots(equation)[-1]
    torch.testing.assert_close(true_field(equation)(NOW, u), equation.slope(NOW, u), rtol=1e-9, atol=1e-6)


@each_equation
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_symplectic_gradient_is_that_of_backpropagation(equation: Equation, dtype: torch.dtype, limit: float) -> None:
    problem = learning_problem(equation, 0).to(dtype)
    ways = torchdiffeq.odeint, partial(torchdiffeq.odeint_adjoint, adjoint_method="symplectic")
    expected, found = (flatten(problem.gradient(solver)) for solver in ways)
    assert relative(found - expected, expected) < limit
