"""torchdyn: fields of every kind; where a field holds what it uses is in test_held_tensors.py for all hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    Mixing,
    Problem,
    assert_equal_values,
    assert_exact,
    assert_same_gradients,
    gradients_of,
    loss_of,
    norm_of,
    problem_for,
    uniform,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchdyn_runs import each_kind, each_named_kind, each_way_back, model_for, returned

Field = Callable[..., Tensor]


def _without_time(w: Tensor) -> Field:
    return lambda x: torch.tanh(x @ w)


def _the_slope_itself(w: Tensor) -> Field:
    return lambda t, x, args=None: w[:2]


def _at_some_times(w: Tensor) -> Field:
    return lambda t, x, args=None: x * w[0] if t < 0.5 else torch.sin(x * w[1])


def _two_of_one_graph(w: Tensor) -> Field:
    one, other = torch.exp(w[0]).sin(), torch.exp(w[0]).cos()
    return lambda t, x, args=None: x * one - torch.tanh(x) * other


def _of_time_alone(w: Tensor) -> Field:
    return lambda t, x, args=None: w[0] * t.cos().expand_as(x)


FIELDS: dict[str, Callable[[Tensor], Field]] = {
    "without time": _without_time,
    "a leaf is the slope": _the_slope_itself,
    "used at some times": _at_some_times,
    "two tensors of one graph": _two_of_one_graph,
    "of time alone": _of_time_alone,
}


@pytest.mark.parametrize("row", FIELDS)
@each_kind
@each_way_back
def test_plain_functions(mode: str, method: str, row: str) -> None:
    weight, problem = uniform(3, 3, seed=91).requires_grad_(), problem_for(method)
    problem.field, problem.extra = FIELDS[row](weight), {"weight": weight}
    assert norm_of(assert_exact(problem, mode, method)["weight"]) > 0


CONSTANT: dict[str, Field] = {
    "the state itself": lambda t, x, args=None: x,
    "no graph": lambda t, x, args=None: torch.full_like(x, 0.3),
    "no gradient wanted": lambda t, x, args=None: torch.tanh(x @ torch.eye(3, dtype=DOUBLE)),
}


@pytest.mark.parametrize("row", CONSTANT)
@each_named_kind
@each_way_back
def test_functions_that_use_nothing(mode: str, method: str, row: str) -> None:
    problem = problem_for(method)
    problem.field = CONSTANT[row]
    assert set(assert_exact(problem, mode, method)) == {"y0[0]", "t"}


@pytest.mark.parametrize("shape", [(3,), (1,), ()], ids=str)
@pytest.mark.parametrize("method", ["torchdyn-midpoint", "torchdyn-dopri5", "torchdyn-tsit5"])
@pytest.mark.parametrize("mode", ["symplectic", "stages", pytest.param("aca", marks=pytest.mark.slow)])
def test_slopes_that_broadcast(mode: str, method: str, shape: tuple[int, ...]) -> None:
    weight, problem = uniform(3, seed=91).requires_grad_(), problem_for(method, (4, 3))
    problem.field = lambda t, x, args=None: (weight * x.mean(0).tanh()).sum_to_size(shape) * torch.cos(t)
    problem.extra = {"weight": weight}
    assert_exact(problem, mode, method)


@pytest.mark.parametrize("form", [tuple, iter], ids=["tuple", "generator"])
@each_named_kind
@each_way_back
def test_optimizable_params(mode: str, method: str, form: Any) -> None:
    weight, idle = nn.Parameter(uniform(3, 3, seed=98)), nn.Parameter(uniform(2, seed=99))
    problem = problem_for(method)
    problem.field = lambda t, x, args=None: torch.tanh(x @ weight) * torch.cos(t)
    problem.extra = {"weight": weight, "idle": idle}
    wanted = problem.wanted()
    found = []
    for name in (mode, BACKPROPAGATION):
        problem.settings["optimizable_params"] = form((weight, idle))
        model = model_for(problem, name, method)
        assert {id(weight), id(idle)} <= {id(parameter) for parameter in model.parameters()}
        found.append(gradients_of(loss_of(returned(problem, name, method, model)[1]), wanted))
    assert_same_gradients(found[0], found[1])
    assert torch.equal(found[0]["idle"], torch.zeros_like(idle))  # type: ignore[arg-type]


@each_named_kind
@each_way_back
def test_two_backward_passes_through_what_is_not_a_leaf(mode: str, method: str) -> None:
    """The graph behind the closed-over tensor is the user's: every solve walks it, and frees it as autograd would."""
    root, problem = uniform(3, 3, seed=92).requires_grad_(), problem_for(method)
    weight = torch.sin(2 * root)
    problem.field = lambda t, x, args=None: torch.tanh(x @ weight) * torch.cos(t)
    wanted = {"root": root}
    truth = gradients_of(loss_of(returned(problem, BACKPROPAGATION, method)[1]), wanted)
    solutions = [returned(problem, mode, method)[1] for _ in range(2)]
    assert_same_gradients(gradients_of(loss_of(solutions[0]), wanted), truth)
    assert_same_gradients(gradients_of(loss_of(solutions[1]), wanted), truth)


class Dropping(Mixing):
    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return nn.functional.dropout(super().forward(t, y), 0.3)


@each_kind
@each_way_back
def test_dropout_is_the_same_in_the_replay(mode: str, method: str) -> None:
    problem = problem_for(method)
    problem.field = Dropping(6, seed=5)
    runs, after = [], []
    for name in (BACKPROPAGATION, mode):
        torch.manual_seed(3)
        runs.append(returned(problem, name, method)[1])
        after.append(torch.rand(4))
    assert_equal_values(runs[1], runs[0])
    assert torch.equal(*after)
    truth, found = (gradients_of(loss_of(run), problem.wanted()) for run in runs)
    assert_same_gradients(found, truth)


class Normalising(Mixing):
    def __init__(self) -> None:
        super().__init__(6, seed=5)
        self.norm = nn.BatchNorm1d(3, dtype=DOUBLE)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        return super().forward(t, self.norm(y))


@each_kind
@each_way_back
def test_running_statistics_move_as_in_autograd(mode: str, method: str) -> None:
    def moved(mode: str) -> list[Tensor]:
        problem = problem_for(method)
        field = problem.field = Normalising()
        loss_of(returned(problem, mode, method)[1]).backward()
        return list(field.norm.buffers())

    assert all(map(torch.equal, moved(mode), moved(BACKPROPAGATION)))


class Descent(nn.Module):
    """As energy models and traces do; what torchdyn solves under no_grad would then have a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform(3, 3, seed=83))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            energy = torch.cos(x @ self.weight + t).sum()
            return -torch.autograd.grad(energy, x, create_graph=True)[0]


@each_kind
@each_way_back
def test_a_field_that_enables_gradients_itself(mode: str, method: str) -> None:
    problem = problem_for(method)
    problem.field = Descent()
    assert_exact(problem, mode, method)


@each_named_kind
@each_way_back
def test_inside_of_pytorchs_checkpoint(mode: str, method: str) -> None:
    """A solver object of its own each time."""
    problem = problem_for(method, time_grad=False)
    wanted = problem.wanted()

    def solved(x: Tensor) -> Tensor:
        again = Problem(problem.field, x, problem.t)
        solution: Tensor = returned(again, mode, method)[1]
        return solution

    found = gradients_of(loss_of(checkpoint(solved, problem.y0, use_reentrant=False)), wanted)
    assert_same_gradients(found, gradients_of(loss_of(returned(problem, BACKPROPAGATION, method)[1]), wanted))
