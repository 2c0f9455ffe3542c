"""What the recorder takes for granted of torchdyn's solve: what its loops call, when, with what, and what they keep.

Each test runs torchdyn's own ``odeint`` with field, solver and interpolator watched, as the recorder does it. A failure
says what a new torchdyn does otherwise; the recorder is in ``torchdiffeq_symplectic/hosts/torchdyn/_recording.py``.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest

pytest.importorskip("torchdyn")

import torch
from torch import Tensor, nn
from torchdyn.numerics.solvers.ode import SOLVER_DICT, str_to_solver

import torchdiffeq_symplectic  # noqa: F401 (registers the modes)
from torchdiffeq_symplectic.hosts.torchdyn._host import odeint, str_to_interp

MODULE = sys.modules["torchdyn.numerics.odeint"]  # the package has a function of this name as well
FIXED = ("euler", "midpoint", "rk4")
ADAPTIVE = ("dopri5", "tsit5")
T = torch.tensor([0.1, 0.34, 0.35, 0.9, 1.27], dtype=torch.float64)
X = torch.tensor([[0.2, -1.0, 0.5], [1.5, 0.1, -0.7]], dtype=torch.float64)
TOLERANCES = {"atol": 1e-3, "rtol": 1e-3}  # odeint's defaults, of which it says nothing


def field(t: Tensor, x: Tensor) -> Tensor:
    """Quick at one time, so that steps are rejected there."""
    return torch.tanh(3 * x.roll(1, -1)) * (1 + 20 * torch.exp(-400 * (t - 0.6) ** 2)) - x


class Event(NamedTuple):
    """One call of something that is watched: its name, its arguments in their order and by name, its result."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class Watched:
    """A stand-in for a solver or an interpolator that writes down its calls and what else is asked of it."""

    def __init__(self, original: Any, events: list[Event], *methods: str) -> None:
        self.__dict__.update(_original=original, _events=events, _methods=methods, _read=set(), _written=set())

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._original)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._original, name)
        self._read.add(name)
        if name not in self._methods:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            self._events.append(Event(name, args, kwargs, result))
            return result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        self._written.add(name)


class Run(NamedTuple):
    """A solve of torchdyn: what was called in its course, and what it returned."""

    events: list[Event]
    times: Tensor
    solution: Tensor
    solver: Watched
    interpolator: Watched | None

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    def arguments(self, name: str, function: Callable[..., Any]) -> list[dict[str, Any]]:
        """Those of every call, by the names that ``function``, a method, gives them."""
        found = []
        for event in self.of(name):
            bound = inspect.signature(function).bind(None, *event.args, **event.kwargs)
            found.append(bound.arguments)
        return found


def watched_solve(
    solver: str,
    t: Tensor | list[Tensor] = T,
    x: Any = X,
    *,
    func: Callable[..., Any] = field,
    interpolator: str | None = None,
    monkeypatch: pytest.MonkeyPatch | None = None,
    **arguments: Any,
) -> Run:
    events: list[Event] = []

    def watching(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = len(events)
            result = function(*args, **kwargs)
            # A call of the field inside of this one comes after it, as it begins later.
            events.insert(begun, Event(name, args, kwargs, result))
            return result

        return call

    if monkeypatch is not None:
        for name in ("init_step", "adapt_step"):
            monkeypatch.setattr(MODULE, name, watching(name, getattr(MODULE, name)))
    stand = Watched(str_to_solver(solver, torch.float64), events, "step", "sync_device_dtype")
    between = None
    if interpolator is not None:
        between = Watched(str_to_interp(interpolator, torch.float64), events, "fit", "evaluate", "sync_device_dtype")
    times, solution = odeint(watching("field", func), x, t, stand, **{**TOLERANCES, **arguments}, interpolator=between)
    return Run(events, times, solution, stand, between)


def step_of(solver: str) -> Callable[..., Any]:
    function: Callable[..., Any] = SOLVER_DICT[solver].step
    return function


def end_of(step: dict[str, Any]) -> float:
    """The time at which a step ends, as torchdyn computes it."""
    return float((step["t"] + step["dt"]).detach())


def steps_of(run: Run, solver: str) -> list[dict[str, Any]]:
    """The arguments of every step and its result, which has an entry of its own."""
    arguments = run.arguments("step", step_of(solver))
    return [{**given, "result": event.result} for given, event in zip(arguments, run.of("step"), strict=True)]


each_solver = pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE])
each_fixed = pytest.mark.parametrize("solver", FIXED)
each_adaptive = pytest.mark.parametrize("solver", ADAPTIVE)


# The call.


def test_odeint_takes_what_the_adapter_gives_it() -> None:
    parameters = inspect.signature(odeint).parameters
    assert list(parameters)[:6] == ["f", "x", "t_span", "solver", "atol", "rtol"], "odeint has another signature"
    defaults = {name: parameters[name].default for name in ("interpolator", "save_at", "args")}
    assert defaults == {"interpolator": None, "save_at": (), "args": {}}


@pytest.mark.parametrize("interpolator", [None, "4th"])
@each_solver
def test_nothing_but_known_names_is_asked_of_a_solver(solver: str, interpolator: str | None) -> None:
    """The stand-in shows all of its attributes, but what is written would not reach the solver."""
    run = watched_solve(solver, interpolator=interpolator)
    known = {"sync_device_dtype", "stepping_class", "step"}
    if solver in ADAPTIVE:
        known |= {"order", "safety", "min_factor", "max_factor"}
    assert run.solver._read == known, "torchdyn asks its solver for something else: the stand-in must know"
    assert run.solver._written == set(), "torchdyn writes to its solver: the stand-in must hand that on"


@each_solver
def test_the_solver_is_synchronised_once_and_before_any_evaluation(solver: str) -> None:
    run = watched_solve(solver)
    first, *rest = [event.name for event in run.events]
    assert first == "sync_device_dtype", "measure() would come too late"
    assert "sync_device_dtype" not in rest
    (x, t_span), result = run.events[0].args, run.events[0].result
    assert (x, t_span) == (X, T)
    assert result[0] is X, "the state is another object after synchronisation: see what the recorder's first x is"
    assert run.of("step")[0].args[1] is X, "the first step starts from something else than the synchronised state"


@each_solver
def test_times_that_decrease_are_negated_together_with_the_field(solver: str) -> None:
    run = watched_solve(solver, T.flip(0))
    backwards = T.flip(0)
    assert torch.equal(run.events[0].args[1], -backwards), "the solver is synchronised with other times"
    assert torch.equal(run.times, -backwards), "the times that are returned are no longer the negated ones"
    step = steps_of(run, solver)[0]
    at = torch.tensor(0.45, dtype=torch.float64)
    assert torch.equal(step["f"](-at, X), -field(at, X)), "the field of a reversed solve is not -f(-t, x)"
    times = [float(event.args[0]) for event in run.of("field")]
    inner = times[2:] if solver in ADAPTIVE else times  # init_step takes a step in the other direction
    assert min(inner) >= float(T[0]) - 1e-12
    assert max(inner) <= float(T[-1]) + 1e-12


@each_solver
def test_the_field_that_the_steps_get_is_one_object_and_the_given_one_forwards(solver: str) -> None:
    def given(t: Tensor, x: Tensor) -> Tensor:
        return field(t, x)

    events: list[Event] = []
    stand = Watched(str_to_solver(solver, torch.float64), events, "step")
    odeint(given, X, T, stand, **TOLERANCES)
    assert {id(event.args[0]) for event in events} == {id(given)}, "the field is wrapped: reversed is no longer told"
    events.clear()
    odeint(given, X, T.flip(0), stand, **TOLERANCES)
    (one,) = {event.args[0] for event in events}
    assert one is not given


@each_adaptive
def test_an_interpolator_that_is_a_name_is_made_and_synchronised_as_the_adapter_does(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Watched] = []
    given: list[tuple[Any, ...]] = []
    events: list[Event] = []

    def make(*args: Any) -> Watched:
        given.append(args)
        made.append(Watched(str_to_interp(*args), events, "sync_device_dtype"))
        return made[-1]

    monkeypatch.setattr(MODULE, "str_to_interp", make)
    odeint(field, X, T, solver, **TOLERANCES, interpolator="4th")
    assert given == ([("4th", torch.float64)] if solver == "dopri5" else []), "it is made for another dtype"
    assert [event.args[0] is X for event in events] == [True] * len(made)


# Fixed steps.


@each_fixed
def test_a_fixed_step_is_called_as_the_recorder_is_and_its_state_handed_on(solver: str) -> None:
    arguments = {"some": "thing"}
    run = watched_solve(solver, args=arguments)
    found = run.of("step")
    assert len(found) == len(T) - 1
    for event in found:
        assert len(event.args) == 4, "step is called with other positional arguments than f, x, t, dt"
        assert event.kwargs == {"k1": None, "args": arguments}
        assert event.kwargs["args"] is arguments
        assert len(event.result) == 3
    for one, other in pairwise(found):
        assert other.args[1] is one.result[1], "the next step no longer starts from the very state that was returned"
    states = [X, *(event.result[1] for event in found)]
    assert torch.equal(run.solution, torch.stack(states)), "the solution is made of something else"
    assert torch.equal(run.times, T)


SAVED = {"all": [0, 1, 2, 3, 4], "some": [1, 3], "first": [0], "last": [4]}


@pytest.mark.parametrize("saved", SAVED)
@each_fixed
def test_the_states_that_are_kept_lie_close_to_a_saved_time(solver: str, saved: str) -> None:
    save_at = T[SAVED[saved]]
    run = watched_solve(solver, save_at=save_at)
    steps = steps_of(run, solver)
    ends = [T[0], *(step["t"] + step["dt"] for step in steps)]
    states = [X, *(step["result"][1] for step in steps)]
    kept = [state for state, end in zip(states, ends, strict=True) if torch.isclose(end, save_at).any()]
    assert torch.equal(run.solution, torch.stack(kept)), "which states are kept is decided otherwise: _at_end must know"
    assert torch.equal(run.times, save_at)


def test_which_states_are_kept_is_decided_by_isclose_with_its_defaults() -> None:
    """Two times of which each is close to the other: a state is kept at both, though one is asked for."""
    t = torch.tensor([0.0, 1.0, 1.0 + 5e-6, 2.0], dtype=torch.float64)
    run = watched_solve("euler", t, save_at=t[[0, 3]])
    assert len(run.solution) == 2
    assert len(watched_solve("euler", t, save_at=t[[0, 1]]).solution) == 3
    with pytest.raises(AssertionError, match="once and only once"):
        watched_solve("euler", t)


# Adaptive steps.


@each_adaptive
def test_the_first_slope_and_the_choice_of_the_first_step_come_before_the_steps(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched_solve(solver, monkeypatch=monkeypatch)
    names = [event.name for event in run.events]
    first = names.index("step")
    # A step is written down when it ends, after the evaluations that it makes.
    assert names[: first + 1] == ["sync_device_dtype", "field", "init_step", *["field"] * 7, "step"]
    k1, choice, trial, *stages = run.events[1:first]
    assert torch.equal(k1.args[0], T[0])
    assert k1.args[0].shape == (), "the time of the first slope is no longer 0-d"
    assert k1.args[1] is X
    assert choice.args[1] is k1.result
    assert float(trial.args[0]) > float(T[0])
    step = steps_of(run, solver)[0]
    assert step["k1"] is k1.result, "the first step does not start from the first slope that was evaluated"
    assert len(stages) == 6, "a step evaluates its first slope again, or another number of stages"
    assert float(step["dt"]) <= float(choice.result)


@each_adaptive
def test_accepted_steps_hand_on_what_was_returned_and_rejected_ones_what_was_given(solver: str) -> None:
    run = watched_solve(solver)
    steps = steps_of(run, solver)
    accepted = 0
    for one, other in pairwise(steps):
        slope, state, error, stages = one["result"]
        if other["x"] is state:
            accepted += 1
            assert other["k1"] is slope, "the slope that is handed on is not the next step's first one"
            assert torch.equal(other["t"], one["t"] + one["dt"])
            ratio = (error / (1e-3 + 1e-3 * torch.max(one["x"].abs(), state.abs()))).pow(2).mean().sqrt()
            assert ratio <= 1
        else:
            assert other["x"] is one["x"], "after a rejected step the state is another object: _settle must know"
            assert other["k1"] is one["k1"], "a rejected step no longer leaves the first slope"
            assert other["t"] is one["t"]
        assert stages[0] is one["k1"]
        assert len(stages) == 7
    assert accepted < len(steps) - 1, "the problem is meant to have rejected steps"
    last = steps[-1]
    assert torch.equal(run.solution[-1], last["result"][1]), "the last attempt is no longer an accepted step"
    assert torch.equal(last["t"] + last["dt"], T[-1:])


@each_adaptive
def test_an_adaptive_step_is_called_as_the_recorder_is(solver: str) -> None:
    arguments = {"some": "thing"}
    run = watched_solve(solver, args=arguments)
    for event in run.of("step"):
        assert len(event.args) == 4, "step is called with other positional arguments than f, x, t, dt"
        assert list(event.kwargs) == ["k1", "args"]
        assert event.kwargs["args"] is arguments
        assert event.args[2].shape == (1,), "the time of a step has another shape: Clock looks at it"
        assert event.args[3].shape in ((), (1,))
        assert len(event.result) == 4, "a step returns something else than slope, state, error and stages"


@each_adaptive
def test_outputs_without_interpolation_are_the_ends_of_steps_at_exactly_their_time(solver: str) -> None:
    run = watched_solve(solver)
    steps = steps_of(run, solver)
    assert torch.equal(run.times, T)
    assert torch.equal(run.solution[0], X)
    accepted = [one for one, other in pairwise(steps) if other["x"] is one["result"][1]] + steps[-1:]
    at_ends = [step["result"][1] for step in accepted if end_of(step) in T.tolist()]
    assert torch.equal(run.solution[1:], torch.stack(at_ends)), "outputs are found by something else than equality"


# Interpolation.


def test_interpolation_comes_in_accepted_steps_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.linspace(0.1, 1.27, 40, dtype=torch.float64)
    run = watched_solve("dopri5", t, interpolator="4th", monkeypatch=monkeypatch)
    assert run.interpolator is not None
    kept = [event for event in run.events if event.name in ("step", "fit", "evaluate")]
    rows: list[Tensor] = [X]
    begins = [i for i, event in enumerate(kept) if event.name == "step"]
    several = 0
    for i, end in zip(begins, [*begins[1:], len(kept)], strict=True):
        step, inside = kept[i], kept[i + 1 : end]
        slope, state, _, stages = step.result
        accepted = end == len(kept) or kept[end].args[1] is state
        names = [event.name for event in inside]
        assert names == [] or (accepted and names == ["fit", *["evaluate"] * (len(names) - 1)]), (
            "a step is interpolated before it is accepted, or in another order"
        )
        _, x, start, size = step.args
        if names:
            fit, *evaluations = inside
            middle = x + size * sum(run.interpolator.bmid[j] * stages[j] for j in range(len(stages)))
            assert fit.kwargs == {}
            h, *given, x_mid = fit.args
            assert h is size, "fit(dt, f0, f1, x0, x1, x_mid) has other arguments"
            assert [id(part) for part in given] == [id(step.kwargs["k1"]), id(slope), id(x), id(state)]
            assert torch.equal(x_mid, middle), "the state in the middle of the step is another one"
            for event in evaluations:
                coefs, t0, t1, at = event.args
                assert coefs is fit.result
                assert t0 is start
                assert torch.equal(t1, start + size)
                assert t0 <= at < t1
                rows.append(event.result)
            several += len(evaluations) > 1
        if accepted and float(start + size) in t.tolist():
            rows.append(state)
    assert several > 0, "the problem is meant to have several outputs in a step"
    assert torch.equal(run.solution, torch.stack(rows)), "the solution is made of something else, or in another order"
    assert torch.equal(run.times, t)
    steps = steps_of(run, "dopri5")
    assert all(end_of(step) not in t[1:-1].tolist() for step in steps), "interpolated outputs cut steps"


# The solvers.


def test_every_solver_of_torchdyn_is_known() -> None:
    kinds: dict[str, set[str]] = {}
    for name, cls in SOLVER_DICT.items():
        kinds.setdefault(cls.__name__, set()).add(name)
    assert set(kinds) == {
        *("Euler", "Midpoint", "RungeKutta4", "DormandPrince45", "Tsitouras45"),  # measured
        "AsynchronousLeapfrog",  # replayed whole
        "ImplicitEuler",  # refused
    }, "torchdyn has another solver: see whether it is measured, replayed whole or refused, and say so in the README"


@pytest.mark.parametrize("name", sorted(SOLVER_DICT))
def test_a_solver_is_a_module_that_can_be_copied_and_says_how_it_steps(name: str) -> None:
    solver: Any = str_to_solver(name)
    assert issubclass(type(solver), nn.Module)
    assert solver.stepping_class in ("fixed", "adaptive")
    assert list(solver.parameters()) == []
    twin: Any = copy.deepcopy(solver)
    state, t = torch.zeros(4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    found = twin.sync_device_dtype(state, t)
    assert found[0] is state
    if twin.tableau is not None:
        nodes, rows, weights, _ = twin.tableau
        assert {part.dtype for part in (nodes, *rows, weights)} == {torch.float64}, "a tableau keeps its own dtype"
        assert solver.tableau[0].dtype == torch.float32, "a copy shares its tableau"
