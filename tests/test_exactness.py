"""The gradient is that of the program that ran: every host, method and mode, every kind of state and time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    DOUBLE,
    FEW,
    KINDS,
    METHODS,
    OF_TORCHDIFFEQ,
    MixingTuple,
    Problem,
    assert_exact,
    over,
    problem_for,
    uniform,
)
from torch import Tensor

# The implicit methods' corrector converges to single precision alone.
COARSER: dict[str, Any] = {"implicit_adams": {"rtol": 1e-4}, "fixed_adams": {"rtol": 1e-4}}
with_and_without_time = pytest.mark.parametrize("time_grad", [False, True], ids=["t-fixed", "t-grad"])


@pytest.mark.whole
@over(METHODS)
def test_gradients_equal_backpropagation(mode: str, method: str) -> None:
    found = assert_exact(problem_for(method), mode, method)
    assert {"y0[0]", "t", "weight", "bias", "frequency"} <= set(found)


@pytest.mark.whole
@over(OF_TORCHDIFFEQ, ["symplectic", "aca", "stages"])
def test_gradients_equal_backpropagation_where_times_need_none(mode: str, method: str) -> None:
    """Explicit Runge-Kutta steps then take a shorter way than the host's own step under autograd."""
    assert_exact(problem_for(method, time_grad=False), mode, method)


@over(METHODS, ["use:symplectic", "use:aca"], every=3)
def test_gradients_equal_backpropagation_where_the_mode_is_chosen_by_use(mode: str, method: str) -> None:
    assert_exact(problem_for(method), mode, method)


@over(METHODS, ["symplectic", "aca"], every=3)
def test_float32(mode: str, method: str) -> None:
    assert_exact(problem_for(method, (2, 2), torch.float32), mode, method, **COARSER.get(method, {}))


@pytest.mark.parametrize("method", [name for name in KINDS if name != "torchdyn-dopri5"])  # its error norm is for reals
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
@pytest.mark.parametrize("mode", ["symplectic", "aca"])
def test_complex_states(mode: str, method: str, dtype: torch.dtype) -> None:
    assert_exact(problem_for(method, (2, 2), dtype), mode, method, **COARSER.get(method, {}))


@pytest.mark.parametrize(
    ("state", "time"),
    [
        (torch.float32, DOUBLE),
        (DOUBLE, torch.float32),
        (torch.complex64, DOUBLE),
        (torch.complex128, torch.float32),
    ],
    ids=["float32-at-float64", "float64-at-float32", "complex64-at-float64", "complex128-at-float32"],
)
@over([name for name in KINDS if name in OF_TORCHDIFFEQ], ["symplectic", "aca"])
def test_times_of_another_dtype(mode: str, method: str, state: torch.dtype, time: torch.dtype) -> None:
    problem = problem_for(method, (2, 2), state)
    problem.t = problem.t.detach().to(time).requires_grad_()
    assert_exact(problem, mode, method, **COARSER.get(method, {}))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32-slopes", "float64-slopes"])
@over([name for name in KINDS if name in OF_TORCHDIFFEQ])
def test_slopes_of_another_dtype_than_the_state(mode: str, method: str, dtype: torch.dtype) -> None:
    """A fixed-grid solver promotes the state, an adaptive one casts the slope."""
    state = DOUBLE if dtype == torch.float32 else torch.float32
    problem = problem_for(method, (2, 2), dtype)
    inner = problem.field
    params: dict[str, Tensor] = dict(inner.named_parameters())  # type: ignore[attr-defined]
    problem.field = lambda t, y: inner(t.to(dtype), y.to(dtype))
    problem.t = torch.tensor([0.1, 0.5, 1.1], dtype=DOUBLE, requires_grad=True)
    problem.y0 = uniform(2, 2, seed=9, dtype=state).requires_grad_()
    problem.extra, problem.adjoint, problem.dtype = params, {"adjoint_params": tuple(params.values())}, torch.float32
    assert_exact(problem, mode, method, **COARSER.get(method, {}))


SHAPES: dict[str, tuple[int, ...]] = {"0-d": (), "one": (1,), "rank-3": (2, 1, 3), "row": (1, 4), "empty": (0, 3)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@over(["rk4", "dopri5"], ["symplectic", "aca"])
def test_states_of_any_shape(mode: str, method: str, shape: tuple[int, ...]) -> None:
    """The default norm of nothing is not a number, for torchdiffeq, too, so an adaptive method gets another."""
    options = {"norm": torch.sum} if shape == (0, 3) and METHODS[method].adaptive else {}
    assert_exact(problem_for(method, shape), mode, method, options=options)


TUPLES: dict[str, list[tuple[int, ...]]] = {
    "two-shapes": [(2, 2), (3,)],
    "with-0-d": [(), (1, 3), (2,)],
    "with-empty": [(2,), (0, 3), (1,)],
    "tuple-of-one": [(2, 2)],
}


def tuple_problem(shapes: list[tuple[int, ...]], dtype: torch.dtype = DOUBLE) -> Problem:
    y0 = tuple(uniform(*shape, seed=20 + i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes))
    t = torch.tensor([-0.3, 0.2, 0.31, 0.8], dtype=dtype.to_real(), requires_grad=True)
    return Problem(MixingTuple(shapes, dtype=dtype), y0, t)


@pytest.mark.parametrize("direction", ["decreasing", pytest.param("increasing", marks=pytest.mark.slow)])
@pytest.mark.parametrize("shapes", TUPLES.values(), ids=TUPLES)
@over(["rk4", "dopri5"])
def test_states_that_are_tuples(mode: str, method: str, shapes: list[tuple[int, ...]], direction: str) -> None:
    problem = tuple_problem(shapes)
    if direction == "decreasing":
        problem.t = problem.t.detach().flip(0).requires_grad_()
    if (0, 3) in shapes and METHODS[method].adaptive:
        problem.settings["options"] = {"norm": lambda parts: torch.cat([p.reshape(-1) for p in parts]).abs().max()}
    assert_exact(problem, mode, method)


@pytest.mark.parametrize("form", [list, tuple])
@over(["dopri5", "adaptive_heun"], ["symplectic", "aca"])
def test_tolerances_as_lists_for_a_tuple_state(mode: str, method: str, form: Any) -> None:
    """As FFJORD's users give them; upstream's own adjoint fails on them in backward."""
    tolerances = {"rtol": form([1e-2, 1e20, 1e-2]), "atol": form([1e-2, 1e20, torch.tensor(1e-3)])}
    assert_exact(tuple_problem([(2, 2), (3,), ()]), mode, method, **tolerances)


@pytest.mark.parametrize("which", [0, 1])
@over(["rk4", "dopri5"])
def test_a_part_of_a_tuple_without_gradient(mode: str, method: str, which: int) -> None:
    problem = tuple_problem([(2,), (1, 2)])
    problem.y0 = tuple(part.detach() if i == which else part for i, part in enumerate(problem.y0))
    assert f"y0[{which}]" not in assert_exact(problem, mode, method)


STRIDED: dict[str, Any] = {
    "transposed": (lambda leaf: leaf.transpose(0, 1)[..., 1], (3, 2, 2)),
    "expanded": (lambda leaf: leaf.expand(2, 3), (3,)),
    "every second": (lambda leaf: leaf[::2, ::2], (3, 6)),
}


@pytest.mark.parametrize("layout", STRIDED)
@over(FEW)
def test_states_that_are_not_contiguous(mode: str, method: str, layout: str) -> None:
    view, shape = STRIDED[layout]
    problem = problem_for(method, (2, 3))
    leaf = uniform(*shape, seed=3).requires_grad_()
    problem.y0, problem.extra = view(leaf), {"leaf": leaf}
    assert not problem.y0.is_contiguous()
    assert_exact(problem, mode, method)


@with_and_without_time
@over([name for name in KINDS if name in OF_TORCHDIFFEQ])
def test_times_of_one_point(mode: str, method: str, time_grad: bool) -> None:
    problem = problem_for(method)
    problem.t = torch.tensor([0.4], dtype=DOUBLE, requires_grad=time_grad)
    settings: dict[str, Any] = {} if METHODS[method].adaptive else {"options": {"step_size": None}}
    assert not assert_exact(problem, mode, method, **settings)["weight"].any()


@over(METHODS, ["symplectic", "aca"], every=3)
def test_one_output_inside_the_first_step(mode: str, method: str) -> None:
    problem = problem_for(method)
    assert_exact(problem, mode, method, loss=lambda solution: solution[1].square().sum())


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@over(["rk4", "heun3", "implicit_adams"])
def test_many_outputs_inside_one_step_of_a_fixed_grid(mode: str, method: str, interp: str) -> None:
    problem = problem_for(method, (3,))
    problem.t = torch.linspace(0.0, 1.0, 23, dtype=DOUBLE).requires_grad_()
    assert_exact(problem, mode, method, rtol=1e-3, options={"step_size": 0.24, "interp": interp})


@over(["rk4", "dopri5"])
def test_outputs_exactly_on_steps(mode: str, method: str) -> None:
    problem = problem_for(method)
    problem.t = (torch.arange(6, dtype=DOUBLE) / 8).requires_grad_()
    adaptive = METHODS[method].adaptive
    options = {"first_step": 0.125, "ifactor": 1.0} if adaptive else {"step_size": 0.125, "interp": "cubic"}
    assert_exact(problem, mode, method, options=options)


@pytest.mark.parametrize("alone", ["y0", "t", "weight"])
@over(KINDS)
def test_the_gradient_of_one_thing_alone(mode: str, method: str, alone: str) -> None:
    problem = problem_for(method)
    field: Any = problem.field
    for part in (field, problem.settings.get("solver")):
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    problem.y0, problem.t = problem.y0.detach(), problem.t.detach()
    {"y0": problem.y0, "t": problem.t, "weight": field.weight}[alone].requires_grad_()
    assert len(assert_exact(problem, mode, method)) == 1


@over(FEW)
def test_unused_parameters_have_zeros_and_frozen_ones_nothing(mode: str, method: str) -> None:
    """As upstream gives them, and as DistributedDataParallel needs them."""
    problem = problem_for(method)
    field: Any = problem.field
    field.unused = torch.nn.Linear(2, 2)
    field.bias.requires_grad_(False)
    found = assert_exact(problem, mode, method)
    assert "bias" not in found
    assert not found["unused.weight"].any()
