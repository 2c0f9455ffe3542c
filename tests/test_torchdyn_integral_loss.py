"""torchdyn's ``integral_loss``: backward gives the gradient of the loss and of the integral, by the solver's weights.

The truth carries the integral in the first column of the state, as torchdyn's own autograd mode does. There an adaptive
solver would look at that column when it chooses its steps; for the truth it is made not to.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    OF_TORCHDYN,
    Problem,
    assert_same_gradients,
    first_step_held,
    gradients_of,
    loss_of,
    norm_of,
    problem_for,
    uniform,
)
from torch import Tensor, nn
from torchdyn.core import ODEProblem
from torchdyn.numerics.solvers.ode import DormandPrince45, Midpoint
from torchdyn_runs import (
    TOLERANCES,
    accepted,
    each_named_kind,
    each_way_back,
    model_for,
    returned,
    steps_recorded,
)

# The solvers whose steps add up slopes, so that it is known how a running cost is to be added up.
SUMMING = [name for name in OF_TORCHDYN if METHODS[name].stages] + [
    "torchdyn-exponential",
    "torchdyn-learned",
    "torchdyn-converging",
]
OTHERS = [name for name in OF_TORCHDYN if name not in SUMMING]
each_kind = pytest.mark.parametrize("method", ["torchdyn-rk4", "torchdyn-dopri5", "torchdyn-stale-heun"])


def running(t: Tensor, x: Tensor) -> Tensor:
    """A running cost of time and state, one number a sample."""
    return (torch.cos(3 * t) * x + x.square()).mean(-1)


class Cost(nn.Module):
    """One with parameters, one of them idle, as a column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.idle = nn.Parameter(uniform(3, seed=21)), nn.Parameter(uniform(2, seed=22))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x * self.weight + t).sum(-1, keepdim=True)


def with_cost(
    method: str, cost: Callable[..., Any] = running, dtype: torch.dtype = DOUBLE, *, time_grad: bool = True
) -> Problem:
    problem = problem_for(method, dtype=dtype, time_grad=time_grad)
    problem.settings["integral_loss"] = cost
    if isinstance(cost, nn.Module):
        problem.extra = {f"cost.{name}": value for name, value in cost.named_parameters()}
    return problem


def with_a_column(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x], 1)


@contextlib.contextmanager
def first_column_ignored() -> Iterator[None]:
    """Adaptive steps are chosen, accepted and rejected as if the first column of the state were not there."""
    module = sys.modules["torchdyn.numerics.odeint"]
    choose, norm = module.init_step, module.hairer_norm

    def choose_by_the_rest(f: Any, slope: Tensor, x: Tensor, *rest: Any) -> Tensor:
        def rest_of_field(t: Tensor, y: Tensor) -> Tensor:
            return f(t, torch.cat([x[:, :1], y], 1))[:, 1:]  # type: ignore[no-any-return]

        return choose(rest_of_field, slope[:, 1:], x[:, 1:], *rest)  # type: ignore[no-any-return]

    with first_step_held(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "init_step", lambda *args: choose_by_the_rest(*args).detach())
        patch.setattr(module, "hairer_norm", lambda tensor: norm(tensor[:, 1:]))
        yield


def truth_of(problem: Problem, method: str) -> tuple[Tensor, Tensor]:
    """The solution, and the integral at the end summed over the batch, both with torchdyn's graph."""
    with first_column_ignored():
        model = model_for(problem, BACKPROPAGATION, method)
        _, solution = model(with_a_column(problem.y0), problem.t, **problem.settings.get("call", {}))
    return solution[..., 1:], solution[-1, :, 0].sum()


def assert_exact(
    problem: Problem, mode: str, method: str, loss: Callable[[Tensor], Tensor] = loss_of
) -> dict[str, Tensor]:
    """The gradient of the loss alone, asked for in the mode, is the one of loss plus integral."""
    wanted = problem.wanted()
    expected, integral = truth_of(problem, method)
    found = returned(problem, mode, method)[1]
    # One column less may change a matrix product's rounding, but no more than that.
    precision = 1e-12 if found.dtype == DOUBLE else 1e-5
    torch.testing.assert_close(found, expected, rtol=precision, atol=precision / 10)
    gradients = gradients_of(loss(found), wanted)
    assert_same_gradients(gradients, gradients_of(loss(expected) + integral, wanted), found.dtype)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def nothing(solution: Tensor) -> Tensor:
    """torchdyn's own test of integral losses goes backward from this."""
    return 0.0 * solution.sum()


@pytest.mark.parametrize("method", SUMMING)
@pytest.mark.parametrize(
    "mode", ["symplectic", *(pytest.param(m, marks=pytest.mark.slow) for m in ("stages", "aca", "baseline"))]
)
def test_integral_is_added_to_the_loss(mode: str, method: str) -> None:
    for loss in (loss_of, nothing):
        found = assert_exact(with_cost(method), mode, method, loss)
        assert all(norm_of(found[name]) > 0 for name in ("y0[0]", "t", "weight", "bias"))


@pytest.mark.parametrize("method", OTHERS)
@each_way_back
def test_solvers_of_another_form_are_refused(mode: str, method: str) -> None:
    """They say nothing about how a running cost is to be added up."""
    with pytest.raises(NotImplementedError, match=r'(?s)integral_loss.*sensitivity="autograd"'):
        returned(with_cost(method), mode, method)


@each_kind
@pytest.mark.parametrize("mode", ["symplectic", "stages", "aca", "baseline"])
def test_values_are_those_without_an_integral(mode: str, method: str) -> None:
    """No column of the integral, and the same steps; the same without gradients."""
    expected = returned(problem_for(method), BACKPROPAGATION, method)[1]
    assert torch.equal(returned(with_cost(method), mode, method)[1], expected)
    with torch.no_grad():
        found = returned(with_cost(method), mode, method)[1]
    assert torch.equal(found, expected)
    assert not found.requires_grad


def of_target() -> tuple[Any, dict[str, Tensor]]:
    root = uniform(3, seed=23).requires_grad_()
    target = torch.exp(root)
    return lambda t, x: (x - target).square().sum(-1), {"root": root}


COSTS: dict[str, Callable[[], tuple[Any, dict[str, Tensor]]]] = {
    "a closure": of_target,
    "of time alone": lambda: (lambda t, x: torch.cos(3 * t) * torch.ones_like(x[:, 0]), {}),
    "without a graph": lambda: (lambda t, x: torch.ones_like(x[:, 0]).detach(), {}),
}


@pytest.mark.parametrize("row", COSTS)
@each_kind
@each_way_back
def test_costs_of_every_kind(mode: str, method: str, row: str) -> None:
    cost, extra = COSTS[row]()
    problem = with_cost(method, cost)
    problem.extra = extra
    found = assert_exact(problem, mode, method)
    assert all(norm_of(found[name]) > 0 for name in extra)


@each_kind
@each_way_back
def test_parameters_of_the_integral_loss(mode: str, method: str) -> None:
    found = assert_exact(with_cost(method, Cost()), mode, method)
    assert norm_of(found["cost.weight"]) > 0
    assert torch.equal(found["cost.idle"], torch.zeros(2, dtype=DOUBLE))


@each_named_kind
@each_way_back
def test_single_precision(mode: str, method: str) -> None:
    assert_exact(with_cost(method, dtype=torch.float32), mode, method)


@each_way_back
def test_outputs_that_are_interpolated_or_not_all_saved(mode: str) -> None:
    """The integral is that over the steps; outputs inside them do not cut it."""
    problem, solver = with_cost("torchdyn-dopri5"), DormandPrince45(DOUBLE)
    problem.settings |= {"solver": solver, "interpolator": "4th"}
    problem.t = torch.linspace(0.1, 1.27, 30, dtype=DOUBLE, requires_grad=True)
    with steps_recorded(solver) as calls:
        assert_exact(problem, mode, "torchdyn-dopri5")
    assert len(accepted(calls)) < 60
    problem = with_cost("torchdyn-rk4")
    problem.settings["call"] = {"save_at": problem.t.detach()[[2, 7]]}
    assert_exact(problem, mode, "torchdyn-rk4")


@each_kind
@each_way_back
def test_every_call_adds_its_own_integral_and_a_second_backward_the_same(mode: str, method: str) -> None:
    """Two solves before one backward pass, of one of which the loss does not see the end."""
    problem = with_cost(method)
    wanted = problem.wanted()
    found = [returned(problem, mode, method)[1] for _ in range(2)]
    (one, cost), (other, another) = (truth_of(problem, method) for _ in range(2))
    loss = loss_of((found[0], found[1][:2]))
    first, second = gradients_of(loss, wanted), gradients_of(loss, wanted)
    assert_same_gradients(first, gradients_of(loss_of((one, other[:2])) + cost + another, wanted))
    assert all(torch.equal(first[name], second[name]) for name in wanted)  # type: ignore[arg-type]


@each_kind
@each_way_back
def test_ode_problem(mode: str, method: str) -> None:
    """It has no wrapper that could carry the integral: the truth carries it by hand."""
    problem = problem_for(method)
    problem.settings |= {"make": ODEProblem, **TOLERANCES}
    field, settings = problem.field, dict(problem.settings)

    def carrying(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return torch.cat([running(t, y[:, 1:])[:, None], field(t, y[:, 1:])], 1)

    with first_column_ignored():
        model = model_for(Problem(carrying, None, None, settings=settings), BACKPROPAGATION, method)
        _, truth = model(with_a_column(problem.y0), problem.t)
    problem.settings["integral_loss"] = running
    found, wanted = returned(problem, mode, method)[1], problem.wanted()
    expected = gradients_of(loss_of(truth[..., 1:]) + truth[-1, :, 0].sum(), wanted)
    assert_same_gradients(gradients_of(loss_of(found), wanted), expected)


@each_way_back
def test_midpoint_quadrature_in_closed_form(mode: str) -> None:
    """``x' = 0`` and ``l = x (1 + t)``: the midpoint rule is exact, ``x ((T - s) + (T^2 - s^2) / 2)``."""
    x = uniform(2, 1, seed=4).requires_grad_()
    t = torch.tensor([0.0, 0.5, 0.8, 2.0], dtype=DOUBLE, requires_grad=True)
    settings = {"solver": Midpoint(DOUBLE), "integral_loss": lambda t, x: x[:, 0] * (1 + t)}
    problem = Problem(lambda t, x, args=None: 0.0 * x, x, t, settings=settings)
    solution = returned(problem, mode, "torchdyn-midpoint")[1]
    of_x, of_t = torch.autograd.grad(nothing(solution), [x, t])
    total = float(x.detach().sum())
    torch.testing.assert_close(of_x, torch.full((2, 1), 4.0, dtype=DOUBLE), rtol=1e-14, atol=0)
    torch.testing.assert_close(of_t, torch.tensor([-total, 0, 0, 3 * total], dtype=DOUBLE), rtol=1e-13, atol=1e-14)


@each_way_back
def test_a_gradient_with_an_integral_is_not_differentiated_again(mode: str) -> None:
    problem = with_cost("torchdyn-rk4")
    solution = returned(problem, mode, "torchdyn-rk4")[1]
    with pytest.raises(NotImplementedError, match=r"integral_loss.*create_graph=True not"):
        torch.autograd.grad(solution[-1].square().sum(), problem.y0, create_graph=True)
