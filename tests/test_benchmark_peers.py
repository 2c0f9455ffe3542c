"""The peers' contenders: the steps that their references repeat, and the errors that are measured by them."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import pytest
import torch
from harness import Net, initial, loss_of, times
from torch import Tensor, nn
from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as TABLEAU

from torchdiffeq_symplectic.benchmark import peers, torchdiffeqs
from torchdiffeq_symplectic.benchmark.compare import compare
from torchdiffeq_symplectic.benchmark.contender import Contender
from torchdiffeq_symplectic.benchmark.problem import Problem, State, as_tuple, flatten
from torchdiffeq_symplectic.benchmark.replay import Flat

METHODS = {"TorchDiffEqPack, ACA": "dopri5", "TorchDiffEqPack, MALI": "sym12async"}
each_peer = pytest.mark.parametrize("name", ["zuko", *METHODS])
each_pack = pytest.mark.parametrize("name", METHODS)


class Uneven(Net):
    """Fast at some times and slow at others, so that the steps differ in length and some are rejected."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        assert t.ndim == 0
        return super().forward(t, y) * torch.exp(torch.sin(20 * t))


class Pair(Uneven):
    def forward(self, t: Tensor, y: Any) -> Any:
        return super().forward(t, y[0]), y[0].sum(dim=1) * y[1]


class WithUnused(Uneven):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


def contender(name: str) -> Contender:
    found = {one.name: one for one in peers.installed()}
    if name not in found:
        pytest.skip(f"{name} is not installed")
    return found[name]


def problem(dtype: torch.dtype = torch.float64, **changes: Any) -> Problem:
    options = {"first_step": 0.1}
    basic = Problem(Uneven(), initial(), times(0.0, 0.375, 0.8125), loss_of, "dopri5", 1e-2, 1e-2, options)
    changed = basic.replace(**changes)
    y0 = tuple(part.detach().to(dtype) for part in as_tuple(changed.y0))
    return changed.replace(
        field=changed.field.to(dtype), y0=y0 if isinstance(changed.y0, tuple) else y0[0], t=changed.t.to(dtype)
    )


PROBLEMS: dict[str, dict[str, Any]] = {
    "three times": {},
    "two times": {"t": times(0.125, 0.8125)},
    "backwards": {"t": times(0.8125, 0.375, 0.0)},
    "tuple": {"field": Pair(), "y0": (initial(2, 3), initial(2))},
    "stack": {"field": nn.ModuleList([Uneven(), Uneven(seed=1)])},
    "own first step": {"options": {}},
}
each_problem = pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS)


def error(name: str, chosen: Problem) -> float:
    """Relative, of a contender's gradient."""
    peer = contender(name)
    found, truth = flatten(chosen.gradient(peer.solve)), peer.reference(chosen).gradient
    return float((found - truth).norm() / truth.norm())


def naive(name: str, chosen: Problem) -> tuple[Tensor, int]:
    """The gradient by backpropagation through the steps of a peer, and how many there are."""
    steps = 0

    def solve(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        nonlocal steps
        if name in METHODS:
            return pack(METHODS[name], func, y0, t, settings)
        grid = zukos_steps(func, y0, t, settings)
        steps += sum(len(interval) for interval in grid)
        return textbook(func, y0, grid)

    return flatten(chosen.gradient(solve)), steps


def pack(method: str, func: nn.Module, y0: State, t: Tensor, settings: dict[str, Any]) -> State:
    """TorchDiffEqPack's own solve with its graph, from output to output, of times that float32 has."""
    from TorchDiffEqPack import odesolve_endtime

    field = Flat(func, y0)  # its times have the dtype of the state again
    states = [field.pack(y0)]
    for start, end in pairwise(t):
        options = {"method": method, "t0": start, "t1": end, "h": settings["options"].get("first_step")}
        tolerances = {"rtol": settings["rtol"], "atol": settings["atol"]}
        states.append(odesolve_endtime(field, states[-1], options | tolerances))
    return field.unpack(torch.stack(states))


def zukos_steps(func: nn.Module, y0: State, t: Tensor, settings: dict[str, Any]) -> list[list[tuple[Tensor, Tensor]]]:
    """Times and lengths for each interval, from the times of its evaluations: a trial has seven, the second at 1/5."""
    seen: list[Tensor] = []

    class Watched(nn.Module):
        def forward(self, t: Tensor, y: State) -> State:
            seen.append(t)
            slope: State = func(t, y)
            return slope

    peer, found, state = contender("zuko"), [], y0
    for interval in pairwise(t):
        seen.clear()
        with torch.no_grad():
            solution = peer.solve(Watched(), state, torch.stack(interval), **settings)
        state = tuple(part[-1] for part in solution) if isinstance(solution, tuple) else solution[-1]
        trials = [(seen[first], 5 * (seen[first + 1] - seen[first])) for first in range(0, len(seen), 7)]
        found.append([one for one, other in pairwise(trials) if other[0] != one[0]] + trials[-1:])
    return found


def textbook(func: nn.Module, y0: State, grid: list[list[tuple[Tensor, Tensor]]]) -> State:
    """Dormand and Prince's method, without an error estimate."""
    states, y = [y0], as_tuple(y0)
    for interval in grid:
        for t, h in interval:
            slopes: list[tuple[Tensor, ...]] = []
            for node, row in zip([0.0, *TABLEAU.alpha[:-1].tolist()], [(), *TABLEAU.beta[:-1]], strict=True):
                stage = advanced(y, h, row, slopes)
                slopes.append(as_tuple(func(t + node * h, stage if isinstance(y0, tuple) else stage[0])))
            y = advanced(y, h, TABLEAU.c_sol[:-1], slopes)
        states.append(y if isinstance(y0, tuple) else y[0])
    return stacked(states)


def advanced(y: tuple[Tensor, ...], h: Tensor, weights: Any, slopes: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    for weight, slope in zip(weights, slopes, strict=True):
        y = tuple(part + h * weight * change for part, change in zip(y, slope, strict=True))
    return y


def stacked(states: list[State]) -> State:
    parts = tuple(torch.stack(part) for part in zip(*map(as_tuple, states), strict=True))
    return parts if isinstance(states[0], tuple) else parts[0]


@each_problem
@each_peer
def test_reference_in_float64_is_backpropagation_through_the_peers_steps(name: str, changes: dict[str, Any]) -> None:
    chosen = problem(**changes)
    truth = contender(name).reference(chosen)
    found, steps = naive(name, chosen)
    assert (found - truth.gradient).norm() < 1e-12 * truth.gradient.norm()
    assert name in METHODS or steps == truth.steps


@pytest.mark.parametrize("changes", [PROBLEMS["backwards"], PROBLEMS["tuple"]])
@each_peer
def test_reference_of_a_float32_solve_is_backpropagation_to_its_rounding(name: str, changes: dict[str, Any]) -> None:
    chosen = problem(torch.float32, **changes)
    truth = contender(name).reference(chosen)
    found, _ = naive(name, chosen)
    assert 0 < (found - truth.gradient).norm() < 1e-5 * truth.gradient.norm()


@each_problem
@each_pack
def test_errors_of_aca_and_mali_are_rounding_to_float32(name: str, changes: dict[str, Any]) -> None:
    assert 1e-12 < error(name, problem(**changes)) < 1e-5


@each_pack
def test_errors_of_aca_and_mali_come_from_times_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    assert error(name, problem()) < 1e-13


def test_zuko_integrates_the_continuous_adjoint() -> None:
    errors = [error("zuko", problem(rtol=tolerance, atol=tolerance)) for tolerance in (1e-3, 1e-5, 1e-7)]
    assert 1e-1 > errors[0] > 10 * errors[1] > 100 * errors[2] > 1e-9


@each_peer
def test_rejected_steps_do_not_count(name: str) -> None:
    chosen = problem(t=times(0.0, 0.8), options={"first_step": 0.5})
    field = chosen.field
    assert isinstance(field, Net)
    contender(name).solve(field, initial(), chosen.t, rtol=1e-2, atol=1e-2, method="dopri5", options=chosen.options)
    evaluations = field.evaluations  # of an accepted step TorchDiffEqPack makes all but the last twice
    steps = contender(name).reference(chosen).steps
    least = {"zuko": 7 * steps, "TorchDiffEqPack, ACA": 7 * (2 * steps - 1), "TorchDiffEqPack, MALI": 2 * steps}
    assert evaluations > least[name]


def test_the_comparison_has_all_of_them() -> None:
    there = [contender(name) for name in ("zuko", *METHODS)]
    rows = compare(problem(t=times(0.0, 0.2)), [torchdiffeqs.installed()[0], *there], repeats=1)
    assert [row.note for row in rows] == [""] * 4
    assert all(getattr(row, column) is not None for row in rows for column in row.columns())


def test_a_failure_is_a_row() -> None:
    rows = compare(
        problem(field=WithUnused(), t=times(0.0, 0.2)), [torchdiffeqs.installed()[0], contender("zuko")], repeats=1
    )
    assert "not have been used" in rows[1].note


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "euler", "options": {"step_size": 0.1}}, "only in place of dopri5"),
        ({"options": {"first_step": 0.1, "max_step": 0.1, "jump_t": times(0.3)}}, "has no max_step, jump_t"),
        ({"options": {"max_num_steps": 1000}}, None),
    ],
)
@each_peer
def test_what_it_does_not_solve(name: str, changes: dict[str, Any], reason: str | None) -> None:
    assert contender(name).refusal(problem(**changes)) == reason


def test_nothing_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.installed() == []
