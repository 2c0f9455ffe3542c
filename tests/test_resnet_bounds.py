"""The constants of the bound and the distance to the ODE, against closed forms; and the bound bounds it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from residual_blocks import DOUBLE, FORMS, forms, state
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet import ResidualField
from torchdiffeq_symplectic.resnet.bounds import Linearised, bound, lipschitz_constant
from torchdiffeq_symplectic.resnet.reference import Comparison, compare_with_solution

ROUNDING = 1e-12


class Scaled(nn.Module):
    """``a x``, a bare residual function."""

    def __init__(self, factor: float | Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.as_tensor(factor, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def compare(field: ResidualField, x: Tensor, accuracy: float = 1e-3) -> Comparison:
    return compare_with_solution(field.requires_grad_(False), x.detach(), accuracy)


def bound_of(found: Comparison) -> list[float]:
    return bound(found.amplifications, found.errors)


def assert_bounded(found: Comparison) -> None:
    assert found.trouble is None
    assert found.distance[-1] > 0
    for distance, most in zip(found.distance, bound_of(found), strict=True):
        assert distance <= most * (1 + ROUNDING)


def linearised(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Linearised, Tensor]:
    """With the Jacobian as a matrix."""
    jacobian = torch.autograd.functional.jacobian(function, x.detach())
    return Linearised(function, x), jacobian.reshape(x.numel(), x.numel())


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("shape", [(1,), (5,), (6, 4), (2, 3, 4)], ids=str)
def test_products_are_those_with_the_jacobian(shape: tuple[int, ...]) -> None:
    at, jacobian = linearised(lambda x: torch.sin(x) * x.roll(1, -1) + x.square().mean(), state(*shape))
    v = state(*shape, seed=3).detach()
    torch.testing.assert_close(at.jvp(v).flatten(), jacobian @ v.flatten(), rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(at.vjp(v).flatten(), jacobian.T @ v.flatten(), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1,), (2,), (60,), (8, 20)], ids=str)
def test_lipschitz_constant_is_the_largest_singular_value(shape: tuple[int, ...], seed: int) -> None:
    weight = state(shape[-1], shape[-1], seed=seed).detach()
    at, jacobian = linearised(lambda x: torch.tanh(x @ weight) @ weight.T, state(*shape, seed=seed + 9))
    largest = float(torch.linalg.svdvals(jacobian)[0])
    assert lipschitz_constant(at, generator()) == pytest.approx(largest, rel=1e-3)


def test_bound_is_the_recursion() -> None:
    assert bound([3.0, 0.5, 2.0], [1.0, 4.0, 0.0]) == [0.0, 1.0, 4.5, 9.0]
    assert bound([math.inf, 2.0], [1.0, math.inf])[-1] == math.inf
    assert bound([math.inf], [0.0]) == [0.0, 0.0]


def exponents(factors: list[float], interpolate: str) -> list[float]:
    """``∫ a`` from 0 to n/N: by the trapezium rule where ``a`` is linear between blocks. It ends constant."""
    following = factors if interpolate == "piecewise" else [*factors[1:], factors[-1]]
    means = [(a + b) / 2 / len(factors) for a, b in zip(factors, following, strict=True)]
    return [0.0, *itertools.accumulate(means)]


@pytest.mark.parametrize("interpolate", ["outputs", "weights", "piecewise"])
@pytest.mark.parametrize("count", [2, 5, 32])
def test_distance_to_the_solution_of_a_scalar_field(count: int, interpolate: str) -> None:
    factors = torch.linspace(-1.5, 2, count, dtype=DOUBLE).sin().tolist()
    field = ResidualField([Scaled(a) for a in factors], residual=True, interpolate=interpolate)
    found = compare(field, torch.tensor([0.5], dtype=DOUBLE))
    network = [0.5, *itertools.accumulate((1 + a / count for a in factors), lambda x, y: x * y, initial=0.5)][1:]
    solution = [0.5 * math.exp(exponent) for exponent in exponents(factors, interpolate)]
    exact = [abs(a - b) for a, b in zip(network, solution, strict=True)]
    assert found.distance == pytest.approx(exact, rel=2e-3, abs=1e-12)
    assert_bounded(found)


@pytest.mark.parametrize("name", FORMS)
def test_bound_holds_for_every_form_of_network(name: str) -> None:
    blocks, keywords, shape = forms()[name]
    assert_bounded(compare(ResidualField(blocks, **keywords), state(*shape)))


def test_what_the_solver_cannot_follow_is_said() -> None:
    class Bursting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 8 * x.square()

    found = compare(ResidualField([Bursting()] * 4, residual=True), torch.ones(2, dtype=DOUBLE))
    assert found.trouble is not None
    assert "between blocks 0 and 1" in found.trouble
    assert found.distance == [0.0, *[math.inf] * 4]
    assert bound_of(found)[-1] == math.inf
