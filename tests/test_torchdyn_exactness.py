"""torchdyn's own program is what is differentiated: to the bit where times are fixed, and whatever its loop does."""

from __future__ import annotations

import sys
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    OF_TORCHDYN,
    Mixing,
    Problem,
    assert_equal_values,
    assert_exact,
    assert_same_gradients,
    gradients_of,
    loss_of,
    problem_for,
    relative_error,
    solve,
    uniform,
)
from torch import Tensor, nn
from torchdyn.numerics.interpolators import FourthOrder
from torchdyn.numerics.solvers.hyper import HyperEuler, HyperMidpoint, HyperRungeKutta4
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler, Midpoint, RungeKutta4, Tsitouras45
from torchdyn_runs import (
    accepted,
    difference_quotient,
    directional,
    each_kind,
    each_named_kind,
    each_way_back,
    model_for,
    returned,
    steps_recorded,
    stiffening,
)
from torchdyn_solvers import BogackiShampine, StaleHeun, Uneven

each_method = pytest.mark.parametrize("method", OF_TORCHDYN)
EXPLICIT = [name for name in OF_TORCHDYN if METHODS[name].stages and "()" not in name]
each_explicit_method = pytest.mark.parametrize("method", EXPLICIT)
FOUR = ["torchdyn-euler", "torchdyn-uneven", "torchdyn-dopri5", "torchdyn-tsit5"]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(DOUBLE, marks=pytest.mark.slow)], ids=str)
@each_method
@each_way_back
def test_gradients_are_torchdyns_own_to_the_bit(mode: str, method: str, dtype: torch.dtype) -> None:
    problem = problem_for(method, dtype=dtype, time_grad=False)
    wanted = problem.wanted()
    truth, found = (
        gradients_of(loss_of(solve(name, problem.field, problem.y0, problem.t, method, **problem.settings)), wanted)
        for name in (BACKPROPAGATION, mode)
    )
    assert_equal_values(found, truth)


# Times of every kind.


@pytest.mark.parametrize("method", [*FOUR, "torchdyn-stale-heun"])
@each_way_back
def test_single_precision_times_with_a_double_precision_state(mode: str, method: str) -> None:
    """The habit: ``t_span=torch.linspace(0, 1, 8)`` is float32 whatever the model is."""
    problem = problem_for(method)
    problem.t = torch.linspace(0, 1, 8, requires_grad=True)
    assert_exact(problem, mode, method)


class Following(Mixing):
    """Its parameters follow the dtype of the state."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        flat, time = y.reshape(-1), t.to(y.dtype)
        slope = torch.sin(self.weight.to(y.dtype) @ flat + self.bias * torch.sin(self.frequency * time))
        return (slope - time * flat / 5).view_as(y)


@pytest.mark.parametrize("method", [*FOUR, "torchdyn-stale-heun"])
@each_way_back
def test_double_precision_times_with_a_single_precision_state(mode: str, method: str) -> None:
    """Adaptive solvers then go over to float64 at the first step that they cut short."""
    problem = problem_for(method, dtype=torch.float32)
    problem.field, problem.dtype = Following(6, seed=5, dtype=torch.float32), torch.float32
    problem.t = torch.linspace(0, 1, 8, dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode, method)


@pytest.mark.parametrize("points", [2, 25])
@each_kind
@each_way_back
def test_few_and_many_times(mode: str, method: str, points: int) -> None:
    problem = problem_for(method)
    problem.t = torch.linspace(-0.3, 1.1, points, dtype=DOUBLE).requires_grad_()
    assert torch.count_nonzero(assert_exact(problem, mode, method)["t"]) == points


@each_kind
@each_way_back
def test_times_as_a_list_of_tensors(mode: str, method: str) -> None:
    problem = problem_for(method)
    problem.t = [torch.tensor([time], dtype=DOUBLE, requires_grad=True) for time in (0.1, 0.3, 0.7, 1.2)]
    problem.extra = {f"t[{i}]": time for i, time in enumerate(problem.t)}
    assert set(assert_exact(problem, mode, method)) >= set(problem.extra)


@each_kind
@each_way_back
def test_times_computed_from_what_is_trained(mode: str, method: str) -> None:
    problem = problem_for(method)
    end = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    problem.t, problem.extra = torch.linspace(0, 1, 6, dtype=DOUBLE) * end, {"end": end}
    wanted = problem.extra | {"y0": problem.y0}
    truth, found = (
        gradients_of(loss_of(solve(name, problem.field, problem.y0, problem.t, method, **problem.settings)), wanted)
        for name in (BACKPROPAGATION, mode)
    )
    assert_same_gradients(found, truth)


@each_way_back
def test_whole_numbers_as_times(mode: str) -> None:
    problem = problem_for("torchdyn-rk4")
    problem.t = torch.arange(4)
    assert_exact(problem, mode, "torchdyn-rk4")


@pytest.mark.parametrize("method", ["torchdyn-dopri5", "torchdyn-tsit5", "torchdyn-stale-heun"])
@each_way_back
def test_a_time_that_is_asked_for_twice(mode: str, method: str) -> None:
    """An adaptive solver then makes a step of size zero."""
    problem = problem_for(method)
    problem.t = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode, method)


@each_explicit_method
@each_way_back
def test_the_times_returned_have_their_gradient(mode: str, method: str) -> None:
    problem = problem_for(method)
    (times, solution), (true_times, true) = (returned(problem, name, method) for name in (mode, BACKPROPAGATION))
    assert torch.equal(times, true_times)
    wanted = problem.wanted()
    assert_same_gradients(
        gradients_of(loss_of(times) + loss_of(solution), wanted),
        gradients_of(loss_of(true_times) + loss_of(true), wanted),
    )


@pytest.mark.parametrize("shape", [(5,), (2, 2, 3), (2, 1, 3, 2)], ids=["1", "3", "4"])
@pytest.mark.parametrize("method", ["torchdyn-rk4", "torchdyn-tsit5", "torchdyn-hyper-midpoint", "torchdyn-alf"])
@each_way_back
def test_states_of_every_rank(mode: str, method: str, shape: tuple[int, ...]) -> None:
    assert_exact(problem_for(method, shape), mode, method)


class Slow(nn.Module):
    """So slow that one step reaches over all output times."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1e-3, dtype=DOUBLE))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return self.rate * torch.ones_like(x)


@pytest.mark.parametrize(("times", "rows"), [([0.03, 0.29], 1), ([0.03, 0.29, 1.29], 3)])
@each_way_back
def test_an_output_time_that_rounding_misses(mode: str, times: list[float], rows: int) -> None:
    """0.03 + (0.29 - 0.03) is more than 0.29: torchdyn loses the last output there, and goes back for another one."""
    problem = Problem(
        Slow(), uniform(2, 3, seed=1).requires_grad_(), torch.tensor(times, dtype=DOUBLE, requires_grad=True)
    )
    assert_exact(problem, mode, "torchdyn-dopri5")
    assert len(returned(problem, mode, "torchdyn-dopri5")[1]) == rows


# Rejected steps.

ADAPTIVE: dict[str, Any] = {
    "dopri5": lambda: DormandPrince45(torch.float32),
    "tsit5": lambda: Tsitouras45(torch.float32),
    "stale-heun": lambda: StaleHeun(DOUBLE),
}


@pytest.mark.parametrize("first", [None, 0.9], ids=["later", "from the first on"])
@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize(
    "solver", [pytest.param(name, marks=[pytest.mark.slow] * (name == "stale-heun")) for name in ADAPTIVE]
)
@each_way_back
def test_rejected_steps_leave_no_trace(
    mode: str, solver: str, direction: str, first: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if first is not None:
        size = torch.tensor(first, dtype=DOUBLE)
        monkeypatch.setattr(sys.modules["torchdyn.numerics.odeint"], "init_step", lambda *_: size)
    problem = stiffening(ADAPTIVE[solver]())
    if direction == "decreasing":
        problem.t = problem.t.detach().flip(0).requires_grad_()
    with steps_recorded(problem.settings["solver"]) as calls:
        returned(problem, BACKPROPAGATION, "torchdyn-dopri5")
    assert len(accepted(calls)) < len(calls)
    assert (calls[0].x is calls[1].x) == (first is not None)
    assert_exact(problem, mode, "torchdyn-dopri5")


# Interpolated outputs.


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("interpolator", ["4th", FourthOrder(DOUBLE)], ids=["by name", "as an instance"])
@each_way_back
def test_several_interpolated_outputs_in_a_step(mode: str, interpolator: Any, direction: str) -> None:
    problem, solver = problem_for("torchdyn-dopri5"), DormandPrince45(DOUBLE)
    problem.settings |= {"solver": solver, "interpolator": interpolator}
    # Away from zero: upstream fails where ``t + (T - t)`` is not ``T`` to the last bit.
    times = torch.linspace(1.1, 2.0, 40, dtype=DOUBLE)
    problem.t = (times if direction == "increasing" else times.flip(0)).requires_grad_()
    with steps_recorded(solver) as calls:
        returned(problem, BACKPROPAGATION, "torchdyn-dopri5")
    assert len(calls) < 20
    assert_exact(problem, mode, "torchdyn-dopri5")
    # Its own cotangents, where the ends of the step have none.
    assert_exact(problem, mode, "torchdyn-dopri5", loss=lambda solution: loss_of(solution[5]))


@each_way_back
def test_interpolated_outputs_between_rejected_steps(mode: str) -> None:
    problem = stiffening(DormandPrince45(DOUBLE))
    problem.settings["interpolator"] = "4th"
    problem.t = torch.linspace(0.0, 1.3, 30, dtype=DOUBLE, requires_grad=True)
    with steps_recorded(problem.settings["solver"]) as calls:
        returned(problem, BACKPROPAGATION, "torchdyn-dopri5")
    assert len(accepted(calls)) < len(calls)
    assert_exact(problem, mode, "torchdyn-dopri5")


@pytest.mark.parametrize("solver", [BogackiShampine, Tsitouras45])
@each_way_back
def test_interpolation_of_other_solvers_is_torchdyns(mode: str, solver: Any) -> None:
    """It takes as many of the weights as there are stages, and does not interpolate for tsit5."""
    problem = problem_for("torchdyn-dopri5")
    problem.settings |= {"solver": solver(DOUBLE), "interpolator": "4th"}
    problem.t = torch.linspace(0.1, 1.27, 20, dtype=DOUBLE, requires_grad=True)
    assert_exact(problem, mode, "torchdyn-dopri5")


# Solvers with tensors of their own.


@each_way_back
def test_coefficients_that_are_trained(mode: str) -> None:
    """The tensors of a solver's tableau are plain attributes; autograd gives them their gradients."""
    solver = RungeKutta4(DOUBLE)
    nodes, rows, weights, _ = solver.tableau
    problem = problem_for("torchdyn-rk4")
    problem.extra = {"c": nodes, "a[1]": rows[1], "b": weights}
    for tensor in problem.extra.values():
        tensor.requires_grad_()
    problem.settings["solver"] = solver
    assert set(assert_exact(problem, mode, "torchdyn-rk4")) >= set(problem.extra)


@each_way_back
def test_coefficients_that_are_changed_between_two_solves(mode: str) -> None:
    """The replay has those that its solve had."""
    solver, problem = RungeKutta4(DOUBLE), problem_for("torchdyn-rk4")
    problem.settings["solver"] = solver
    truth = gradients_of(loss_of(returned(problem, BACKPROPAGATION, "torchdyn-rk4")[1]), problem.wanted())
    solution = returned(problem, mode, "torchdyn-rk4")[1]
    nodes, rows, _, error = solver.tableau
    solver.tableau = nodes, rows, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=DOUBLE), error
    assert_same_gradients(gradients_of(loss_of(solution), problem.wanted()), truth)
    assert_exact(problem, mode, "torchdyn-rk4")


@pytest.mark.parametrize("solver", [HyperEuler, HyperMidpoint, HyperRungeKutta4])
@each_way_back
def test_a_hypersolver_whose_network_is_the_field(mode: str, solver: Any) -> None:
    problem = problem_for("torchdyn-euler")
    problem.settings["solver"] = solver(problem.field, DOUBLE)
    assert_exact(problem, mode, "torchdyn-euler")


@pytest.mark.parametrize("solver", [RungeKutta4, DormandPrince45, Euler])
@each_way_back
def test_one_solver_with_states_of_two_precisions(mode: str, solver: Any) -> None:
    """torchdyn rounds a solver's coefficients to the state's dtype for good: a replay has those of its solve."""
    method = "torchdyn-dopri5" if solver is DormandPrince45 else "torchdyn-rk4"
    shared = solver(DOUBLE)
    problems = [problem_for(method, dtype=dtype) for dtype in (DOUBLE, torch.float32, DOUBLE)]
    for problem in problems:
        problem.settings["solver"] = shared
    truths = [gradients_of(loss_of(returned(p, BACKPROPAGATION, method)[1]), p.wanted()) for p in problems]
    shared.tableau = solver(DOUBLE).tableau
    solutions = [returned(problem, mode, method)[1] for problem in problems]
    for problem, solution, truth in zip(problems, solutions, truths, strict=True):
        assert_same_gradients(gradients_of(loss_of(solution), problem.wanted()), truth, solution.dtype)


# Several solves, and witnesses that are not backpropagation.


@each_kind
@each_way_back
def test_two_solves_before_one_backward(mode: str, method: str) -> None:
    problem = problem_for(method)
    wanted = problem.wanted()

    def loss(name: str) -> Tensor:
        first = returned(problem, name, method)[1]
        later = Problem(problem.field, first[-1], problem.t + 0.5, settings=problem.settings)
        return loss_of((first, returned(later, name, method)[1]))

    assert_same_gradients(gradients_of(loss(mode), wanted), gradients_of(loss(BACKPROPAGATION), wanted))


@each_named_kind
@each_way_back
def test_gradients_are_accumulated_by_backward(mode: str, method: str) -> None:
    problem = problem_for(method)
    field: Any = problem.field
    truth = gradients_of(loss_of(returned(problem, BACKPROPAGATION, method)[1]), problem.wanted())["weight"]
    assert truth is not None
    for _ in range(2):
        loss_of(returned(problem, mode, method)[1]).backward()
    assert relative_error(field.weight.grad, 2 * truth) < 1e-11


@pytest.mark.parametrize("solver", [RungeKutta4, DormandPrince45, Tsitouras45, BogackiShampine, StaleHeun])
@each_way_back
def test_finite_differences_with_the_accepted_steps_held_constant(mode: str, solver: Any) -> None:
    """The steps taken again one by one, by the solver's own rule, at a state and parameters that are moved."""
    method = "torchdyn-rk4" if solver is RungeKutta4 else "torchdyn-dopri5"
    problem, instance = problem_for(method, time_grad=False), solver(DOUBLE)
    problem.settings["solver"] = instance
    with steps_recorded(instance) as calls:
        solution = returned(problem, BACKPROPAGATION, method)[1]
    taken = accepted(calls)
    assert torch.equal(taken[-1].end, solution[-1])

    def end() -> float:
        x, slope = problem.y0, None
        for one in taken:
            slope, x, *_ = instance.step(problem.field, x, one.t, one.dt, k1=slope)
        return float(loss_of(x))

    wanted = problem.wanted()
    slope, directions = directional(gradients_of(loss_of(returned(problem, mode, method)[1][-1]), wanted))
    assert slope == pytest.approx(difference_quotient(end, wanted, directions), rel=1e-8)


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
@each_way_back
def test_closed_form_of_a_linear_field(mode: str, solver: Any) -> None:
    """``sum_mj w_mj x_mj`` with ``x_m = x_0 prod_i P(h_i rate)``, differentiated by hand for x_0, rates and times."""
    field, x = Decay(uniform(3, seed=2)), uniform(3, seed=1).requires_grad_()
    t_span = torch.tensor([0.0, 0.2, 0.35, 0.8, 0.9], dtype=DOUBLE, requires_grad=True)
    weights = uniform(5, 3, seed=3)
    solution = solve(mode, field, x, t_span, "torchdyn-euler", solver=solver(DOUBLE))
    found = torch.autograd.grad((weights * solution).sum(), [x, field.rate, t_span])

    with torch.no_grad():
        sizes, powers = t_span.diff(), range(len(AMPLIFICATION[solver]))
        z = sizes[:, None] * field.rate
        terms = [(c, p) for p, c in zip(powers, AMPLIFICATION[solver], strict=True)]
        factor = torch.stack([c * z**p for c, p in terms]).sum(0)
        slope = torch.stack([p * c * z ** (p - 1) for c, p in terms if p]).sum(0)
        states = x * torch.cat([torch.ones(1, 3, dtype=DOUBLE), factor.cumprod(0)])
        # What a relative change of the factor of step i is worth: all outputs after it change by as much.
        worth = (weights * states).flip(0).cumsum(0).flip(0)[1:]
        of_size, zero = (worth * field.rate * slope / factor).sum(1), torch.zeros(1, dtype=DOUBLE)
        expected = [
            (weights * states).sum(0) / x,
            (worth * sizes[:, None] * slope / factor).sum(0),
            torch.cat([zero, of_size]) - torch.cat([of_size, zero]),
        ]
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    assert max(errors) < 1e-13, errors


@each_way_back
def test_rk4_is_differentiated_as_torchdyn_computes_it(mode: str) -> None:
    """Its second stage stands at the start of the step and its last one in the middle."""
    strength = torch.tensor([1.5], dtype=DOUBLE, requires_grad=True)
    start, size = 0.3, 0.4
    problem = Problem(
        lambda t, x, args=None: strength * t**2 + 0 * x,
        torch.zeros(1, dtype=DOUBLE),
        torch.tensor([start, start + size], dtype=DOUBLE),
        settings={"solver": RungeKutta4(DOUBLE)},
    )
    (found,) = torch.autograd.grad(
        model_for(problem, mode, "torchdyn-rk4")(problem.y0, problem.t)[1][-1].sum(), strength
    )
    nodes = [start, start, start + size / 2, start + size / 2]
    expected = size * sum(b * t**2 for b, t in zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), nodes, strict=True))
    assert float(found) == pytest.approx(expected, rel=1e-14)
