"""The gradient is exact whatever the field does: layers used by turns, gradients inside, solves inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import (
    ADAPTIVE,
    BACKPROPAGATION,
    DOUBLE,
    FEW,
    METHODS,
    OF_TORCHDYN,
    Mixing,
    Problem,
    arguments_of,
    assert_exact,
    assert_same_gradients,
    gradients_of,
    loss_of,
    over,
    problem_for,
    solve,
    uniform,
)
from torch import Tensor, nn

# One of each kind that carries slopes, or none.
FAMILY = [n for n in ("rk4", "dopri5", "adaptive_heun", "implicit_adams") if n in METHODS]
BOTH = [*FAMILY, *(n for n in FEW if n in OF_TORCHDYN)]
T = torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE)


class UsedByTurns(nn.Module):
    """One layer early, another late, a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.never = (Mixing(4, seed=seed) for seed in (11, 12, 13))

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = self.early(t, y) if t < 0.6 else self.late(t, y)
        return slope


@over(BOTH)
def test_parameters_that_are_used_only_at_some_times(mode: str, method: str) -> None:
    problem = problem_for(method, (2, 2))
    problem.field = UsedByTurns()
    found = assert_exact(problem, mode, method)
    assert found["early.weight"].any()
    assert found["late.weight"].any()
    assert not found["never.weight"].any()


class ManyLayers(nn.Module):
    """More parameters than are asked for at every stage; which two are used depends on time."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(uniform(3, 3, seed=30 + i)) for i in range(layers)])
        self.shared = nn.Parameter(uniform(3, seed=29))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        position = min(int(float(t.detach()) * len(self.weights)), len(self.weights) - 2)
        slope: Tensor = torch.sin(y @ self.weights[position] + self.shared * t) @ self.weights[position + 1].t()
        return slope


@pytest.mark.parametrize("layers", [20, 80])
@over(["rk4", "dopri5"])
def test_many_parameters_each_used_at_some_times(mode: str, method: str, layers: int) -> None:
    t = torch.tensor([0.0, 0.31, 0.7], dtype=DOUBLE, requires_grad=True)
    problem = Problem(ManyLayers(layers), uniform(2, 3, seed=8).requires_grad_(), t)
    found = assert_exact(problem, mode, method)
    assert len(found) == layers + 3
    assert [name for name, gradient in found.items() if not gradient.any()]


@pytest.mark.parametrize("kind", [tuple, list, iter], ids=["tuple", "list", "iterator"])
@over(["rk4"])
def test_parameters_in_any_iterable(mode: str, method: str, kind: Callable[[Any], Any]) -> None:
    field, problem = Mixing(6), problem_for(method)
    problem.field, problem.extra = field.forward, dict(field.named_parameters())
    problem.adjoint = {"adjoint_params": kind(list(field.parameters()))}
    assert_exact(problem, mode, method)


class Hutchinson(nn.Module):
    """FFJORD's field: the divergence by one noise vector, kinetic energy and the Jacobian's norm beside it."""

    def __init__(self, inner: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.inner, self.noise = inner, noise

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = state[0].requires_grad_()
            slope = self.inner(t, z)
            (product,) = torch.autograd.grad(slope, z, self.noise, create_graph=True)
        divergence = (product * self.noise).sum(1)
        return slope, -divergence, slope.square().sum(), product.square().sum(1, keepdim=True)


@pytest.mark.parametrize("time_grad", [False, True], ids=["t-fixed", "t-grad"])
@over(FAMILY)
def test_a_field_that_differentiates_inside(mode: str, method: str, time_grad: bool) -> None:
    z = uniform(2, 3, seed=6).requires_grad_()
    rest = torch.zeros(2, dtype=DOUBLE), torch.zeros((), dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE)
    t = torch.tensor([0.9, 0.4, 0.1], dtype=DOUBLE).requires_grad_(time_grad)
    field = Hutchinson(Mixing(6), torch.sign(uniform(2, 3, seed=7)))
    assert_exact(Problem(field, (z, *rest), t), mode, method)


class Nested(nn.Module):
    """A field that solves another equation for its value; ``solve`` is odeint or odeint_adjoint in a mode."""

    def __init__(self, solve: Callable[..., Tensor]) -> None:
        super().__init__()
        self.outer, self.inner, self.solve = Mixing(3, seed=50), Mixing(3, seed=60), solve

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        times = torch.stack([torch.zeros_like(t), 0.3 + 0.1 * t])
        slope: Tensor = self.outer(t, self.solve(self.inner, y, times, method="heun3")[-1])
        return slope


@over(["rk4", "dopri5"])
def test_a_field_that_solves_inside(mode: str, method: str) -> None:
    plain = Nested(torchdiffeq.odeint)
    nested = Nested(lambda *args, **kwargs: torchdiffeq.odeint_adjoint(*args, **kwargs, **arguments_of(mode)))
    t, y0 = T.clone().requires_grad_(), uniform(3, seed=5).requires_grad_()
    truth, found = solve(BACKPROPAGATION, plain, y0, t, method), solve(mode, nested, y0, t, method)
    assert torch.equal(found, truth)
    wanted = [{"y0": y0, "t": t} | dict(field.named_parameters()) for field in (plain, nested)]
    assert_same_gradients(gradients_of(loss_of(found), wanted[1]), gradients_of(loss_of(truth), wanted[0]))


@pytest.mark.parametrize("inner", ["odeint", "odeint_adjoint"])
def test_solves_inside_of_the_field_are_under_the_same_choice_when_replayed_outside(inner: str) -> None:
    # The functions that `use` reaches, which in the truth run under no choice: odeint_adjoint would not be exact.
    def solve_inside(*args: Any, **kwargs: Any) -> Tensor:
        solution: Tensor = getattr(torchdiffeq, inner if in_use else "odeint")(*args, **kwargs)
        return solution

    nested = Nested(solve_inside)
    y0, results = uniform(3, seed=3).requires_grad_(), []
    for in_use in (False, True):
        solution = solve("use:symplectic" if in_use else BACKPROPAGATION, nested, y0, T)
        results.append(gradients_of(loss_of(solution), {"y0": y0, **dict(nested.named_parameters())}))
    assert_same_gradients(results[1], results[0])


def of_an_energy(t: Tensor, y: Tensor, leaf: Tensor) -> Tensor:
    """As energy models do it; what the host solves without gradients would then have a graph."""
    with torch.enable_grad():
        x = y if y.requires_grad else y.requires_grad_()
        return -torch.autograd.grad(torch.cos(x @ leaf + t).sum(), x, create_graph=True)[0]


FIELDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "of-an-energy": of_an_energy,
    "constant": lambda t, y, leaf: torch.ones_like(y),
    "new-tensor": lambda t, y, leaf: torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE).expand(2, 3),
    "detached": lambda t, y, leaf: torch.sin(y @ leaf).detach(),
    "time-alone": lambda t, y, leaf: torch.sin(t) * torch.ones_like(y),
    "parameter-alone": lambda t, y, leaf: leaf[:2] * 2,
    "the-parameter-itself": lambda t, y, leaf: leaf[:2],
    "state-itself": lambda t, y, leaf: y,
    "view-of-state": lambda t, y, leaf: y.flip(0),
    "sometimes-detached": lambda t, y, leaf: torch.sin(y @ leaf) if t > 0.5 else torch.cos(y).detach(),
    "0-d": lambda t, y, leaf: (y @ leaf).sum() * t,
    "row": lambda t, y, leaf: torch.sin(y @ leaf)[1],
    "expanded": lambda t, y, leaf: torch.sin(y @ leaf)[:1].expand(2, 3),
    "transposed": lambda t, y, leaf: torch.sin(leaf.t() @ y.t()).t(),
}


@pytest.mark.parametrize("name", FIELDS)
@over(BOTH, every=2)
def test_fields_of_unusual_results(mode: str, method: str, name: str) -> None:
    """No graph counts as zero, and a slope of smaller shape is broadcast to the state's."""
    if name in ("0-d", "row") and method in ADAPTIVE:
        pytest.skip("torchdiffeq's interpolation takes no slope of a smaller shape")
    leaf = uniform(3, 3, seed=2).requires_grad_()
    t, y0 = T.clone().requires_grad_(), uniform(2, 3, seed=4).requires_grad_()
    problem = Problem(lambda t, y, args=None: FIELDS[name](t, y, leaf), y0, t, {"leaf": leaf})
    problem.adjoint = {"adjoint_params": (leaf,)}
    assert_exact(problem, mode, method)


@pytest.mark.filterwarnings("ignore::torchdiffeq_symplectic.MissingGradientWarning")  # odeint_adjoint's false alarm
@over(["rk4", "dopri5"], ["symplectic", "aca", "use:symplectic", "use:aca"])
def test_a_field_that_makes_a_leaf_of_its_own(mode: str, method: str) -> None:
    """A score network: the slope is a gradient in a leaf that each evaluation makes, which nobody need list."""
    weight, y0 = uniform(3, seed=1).requires_grad_(), uniform(3, seed=2).requires_grad_()

    def field(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y.detach().clone().requires_grad_()
            (score,) = torch.autograd.grad((weight * x).sin().sum(), x, create_graph=True)
        return score + y

    assert_exact(Problem(field, y0, T, {"weight": weight}, adjoint={"adjoint_params": (weight,)}), mode, method)


class SetsItself(nn.Module):
    """Takes a parameter from the first state that it sees, and keeps the last solution; it is the model itself."""

    solution: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift, self.ready = Mixing(6), nn.Parameter(torch.zeros(3, dtype=DOUBLE)), False

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.shift.copy_(-y.mean(dim=0))
            self.ready = True
        result: Tensor = self.inner(t, y + self.shift)
        return result


@over([name for name in FEW if name in BOTH])
def test_a_field_that_sets_a_parameter_and_keeps_its_solution(mode: str, method: str) -> None:
    field, problem, results = SetsItself(), problem_for(method, time_grad=False), []
    wanted = {"y0": problem.y0, **dict(field.named_parameters())}
    for name in (mode, BACKPROPAGATION, mode):  # at last in the place of a solution whose graph holds the field
        field.solution = solve(name, field, problem.y0, problem.t, method)
        results.append(gradients_of(loss_of(field.solution), wanted))
    for found in (results[0], results[2]):
        assert_same_gradients(found, results[1])
