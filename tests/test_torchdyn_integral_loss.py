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
from cases import assert_same_gradients, gradients_of, loss_of, norm_of, uniform
from torch import Tensor, nn
from torchdyn.core import ODEProblem
from torchdyn.numerics.solvers.ode import DormandPrince45, Midpoint, Tsitouras45
from torchdyn_cases import (
    DOUBLE,
    OF_ANOTHER_FORM,
    Field,
    Problem,
    State,
    accepted,
    each_explicit_solver,
    each_mode,
    first_step_held,
    problem_for,
    steps_recorded,
)

each_kind = pytest.mark.parametrize("solver", ["rk4", "dopri5", "stale-heun"])


def running(t: Tensor, x: Tensor) -> Tensor:
    """A running cost of time and state, one number a sample."""
    return (torch.cos(3 * t) * x + x.square()).mean(-1)


class Cost(nn.Module):
    """One with parameters, one of them idle, as a column."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform(width, seed=21))
        self.idle = nn.Parameter(uniform(2, seed=22))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x * self.weight + t).sum(-1, keepdim=True)


def with_cost(solver: str, cost: Callable[..., Any] = running, *, time_grad: bool = True) -> Problem:
    problem = problem_for(solver, time_grad=time_grad)
    problem.settings["integral_loss"] = cost
    if isinstance(cost, nn.Module):
        problem.params = {f"cost.{name}": value for name, value in cost.named_parameters()}
    return problem


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


def truth_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """The solution, and the integral at the end summed over the batch, both with torchdyn's graph."""
    x = problem.x
    assert isinstance(x, Tensor)
    with first_column_ignored():
        model = problem.model("autograd")
        _, solution = model(torch.cat([torch.zeros_like(x[:, :1]), x], 1), problem.t_span, **problem.call)
    return solution[..., 1:], solution[-1, :, 0].sum()


def assert_exact(problem: Problem, mode: str, loss: Callable[[Tensor], Tensor] = loss_of) -> dict[str, Tensor]:
    """The gradient of the loss alone, asked for in the mode, is the one of loss plus integral."""
    wanted = problem.wanted()
    expected, integral = truth_of(problem)
    _, found = problem.solve(mode)
    assert isinstance(found, Tensor)
    # One column less may change a matrix product's rounding, but no more than that.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    gradients = gradients_of(loss(found), wanted)
    assert_same_gradients(gradients, gradients_of(loss(expected) + integral, wanted), found.dtype)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def nothing(solution: Tensor) -> Tensor:
    """torchdyn's own test of integral losses goes backward from this."""
    return 0.0 * solution.sum()


@pytest.mark.parametrize("loss", [loss_of, nothing], ids=["loss", "no loss"])
@each_explicit_solver
@each_mode
def test_integral_is_added_to_the_loss(mode: str, solver: str, loss: Callable[[Tensor], Tensor]) -> None:
    found = assert_exact(with_cost(solver), mode, loss)
    assert all(norm_of(found[name]) > 0 for name in ("x", "t", "field.weight", "field.bias"))


@pytest.mark.parametrize("solver", OF_ANOTHER_FORM)
@each_mode
def test_solvers_without_weights_are_refused(mode: str, solver: str) -> None:
    """They say nothing about how a running cost is to be summed."""
    with pytest.raises(NotImplementedError, match=r'(?s)integral_loss.*sensitivity="autograd"'):
        with_cost(solver).solve(mode)


@each_kind
@each_mode
def test_values_are_those_without_an_integral(mode: str, solver: str) -> None:
    """No column of the integral, and the same steps."""
    problem, plain = with_cost(solver), problem_for(solver)
    _, found = problem.solve(mode)
    _, expected = plain.solve("autograd")
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert torch.equal(found, expected)


@each_kind
@each_mode
def test_parameters_of_the_integral_loss(mode: str, solver: str) -> None:
    found = assert_exact(with_cost(solver, Cost()), mode)
    assert norm_of(found["cost.weight"]) > 0
    assert torch.equal(found["cost.idle"], torch.zeros(2, dtype=DOUBLE))


@each_kind
@each_mode
def test_tensors_that_the_integral_loss_closes_over(mode: str, solver: str) -> None:
    root = uniform(3, seed=23).requires_grad_()
    target = torch.exp(root)
    problem = with_cost(solver, lambda t, x: (x - target).square().sum(-1))
    problem.params = {"root": root}
    assert norm_of(assert_exact(problem, mode)["root"]) > 0


@each_kind
@each_mode
def test_parameters_that_field_and_integral_loss_share(mode: str, solver: str) -> None:
    """As in ``integral_loss=lambda t, x: field(t, x).square().sum(-1)``, the kinetic regularisation."""
    problem = problem_for(solver)
    field = problem.field
    # A lambda, so that torchdyn does not register the field twice.
    problem.settings["integral_loss"] = lambda t, x: field(t, x).square().mean(-1)
    assert_exact(problem, mode)


@each_kind
@each_mode
def test_decreasing_times(mode: str, solver: str) -> None:
    problem = with_cost(solver)
    problem.t_span = problem.t_span.detach().flip(0).requires_grad_()
    assert_exact(problem, mode)


@each_kind
@each_mode
def test_an_integral_loss_of_the_time_alone(mode: str, solver: str) -> None:
    """Its only gradient is that of the times."""
    problem = with_cost(solver, lambda t, x: torch.cos(3 * t) * torch.ones_like(x[:, 0]))
    assert norm_of(assert_exact(problem, mode, nothing)["t"]) > 0


@each_kind
@each_mode
def test_an_integral_loss_without_gradients(mode: str, solver: str) -> None:
    problem = with_cost(solver, lambda t, x: torch.ones_like(x[:, 0]).detach(), time_grad=False)
    assert_exact(problem, mode)


@each_kind
@each_mode
def test_a_field_without_gradients(mode: str, solver: str) -> None:
    """Then the state at the start is all there is."""
    problem = with_cost(solver, time_grad=False)
    problem.field = lambda t, x, args=None: torch.full_like(x, 0.3)
    assert norm_of(assert_exact(problem, mode, nothing)["x"]) > 0


@pytest.mark.parametrize("points", [2, 30])
@each_kind
@each_mode
def test_few_and_many_times(mode: str, solver: str, points: int) -> None:
    problem = with_cost(solver)
    problem.t_span = torch.linspace(-0.2, 1.1, points, dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode)


@each_mode
def test_interpolated_outputs(mode: str) -> None:
    """The integral is that over the steps; outputs inside them do not cut it."""
    problem, solver = with_cost("dopri5"), DormandPrince45(DOUBLE)
    problem.settings |= {"solver": solver, "interpolator": "4th"}
    problem.t_span = torch.linspace(0.1, 1.27, 30, dtype=DOUBLE, requires_grad=True)
    with steps_recorded(solver) as calls:
        assert_exact(problem, mode)
    assert len(accepted(calls)) < 30


@each_mode
def test_outputs_that_are_not_all_saved(mode: str) -> None:
    problem = with_cost("rk4")
    problem.call = {"save_at": problem.t_span.detach()[[2, 7]]}
    assert_exact(problem, mode)


@pytest.mark.parametrize("solver", ["midpoint", "tsit5", "stale-heun"])
@each_mode
def test_single_precision_times_with_a_double_precision_state(mode: str, solver: str) -> None:
    problem = with_cost(solver)
    problem.t_span = torch.linspace(0, 1, 8, requires_grad=True)
    assert_exact(problem, mode)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_single_precision(mode: str, solver: str) -> None:
    problem = problem_for(solver, dtype=torch.float32)
    problem.settings["integral_loss"] = running
    wanted = problem.wanted()
    expected, integral = truth_of(problem)
    _, found = problem.solve(mode)
    assert isinstance(found, Tensor)
    gradients = gradients_of(loss_of(found), wanted)
    assert_same_gradients(gradients, gradients_of(loss_of(expected) + integral, wanted), torch.float32)


@each_kind
@each_mode
def test_every_call_adds_its_own_integral(mode: str, solver: str) -> None:
    """Two solves before one backward pass, of one of which the loss does not see the end."""
    problem = with_cost(solver)
    wanted = problem.wanted()
    model = problem.model(mode)
    found = [model(problem.x, problem.t_span)[1] for _ in range(2)]
    truth = [truth_of(problem) for _ in range(2)]
    loss = loss_of((found[0], found[1][:2]))
    expected = loss_of((truth[0][0], truth[1][0][:2])) + truth[0][1] + truth[1][1]
    assert_same_gradients(gradients_of(loss, wanted), gradients_of(expected, wanted), DOUBLE)


@each_kind
@each_mode
def test_a_second_backward_gives_the_same(mode: str, solver: str) -> None:
    problem = with_cost(solver)
    wanted = list(problem.wanted().values())
    _, solution = problem.solve(mode)
    assert isinstance(solution, Tensor)
    loss = loss_of(solution)
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@each_kind
@each_mode
def test_without_gradients_nothing_happens(mode: str, solver: str) -> None:
    problem = with_cost(solver)
    with torch.no_grad():
        _, found = problem.solve(mode)
    _, expected = problem_for(solver).solve("autograd")
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    assert not found.requires_grad
    assert torch.equal(found, expected)


@each_kind
@each_mode
def test_ode_problem(mode: str, solver: str) -> None:
    """It has no wrapper that could carry the integral: the truth carries it by hand."""
    problem = problem_for(solver)
    problem.make = ODEProblem
    problem.settings |= {"atol": 1e-3, "rtol": 1e-3}
    wanted, field, x = problem.wanted(), problem.field, problem.x
    assert isinstance(x, Tensor)

    def carrying(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return torch.cat([running(t, y[:, 1:])[:, None], field(t, y[:, 1:])], 1)

    augmented = Problem(carrying, x, problem.t_span, problem.settings, make=ODEProblem)
    with first_column_ignored():
        _, truth = augmented.model("autograd")(torch.cat([torch.zeros_like(x[:, :1]), x], 1), problem.t_span)
    problem.settings = problem.settings | {"integral_loss": running}
    _, found = problem.solve(mode)
    assert isinstance(found, Tensor)
    expected = gradients_of(loss_of(truth[..., 1:]) + truth[-1, :, 0].sum(), wanted)
    assert_same_gradients(gradients_of(loss_of(found), wanted), expected, DOUBLE)


class Pendulum(nn.Module):
    """Its acceleration, for ``order=2``; its whole slope for order one."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(uniform(4, 2, seed=24))
        self.whole = whole

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        acceleration = torch.sin(x @ self.stiffness + t)
        return torch.cat([x[:, 2:], acceleration], 1) if self.whole else acceleration


@each_kind
@each_mode
def test_second_order(mode: str, solver: str) -> None:
    """torchdyn's autograd mode fails here (it calls a method that does not exist), so the truth has order one."""
    problem = problem_for(solver, (2, 4))
    problem.settings["integral_loss"] = running
    field, problem.field = Pendulum(whole=False), Pendulum(whole=True)
    problem.field.stiffness = field.stiffness
    wanted = problem.wanted()
    expected, integral = truth_of(problem)
    problem.field = field
    problem.settings["order"] = 2
    found = problem.solve(mode)[1]
    assert isinstance(found, Tensor)
    assert_same_gradients(
        gradients_of(loss_of(found), wanted), gradients_of(loss_of(expected) + integral, wanted), DOUBLE
    )


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_a_model_that_goes_back_to_autograd_carries_the_column_again(mode: str, solver: str) -> None:
    problem = with_cost(solver)
    assert isinstance(problem.x, Tensor)
    x = torch.cat([torch.zeros_like(problem.x[:, :1]), problem.x], 1)
    expected = problem.model("autograd")(x, problem.t_span)
    moved = problem.model(mode)
    moved.sensitivity = "autograd"  # type: ignore[assignment]
    found = moved(x, problem.t_span)
    assert torch.equal(found[1], expected[1])
    assert found[1].shape[-1] == 4


@each_mode
def test_midpoint_quadrature_in_closed_form(mode: str) -> None:
    """``x' = 0`` and ``l = x (1 + t)``: the integral is ``x`` times the midpoint rule of ``1 + t``."""
    x = uniform(2, 1, seed=4).requires_grad_()
    t_span = torch.tensor([0.0, 0.5, 0.8, 2.0], dtype=DOUBLE, requires_grad=True)

    def cost(t: Tensor, x: Tensor) -> Tensor:
        return x[:, 0] * (1 + t)

    settings = {"solver": Midpoint(DOUBLE), "integral_loss": cost}
    problem = Problem(lambda t, x, args=None: 0.0 * x, x, t_span, settings)
    found = problem.gradients(mode, lambda t_eval, solution: nothing(solution) if isinstance(solution, Tensor) else x)
    # The midpoint rule is exact for 1 + t: x ((T - s) + (T^2 - s^2) / 2).
    assert found["x"] is not None
    assert found["t"] is not None
    total = float(x.detach().sum())
    torch.testing.assert_close(found["x"], torch.full((2, 1), 4.0, dtype=DOUBLE), rtol=1e-14, atol=0)
    torch.testing.assert_close(
        found["t"], torch.tensor([-total, 0, 0, 3 * total], dtype=DOUBLE), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize("solver", [DormandPrince45, Tsitouras45], ids=["dopri5", "tsit5"])
@each_mode
def test_finite_differences_of_the_quadrature_on_the_accepted_steps(mode: str, solver: Any) -> None:
    """The steps taken again by the solver's own rule, with the integral as a state of its own."""
    instance = solver(DOUBLE)
    problem = problem_for("dopri5", time_grad=False)
    problem.settings = {"solver": instance}
    wanted, field = problem.wanted(), problem.field
    with steps_recorded(instance) as calls:
        problem.solve("autograd")
    taken = accepted(calls)

    def carrying(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([running(t, y[:, 1:])[:, None], field(t, y[:, 1:])], 1)

    def total() -> float:
        assert isinstance(problem.x, Tensor)
        y, slope = torch.cat([torch.zeros_like(problem.x[:, :1]), problem.x], 1), None
        for one in taken:
            slope, y, *_ = instance.step(carrying, y, one.t, one.dt, k1=slope)
        return float(y[:, 0].sum() + loss_of(y[:, 1:]))

    def loss(t_eval: Tensor, solution: State) -> Tensor:
        assert isinstance(solution, Tensor)
        return loss_of(solution[-1])

    problem.settings["integral_loss"] = running
    directions = {name: uniform(*tensor.shape, seed=60 + i) for i, (name, tensor) in enumerate(wanted.items())}
    gradients = problem.gradients(mode, loss)
    slope = sum(
        float((gradient * directions[name]).sum()) for name, gradient in gradients.items() if gradient is not None
    )
    totals = []
    with torch.no_grad():
        for shift in (1e-5, -2e-5):
            for name, tensor in wanted.items():
                tensor += shift * directions[name]
            totals.append(total())
    # 1e-5 squared of truncation and 1e-16 / 1e-5 of rounding are left.
    assert slope == pytest.approx((totals[0] - totals[1]) / 2e-5, rel=1e-8)


@each_mode
def test_the_state_has_no_column_for_data_control(mode: str) -> None:
    """A field that is as wide as the state itself works, as torchdyn's adjoint modes have it."""
    problem = with_cost("rk4", time_grad=False)
    problem.field = Field(6, seed=5)
    found = problem.solve(mode)[1]
    assert isinstance(found, Tensor)
    assert found.shape == (8, 2, 3)
