"""The reference repeats the accepted steps, and the comparison's numbers are what they say."""

import dataclasses
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark.compare import CONTENDERS, Contender, compare
from torchdiffeq_symplectic.benchmark.problem import Problem, State, as_tuple, flatten, gradient
from torchdiffeq_symplectic.benchmark.reference import accepted_grid, reference_gradient

BACKPROPAGATION = CONTENDERS[0]


class Field(nn.Module):
    """A stiff enough field that changes with time, so that the steps differ in length and some are rejected."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.matrix) * torch.exp(torch.sin(20 * t)) - y


class TupleField(Field):
    def forward(self, t: Tensor, y: Any) -> Any:
        return super().forward(t, y[0]), y[0].sum(dim=1) * y[1]


class Noisy(Field):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) + torch.randn_like(y)


def square(solution: State) -> Tensor:
    return torch.stack([part.square().sum() for part in as_tuple(solution)]).sum()


def problem(dtype: torch.dtype = torch.float64, **changes: Any) -> Problem:
    y0 = torch.linspace(-1, 2, 6).reshape(2, 3)
    basic = Problem(Field(), y0, torch.tensor([0.0, 0.4, 1.3]), square, "dopri5", 1e-4, 1e-4, {"first_step": 0.5})
    changed = dataclasses.replace(basic, **changes)
    y0s = tuple(part.to(dtype) for part in as_tuple(changed.y0))
    return changed.replace(
        field=changed.field.to(dtype),
        y0=y0s if isinstance(changed.y0, tuple) else y0s[0],
        t=changed.t.to(dtype),
    )


PROBLEMS: dict[str, dict[str, Any]] = {
    "dopri5": {},
    "dopri8": {"method": "dopri8"},
    "bosh3": {"method": "bosh3"},
    "fehlberg2": {"method": "fehlberg2"},
    "adaptive_heun": {"method": "adaptive_heun"},
    "rk4": {"method": "rk4", "options": {"step_size": 0.05}},
    "jumps": {"options": {"first_step": 0.5, "jump_t": torch.tensor([0.3, 0.9])}},
    "limited steps": {"options": {"first_step": 0.01, "max_step": 0.02}},
    "backwards": {"t": torch.tensor([1.3, 0.4, 0.0])},
    "tuple": {"field": TupleField(), "y0": (torch.linspace(-1, 2, 6).reshape(2, 3), torch.ones(2))},
}


@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_reference_in_float64_is_backpropagation(changes: dict[str, Any]) -> None:
    exact = problem(**changes)
    found = flatten(gradient(square(exact.solve(BACKPROPAGATION.solve)), exact.leaves))
    reference = reference_gradient(exact)
    assert (found - reference).norm() < 1e-12 * reference.norm()


@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_reference_of_a_float32_solve_is_backpropagation_to_its_rounding(changes: dict[str, Any]) -> None:
    single = problem(torch.float32, **changes)
    found = flatten(gradient(square(single.solve(BACKPROPAGATION.solve)), single.leaves))
    reference = reference_gradient(single)
    assert 0 < (found - reference).norm() < 1e-5 * reference.norm()


def test_grid_runs_from_the_first_time_to_beyond_the_last() -> None:
    grid = accepted_grid(problem())
    assert grid == sorted(set(grid))
    assert grid[0] == 0.0
    assert grid[-2] < float(problem().t[-1]) <= grid[-1]


def test_grid_has_no_rejected_steps() -> None:
    rejecting = problem()
    grid = accepted_grid(rejecting)
    evaluations = compare(rejecting, [BACKPROPAGATION], repeats=1)[0].forward_evaluations
    assert grid[1] < 0.5  # the first trial step, of 0.5, was rejected
    assert evaluations > 1 + 6 * (len(grid) - 1)


def test_evaluations_and_times_of_backpropagation() -> None:
    (row,) = compare(problem(method="rk4", options={"step_size": 0.1}), [BACKPROPAGATION], repeats=1)
    assert row.contender == "backpropagation"
    assert (row.forward_evaluations, row.backward_evaluations) == (4 * 13, 0)
    assert row.relative_time == 1.0
    assert row.seconds > 0


def test_a_contender_that_evaluates_in_backward_is_caught_at_it() -> None:
    adjoint = CONTENDERS[1]
    rows = compare(problem(), [adjoint, BACKPROPAGATION], repeats=1)
    assert [row.contender for row in rows] == ["adjoint", "backpropagation"]
    assert rows[0].forward_evaluations == rows[1].forward_evaluations
    assert rows[0].backward_evaluations > 0
    assert rows[0].gradient_error > 1e-6 > 1e-12 > rows[1].gradient_error


def test_peak_memory_counts_what_a_solve_keeps() -> None:
    kept: list[Tensor] = []
    size = 2**20

    def solve(*args: Any, **kwargs: Any) -> State:
        kept[:] = [torch.empty(size, dtype=torch.uint8)]
        solution: State = torchdiffeq.odeint(*args, **kwargs)
        kept.clear()
        return solution

    rows = compare(problem(), [BACKPROPAGATION, Contender("with a mebibyte", solve)], repeats=1)
    assert size < rows[1].peak_bytes <= size + rows[0].peak_bytes


def test_a_field_with_new_noise_at_each_call_is_refused() -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises(RuntimeError, match=r"problem\.field.*noise"):
        reference_gradient(problem(field=Noisy(), method="rk4", options={"step_size": 0.1}))


@pytest.mark.parametrize(
    ("contenders", "repeats", "message"),
    [(CONTENDERS[:1], 0, "repeats=0"), (CONTENDERS[1:2], 1, "contenders.*'backpropagation'")],
)
def test_wrong_arguments_are_named(contenders: tuple[Contender, ...], repeats: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(problem(), contenders, repeats)
