"""The comparison's numbers are what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from harness import Net, initial, loss_of, times
from torch import Tensor, nn

pytest.importorskip("pandas", reason='needs the extra "cli"')

from torchdiffeq_symplectic.experiments.benchmark import Contender, Problem, compare, installed
from torchdiffeq_symplectic.experiments.benchmark.problem import as_tuple, flatten

CONTENDERS = {contender.name: contender for contender in installed()}
BACKPROPAGATION = CONTENDERS["backpropagation"]


class Pair(Net):
    def forward(self, t: Tensor, y: Any) -> Any:  # type: ignore[override]
        return super().forward(t, y[0]), y[0].sum(dim=1) * y[1]


def problem(dtype: torch.dtype = torch.float64, **changes: Any) -> Problem:
    options = {"first_step": 0.1}
    basic = Problem(Net(), initial(), times(0.0, 0.4, 1.3), loss_of, "dopri5", 1e-4, 1e-4, options).replace(**changes)
    y0 = tuple(part.detach().to(dtype) for part in as_tuple(basic.y0))
    return basic.replace(
        field=basic.field.to(dtype), y0=y0 if isinstance(basic.y0, tuple) else y0[0], t=basic.t.to(dtype)
    )


PROBLEMS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "backwards": {"t": times(1.3, 0.4, 0.0)},
    "tuple": {"field": Pair(), "y0": (initial(2, 3), initial(2))},
    "stack": {"field": nn.ModuleList([Net(), Net()])},
    "euler": {"method": "euler", "options": {"step_size": 0.1}},
}
each_problem = pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS)


@each_problem
def test_a_gradient_of_a_problem_is_backpropagation_through_its_solves(changes: dict[str, Any]) -> None:
    chosen = problem(**changes)
    fields = chosen.field if isinstance(chosen.field, nn.ModuleList) else [chosen.field]
    y0 = tuple(part.clone().requires_grad_() for part in as_tuple(chosen.y0))
    state: Any = y0 if isinstance(chosen.y0, tuple) else y0[0]
    for field in fields:
        solution = torchdiffeq.odeint(
            field, state, chosen.t, method=chosen.method, rtol=1e-4, atol=1e-4, options=dict(chosen.options)
        )
        state = tuple(part[-1] for part in solution) if isinstance(solution, tuple) else solution[-1]
    expected = torch.autograd.grad(chosen.loss(solution), (*y0, *chosen.field.parameters()))
    assert torch.equal(flatten(chosen.gradient(BACKPROPAGATION.solve)), flatten(expected))


def test_a_known_error_evaluations_and_memory_are_found() -> None:
    def solve(func: nn.Module, y0: Any, t: Tensor, **settings: Any) -> Any:
        kept = torch.zeros(10**6, dtype=torch.uint8)  # ten times all of backpropagation's
        func(t[0], y0)  # one evaluation more
        solution = torchdiffeq.odeint(func, y0, t, **settings)
        solution.register_hook(lambda gradient: gradient * (1 + 1e-3 * (kept.numel() > 0)))
        return solution

    rows = compare(problem(), [BACKPROPAGATION, Contender("known", solve)], repeats=1).set_index("contender")
    base, known = rows.loc["backpropagation"], rows.loc["known"]
    assert base["gradient_error"] == 0
    assert known["gradient_error"] == pytest.approx(1e-3, rel=1e-9)
    assert known["forward_evaluations"] == base["forward_evaluations"] + 1
    assert known["backward_evaluations"] == base["backward_evaluations"] == 0
    assert 0.9e6 < known["peak_bytes"] - base["peak_bytes"] < 1.1e6
    assert base["relative_time"] == base["relative_forward"] == base["relative_backward"] == 1


@pytest.mark.parametrize("name", ["aca", "baseline", "symplectic", "symplectic, stages"])
@each_problem
def test_own_modes_are_exact(name: str, changes: dict[str, Any]) -> None:
    rows = compare(problem(torch.float32, **changes), [BACKPROPAGATION, CONTENDERS[name]], repeats=1)
    assert rows["gradient_error"].iloc[1] < 1e-12  # in float64, whatever the problem's dtype


def test_who_does_not_solve_or_fails_or_does_not_end_is_noted() -> None:
    def failing(*arguments: Any, **settings: Any) -> Any:
        raise ValueError("a number was not to its liking\nand more")

    chosen = [
        BACKPROPAGATION,
        Contender("refusing", BACKPROPAGATION.solve, refusal=lambda problem: f"not by {problem.method}"),
        Contender("failing", failing),
        CONTENDERS["checkpoint"],
    ]
    once = int(compare(problem(), [BACKPROPAGATION], repeats=1)["forward_evaluations"].iloc[0])
    budget = once + 1  # enough for one pass, not for two
    rows = compare(problem(), chosen, repeats=1, budget=budget).set_index("contender")
    assert list(rows["note"]) == [
        "",
        "not by dopri5",
        "ValueError: a number was not to its liking",
        f"stopped after {budget} evaluations",
    ]
    assert rows.iloc[1:].drop(columns="note").isna().all(axis=None)


def test_a_failure_of_this_package_is_a_defect() -> None:
    def failing(*arguments: Any, **settings: Any) -> Any:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        compare(problem(), [BACKPROPAGATION, Contender("own", failing, may_fail=False)], repeats=1)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        compare(problem(), [BACKPROPAGATION], repeats=0)
    with pytest.raises(ValueError, match="backpropagation"):
        compare(problem(), [CONTENDERS["aca"]])

    class Noisy(Net):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(t, y) + torch.randn_like(y)

    with pytest.raises(RuntimeError, match="fix its noise"):
        compare(problem(field=Noisy()), [BACKPROPAGATION])
