"""torchdyn: values are its own, and the gradient is that of the program that ran, for every solver and mode."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from cases import assert_same_gradients, gradients_of, loss_of, norm_of, relative_error, uniform
from torch import Tensor, nn
from torchdyn.numerics.interpolators import FourthOrder
from torchdyn.numerics.solvers.hyper import HyperEuler, HyperMidpoint, HyperRungeKutta4
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler, Midpoint, RungeKutta4, Tsitouras45
from torchdyn_cases import (
    DOUBLE,
    SOLVERS,
    Field,
    Problem,
    State,
    Stiffening,
    Uneven,
    accepted,
    assert_equal_values,
    assert_exact,
    each_explicit_solver,
    each_kind,
    each_mode,
    each_named_kind,
    each_solver,
    problem_for,
    steps_recorded,
    weighed,
    with_and_without_time,
)

each_adaptive_solver = pytest.mark.parametrize("solver", [name for name, row in SOLVERS.items() if row.adaptive])


@with_and_without_time
@each_solver
@each_mode
def test_gradients_equal_those_of_autograd(mode: str, solver: str, time_grad: bool) -> None:
    found = assert_exact(problem_for(solver, time_grad=time_grad), mode)
    assert set(found) >= {"x", "field.weight", "field.bias", "field.frequency"}
    assert ("t" in found) == time_grad
    assert all(norm_of(gradient) > 0 for gradient in found.values())


@each_solver
@each_mode
def test_single_precision(mode: str, solver: str) -> None:
    assert_exact(problem_for(solver, dtype=torch.float32), mode)


@pytest.mark.parametrize("solver", ["euler", "rk4", "uneven", "dopri5", "tsit5", "stale-heun"])
@each_mode
def test_single_precision_times_with_a_double_precision_state(mode: str, solver: str) -> None:
    """The habit: ``t_span=torch.linspace(0, 1, 8)`` is float32 whatever the model is."""
    problem = problem_for(solver)
    problem.t_span = torch.linspace(0, 1, 8, requires_grad=True)
    assert_exact(problem, mode)


class Following(Field):
    """Its parameters follow the dtype of the state."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        flat, time = y.reshape(-1), t.to(y.dtype)
        slope = torch.sin(self.weight.to(y.dtype) @ flat + self.bias * torch.sin(self.frequency * time))
        return (slope - time * flat / 5).view_as(y)


# Not for a solver that hands on a slope which is not that at the step's end: that one is refused by the replay's check.
@pytest.mark.parametrize("solver", ["euler", "rk4", "uneven", "dopri5", "tsit5"])
@each_mode
def test_double_precision_times_with_a_single_precision_state(mode: str, solver: str) -> None:
    """Adaptive solvers then go over to float64 at the first step that they cut short."""
    problem = problem_for(solver, dtype=torch.float32)
    problem.field = Following(6, seed=5, dtype=torch.float32)
    problem.t_span = torch.linspace(0, 1, 8, dtype=DOUBLE, requires_grad=True)
    wanted = problem.wanted()
    truth, found = problem.solve("autograd"), problem.solve(mode)
    assert_equal_values(found, truth)
    assert_same_gradients(gradients_of(weighed(*found), wanted), gradients_of(weighed(*truth), wanted), torch.float32)


@pytest.mark.parametrize("solver", ["rk4", "uneven", "dopri5", "hyper-euler"])
@each_mode
def test_complex_states(mode: str, solver: str) -> None:
    assert_exact(problem_for(solver, dtype=torch.complex128), mode)


@each_solver
@each_mode
def test_decreasing_times(mode: str, solver: str) -> None:
    """torchdyn then solves ``-f(-t, x)`` over the negated times, and returns them negated."""
    problem = problem_for(solver)
    problem.t_span = problem.t_span.detach().flip(0).requires_grad_()
    assert_exact(problem, mode)


@with_and_without_time
@pytest.mark.parametrize("points", [2, 60])
@each_kind
@each_mode
def test_few_and_many_times(mode: str, solver: str, points: int, time_grad: bool) -> None:
    problem = problem_for(solver)
    problem.t_span = torch.linspace(-0.3, 1.1, points, dtype=DOUBLE).requires_grad_(time_grad)
    found = assert_exact(problem, mode)
    if time_grad:
        assert torch.count_nonzero(found["t"]) == points


@each_kind
@each_mode
def test_times_as_a_list_of_tensors(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.t_span = [torch.tensor([time], dtype=DOUBLE, requires_grad=True) for time in (0.1, 0.3, 0.7, 1.2)]
    problem.params = {f"t[{i}]": time for i, time in enumerate(problem.t_span)}
    assert set(assert_exact(problem, mode)) >= set(problem.params)


@each_kind
@each_mode
def test_times_computed_from_what_is_trained(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    end = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    problem.t_span = torch.linspace(0, 1, 6, dtype=DOUBLE) * end
    problem.params = {"end": end}
    assert "end" in assert_exact(problem, mode)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "uneven", "hyper-euler"])
@each_mode
def test_whole_numbers_as_times(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.t_span = torch.arange(4)
    assert_exact(problem, mode)


@pytest.mark.parametrize("solver", ["dopri5", "tsit5", "stale-heun"])
@each_mode
def test_a_time_that_is_asked_for_twice(mode: str, solver: str) -> None:
    """An adaptive solver then makes a step of size zero."""
    problem = problem_for(solver)
    problem.t_span = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 3), (2, 1, 3, 2)], ids=["1", "2", "3", "4"])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5", "tsit5", "hyper-midpoint", "alf"])
@each_mode
def test_states_of_every_rank(mode: str, solver: str, shape: tuple[int, ...]) -> None:
    assert_exact(problem_for(solver, shape), mode)


@each_kind
@each_mode
def test_a_state_that_is_not_contiguous_and_not_a_leaf(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    start = uniform(3, 2, seed=3).requires_grad_()
    problem.x, problem.params = (2 * start).t(), {"start": start}
    assert "start" in assert_exact(problem, mode)


@pytest.mark.parametrize("wanted", ["x", "field", "t"])
@each_kind
@each_mode
def test_gradients_of_one_input_alone(mode: str, solver: str, wanted: str) -> None:
    problem = problem_for(solver, time_grad=wanted == "t")
    assert isinstance(problem.x, Tensor)
    assert isinstance(problem.field, nn.Module)
    problem.x.requires_grad_(wanted == "x")
    problem.field.requires_grad_(wanted == "field")
    if isinstance(problem.settings["solver"], nn.Module):
        problem.settings["solver"].requires_grad_(False)
    assert {name.split(".")[0] for name in assert_exact(problem, mode)} == {wanted}


@pytest.mark.parametrize("output", [0, 1, -1], ids=["first", "second", "last"])
@each_kind
@each_mode
def test_a_loss_of_one_output(mode: str, solver: str, output: int) -> None:
    def loss(t_eval: Tensor, solution: State) -> Tensor:
        assert isinstance(solution, Tensor)
        return loss_of(solution[output])

    assert_exact(problem_for(solver), mode, loss)


@each_explicit_solver
@each_mode
def test_the_times_returned_have_their_gradient(mode: str, solver: str) -> None:
    def of_times_alone(t_eval: Tensor, solution: State) -> Tensor:
        return loss_of(t_eval)

    def of_both(t_eval: Tensor, solution: State) -> Tensor:
        return loss_of(t_eval) + weighed(t_eval, solution)

    assert "t" in assert_exact(problem_for(solver), mode, of_times_alone)
    assert_exact(problem_for(solver), mode, of_both)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@each_adaptive_solver
@each_mode
def test_rejected_steps_leave_no_trace(mode: str, solver: str, direction: str) -> None:
    instance = _stiffening(solver).settings["solver"]
    problem = _stiffening(solver)
    problem.settings["solver"] = instance
    if direction == "decreasing":
        problem.t_span = problem.t_span.detach().flip(0).requires_grad_()
    with steps_recorded(instance) as calls:
        problem.solve("autograd")
    assert len(accepted(calls)) < len(calls)
    assert_exact(problem, mode)


@pytest.mark.parametrize("solver", ["dopri5", "tsit5", pytest.param("stale-heun", marks=pytest.mark.slow)])
@each_mode
def test_the_first_steps_are_rejected(mode: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first slope is that of before them; it was taken to be one of the rejected step's."""
    monkeypatch.setattr(
        sys.modules["torchdyn.numerics.odeint"], "init_step", lambda *_: torch.tensor(0.9, dtype=DOUBLE)
    )
    instance = _stiffening(solver).settings["solver"]
    problem = _stiffening(solver)
    problem.settings |= {"solver": instance, "atol": 1e-5, "rtol": 1e-5}
    with steps_recorded(instance) as calls:
        problem.solve("autograd")
    assert calls[0].x is calls[1].x
    assert_exact(problem, mode)


def _stiffening(solver: str) -> Problem:
    problem = problem_for(solver, (2, 2))
    problem.field = Stiffening(4, seed=17)
    instances: dict[str, Any] = {"dopri5": DormandPrince45, "tsit5": Tsitouras45}
    if solver in instances:
        problem.settings["solver"] = instances[solver](torch.float32)
    problem.settings |= {"atol": 1e-3, "rtol": 1e-3}
    problem.t_span = torch.tensor([0.0, 0.8, 0.83, 1.3], dtype=DOUBLE, requires_grad=True)
    return problem


@each_adaptive_solver
@each_mode
def test_tolerances(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    problem.settings |= {"atol": 1e-5, "rtol": 1e-5}
    assert_exact(problem, mode)


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("interpolator", ["by name", "as an instance"])
@with_and_without_time
@each_mode
def test_several_interpolated_outputs_in_a_step(mode: str, time_grad: bool, interpolator: str, direction: str) -> None:
    problem, solver = problem_for("dopri5"), DormandPrince45(DOUBLE)
    problem.settings = {"solver": solver, "interpolator": "4th" if interpolator == "by name" else FourthOrder(DOUBLE)}
    # Away from zero: upstream fails where ``t + (T - t)`` is not ``T`` to the last bit.
    times = torch.linspace(1.1, 2.0, 40, dtype=DOUBLE)
    problem.t_span = (times if direction == "increasing" else times.flip(0)).requires_grad_(time_grad)
    with steps_recorded(solver) as calls:
        problem.solve("autograd")
    assert len(calls) < 20
    assert_exact(problem, mode)


@each_mode
def test_interpolated_outputs_between_rejected_steps(mode: str) -> None:
    problem = _stiffening("DormandPrince45()")
    problem.settings["interpolator"] = "4th"
    problem.t_span = torch.linspace(0.0, 1.3, 30, dtype=DOUBLE, requires_grad=True)
    with steps_recorded(problem.settings["solver"]) as calls:
        problem.solve("autograd")
    assert len(accepted(calls)) < len(calls)
    assert_exact(problem, mode)


@each_mode
def test_an_interpolated_output_alone(mode: str) -> None:
    """Its own cotangents, where the ends of the step have none."""

    def loss(t_eval: Tensor, solution: State) -> Tensor:
        assert isinstance(solution, Tensor)
        return loss_of(solution[5])

    problem = problem_for("dopri5")
    problem.settings["interpolator"] = "4th"
    problem.t_span = torch.linspace(0.1, 1.27, 20, dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode, loss)


@each_mode
def test_interpolated_times_have_their_gradient(mode: str) -> None:
    def loss(t_eval: Tensor, solution: State) -> Tensor:
        return loss_of(t_eval) + weighed(t_eval, solution)

    problem = problem_for("dopri5")
    problem.settings["interpolator"] = "4th"
    problem.t_span = torch.linspace(0.1, 1.27, 20, dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode, loss)


@each_mode
def test_a_solver_of_fewer_stages_with_the_same_interpolation(mode: str) -> None:
    """torchdyn then takes as many of the interpolation's weights as there are stages."""
    problem = problem_for("bogacki-shampine")
    problem.settings["interpolator"] = "4th"
    problem.t_span = torch.linspace(0.1, 1.27, 20, dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode)


@each_mode
def test_tsit5_has_no_interpolation_upstream(mode: str) -> None:
    problem = problem_for("tsit5")
    problem.settings["interpolator"] = "4th"
    assert_exact(problem, mode)


@each_mode
def test_coefficients_that_are_trained(mode: str) -> None:
    """The tensors of a solver's tableau are plain attributes; autograd gives them their gradients."""
    solver = RungeKutta4(DOUBLE)
    nodes, rows, weights, _ = solver.tableau
    trained = {"c": nodes, "a[1]": rows[1], "b": weights}
    for tensor in trained.values():
        tensor.requires_grad_()
    problem = problem_for("rk4")
    problem.settings["solver"], problem.params = solver, trained
    assert set(assert_exact(problem, mode)) >= set(trained)


@each_mode
def test_coefficients_that_are_changed_between_two_solves(mode: str) -> None:
    solver = RungeKutta4(DOUBLE)
    problem = problem_for("rk4")
    problem.settings["solver"] = solver
    assert_exact(problem, mode)
    nodes, rows, _, error = solver.tableau
    solver.tableau = nodes, rows, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE), error
    assert_exact(problem, mode)


@pytest.mark.parametrize("solver", [HyperEuler, HyperMidpoint, HyperRungeKutta4])
@each_mode
def test_a_hypersolver_whose_network_is_the_field(mode: str, solver: Any) -> None:
    problem = problem_for("euler")
    problem.settings["solver"] = solver(problem.field, DOUBLE)
    assert_exact(problem, mode)


@each_kind
@each_mode
def test_one_model_with_states_of_two_precisions(mode: str, solver: str) -> None:
    """torchdyn rounds a solver's coefficients to the state's dtype for good: what is measured must follow."""
    instances = {"rk4": RungeKutta4, "dopri5": DormandPrince45, "hyper-euler": Euler}
    shared = instances[solver](DOUBLE)
    for dtype in (DOUBLE, torch.float32, DOUBLE):
        problem = problem_for(solver, dtype=dtype)
        problem.settings["solver"] = shared
        assert_exact(problem, mode)


@each_kind
@each_mode
def test_two_solves_before_one_backward(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    model, wanted = problem.model(mode), problem.wanted()
    _, first = model(problem.x, problem.t_span)
    _, second = model(first[-1], problem.t_span + 0.5)
    found = gradients_of(loss_of((first, second)), wanted)
    later = problem_for(solver)
    later.settings, later.field = problem.settings, problem.field
    truth = problem.solve("autograd")[1]
    assert isinstance(truth, Tensor)
    later.x, later.t_span = truth[-1], problem.t_span + 0.5
    again = later.solve("autograd")[1]
    assert isinstance(again, Tensor)
    assert_same_gradients(found, gradients_of(loss_of((truth, again)), wanted), DOUBLE)


@each_kind
@each_mode
def test_a_second_backward_gives_the_same(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    loss, wanted = weighed(*problem.solve(mode)), list(problem.wanted().values())
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("solver", ["rk4", "uneven", "dopri5", "stale-heun", "hyper-euler", "alf"])
@each_mode
def test_gradients_of_gradients(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    wanted = problem.wanted()

    def penalised(mode: str) -> dict[str, Tensor | None]:
        loss = weighed(*problem.solve(mode))
        first = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
        return gradients_of(loss + loss_of(first), wanted)

    assert_same_gradients(penalised(mode), penalised("autograd"), DOUBLE)


@each_mode
def test_gradients_of_gradients_at_interpolated_outputs(mode: str) -> None:
    problem = problem_for("dopri5")
    problem.settings["interpolator"] = "4th"
    problem.t_span = torch.linspace(0.1, 1.27, 20, dtype=DOUBLE, requires_grad=True)
    wanted = problem.wanted()

    def penalised(mode: str) -> dict[str, Tensor | None]:
        loss = weighed(*problem.solve(mode))
        first = torch.autograd.grad(loss, list(wanted.values()), create_graph=True)
        return gradients_of(loss + loss_of(first), wanted)

    assert_same_gradients(penalised(mode), penalised("autograd"), DOUBLE)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
@each_kind
@each_mode
def test_without_gradients_the_solution_is_a_plain_one(mode: str, solver: str, switch: Any) -> None:
    problem = problem_for(solver)
    with switch():
        found = problem.solve(mode)
    assert isinstance(found[1], Tensor)
    assert not found[1].requires_grad
    assert_equal_values(found, problem.solve("autograd"))


@each_kind
@each_mode
def test_where_no_gradient_is_wanted_there_is_no_graph(mode: str, solver: str) -> None:
    problem = problem_for(solver, time_grad=False)
    for tensor in problem.wanted().values():
        tensor.requires_grad_(False)
    found = problem.solve(mode)
    assert not any(part.requires_grad for part in found if isinstance(part, Tensor))


def _at(problem: Problem, wanted: dict[str, Tensor], shift: float, directions: dict[str, Tensor], mode: str) -> float:
    """The loss with every tensor moved along its direction."""
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor += shift * directions[name]
        loss = float(weighed(*problem.solve(mode)))
        for name, tensor in wanted.items():
            tensor -= shift * directions[name]
    return loss


@pytest.mark.parametrize("solver", ["Euler()", "Midpoint()", "RungeKutta4()", "uneven", "hyper-rk4", "learned", "alf"])
@each_mode
def test_finite_differences(mode: str, solver: str) -> None:
    """Central differences of a smooth function: 1e-5 squared of truncation and 1e-16 / 1e-5 of rounding are left."""
    problem = problem_for(solver)
    wanted = problem.wanted()
    directions = {name: uniform(*tensor.shape, seed=60 + i) for i, (name, tensor) in enumerate(wanted.items())}
    gradients = gradients_of(weighed(*problem.solve(mode)), wanted)
    slope = sum(
        float((gradient * directions[name]).sum()) for name, gradient in gradients.items() if gradient is not None
    )
    ahead, behind = (_at(problem, wanted, shift, directions, mode) for shift in (1e-5, -1e-5))
    assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-8)


@pytest.mark.parametrize("solver", ["DormandPrince45()", "Tsitouras45()", "bogacki-shampine", "stale-heun"])
@each_mode
def test_finite_differences_with_the_accepted_steps_held_constant(mode: str, solver: str) -> None:
    """The steps taken again one by one, by the solver's own rule, at a state and parameters that are moved."""
    problem = problem_for(solver, time_grad=False)
    instance, wanted = problem.settings["solver"], problem.wanted()
    with steps_recorded(instance) as calls:
        solution = problem.solve("autograd")[1]
    taken = accepted(calls)
    assert isinstance(solution, Tensor)
    assert torch.equal(taken[-1].end, solution[-1])

    def end() -> Tensor:
        x, slope = problem.x, None
        for one in taken:
            slope, x, *_ = instance.step(problem.field, x, one.t, one.dt, k1=slope)
        assert isinstance(x, Tensor)
        return x

    def loss(t_eval: Tensor, solution: State) -> Tensor:
        assert isinstance(solution, Tensor)
        return loss_of(solution[-1])

    directions = {name: uniform(*tensor.shape, seed=60 + i) for i, (name, tensor) in enumerate(wanted.items())}
    gradients = problem.gradients(mode, loss)
    slope = sum(
        float((gradient * directions[name]).sum()) for name, gradient in gradients.items() if gradient is not None
    )
    losses = []
    with torch.no_grad():
        for shift in (1e-5, -2e-5):
            for name, tensor in wanted.items():
                tensor += shift * directions[name]
            losses.append(float(loss_of(end())))
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-8)


class Decay(nn.Module):
    """``f(t, x) = rate x``, entry by entry."""

    def __init__(self, rates: Tensor) -> None:
        super().__init__()
        self.rate = nn.Parameter(rates)

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.rate * x


# The polynomial by which a step of size h multiplies the state, coefficients of powers of h times rate.
AMPLIFICATION: dict[Any, tuple[float, ...]] = {
    Euler: (1, 1),
    Midpoint: (1, 1, 1 / 2),
    RungeKutta4: (1, 1, 1 / 2, 1 / 6, 1 / 24),
    Uneven: (1, 1, 0.35 * 0.25 + 0.45 * (1.1 - 0.4), 0.45 * 1.1 * 0.25),
}


@pytest.mark.parametrize("solver", AMPLIFICATION, ids=lambda solver: solver.__name__)
@each_mode
def test_closed_form_of_a_linear_field(mode: str, solver: Any) -> None:
    """``sum_mj w_mj x_mj`` with ``x_m = x_0 prod_i P(h_i rate)``, differentiated by hand for x_0, rates and times."""
    x = uniform(3, seed=1).requires_grad_()
    field = Decay(uniform(3, seed=2))
    t_span = torch.tensor([0.0, 0.2, 0.35, 0.8, 0.9], dtype=DOUBLE, requires_grad=True)
    weights = uniform(5, 3, seed=3)
    problem = Problem(field, x, t_span, {"solver": solver(DOUBLE)})
    _, solution = problem.solve(mode)
    assert isinstance(solution, Tensor)
    found = torch.autograd.grad((weights * solution).sum(), [x, field.rate, t_span])

    with torch.no_grad():
        sizes, powers = t_span.diff(), range(len(AMPLIFICATION[solver]))
        z = sizes[:, None] * field.rate
        factor = sum(c * z**p for p, c in zip(powers, AMPLIFICATION[solver], strict=True))
        slope = sum(p * c * z ** (p - 1) for p, c in zip(powers, AMPLIFICATION[solver], strict=True) if p)
        assert isinstance(factor, Tensor)
        states = x * torch.cat([torch.ones(1, 3, dtype=DOUBLE), factor.cumprod(0)])
        # What a relative change of the factor of step i is worth: all outputs after it change by as much.
        worth = (weights * states).flip(0).cumsum(0).flip(0)[1:]
        of_size = (worth * field.rate * slope / factor).sum(1)
        zero = torch.zeros(1, dtype=DOUBLE)
        expected = [
            (weights * states).sum(0) / x,
            (worth * sizes[:, None] * slope / factor).sum(0),
            torch.cat([zero, of_size]) - torch.cat([of_size, zero]),
        ]
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < 1e-13, errors


@each_mode
def test_rk4_is_differentiated_as_torchdyn_computes_it(mode: str) -> None:
    """Its second stage stands at the start of the step and its last one in the middle."""

    def field(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return strength * t**2 + 0 * x

    strength = torch.tensor([1.5], dtype=DOUBLE, requires_grad=True)
    start, size = 0.3, 0.4
    t_span = torch.tensor([start, start + size], dtype=DOUBLE)
    problem = Problem(field, torch.zeros(1, dtype=DOUBLE), t_span, {"solver": RungeKutta4(DOUBLE)})
    _, solution = problem.solve(mode)
    assert isinstance(solution, Tensor)
    (found,) = torch.autograd.grad(solution[-1].sum(), strength)
    nodes = [start, start, start + size / 2, start + size / 2]
    expected = size * sum(b * t**2 for b, t in zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), nodes, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-14)


@each_mode
def test_the_cotangent_and_the_variation_have_a_constant_product(mode: str) -> None:
    """The symplectic condition: along a solve, in any mode, for a loss of the end alone."""
    problem = problem_for("rk4", time_grad=False)
    assert isinstance(problem.x, Tensor)
    direction, weights = uniform(2, 3, seed=8), uniform(2, 3, seed=9)

    def of_start(x: Tensor) -> Tensor:
        problem.x = x
        solution = problem.solve("autograd")[1]
        assert isinstance(solution, Tensor)
        return solution[-1]

    _, variation = torch.autograd.functional.jvp(of_start, problem.x.detach(), direction)
    problem.x = problem.x.detach().requires_grad_()
    solution = problem.solve(mode)[1]
    assert isinstance(solution, Tensor)
    (cotangent,) = torch.autograd.grad((weights * solution[-1]).sum(), problem.x)
    assert float((cotangent * direction).sum()) == pytest.approx(float((weights * variation).sum()), rel=1e-12)


@pytest.mark.parametrize(
    "pair", list(itertools.combinations(["symplectic", "symplectic-stages", "aca", "baseline"], 2))
)
def test_modes_agree(pair: tuple[str, str]) -> None:
    problem = problem_for("tsit5", (3, 4))
    one, other = (problem.gradients(mode) for mode in pair)
    assert_same_gradients(one, other, DOUBLE)


@each_named_kind
@each_mode
def test_gradients_are_accumulated_by_backward(mode: str, solver: str) -> None:
    problem = problem_for(solver)
    assert isinstance(problem.field, Field)
    truth = problem.gradients("autograd")["field.weight"]
    assert truth is not None
    for _ in range(2):
        weighed(*problem.solve(mode)).backward()
    assert problem.field.weight.grad is not None
    assert relative_error(problem.field.weight.grad, 2 * truth) < 1e-11
