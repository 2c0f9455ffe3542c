"""torchdyn's contenders: the steps that the reference repeats, and the errors that are measured by it."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Net, initial, loss_of, times
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn_cases import first_step_held

from torchdiffeq_symplectic.benchmark import torchdiffeqs, torchdyns
from torchdiffeq_symplectic.benchmark.compare import compare
from torchdiffeq_symplectic.benchmark.problem import Problem, as_tuple, flatten
from torchdiffeq_symplectic.benchmark.reference import recorded_steps

CONTENDERS = {contender.name.removeprefix("torchdyn, "): contender for contender in torchdyns.installed()}
BACKPROPAGATION = torchdiffeqs.installed()[0]


class Uneven(Net):
    """Fast at some times and slow at others, so that the steps differ in length and some are rejected."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        assert t.ndim == 0
        return super().forward(t, y) * torch.exp(2 * torch.sin(20 * t))


class Pair(Uneven):
    def forward(self, t: Tensor, y: Any) -> Any:
        return super().forward(t, y[0]), y[0].sum(dim=1) * y[1]


def problem(dtype: torch.dtype = torch.float64, **changes: Any) -> Problem:
    basic = Problem(Uneven(), initial(), times(0.0, 0.4, 1.3), loss_of, "dopri5", 1e-3, 1e-3).replace(**changes)
    y0 = tuple(part.detach().to(dtype) for part in as_tuple(basic.y0))
    return basic.replace(
        field=basic.field.to(dtype), y0=y0 if isinstance(basic.y0, tuple) else y0[0], t=basic.t.to(dtype)
    )


def euler(**changes: Any) -> dict[str, Any]:
    return {"method": "euler", "options": {"step_size": 0.1}, **changes}


PROBLEMS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "two times": {"t": times(0.1, 1.3)},
    "backwards": {"t": times(1.3, 0.4, 0.0)},
    "tuple": {"field": Pair(), "y0": (initial(2, 3), initial(2))},
    "stack": {"field": nn.ModuleList([Uneven(), Uneven(seed=1)])},
    "euler": euler(),
    "euler, backwards": euler(t=times(1.3, 0.4, 0.0)),
    "euler, a last step that is shorter": euler(t=times(0.0, 0.4, 1.35)),
    "euler, stack of tuples": euler(
        field=nn.ModuleList([Pair(), Pair(seed=1)]), y0=(initial(2, 3), initial(2)), t=times(0.0, 0.4, 1.0)
    ),
    "euler, steps from output to output": {"method": "euler"},
    "midpoint": euler(method="midpoint"),
}
TIGHT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
each_problem = pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS)


def error(name: str, chosen: Problem) -> float:
    """Relative, of a contender's gradient."""
    found, truth = flatten(chosen.gradient(CONTENDERS[name].solve)), torchdyns.reference(chosen).gradient
    return float((found - truth).norm() / truth.norm())


@each_problem
def test_reference_in_float64_is_torchdyns_backpropagation(changes: dict[str, Any]) -> None:
    with first_step_held():
        assert error("autograd", problem(**changes)) < 1e-13


@pytest.mark.parametrize("name", ["dopri5", "backwards", "tuple", "stack", "euler"])
def test_reference_of_a_float32_solve_is_backpropagation_to_its_rounding(name: str) -> None:
    with first_step_held():
        assert 0 < error("autograd", problem(torch.float32, **PROBLEMS[name])) < 1e-5


@each_problem
@pytest.mark.parametrize("name", ["adjoint", "symplectic"])
def test_every_way_has_the_same_solution(name: str, changes: dict[str, Any]) -> None:
    chosen = problem(**changes)
    for part, truth in zip(
        as_tuple(chosen.solve(CONTENDERS[name].solve)),
        as_tuple(chosen.solve(CONTENDERS["autograd"].solve)),
        strict=True,
    ):
        assert torch.equal(part, truth)


@each_problem
def test_this_packages_mode_is_exact(changes: dict[str, Any]) -> None:
    assert error("symplectic", problem(**changes)) < 1e-14


@pytest.mark.parametrize("name", ["dopri5", "tuple", "stack", "euler"])
def test_the_adjoint_is_not(name: str) -> None:
    assert 1e-7 < error("adjoint", problem(**PROBLEMS[name])) < 1


def test_backpropagation_also_differentiates_the_choice_of_the_first_step() -> None:
    assert 1e-10 < error("autograd", problem()) < 1e-4


def test_the_interpolated_adjoint_is_wrong_for_more_than_two_times() -> None:
    two, three = (problem(t=t, **TIGHT) for t in (times(0.0, 1.3), times(0.0, 0.4, 1.3)))
    assert error("interpolated_adjoint", two) < 1e-3 < 0.1 < error("interpolated_adjoint", three)


@pytest.mark.parametrize("name", ["adjoint", "interpolated_adjoint"])
def test_the_adjoints_are_wrong_for_decreasing_times(name: str) -> None:
    forwards, backwards = (problem(t=t, **TIGHT) for t in (times(0.0, 1.3), times(1.3, 0.0)))
    assert error(name, forwards) < 1e-3 < 0.1 < error(name, backwards)


@pytest.fixture
def frozen() -> Iterator[None]:
    """All that is alive is left out of garbage collections, which come between timings and would take most time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen")
def test_the_comparison_has_all_of_them() -> None:
    short = problem(field=Net(), t=times(0.0, 0.2), rtol=1e-2)
    rows = compare(short, [BACKPROPAGATION, *CONTENDERS.values()], repeats=1)
    assert [row.note for row in rows] == [""] * 8
    assert all(getattr(row, column) is not None for row in rows for column in row.columns())
    assert len({(row.steps, row.forward_evaluations) for row in rows[1:]}) == 1


def test_rejected_steps_do_not_count() -> None:
    chosen = problem()
    field = chosen.field
    assert isinstance(field, Net)
    chosen.solve(CONTENDERS["autograd"].solve)
    trials, rest = divmod(field.evaluations - 2, 6)  # besides those of two for the first step
    assert rest == 0
    assert trials > torchdyns.reference(chosen).steps > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name, changes in PROBLEMS.items() if "method" in changes])
def test_fixed_steps_are_torchdiffeqs(name: str, dtype: torch.dtype) -> None:
    chosen = problem(dtype, **PROBLEMS[name])
    for part, truth in zip(
        as_tuple(chosen.solve(CONTENDERS["symplectic"].solve)),
        as_tuple(chosen.solve(BACKPROPAGATION.solve)),
        strict=True,
    ):
        torch.testing.assert_close(part, truth)
    assert torchdyns.reference(chosen).steps == sum(steps.number for steps in recorded_steps(chosen))


def test_rounding_adds_no_fixed_step() -> None:
    chosen = problem(torch.float32, method="euler", t=times(0.1, 1.0, 3.1), options={"step_size": 0.05})
    assert torchdyns.reference(chosen).steps == 60


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "rk4", "options": {"step_size": 0.1}}, "only for dopri5, euler, midpoint"),
        ({"method": "dopri8"}, "only for dopri5, euler, midpoint"),
        (euler(t=times(0.0, 0.45, 1.0)), "its steps must end at the output times"),
        ({"options": {"first_step": 0.1, "max_step": 0.1, "jump_t": times(0.3)}}, "has no max_step, jump_t"),
    ],
)
def test_what_it_does_not_solve(changes: dict[str, Any], reason: str) -> None:
    assert {contender.refusal(problem(**changes)) for contender in CONTENDERS.values()} == {reason}


@each_problem
def test_what_it_solves(changes: dict[str, Any]) -> None:
    chosen = problem(**{"options": {"first_step": 0.1, "max_num_steps": 1000}, **changes})
    assert {contender.refusal(chosen) for contender in CONTENDERS.values()} == {None}


def test_a_failure_of_this_packages_mode_is_a_defect() -> None:
    assert [name for name, contender in CONTENDERS.items() if not contender.may_fail] == [
        "baseline",
        "aca",
        "symplectic",
        "symplectic, stages",
    ]


def test_nothing_without_torchdyn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert torchdyns.installed() == []
