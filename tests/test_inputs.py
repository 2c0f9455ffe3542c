"""The gradient is exact for every kind of state, dtype, time and field that torchdiffeq differentiates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from cases import (
    ADAPTIVE,
    METHODS,
    MODES,
    Mixing,
    MixingTuple,
    Problem,
    assert_exact,
    each_family,
    each_kind,
    each_mode,
    mixing_problem,
    of_table,
    uniform,
    with_and_without_time,
)
from torch import Tensor

SHAPES: dict[str, tuple[int, ...]] = {"0-d": (), "one": (1,), "rank-3": (2, 1, 3), "row": (1, 4)}
TUPLES: dict[str, list[tuple[int, ...]]] = {
    "two-shapes": [(2, 2), (3,)],
    "with-0-d": [(), (1, 3), (2,)],
    "with-empty": [(2,), (0, 3), (1,)],
    "tuple-of-one": [(2, 2)],
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.complex64, torch.complex128)}

# The large weights of the last amplify what is rounded in the slopes.
each_family_and_explicit_adams = pytest.mark.parametrize(
    "method", of_table(["rk4", "dopri5", "adaptive_heun", "implicit_adams", "explicit_adams"])
)
each_dtype = pytest.mark.parametrize("dtype", list(DTYPES))


def without_time(problem: Problem, time_grad: bool) -> Problem:
    """The problem with or without a gradient of t."""
    problem.t = problem.t.detach().requires_grad_(time_grad)
    return problem


def coarser(method: str) -> dict[str, Any]:
    """Arguments for single precision.

    The implicit methods' corrector can only converge to that, and over a hundred short steps backpropagation loses
    three digits of the gradient of t, which then is no truth to compare with.
    """
    coarse = {"implicit_adams": {"rtol": 1e-4}, "fixed_adams": {"rtol": 1e-4}, "adaptive_heun": {"rtol": 1e-2}}
    return METHODS[method] | coarse.get(method, {})


def tuple_problem(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> Problem:
    parts = [uniform(*shape, seed=20 + i, dtype=dtype) for i, shape in enumerate(shapes)]
    y0 = tuple(part.requires_grad_() for part in parts)
    t = torch.tensor([-0.3, 0.2, 0.31, 0.8], dtype=dtype.to_real(), requires_grad=True)
    return Problem(MixingTuple(shapes, dtype=dtype), y0, t)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@with_and_without_time
@each_kind
@each_mode
def test_state_of_any_shape(mode: str, method: str, time_grad: bool, shape: tuple[int, ...]) -> None:
    problem = without_time(mixing_problem(shape), time_grad)
    assert ("t" in assert_exact(problem, mode, **METHODS[method])) == time_grad


@with_and_without_time
@each_kind
@each_mode
def test_empty_batch(mode: str, method: str, time_grad: bool) -> None:
    """The default norm of nothing is not a number, also for torchdiffeq, so the adaptive method gets another."""
    problem = without_time(mixing_problem((0, 3)), time_grad)
    if method == "dopri5":
        problem.kwargs["options"] = {"norm": torch.sum}
    assert_exact(problem, mode, **METHODS[method])


@pytest.mark.parametrize("shapes", TUPLES.values(), ids=TUPLES)
@with_and_without_time
@each_kind
@each_mode
def test_state_that_is_a_tuple(mode: str, method: str, time_grad: bool, shapes: list[tuple[int, ...]]) -> None:
    problem = without_time(tuple_problem(shapes), time_grad)
    if (0, 3) in shapes and method == "dopri5":
        problem.kwargs["options"] = {"norm": lambda parts: torch.cat([part.reshape(-1) for part in parts]).abs().max()}
    assert_exact(problem, mode, **METHODS[method])


@with_and_without_time
@each_kind
@each_mode
def test_state_that_is_not_contiguous(mode: str, method: str, time_grad: bool) -> None:
    problem = without_time(mixing_problem((2, 3)), time_grad)
    leaf = uniform(3, 2, 2, seed=3).requires_grad_()
    problem.y0 = leaf.transpose(0, 1)[..., 1]
    problem.params = {"leaf": leaf}
    assert not problem.y0.is_contiguous()
    assert_exact(problem, mode, **METHODS[method])


@each_kind
@each_mode
def test_state_that_is_expanded(mode: str, method: str) -> None:
    problem = mixing_problem((2, 3))
    leaf = uniform(3, seed=3).requires_grad_()
    problem.y0, problem.params = leaf.expand(2, 3), {"leaf": leaf}
    assert_exact(problem, mode, **METHODS[method])


@each_dtype
@each_family
@each_mode
def test_dtype(mode: str, method: str, dtype: str) -> None:
    problem = mixing_problem((2, 2), DTYPES[dtype])
    assert_exact(problem, mode, **coarser(method))


@each_dtype
@each_kind
@each_mode
def test_dtype_of_a_tuple(mode: str, method: str, dtype: str) -> None:
    assert_exact(tuple_problem([(2,), (1, 2)], DTYPES[dtype]), mode, **METHODS[method])


@pytest.mark.parametrize(
    ("state", "time"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.complex64, torch.float64),
        (torch.complex128, torch.float32),
    ],
    ids=["float32-at-float64", "float64-at-float32", "complex64-at-float64", "complex128-at-float32"],
)
@each_family
@each_mode
def test_time_of_another_dtype(mode: str, method: str, state: torch.dtype, time: torch.dtype) -> None:
    problem = mixing_problem((2, 2), state)
    problem.t = problem.t.detach().to(time).requires_grad_()
    assert_exact(problem, mode, **coarser(method))


@pytest.mark.parametrize("field_dtype", [torch.float32, torch.float64], ids=["float32-slopes", "float64-slopes"])
@each_family_and_explicit_adams
@each_mode
def test_field_of_another_dtype_than_the_state(mode: str, method: str, field_dtype: torch.dtype) -> None:
    """A fixed-grid solver promotes the state, an adaptive one casts the slope."""
    state_dtype = torch.float64 if field_dtype == torch.float32 else torch.float32
    inner = Mixing(4, dtype=field_dtype)

    def func(t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = inner(t.to(field_dtype), y.to(field_dtype))
        return slope

    t = torch.tensor([0.1, 0.5, 1.1], dtype=torch.float64, requires_grad=True)
    params: dict[str, Tensor] = dict(inner.named_parameters())
    y0 = uniform(2, 2, seed=9, dtype=state_dtype).requires_grad_()
    problem = Problem(func, y0, t, params, adjoint_kwargs={"adjoint_params": tuple(params.values())})
    problem.dtype = torch.float32
    assert_exact(problem, mode, **coarser(method))


@with_and_without_time
@each_family
@each_mode
def test_decreasing_times(mode: str, method: str, time_grad: bool) -> None:
    problem = without_time(mixing_problem(), time_grad)
    problem.t = problem.t.detach().flip(0).requires_grad_(time_grad)
    assert_exact(problem, mode, **METHODS[method])


@with_and_without_time
@each_kind
@each_mode
def test_decreasing_times_of_a_tuple(mode: str, method: str, time_grad: bool) -> None:
    problem = tuple_problem([(2,), (1, 2)])
    problem.t = problem.t.detach().flip(0).requires_grad_(time_grad)
    assert_exact(problem, mode, **METHODS[method])


@with_and_without_time
@each_family
@each_mode
def test_times_of_one_point(mode: str, method: str, time_grad: bool) -> None:
    problem = mixing_problem()
    problem.t = torch.tensor([0.4], dtype=torch.float64, requires_grad=time_grad)
    kwargs = METHODS[method] if method in ADAPTIVE else {"method": method}
    found = assert_exact(problem, mode, **kwargs)
    assert torch.equal(found["weight"], torch.zeros(6, 6, dtype=torch.float64))


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@with_and_without_time
@each_family
@each_mode
def test_many_outputs_inside_one_step(mode: str, method: str, time_grad: bool, interp: str) -> None:
    problem = mixing_problem((3,))
    problem.t = torch.linspace(0.0, 1.0, 23, dtype=torch.float64).requires_grad_(time_grad)
    if method not in ADAPTIVE:
        assert_exact(problem, mode, method=method, rtol=1e-3, options={"step_size": 0.24, "interp": interp})
    elif interp == "linear":
        assert_exact(problem, mode, method=method, rtol=1e-2, atol=1e-2, options={"first_step": 0.6})
    else:
        pytest.skip("adaptive methods have one interpolation")


@each_kind
@each_mode
def test_outputs_exactly_on_steps(mode: str, method: str) -> None:
    problem = mixing_problem()
    problem.t = (torch.arange(6, dtype=torch.float64) / 8).requires_grad_()
    options = {"step_size": 0.125, "interp": "cubic"} if method == "rk4" else {"first_step": 0.125, "ifactor": 1.0}
    assert_exact(problem, mode, method=method, rtol=1e-3, atol=1e-3, options=options)


@each_kind
@each_mode
def test_state_without_gradient(mode: str, method: str) -> None:
    problem = mixing_problem()
    assert isinstance(problem.y0, Tensor)
    problem.y0 = problem.y0.detach()
    assert "y0[0]" not in assert_exact(problem, mode, **METHODS[method])


@pytest.mark.parametrize("which", [0, 1])
@each_kind
@each_mode
def test_part_of_a_tuple_without_gradient(mode: str, method: str, which: int) -> None:
    problem = tuple_problem([(2,), (1, 2)])
    problem.y0 = tuple(part.detach() if i == which else part for i, part in enumerate(problem.y0))
    assert f"y0[{which}]" not in assert_exact(problem, mode, **METHODS[method])


@pytest.mark.parametrize("alone", ["y0", "t", "weight"])
@each_kind
@each_mode
def test_gradient_of_one_thing_alone(mode: str, method: str, alone: str) -> None:
    problem = mixing_problem()
    assert isinstance(problem.func, Mixing)
    assert isinstance(problem.y0, Tensor)
    problem.func.requires_grad_(False)
    problem.y0, problem.t = problem.y0.detach(), problem.t.detach()
    tensors = {"y0": problem.y0, "t": problem.t, "weight": problem.func.weight}
    tensors[alone].requires_grad_()
    assert len(assert_exact(problem, mode, **METHODS[method])) == 1


@each_kind
@each_mode
def test_frozen_and_unused_parameters(mode: str, method: str) -> None:
    """Unused ones get zeros, not None, as upstream gives and DistributedDataParallel needs; frozen ones None."""
    problem = mixing_problem()
    assert isinstance(problem.func, Mixing)
    problem.func.unused = torch.nn.Linear(2, 2)
    problem.func.bias.requires_grad_(False)
    assert_exact(problem, mode, **METHODS[method])
    torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, **METHODS[method], **MODES[mode]).sum().backward()
    for parameter in problem.func.unused.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert problem.func.bias.grad is None
    assert problem.func.weight.grad is not None
