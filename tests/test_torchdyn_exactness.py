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
    solve,
    uniform,
)
from torch import Tensor, nn
from torchdyn.numerics.interpolators import FourthOrder
from torchdyn.numerics.solvers.hyper import HyperEuler, HyperMidpoint, HyperRungeKutta4
from torchdyn.numerics.solvers.ode import DormandPrince45, Euler, RungeKutta4, Tsitouras45
from torchdyn_runs import (
    accepted,
    each_kind,
    each_way_back,
    returned,
    steps_recorded,
    stiffening,
)
from torchdyn_solvers import BogackiShampine, StaleHeun

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


@each_kind
@each_way_back
def test_times_as_a_list_of_tensors(mode: str, method: str) -> None:
    problem = problem_for(method)
    problem.t = [torch.tensor([time], dtype=DOUBLE, requires_grad=True) for time in (0.1, 0.3, 0.7, 1.2)]
    problem.extra = {f"t[{i}]": time for i, time in enumerate(problem.t)}
    assert set(assert_exact(problem, mode, method)) >= set(problem.extra)


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
