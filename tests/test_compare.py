"""The reference repeats the accepted steps, and the comparison's numbers are what they say."""

import dataclasses
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.benchmark import torchdiffeqs
from torchdiffeq_symplectic.benchmark.compare import compare
from torchdiffeq_symplectic.benchmark.contender import Contender
from torchdiffeq_symplectic.benchmark.problem import Problem, State, as_tuple, flatten, gradient
from torchdiffeq_symplectic.benchmark.reference import recorded_steps, reference

CONTENDERS = {contender.name: contender for contender in torchdiffeqs.installed()}
BACKPROPAGATION = CONTENDERS["backpropagation"]


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


class Slower(Field):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * super().forward(t, y)


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
    "stack": {"field": nn.ModuleList([Field(), Slower()])},
    "stack of tuples": {
        "field": nn.ModuleList([TupleField(), TupleField()]),
        "y0": (torch.linspace(-1, 2, 6).reshape(2, 3), torch.ones(2)),
    },
}


@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_reference_in_float64_is_backpropagation(changes: dict[str, Any]) -> None:
    exact = problem(**changes)
    found = flatten(gradient(square(exact.solve(BACKPROPAGATION.solve)), exact.leaves))
    expected = reference(exact).gradient
    assert (found - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_reference_of_a_float32_solve_is_backpropagation_to_its_rounding(changes: dict[str, Any]) -> None:
    single = problem(torch.float32, **changes)
    found = flatten(gradient(square(single.solve(BACKPROPAGATION.solve)), single.leaves))
    expected = reference(single).gradient
    assert 0 < (found - expected).norm() < 1e-5 * expected.norm()


def test_grid_runs_from_the_first_time_to_beyond_the_last() -> None:
    (steps,) = recorded_steps(problem())
    grid = list(steps.grid)
    assert grid == sorted(set(grid))
    assert grid[0] == 0.0
    assert grid[-2] < float(problem().t[-1]) <= grid[-1]
    assert steps.number == len(grid) - 1


def test_grid_has_no_rejected_steps() -> None:
    rejecting = problem()
    (steps,) = recorded_steps(rejecting)
    (row,) = compare(rejecting, [BACKPROPAGATION], repeats=1)
    assert row.steps == steps.number
    assert steps.grid[1] < 0.5  # the first trial step, of 0.5, was rejected
    assert row.forward_evaluations is not None
    assert row.forward_evaluations > 1 + 6 * steps.number


def test_each_field_of_a_stack_starts_where_the_one_before_ended() -> None:
    stack = problem(field=nn.ModuleList([Field(), Slower()]))
    first, second = stack.field.children()
    alone = problem(field=first)
    with torch.no_grad():
        middle = alone.solve(torchdiffeq.odeint)[-1]
        end = problem(field=second, y0=middle).solve(torchdiffeq.odeint)
        assert torch.equal(stack.solve(torchdiffeq.odeint), end)  # type: ignore[arg-type]
    assert len(recorded_steps(stack)) == 2


def test_evaluations_and_times_of_backpropagation() -> None:
    (row,) = compare(problem(method="rk4", options={"step_size": 0.1}), [BACKPROPAGATION], repeats=1)
    assert row.contender == "backpropagation"
    assert (row.forward_evaluations, row.backward_evaluations, row.steps) == (4 * 13, 0, 13)
    assert row.relative_time == row.relative_time_low == row.relative_time_high == 1.0
    assert row.relative_forward == row.relative_backward == 1.0
    assert row.seconds is not None
    assert row.seconds > 0
    assert row.note == ""


def test_a_contender_that_evaluates_in_backward_is_caught_at_it() -> None:
    rows = compare(problem(), [CONTENDERS["adjoint"], BACKPROPAGATION], repeats=1)
    assert [row.contender for row in rows] == ["adjoint", "backpropagation"]
    adjoint, exact = rows
    assert adjoint.forward_evaluations == exact.forward_evaluations
    assert adjoint.backward_evaluations
    assert adjoint.gradient_error is not None
    assert exact.gradient_error is not None
    assert adjoint.gradient_error > 1e-6 > 1e-12 > exact.gradient_error


@pytest.mark.slow
@pytest.mark.parametrize("changes", [PROBLEMS["dopri5"], PROBLEMS["stack"], PROBLEMS["tuple"]])
def test_every_exact_way_is_found_exact_with_the_evaluations_that_it_costs(changes: dict[str, Any]) -> None:
    exact = {"backpropagation", "checkpoint", "baseline", "aca", "symplectic", "symplectic, stages"}
    rows = {row.contender: row for row in compare(problem(**changes), list(CONTENDERS.values()), repeats=1)}
    for name in exact:
        error = rows[name].gradient_error
        assert error is not None
        assert error < 1e-12, name
        assert rows[name].peak_bytes
    assert rows["checkpoint"].backward_evaluations == rows["backpropagation"].forward_evaluations
    assert rows["memory_free"].note == "only for euler and heun2"
    assert rows["memory_free"].gradient_error is None


def test_seminorm_is_not_for_fixed_steps() -> None:
    fixed = problem(method="euler", field=Slower(), options={"step_size": 0.01})
    rows = compare(fixed, [BACKPROPAGATION, CONTENDERS["adjoint, seminorm"], CONTENDERS["memory_free"]], repeats=1)
    assert "fixed steps" in rows[1].note
    assert rows[2].note == ""
    assert rows[2].backward_evaluations == 2 * 130


def test_who_evaluates_too_often_is_stopped() -> None:
    forward = compare(problem(), [BACKPROPAGATION], repeats=1)[0].forward_evaluations
    rows = compare(problem(), [BACKPROPAGATION, CONTENDERS["adjoint"]], repeats=1, budget=forward)
    assert rows[0].note == ""
    assert rows[1].note == f"stopped after {forward} evaluations"
    assert rows[1].seconds is None


def failing(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    raise ArithmeticError("too stiff\nfor this")


def test_a_failure_is_a_row_of_others_and_an_error_of_our_own() -> None:
    rows = compare(problem(), [BACKPROPAGATION, Contender("failing", failing)], repeats=1)
    assert rows[1].note == "ArithmeticError: too stiff"
    with pytest.raises(ArithmeticError, match="too stiff"):
        compare(problem(), [BACKPROPAGATION, Contender("failing", failing, may_fail=False)], repeats=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    there = problem(torch.float32).to("cuda")
    rows = {row.contender: row for row in compare(there, list(CONTENDERS.values()), repeats=2)}
    for name in ("backpropagation", "aca", "symplectic"):
        error = rows[name].gradient_error
        assert error is not None
        assert error < 1e-5
        assert rows[name].peak_bytes
    assert there.y0.device.type == "cuda"  # type: ignore[union-attr]


def test_a_problem_on_another_device_is_a_copy() -> None:
    here = problem()
    there = here.to("meta")
    assert {leaf.device.type for leaf in (*there.leaves, there.t)} == {"meta"}
    assert {leaf.device.type for leaf in (*here.leaves, here.t)} == {"cpu"}


def test_peak_memory_counts_what_a_solve_keeps() -> None:
    kept: list[Tensor] = []
    size = 2**20

    def solve(*args: Any, **kwargs: Any) -> State:
        kept[:] = [torch.empty(size, dtype=torch.uint8)]
        solution: State = torchdiffeq.odeint(*args, **kwargs)
        kept.clear()
        return solution

    base, more = compare(problem(), [BACKPROPAGATION, Contender("with a mebibyte", solve)], repeats=1)
    assert base.peak_bytes is not None
    assert more.peak_bytes is not None
    assert size < more.peak_bytes <= size + base.peak_bytes


def test_a_field_with_new_noise_at_each_call_is_refused() -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises(RuntimeError, match=r"problem\.field.*noise"):
        reference(problem(field=Noisy(), method="rk4", options={"step_size": 0.1}))


@pytest.mark.filterwarnings("ignore:The following arguments have no effect:UserWarning")  # scipy's
def test_a_method_whose_steps_are_not_told_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'scipy_solver'.*0\.2\.4"):
        recorded_steps(problem(method="scipy_solver", options={"solver": "RK45"}))


@pytest.mark.parametrize(
    ("contender", "repeats", "message"),
    [("backpropagation", 0, "repeats=0"), ("adjoint", 1, "contenders.*'backpropagation'")],
)
def test_wrong_arguments_are_named(contender: str, repeats: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(problem(), [CONTENDERS[contender]], repeats)
