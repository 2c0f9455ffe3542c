"""What the recorders take for granted of torchdiffeq's solvers: which methods are called, when, with what.

Each test runs a solver of torchdiffeq with the method in question watched by a subclass, as the recorders do it. A
failure says what a new torchdiffeq does otherwise; the recorders are in
``torchdiffeq_symplectic/hosts/torchdiffeq/_recording.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torchdiffeq._impl import misc, rk_common
from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.solvers import FixedGridODESolver

from torchdiffeq_symplectic.hosts.torchdiffeq._host import SOLVERS

ADAPTIVE = sorted(name for name, solver in SOLVERS.items() if issubclass(solver, RKAdaptiveStepsizeODESolver))
ADAMS = sorted(name for name, solver in SOLVERS.items() if issubclass(solver, AdamsBashforthMoulton))
FIXED = sorted(name for name, solver in SOLVERS.items() if issubclass(solver, FixedGridODESolver) and name not in ADAMS)
T = torch.tensor([0.0, 0.31, 0.32, 1.0], dtype=torch.float64)
Y0 = torch.tensor([[0.2, -1.0, 0.5], [1.5, 0.1, -0.7]], dtype=torch.float64)
STEP_T = torch.tensor([0.8, -2.0, 0.45, 0.25], dtype=torch.float64)  # out of order, one before the start
JUMP_T = torch.tensor([0.6, 0.15], dtype=torch.float64)


def field(t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(3 * y.roll(1, -1)) * torch.exp(torch.sin(15 * t)) - y


class Call(NamedTuple):
    """One call of a watched method."""

    name: str
    args: tuple[Any, ...]
    result: Any


def watched(method: str, *names: str, **options: Any) -> tuple[Any, list[Call]]:
    """A solver whose methods ``names`` write down their calls, in the order in which they begin."""
    calls: list[Any] = []

    def watch(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            assert self is solver
            calls.append(None)
            place = len(calls) - 1
            result = getattr(super(watching, self), name)(*args)
            calls[place] = Call(name, args, result)
            return result

        return call

    watching = type("Watching", (SOLVERS[method],), {name: watch(name) for name in names})
    func = misc._check_inputs(field, Y0, T, 1e-4, 1e-4, method, None, None, SOLVERS)[1]
    settings = {"norm": misc._rms_norm, **options}
    solver = watching(func=func, y0=Y0, rtol=1e-4, atol=1e-4, **settings)
    return solver, calls


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# Adaptive solvers.


def test_state_of_an_adaptive_solver_has_known_fields() -> None:
    assert rk_common._RungeKuttaState._fields == ("y1", "f1", "t0", "t1", "dt", "interp_coeff")


@pytest.mark.parametrize("method", ADAPTIVE)
def test_start_is_a_state_at_the_first_time_with_a_fresh_slope(method: str) -> None:
    solver, _ = watched(method, first_step=0.05)
    solver._before_integrate(T)
    state = solver.rk_state
    assert state.y1 is solver.y0
    assert torch.equal(state.f1, field(T[0], Y0))
    assert state.t0 == state.t1 == T[0]
    assert float(state.dt) == pytest.approx(0.05)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_interp_fit_is_called_in_accepted_steps_alone(method: str) -> None:
    solver, calls = watched(method, "_adaptive_step", "_interp_fit", first_step=0.6)
    solver.integrate(T)
    steps = [i for i, call in enumerate(calls) if call.name == "_adaptive_step"]
    accepted = 0
    for i, following in zip(steps, [*steps[1:], len(calls)], strict=True):
        (old,), new = calls[i].args, calls[i].result
        inside = calls[i + 1 : following]
        moved = bool(new.t1 > old.t1)
        assert [call.name for call in inside] == ["_interp_fit"] * moved, "_interp_fit no longer marks accepted steps"
        if not moved:
            assert new.y1 is old.y1, "a rejected step no longer leaves the state"
            continue
        accepted += 1
        y0, y1, k, dt = inside[0].args
        assert y0 is old.y1, "_interp_fit(y0, y1, k, dt): y0 is no longer the state before the step"
        assert y1 is new.y1
        assert new.t0 == old.t1
        assert torch.equal(old.t1 + dt, new.t1)
        assert k.shape[:-1] == Y0.shape, "slopes no longer lie along the last dimension of k"
        assert k.shape[-1] == len(solver.tableau.alpha) + 1
        assert torch.equal(k[..., 0], old.f1), "k no longer begins with the slope that is carried in"
        assert torch.equal(k[..., -1], new.f1)
        assert new.f1.untyped_storage().data_ptr() == storage(k), "f1 is no longer a view of k: jumps cannot be told"
    assert 0 < accepted < len(steps), "the problem is meant to have rejected steps"


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("name", ["step_t", "jump_t"])
def test_cut_steps_end_at_views_of_the_sorted_option(method: str, name: str) -> None:
    given = {"step_t": STEP_T, "jump_t": JUMP_T}[name]
    solver, calls = watched(method, "_adaptive_step", "_interp_fit", first_step=0.09, **{name: given})
    solver.integrate(T)
    ordered = getattr(solver, name)
    assert torch.equal(ordered, given[given >= T[0]].sort().values), f"{name} is no longer sorted in place of the given"
    assert torch.equal(ordered, rk_common._sort_tvals(given, T[0]))
    ends = [call.result.t1 for call in calls if call.name == "_adaptive_step"]
    sizes = [call.args[3] for call in calls if call.name == "_interp_fit"]
    views = [end for end in ends if storage(end) == storage(ordered)]
    offsets = sorted({end.storage_offset() - ordered.storage_offset() for end in views})
    assert offsets == list(range(len(ordered))), f"a step cut at {name} no longer ends at a view of that entry"
    assert all(end == ordered[end.storage_offset() - ordered.storage_offset()] for end in views)
    assert not any(float(end) in ordered.tolist() for end in ends if storage(end) != storage(ordered))
    starts = [T[0], *[end for before, end in zip([T[0], *ends], ends, strict=False) if end > before]]
    for size, start, end in zip(sizes, starts, starts[1:], strict=False):
        exact = torch.equal(size, end - start) if storage(end) == storage(ordered) else torch.equal(start + size, end)
        assert exact, "_interp_fit no longer gets the size of the step as it was cut"


@pytest.mark.parametrize("method", ADAPTIVE)
def test_slope_after_a_jump_is_fresh_and_from_the_other_side(method: str) -> None:
    solver, calls = watched(method, "_adaptive_step", "_interp_fit", first_step=0.09, jump_t=JUMP_T, step_t=STEP_T)
    solver.integrate(T)
    fits = iter([call for call in calls if call.name == "_interp_fit"])
    fresh = []
    for call in calls:
        if call.name == "_adaptive_step" and call.result.t1 > call.args[0].t1:
            k = next(fits).args[2]
            if storage(call.result.f1) != storage(k):
                new = call.result
                fresh.append(float(new.t1))
                above = torch.nextafter(new.t1, new.t1 + 1)
                assert torch.equal(new.f1, field(above, new.y1)), "after a jump f is no longer taken from above"
    assert fresh == sorted(JUMP_T.tolist()), "the slope is evaluated anew elsewhere than after a jump"


@pytest.mark.parametrize("method", ADAPTIVE)
def test_outputs_are_asked_for_one_by_one_and_interpolated_by_a_polynomial(method: str) -> None:
    solver, _ = watched(method, first_step=0.05)
    checked: list[float] = []

    class Checking(type(solver)):  # type: ignore[misc]
        def _advance(self, next_t: Tensor) -> Tensor:
            value = super()._advance(next_t)
            state = self.rk_state
            theta = (next_t - state.t0) / (state.t1 - state.t0)
            powers = torch.stack([coefficient * theta**p for p, coefficient in enumerate(state.interp_coeff)])
            assert torch.allclose(value, powers.sum(0), rtol=1e-13, atol=1e-13), "interp_coeff are other coefficients"
            checked.append(float(theta))
            return value  # type: ignore[no-any-return]

    solver.__class__ = Checking
    solution = solver.integrate(T)
    assert len(checked) == len(T) - 1, "_advance is no longer called once for each output"
    assert all(0 <= theta <= 1 for theta in checked)
    assert torch.equal(solution[0], Y0)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_an_event_is_looked_for_in_one_call_and_lies_in_the_last_step(method: str) -> None:
    solver, calls = watched(method, "_advance_until_event", "_advance", first_step=0.05)
    event_fn = misc._check_inputs(
        field, Y0, T[:2], 1e-4, 1e-4, method, None, lambda t, y: t - 0.57 + 0.01 * y[0, 0], SOLVERS
    )[8]
    event_t, solution = solver.integrate_until_event(T[0], event_fn)
    assert [call.name for call in calls] == ["_advance_until_event"]
    (function,), (at, value) = calls[0].args, calls[0].result
    assert function is event_fn
    assert at is event_t
    assert solver.rk_state.t0 <= event_t <= solver.rk_state.t1
    assert torch.equal(solution, torch.stack([Y0, value]))


# Fixed-grid solvers.


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("method", FIXED + ADAMS)
def test_the_grid_is_made_once_and_passed_to_steps_entry_by_entry(method: str) -> None:
    solver, calls = watched(method, "_step_func")
    made: list[tuple[Any, ...]] = []
    grid = torch.linspace(0, 1, 8, dtype=torch.float64)

    def constructor(*arguments: Any) -> Tensor:
        made.append(arguments)
        return grid

    assert callable(solver.grid_constructor), "grid_constructor is no longer an attribute of the solver"
    solver.grid_constructor = constructor
    solver.integrate(T)
    assert len(made) == 1
    func, y0, t = made[0]
    assert func is solver.func
    assert y0 is solver.y0
    assert t is T
    assert len(calls) == len(grid) - 1
    for call, start, end in zip(calls, grid[:-1], grid[1:], strict=True):
        func, t0, dt, t1, _ = call.args
        assert func is solver.func, "_step_func(func, t0, dt, t1, y0) has other arguments"
        assert torch.equal(torch.stack([t0, dt, t1]), torch.stack([start, end - start, end]))


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("method", FIXED + ADAMS)
def test_a_step_returns_the_change_of_the_state_and_the_first_slope(method: str) -> None:
    solver, calls = watched(method, "_step_func", step_size=0.1)
    solver.integrate(T)
    for call, following in pairwise(calls):
        change, slope = call.result
        y0 = call.args[4]
        assert torch.equal(y0 + change, following.args[4]), "_step_func no longer returns the change of the state first"
        assert torch.equal(slope, field(call.args[1], y0)), "_step_func no longer returns the first slope second"


@pytest.mark.parametrize("method", FIXED)
def test_outputs_are_interpolated_between_the_states_around_them(method: str) -> None:
    solver, calls = watched(method, "_linear_interp", "_step_func", step_size=0.1)
    solution = solver.integrate(T)
    steps = [call for call in calls if call.name == "_step_func"]
    fits = [call for call in calls if call.name == "_linear_interp"]
    assert [float(call.args[4]) for call in fits] == T[1:].tolist(), "not one _linear_interp for each output"
    for output, call in enumerate(fits, start=1):
        t0, t1, y0, y1, t = call.args
        assert t0 <= t <= t1
        (step,) = (step for step in steps if step.args[1] is t0)
        assert y0 is step.args[4]
        assert torch.equal(y1, y0 + step.result[0])
        assert torch.equal(solution[output], call.result)


@pytest.mark.parametrize("method", FIXED)
def test_linear_interpolation_at_the_ends_gives_the_states_themselves(method: str) -> None:
    solver, _ = watched(method)
    y1 = Y0 + 1
    assert solver._linear_interp(T[0], T[3], Y0, y1, T[0].clone()) is Y0
    assert solver._linear_interp(T[0], T[3], Y0, y1, T[3].clone()) is y1, "_linear_interp no longer returns y1 itself"
    assert torch.allclose(solver._linear_interp(T[0], T[3], Y0, y1, T[1]), Y0 + T[1])


@pytest.mark.parametrize("method", FIXED)
def test_cubic_interpolation_gets_slopes_at_both_ends(method: str) -> None:
    solver, calls = watched(method, "_cubic_hermite_interp", step_size=0.1, interp="cubic")
    solver.integrate(T)
    assert [float(call.args[6]) for call in calls] == T[1:].tolist(), "not one _cubic_hermite_interp for each output"
    for call in calls:
        t0, y0, f0, t1, y1, f1, t = call.args
        assert torch.equal(f0, field(t0, y0))
        assert torch.equal(f1, field(t1, y1)), "the slope at the end of the step is another one"
        assert t0 <= t <= t1


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", FIXED)
def test_an_event_is_interpolated_last_at_its_own_time(method: str, interp: str) -> None:
    names = ("_step_func", "_linear_interp", "_cubic_hermite_interp")
    solver, calls = watched(method, *names, step_size=0.1, interp=interp)
    event_fn = misc._check_inputs(
        field, Y0, T[:2], 1e-4, 1e-4, method, None, lambda t, y: t - 0.57 + 0.01 * y[0, 0], SOLVERS
    )[8]
    event_t, solution = solver.integrate_until_event(T[0], event_fn)
    assert calls[-1].name == {"linear": "_linear_interp", "cubic": "_cubic_hermite_interp"}[interp]
    assert calls[-1].args[-1] is event_t, "the last interpolation is no longer that of the event"
    assert torch.equal(solution[1], calls[-1].result)
    steps = [call for call in calls if call.name == "_step_func"]
    assert calls[: len(steps)] == steps, "steps are taken after the search for the event has begun"
    assert steps[-1].args[1] <= event_t <= steps[-1].args[3]


@pytest.mark.parametrize("method", FIXED)
def test_a_fixed_step_remembers_nothing_of_the_step_before(method: str) -> None:
    solver, _ = watched(method)
    step = (solver.func, T[1], T[2] - T[1], T[2], Y0)
    first, _ = solver._step_func(*step)
    solver._step_func(solver.func, T[0], T[1], T[1], 3 * Y0)
    again, _ = solver._step_func(*step)
    assert torch.equal(first, again), "it carries slopes over: measure it as the Adams methods are"


# Adams methods.


# The names of options, and the arithmetic of the times, for all.
