"""The gradient is exact under every option of torchdiffeq, and options of upstream's adjoint have no effect on it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import (
    ADAPTIVE,
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    Mixing,
    arguments_of,
    assert_exact,
    assert_same_gradients,
    each_mode,
    gradients_of,
    loss_of,
    over,
    problem_for,
    solve,
)
from torch import Tensor

GRIDS = [name for name in ("rk4", "explicit_adams", "implicit_adams", "heun3") if name in METHODS]
CARRIERS = ["dopri5", "adaptive_heun"]  # one whose last slope is the next one's first, one whose is not
directions = pytest.mark.parametrize("direction", ["decreasing", pytest.param("increasing", marks=pytest.mark.slow)])


def towards(direction: str, t: Tensor) -> Tensor:
    return t.detach().flip(0) if direction == "decreasing" else t.detach()


class Stiffening(Mixing):
    """A field that becomes fast half-way, so that steps are rejected; notes what the solver reports."""

    def __init__(self, size: int) -> None:
        super().__init__(size, seed=17)
        self.tried: list[float] = []
        self.accepted: list[float] = []
        self.rejected: list[float] = []

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        fast = 1 + 12 * torch.sigmoid(30 * (t - 0.5))
        return super().forward(t, y) * fast + torch.sin(25 * t) * y.flip(0)

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.tried.append(float(dt.detach()))

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted.append(float(dt.detach()))

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.rejected.append(float(dt.detach()))


@over(ADAPTIVE)
def test_rejected_steps_leave_no_trace(mode: str, method: str) -> None:
    problem = problem_for(method, (2, 2))
    field = problem.field = Stiffening(4)
    assert_exact(problem, mode, method, rtol=1e-3, atol=1e-4, options={"first_step": 0.4})
    assert field.rejected


def _grows_slowly(sizes: list[float]) -> bool:
    return max(after / before for before, after in itertools.pairwise(sizes)) < 1.5000001


# Each row with the tolerances under which the option matters, and a check on the sizes of the accepted steps.
STEPPING: dict[str, tuple[float, dict[str, Any], Callable[[list[float]], bool]]] = {
    "min_step": (1e-9, {"first_step": 0.2, "min_step": 0.05}, lambda sizes: min(sizes[:-1]) >= 0.05),
    "max_step": (1e-2, {"first_step": 0.02, "max_step": 0.06}, lambda sizes: max(sizes) <= 0.06),
    "safety": (1e-3, {"first_step": 0.1, "safety": 0.5}, lambda sizes: len(sizes) > 1),
    "ifactor": (1e-1, {"first_step": 0.1, "ifactor": 1.5}, _grows_slowly),
    "dfactor": (1e-2, {"first_step": 0.5, "dfactor": 0.7}, lambda sizes: len(sizes) > 1),
    "max_num_steps": (1e-3, {"first_step": 0.1, "max_num_steps": 500}, lambda sizes: len(sizes) <= 500),
    "tensors": (1e-3, {"first_step": torch.tensor(0.1), "max_step": torch.tensor(0.2)}, lambda s: max(s) < 0.2000001),
    "norm": (1e-3, {"first_step": 0.1, "norm": lambda y: y[:, 0].square().mean().sqrt()}, lambda sizes: True),
}


@pytest.mark.parametrize("case", STEPPING)
@over(CARRIERS, every=2)
def test_options_of_step_size_control(mode: str, method: str, case: str) -> None:
    tolerance, options, holds = STEPPING[case]
    problem = problem_for(method, (2, 2))
    field = problem.field = Stiffening(4)
    assert_exact(problem, mode, method, rtol=tolerance, atol=tolerance, options=options)
    assert holds(field.accepted)


@directions
@pytest.mark.parametrize("grad", ["t", "step_t", "both"])
@over(CARRIERS)
def test_step_t(mode: str, method: str, grad: str, direction: str) -> None:
    """Between two of them the steps hang on the first; a step that is cut moves with both."""
    problem = problem_for(method, (2, 2))
    problem.field = Stiffening(4)
    problem.t = towards(direction, problem.t).requires_grad_(grad in ("t", "both"))
    # Unordered, one before the start, one at it, one after the end.
    step_t = torch.tensor([0.52, 0.25, 1.4, -0.2, 0.81, 0.83, float(problem.t[0].detach())], dtype=DOUBLE)
    problem.extra = {"step_t": step_t.requires_grad_(grad in ("step_t", "both"))}
    options = {"first_step": 0.2, "step_t": step_t, "ifactor": 2.0}
    found = assert_exact(problem, mode, method, rtol=1e2, atol=1e2, options=options)
    assert ("step_t" in found) == (grad in ("step_t", "both"))


class Switching(Mixing):
    """Another field from 0.5 on, and yet another from 0.9 on."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Any:
        slope = super().forward(t, y)
        if t < 0.5:
            return slope
        return 2 - slope * self.bias.sum() if t < 0.9 else slope.flip(-1)


@directions
@pytest.mark.parametrize("grad", ["t", "jump_t", "none"])
@over(CARRIERS)
def test_jump_t_where_the_field_is_discontinuous(mode: str, method: str, grad: str, direction: str) -> None:
    problem = problem_for(method, (2, 2))
    problem.field = Switching(4)
    problem.t = towards(direction, problem.t).requires_grad_(grad == "t")
    jump_t = torch.tensor([0.9, 0.5], dtype=DOUBLE).requires_grad_(grad == "jump_t")
    problem.extra = {"jump_t": jump_t}
    options = {"first_step": 0.15, "jump_t": jump_t, "step_t": torch.tensor([0.7, 1.2], dtype=DOUBLE)}
    assert_exact(problem, mode, method, rtol=1e-3, atol=1e-5, options=options)


@over(CARRIERS)
def test_jumps_at_outputs_and_at_the_start(mode: str, method: str) -> None:
    problem = problem_for(method, (2, 2))
    problem.field = Switching(4)
    problem.t = torch.tensor([0.5, 0.9, 1.3], dtype=DOUBLE, requires_grad=True)
    jump_t = torch.tensor([0.5, 0.9, 1.3], dtype=DOUBLE, requires_grad=True)
    problem.extra = {"jump_t": jump_t}
    assert_exact(problem, mode, method, rtol=1e-3, options={"first_step": 0.15, "jump_t": jump_t})


@directions
@over(GRIDS)
def test_a_step_size_that_is_a_tensor_with_gradient(mode: str, method: str, direction: str) -> None:
    problem = problem_for(method, (2, 2))
    problem.t = towards(direction, problem.t).requires_grad_(mode == "symplectic")
    step_size = torch.tensor(0.12, dtype=DOUBLE, requires_grad=True)
    problem.extra = {"step_size": step_size}
    found = assert_exact(problem, mode, method, rtol=1e-2, options={"step_size": step_size})
    assert float(found["step_size"].abs()) > 0


def squeezed(func: Any, y0: Tensor, t: Tensor) -> Tensor:
    """Quadratically finer towards the end, through every entry of ``t``."""
    inner = torch.linspace(0, 1, 9, dtype=t.dtype)[1:-1]
    middle = t[1] + (t[-2] - t[1]) * (2 * inner - inner**2) + 0.01 * torch.sin(t[1] * t[2])
    return torch.cat([t[:1], middle, t[-1:]])


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@directions
@over(GRIDS)
def test_a_grid_that_depends_on_t_nonlinearly(mode: str, method: str, direction: str, interp: str) -> None:
    problem = problem_for(method, (2, 2))
    problem.t = torch.tensor([0.1, 0.2, 0.4, 0.95, 1.27], dtype=DOUBLE)
    problem.t = towards(direction, problem.t).requires_grad_()
    options = {"step_size": None, "grid_constructor": squeezed, "interp": interp}
    assert_exact(problem, mode, method, rtol=1e-1, options=options)


@pytest.mark.parametrize("alone", [False, True], ids=["with-others", "alone"])
@over(GRIDS)
def test_a_grid_whose_points_are_learned(mode: str, method: str, alone: bool) -> None:
    problem = problem_for(method, (2, 2))
    grid = torch.tensor([0.22, 0.4, 0.88, 1.01], dtype=DOUBLE, requires_grad=True)
    problem.extra = {"grid": grid}
    if alone:
        problem.y0, problem.t = problem.y0.detach(), problem.t.detach()
        problem.field.requires_grad_(False)  # type: ignore[attr-defined]
    options = {"step_size": None, "grid_constructor": lambda func, y0, t: torch.cat([t[:1], grid, t[-1:]])}
    assert "grid" in assert_exact(problem, mode, method, rtol=1e-1, options=options)


@each_mode
def test_a_grid_constructor_that_looks_at_the_state_and_the_field_is_called_once(mode: str) -> None:
    called = []

    def constructor(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        called.append(0)
        slope = func(t[0], y0)
        step = 0.2 / (1 + y0.square().mean() + slope.square().mean())
        number = math.ceil(float(((t[-1] - t[0]) / step).detach()))
        return torch.cat([t[0] + step * torch.arange(number, dtype=t.dtype), t[-1:]])

    options = {"step_size": None, "grid_constructor": constructor}
    assert_exact(problem_for("heun3", (2, 2)), mode, "heun3", options=options)
    assert len(called) == 2  # by odeint, and here


ADJOINT: dict[str, dict[str, Any]] = {
    "tolerances": {"adjoint_rtol": 1e3, "adjoint_atol": 1e3},
    "seminorm": {"adjoint_options": {"norm": "seminorm"}},
    "norm": {"adjoint_options": {"norm": lambda parts: 1 / 0}},
    "options-of-a-method": {"adjoint_options": {"step_size": 1e-9, "first_step": 1e-9, "max_num_steps": 1}},
    "list-tolerances": {"adjoint_rtol": [1.0, 2.0, 3.0], "adjoint_atol": torch.ones(5)},
}


@pytest.mark.parametrize("case", ADJOINT)
@over(["rk4", "dopri5"], every=2)
def test_arguments_of_upstreams_adjoint_have_no_effect(mode: str, method: str, case: str) -> None:
    problem = problem_for(method)
    problem.adjoint = ADJOINT[case]
    assert_exact(problem, mode, method)


@over(["rk4", "dopri5"])
def test_options_of_the_caller_stay_as_they_are(mode: str, method: str) -> None:
    problem, row = problem_for(method), METHODS[method]
    own = arguments_of(mode)
    options = dict(row.settings["options"])
    adjoint_options = {"norm": "seminorm", **own.pop("adjoint_options", {})}
    before = dict(adjoint_options)
    call = {"options": options, "adjoint_options": adjoint_options, **own}
    torchdiffeq.odeint_adjoint(problem.field, problem.y0, problem.t, method=method, **call).sum().backward()
    assert options == row.settings["options"]
    assert adjoint_options == before


@each_mode
def test_the_default_first_step_is_held_constant(mode: str) -> None:
    """Without ``first_step`` the gradient is that for the one that torchdiffeq chose."""
    problem = problem_for("dopri5")
    field = problem.field = Stiffening(6)
    wanted, settings = problem.wanted(), {"rtol": 1e-4, "atol": 1e-5}
    own = arguments_of(mode)
    found = torchdiffeq.odeint_adjoint(field, problem.y0, problem.t, **settings, **own)
    options = {"first_step": torch.tensor(field.tried[0], dtype=DOUBLE)}
    truth = solve(BACKPROPAGATION, field, problem.y0, problem.t, "dopri5", options=options, **settings)
    assert torch.equal(found, truth)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted))
