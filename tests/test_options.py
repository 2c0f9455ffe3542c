"""The gradient is exact under every option of torchdiffeq, and options of upstream's adjoint have no effect on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
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
    assert_same_gradients,
    each_family,
    each_kind,
    each_mode,
    gradients_of,
    loss_of,
    mixing_problem,
    of_table,
    uniform,
    with_and_without_time,
)
from torch import Tensor

DOUBLE = torch.float64
each_family_of_grids = pytest.mark.parametrize("method", of_table(["heun3", "rk4", "explicit_adams", "implicit_adams"]))
# One whose last slope is the next one's first, one whose is not.
each_carrier = pytest.mark.parametrize("method", of_table(["dopri5", "adaptive_heun"]))


class Stiffening(Mixing):
    """A field that becomes fast half-way, so that steps are rejected; counts what the solver reports."""

    def __init__(self, size: int) -> None:
        super().__init__(size, seed=17)
        self.tried: list[float] = []
        self.accepted: list[float] = []
        self.rejected: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) * (1 + 12 * torch.sigmoid(30 * (t - 0.5))) + torch.sin(25 * t) * y.flip(0)

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.tried.append(float(dt.detach()))

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted.append(float(dt.detach()))

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.rejected.append(float(dt.detach()))


@pytest.mark.parametrize("method", of_table(ADAPTIVE))
@each_mode
def test_rejected_steps_leave_no_trace(mode: str, method: str) -> None:
    problem = mixing_problem((2, 2))
    func = problem.func = Stiffening(4)
    assert_exact(problem, mode, method=method, rtol=1e-3, atol=1e-4, options={"first_step": 0.4})
    assert func.rejected


def _grows_slowly(sizes: list[float]) -> bool:
    return max(after / before for before, after in itertools.pairwise(sizes)) < 1.5000001


# Each row with the tolerances under which the option matters, and a check on the sizes of the accepted steps.
STEPPING: dict[str, tuple[float, dict[str, Any], Callable[[list[float]], bool]]] = {
    "min_step": (1e-9, {"first_step": 0.2, "min_step": 0.05}, lambda sizes: min(sizes[:-1]) >= 0.05),
    "max_step": (1e-2, {"first_step": 0.02, "max_step": 0.06}, lambda sizes: max(sizes) <= 0.06),
    "min-and-max": (1e-6, {"first_step": 0.2, "min_step": 0.1, "max_step": 0.15}, lambda sizes: max(sizes) <= 0.15),
    "safety": (1e-3, {"first_step": 0.1, "safety": 0.5}, lambda sizes: len(sizes) > 1),
    "ifactor": (1e-1, {"first_step": 0.1, "ifactor": 1.5}, _grows_slowly),
    "dfactor": (1e-2, {"first_step": 0.5, "dfactor": 0.7}, lambda sizes: len(sizes) > 1),
    "max_num_steps": (1e-3, {"first_step": 0.1, "max_num_steps": 500}, lambda sizes: len(sizes) <= 500),
    "tensors": (1e-3, {"first_step": torch.tensor(0.1), "max_step": torch.tensor(0.2)}, lambda s: max(s) < 0.2000001),
}


@pytest.mark.parametrize("case", STEPPING)
@each_carrier
@each_mode
def test_options_of_step_size_control(mode: str, method: str, case: str) -> None:
    tolerance, options, holds = STEPPING[case]
    problem = mixing_problem((2, 2))
    func = problem.func = Stiffening(4)
    assert_exact(problem, mode, method=method, rtol=tolerance, atol=tolerance, options=options)
    assert holds(func.accepted)


@each_mode
def test_too_many_steps_fail_as_upstream(mode: str) -> None:
    problem = mixing_problem()
    options = {"first_step": 1e-3, "max_num_steps": 2}
    with pytest.raises(AssertionError, match="max_num_steps exceeded"):
        torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, options=options, **MODES[mode])


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("grad", ["t", "step_t", "both"])
@each_carrier
@each_mode
def test_step_t(mode: str, method: str, grad: str, direction: str) -> None:
    """Between two of them the steps hang on the first; a step that is cut moves with both."""
    problem = mixing_problem((2, 2))
    problem.func = Stiffening(4)
    t = problem.t.detach().flip(0) if direction == "decreasing" else problem.t.detach()
    problem.t = t.requires_grad_(grad in ("t", "both"))
    # Unordered, one before the start, one at it, one after the end.
    step_t = torch.tensor([0.52, 0.25, 1.4, -0.2, 0.81, 0.83, float(t[0].detach())], dtype=DOUBLE)
    problem.params = {"step_t": step_t.requires_grad_(grad in ("step_t", "both"))}
    options = {"first_step": 0.2, "step_t": step_t, "ifactor": 2.0}
    found = assert_exact(problem, mode, method=method, rtol=1e2, atol=1e2, options=options)
    assert ("step_t" in found) == (grad in ("step_t", "both"))


class Switching(Mixing):
    """Another field from 0.5 on, and yet another from 0.9 on."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope = super().forward(t, y)
        if t < 0.5:
            return slope
        return 2 - slope * self.bias.sum() if t < 0.9 else slope.flip(-1)


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("grad", ["t", "jump_t", "none"])
@each_carrier
@each_mode
def test_jump_t_where_the_field_is_discontinuous(mode: str, method: str, grad: str, direction: str) -> None:
    problem = mixing_problem((2, 2))
    problem.func = Switching(4)
    t = problem.t.detach().flip(0) if direction == "decreasing" else problem.t.detach()
    problem.t = t.requires_grad_(grad == "t")
    jump_t = torch.tensor([0.9, 0.5], dtype=DOUBLE).requires_grad_(grad == "jump_t")
    problem.params = {"jump_t": jump_t}
    options = {"first_step": 0.15, "jump_t": jump_t, "step_t": torch.tensor([0.7, 1.2], dtype=DOUBLE)}
    assert_exact(problem, mode, method=method, rtol=1e-3, atol=1e-5, options=options)


@each_carrier
@each_mode
def test_jump_at_an_output_and_at_the_start(mode: str, method: str) -> None:
    problem = mixing_problem((2, 2))
    problem.func = Switching(4)
    problem.t = torch.tensor([0.5, 0.9, 1.3], dtype=DOUBLE, requires_grad=True)
    jump_t = torch.tensor([0.5, 0.9, 1.3], dtype=DOUBLE, requires_grad=True)
    problem.params = {"jump_t": jump_t}
    assert_exact(problem, mode, method=method, rtol=1e-3, options={"first_step": 0.15, "jump_t": jump_t})


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@each_carrier
@each_mode
def test_time_arithmetic_in_single_precision(mode: str, method: str, state: torch.dtype) -> None:
    problem = mixing_problem((2, 2), state)
    problem.t = torch.tensor([0.125, 0.375, 0.875, 1.25], dtype=torch.float32, requires_grad=True)
    options = {"first_step": 0.07, "dtype": torch.float32}
    assert_exact(problem, mode, method=method, rtol=1e-3, atol=1e-4, options=options)


def largest(tensor: Tensor) -> Tensor:
    return tensor.abs().max()


def of_first_column(tensor: Tensor) -> Tensor:
    return tensor[:, 0].square().mean().sqrt()


@pytest.mark.parametrize("norm", [largest, of_first_column])
@each_carrier
@each_mode
def test_norm(mode: str, method: str, norm: Callable[[Tensor], Tensor]) -> None:
    options = {"first_step": 0.1, "norm": norm}
    assert_exact(mixing_problem(), mode, method=method, rtol=1e-4, atol=1e-5, options=options)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("perturb", [False, True], ids=["unperturbed", "perturbed"])
@each_family_of_grids
@each_mode
def test_step_size(mode: str, method: str, perturb: bool, interp: str) -> None:
    problem = mixing_problem((2, 2))
    problem.func = Switching(4) if perturb else problem.func
    options = {"step_size": 0.1, "interp": interp, "perturb": perturb}
    assert_exact(problem, mode, method=method, rtol=1e-2, options=options)


@with_and_without_time
@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@each_family_of_grids
@each_mode
def test_step_size_that_is_a_tensor_with_gradient(mode: str, method: str, direction: str, time_grad: bool) -> None:
    problem = mixing_problem((2, 2))
    t = problem.t.detach().flip(0) if direction == "decreasing" else problem.t.detach()
    problem.t = t.requires_grad_(time_grad)
    step_size = torch.tensor(0.12, dtype=DOUBLE, requires_grad=True)
    problem.params = {"step_size": step_size}
    found = assert_exact(problem, mode, method=method, rtol=1e-2, options={"step_size": step_size})
    assert float(found["step_size"].abs()) > 0


def squeezed(func: Any, y0: Tensor, t: Tensor) -> Tensor:
    """Quadratically finer towards the end, through every entry of ``t``."""
    inner = torch.linspace(0, 1, 9, dtype=t.dtype)[1:-1]
    middle = t[1] + (t[-2] - t[1]) * (2 * inner - inner**2) + 0.01 * torch.sin(t[1] * t[2])
    return torch.cat([t[:1], middle, t[-1:]])


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@each_family_of_grids
@each_mode
def test_grid_that_depends_on_t_nonlinearly(mode: str, method: str, direction: str, interp: str) -> None:
    problem = mixing_problem((2, 2))
    problem.t = torch.tensor([0.1, 0.2, 0.4, 0.95, 1.27], dtype=DOUBLE)
    if direction == "decreasing":
        problem.t = problem.t.flip(0)
    problem.t.requires_grad_()
    options = {"grid_constructor": squeezed, "interp": interp}
    assert_exact(problem, mode, method=method, rtol=1e-1, options=options)


@pytest.mark.parametrize("alone", [False, True], ids=["with-others", "alone"])
@each_family_of_grids
@each_mode
def test_grid_whose_points_are_learned(mode: str, method: str, alone: bool) -> None:
    problem = mixing_problem((2, 2))
    grid = torch.tensor([0.22, 0.4, 0.88, 1.01], dtype=DOUBLE, requires_grad=True)
    problem.params = {"grid": grid}
    if alone:
        assert isinstance(problem.y0, Tensor)
        assert isinstance(problem.func, Mixing)
        problem.y0, problem.t = problem.y0.detach(), problem.t.detach()
        problem.func.requires_grad_(False)
    options = {"grid_constructor": lambda func, y0, t: torch.cat([t[:1], grid, t[-1:]])}
    assert "grid" in assert_exact(problem, mode, method=method, rtol=1e-1, options=options)


@each_mode
def test_grid_constructor_that_looks_at_the_state_and_the_field(mode: str) -> None:
    def constructor(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        slope = func(t[0], y0)
        step = 0.2 / (1 + y0.square().mean() + slope.square().mean())
        number = math.ceil(float(((t[-1] - t[0]) / step).detach()))
        return torch.cat([t[0] + step * torch.arange(number, dtype=t.dtype), t[-1:]])

    assert_exact(mixing_problem((2, 2)), mode, method="heun3", options={"grid_constructor": constructor})


@pytest.mark.parametrize("options", [None, {}], ids=["no-options", "empty-options"])
@each_mode
def test_adjoint_options_are_not_needed_where_options_are_none_or_empty(
    mode: str, options: dict[str, Any] | None
) -> None:
    assert_exact(mixing_problem(), mode, method="rk4", options=options)


ADJOINT: dict[str, dict[str, Any]] = {
    "tolerances": {"adjoint_rtol": 1e3, "adjoint_atol": 1e3},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": lambda parts: 1 / 0}},
    "options-of-a-method": {"adjoint_options": {"step_size": 1e-9, "first_step": 1e-9, "max_num_steps": 1}},
    "list-tolerances": {"adjoint_rtol": [1.0, 2.0, 3.0], "adjoint_atol": torch.ones(5)},
}


@pytest.mark.parametrize("case", ADJOINT)
@each_kind
@each_mode
def test_arguments_of_upstreams_adjoint_have_no_effect(mode: str, method: str, case: str) -> None:
    problem = mixing_problem()
    problem.adjoint_kwargs = ADJOINT[case]
    assert_exact(problem, mode, **METHODS[method])


@each_kind
@each_mode
def test_adjoint_options_of_the_caller_stay_as_they_are(mode: str, method: str) -> None:
    problem = mixing_problem()
    options, adjoint_options = dict(METHODS[method]["options"]), {"norm": "seminorm"}
    torchdiffeq.odeint_adjoint(
        problem.func,
        problem.y0,
        problem.t,
        method=method,
        options=options,
        adjoint_method=MODES[mode]["adjoint_method"],
        adjoint_options=adjoint_options,
    ).sum().backward()
    assert options == METHODS[method]["options"]
    assert adjoint_options == {"norm": "seminorm"}


@each_kind
@each_mode
def test_unknown_options_only_warn(mode: str, method: str) -> None:
    kwargs = METHODS[method] | {"options": METHODS[method]["options"] | {"grid_points": 3}}
    with pytest.warns(UserWarning, match="Unexpected arguments {'grid_points': 3}"):
        assert_exact(mixing_problem(), mode, **kwargs)


@each_kind
@each_mode
def test_unknown_adjoint_options_only_warn(mode: str, method: str) -> None:
    problem = mixing_problem()
    problem.adjoint_kwargs = {"adjoint_options": {"grid_points": 3}}
    with pytest.warns(UserWarning, match="Unexpected arguments {'grid_points': 3}"):
        assert_exact(problem, mode, **METHODS[method])


@pytest.mark.parametrize("form", [list, tuple])
@each_family
@each_mode
def test_tolerances_as_lists_for_a_tuple_state(mode: str, method: str, form: Callable[[Any], Any]) -> None:
    """As FFJORD's users give them; upstream's own adjoint fails on them in backward."""
    shapes: list[tuple[int, ...]] = [(2, 2), (3,), ()]
    y0 = tuple(uniform(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes))
    t = torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE, requires_grad=True)
    kwargs = METHODS[method]
    if method in ADAPTIVE:
        kwargs = kwargs | {"rtol": form([1e-3, 1e20, 1e-4]), "atol": form([1e-4, 1e20, torch.tensor(1e-5)])}
    assert_exact(Problem(MixingTuple(shapes), y0, t), mode, **kwargs)


@each_mode
def test_tolerances_as_tensors(mode: str) -> None:
    rtol, atol = torch.full((2, 3), 1e-4, dtype=DOUBLE), torch.rand(3, dtype=DOUBLE) / 100 + 1e-5
    assert_exact(mixing_problem(), mode, method="dopri5", rtol=rtol, atol=atol, options={"first_step": 0.1})


@each_mode
def test_default_first_step_is_held_constant(mode: str) -> None:
    """Without ``first_step`` the gradient is that for the one that torchdiffeq chose."""
    problem = mixing_problem()
    func = problem.func = Stiffening(6)
    wanted = problem.wanted()
    kwargs: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    found = torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, **kwargs, **MODES[mode])
    options = {"first_step": torch.tensor(func.tried[0], dtype=DOUBLE)}
    truth = torchdiffeq.odeint(problem.func, problem.y0, problem.t, **kwargs, method="dopri5", options=options)
    assert torch.equal(found, truth)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted), problem.t.dtype)
