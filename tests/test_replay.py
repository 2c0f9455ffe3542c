"""A replay is the forward pass again, bit for bit: states, slopes, strides, and so whatever hangs on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    FEW,
    METHODS,
    OF_TORCHDIFFEQ,
    Mixing,
    Problem,
    assert_exact,
    each_mode,
    error,
    loss_of,
    over,
    problem_for,
    solve,
    times,
    uniform,
)
from torch import Tensor, nn

REPLAYED = ["symplectic", "stages", "aca"]


class Watched(Mixing):
    """Notes the bits, the strides and the time of each state that it is asked for."""

    def __init__(self, size: int, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__(size, seed=5, dtype=dtype)
        self.seen: list[tuple[float, tuple[int, ...], bytes]] = []

    def forward(self, t: Tensor, y: Any, args: Any = None) -> Any:
        state = y.detach()
        self.seen.append((float(t.detach().real), state.stride(), state.contiguous().numpy().tobytes()))
        return super().forward(t, y)


def replayed(problem: Problem, mode: str, method: str) -> tuple[set[Any], set[Any]]:
    """What the field was asked for in the solve, and in backward."""
    field: Any = problem.field
    loss = loss_of(solve(mode, field, problem.y0, problem.t, method, **problem.settings))
    forward, field.seen = set(field.seen), []
    torch.autograd.grad(loss, [problem.y0, *field.parameters()])
    return forward, set(field.seen)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
@pytest.mark.whole
@over(METHODS, ["symplectic", "aca"], every=2)
def test_stage_states_of_the_replay_are_those_of_the_solve(mode: str, method: str, dtype: torch.dtype) -> None:
    problem = problem_for(method, (2, 3), dtype, time_grad=False)  # so that shorter ways through a step are taken
    problem.field = Watched(6, dtype)
    forward, backward = replayed(problem, mode, method)
    assert backward
    assert backward <= forward


class Thermostat(nn.Module):
    """Grows entry by entry up to a threshold of its own, where it switches: ``where(y >= threshold, -1, 1)``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.9, dtype=dtype))
        self.threshold = torch.full((ENTRIES,), torch.inf, dtype=dtype)
        self.states: list[Tensor] = []

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        self.states.append(y.detach().clone())
        ones = torch.ones_like(y)
        slope: Tensor = torch.where(y >= self.threshold, -ones, ones) * self.rate * (1.5 + torch.sin(3 * y))
        return slope


ENTRIES = 40
# Implicit Adams methods do not converge on a field that jumps.
OF_ONE_STATE = [n for n, row in METHODS.items() if not row.halves and n not in ("implicit_adams", "fixed_adams")]


def thermostat(method: str, dtype: torch.dtype) -> Problem:
    """Each entry's threshold is, to the bit, the state of one of its stages: the largest so far."""
    row, field = METHODS[method], Thermostat(dtype)
    y0 = uniform(ENTRIES, seed=3, dtype=dtype).requires_grad_()
    t = torch.linspace(0, 1, 8, dtype=dtype)
    problem = Problem(field, y0, t)
    if callable(row.solver):
        problem.settings["solver"] = row.solver(dtype, ENTRIES)
    if row.adaptive:  # all steps are accepted, so that they do not depend on the thresholds
        problem.settings |= {"rtol": 1e3, "atol": 1e3}
        if row.host == "torchdiffeq":
            problem.settings["options"] = {"first_step": 0.13, "ifactor": 1.0}
    with torch.no_grad():
        solve(BACKPROPAGATION, field, y0, t, method, **problem.settings)
    states = torch.stack(field.states)
    largest, at = states.cummax(0)
    chosen = torch.linspace(1, len(states) - 1, ENTRIES).long()
    field.threshold = largest[chosen, torch.arange(ENTRIES)]
    assert at.unique().numel() > 3
    return problem


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
@over(OF_ONE_STATE, ["symplectic", "aca"], every=3)
def test_a_field_that_switches_at_a_state_of_the_solve(mode: str, method: str, dtype: torch.dtype) -> None:
    """Recomputed in another order, the stage fell on the other side of its threshold: a ReplayError, and a gradient of
    0.1746 for 0.1484 with the check off.
    """
    assert_exact(thermostat(method, dtype), mode, method)


class Images(nn.Module):
    """A convolution with dropout, whose masks are drawn in the order of memory."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 3, 3, padding=1, dtype=DOUBLE)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = nn.functional.dropout(torch.tanh(self.layer(y)), 0.4) * torch.cos(t)
        return result


@over(FEW, REPLAYED)
def test_channels_last_with_dropout(mode: str, method: str) -> None:
    """A ReplayError with contiguous replays; with the check off the gradient was 6 to 78 % wrong."""
    y0 = uniform(2, 3, 4, 5, seed=2).to(memory_format=torch.channels_last).requires_grad_()
    assert not y0.is_contiguous()
    field, t = Images(), torch.linspace(0, 1, 5, dtype=DOUBLE)
    wide = {"rtol": 10.0, "atol": 10.0} if METHODS[method].adaptive else {}

    def gradient(mode: str) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        return torch.autograd.grad(loss_of(solve(mode, field, y0, t, method, **wide)), [y0, *field.parameters()])

    assert error(gradient(mode), gradient(BACKPROPAGATION)) < 1e-11


@over([name for name, row in METHODS.items() if not row.halves], ["symplectic", "aca"], every=4)
def test_a_field_that_views_the_memory_of_a_transposed_state(mode: str, method: str) -> None:
    """``y.t().view(-1)`` fails on a contiguous state: it crashed in backward."""
    weight = uniform(6, 6, seed=1).requires_grad_()

    def field(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return torch.sin(weight @ y.t().view(-1) + t).view(3, 2).t()

    y0 = uniform(3, 2, seed=3).t().requires_grad_()
    problem = problem_for(method)
    problem.field, problem.y0 = field, y0
    problem.extra, problem.adjoint = {"weight": weight}, {"adjoint_params": (weight,)}
    assert_exact(problem, mode, method)


# No alarm where nothing differs.

# Once, the replay of a whole solve alone had the alarm.
ALARMS = [("baseline", False), ("symplectic", False), ("symplectic", True), ("aca", True)]
PASSING_ZERO = torch.linspace(-0.45, 0.45, 60, dtype=DOUBLE)


@pytest.mark.parametrize("values", [slice(0, 60, 5), pytest.param(slice(60), marks=pytest.mark.slow)], ids=["", "all"])
@pytest.mark.parametrize(("mode", "again"), ALARMS, ids=["baseline", "symplectic", "symplectic, create_graph", "aca"])
@pytest.mark.parametrize("method", ["rk4", "explicit_adams"])
def test_no_false_alarm_where_one_number_passes_zero(mode: str, method: str, again: bool, values: slice) -> None:
    """With a bound for rounding relative to the present state, 11 of 60 initial values raised by rk4, 43 by
    explicit_adams: the state is zero to rounding where it passes.
    """
    for value in PASSING_ZERO[values]:
        y0 = value.clone().requires_grad_()
        solution = solve(
            mode,
            lambda t, y: 1.3 * torch.cos(3 * t) - 0.1 * y,
            y0,
            times(0.0, 2.0),
            method,
            options={"step_size": 0.1},
            adjoint_params=(),
        )
        (gradient,) = torch.autograd.grad(solution[-1], y0, create_graph=again)
        assert float(gradient.detach()) == pytest.approx(0.818730, rel=1e-3)


def stiff(t: Tensor, y: Tensor) -> Tensor:
    rates = torch.tensor([-30.0, -2.0, 0.1], dtype=y.dtype.to_real())
    return rates * (y - torch.cos(3 * t)) + 0.1 * y.roll(1, -1) * y


def large_and_small(t: Tensor, y: Tensor) -> Tensor:
    return y.roll(1, -1) * torch.tensor([1e3, 1e-3, 1.0], dtype=y.dtype.to_real()) + 1e4


def cancelling(t: Tensor, y: Tensor) -> Tensor:
    """Slopes far larger than the state, that nearly cancel over a step."""
    return 1e3 * torch.sin(200 * t) - 5 * y


TAME = [stiff, large_and_small, cancelling]
SLOW_DTYPES = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.complex64)]
DTYPES = [torch.float32, torch.complex128, *SLOW_DTYPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("field", TAME, ids=lambda field: field.__name__)
@over(["rk4", "dopri5"], ["symplectic", "baseline"])
def test_no_false_alarm_on_badly_scaled_fields(mode: str, method: str, field: Any, dtype: torch.dtype) -> None:
    y0 = torch.tensor([0.7, -1.3, 2.1], dtype=dtype, requires_grad=True)
    t = torch.tensor([0.0, 0.51, 1.0], dtype=dtype.to_real())
    settings = {"options": {"step_size": 0.02}} if method == "rk4" else {"rtol": 1e-3, "atol": 1e-3}
    solution = solve(mode, field, y0, t, method, adjoint_params=(), **settings)
    torch.autograd.grad(solution.abs().sum(), y0)


@pytest.mark.parametrize("kind", ["float32", "autocast"])
@pytest.mark.parametrize("steps", [200, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", ["symplectic", "baseline"])
def test_no_false_alarm_over_many_steps(mode: str, steps: int, kind: str) -> None:
    problem = problem_for("rk4", (3,), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        solution = solve(
            mode, problem.field, problem.y0, torch.linspace(0, 20, steps + 1), "rk4", options={"step_size": None}
        )
    torch.autograd.grad(solution[-1].abs().sum(), [problem.y0, *problem.field.parameters()])  # type: ignore[attr-defined]


@each_mode
def test_states_that_are_not_finite_are_no_alarm(mode: str) -> None:
    """In fixed steps: an adaptive solver refuses such states."""
    problem = problem_for("rk4")
    inner = problem.field
    solution = solve(
        mode,
        lambda t, y: inner(t, y) * torch.where(t > 0.5, torch.inf, 1.0),
        problem.y0,
        problem.t,
        adjoint_params=(),
    )
    (found,) = torch.autograd.grad(solution.sum(), problem.y0)
    assert not torch.isfinite(found).all()


def test_every_method_of_torchdiffeq_is_watched() -> None:
    """A method that a new release brings is a row of the harness, or is known to be refused."""
    from torchdiffeq._impl.odeint import SOLVERS

    assert set(SOLVERS) - {"scipy_solver"} == set(OF_TORCHDIFFEQ)
