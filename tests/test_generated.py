"""Generated solves: whatever hosts, methods, shapes, dtypes, times and fields meet, the gradient is backpropagation's.

Hypothesis draws them, the same in every run, and shrinks what it finds. More by HYPOTHESIS_CASES.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    MODES,
    OF_TORCHDYN,
    Mixing,
    Problem,
    assert_exact,
    error,
    gradients_of,
    loss_of,
    solve,
    uniform,
)
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

MOST = 10_000  # evaluations of one case
CASES = int(os.environ.get("HYPOTHESIS_CASES", "20"))
few = settings(
    max_examples=CASES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
many = settings(few, max_examples=100 * CASES)
# Under both names: a bounded number by default, many where slow tests run.
BUDGETS = [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]

EVERY_MODE = st.sampled_from([*MODES, *(f"use:{mode}" for mode in MODES)])
SHAPES = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)


def bounded(y: Tensor) -> Tensor:
    """Complex states near the unit disc: sines and tangents of others overflow, or have poles."""
    return y / (1 + (y * y.conj()).real) if y.is_complex() else y


class Field(nn.Module):
    """Smooth, switching or not seeing some of its inputs; its parameters are shared or frozen by chance."""

    def __init__(self, size: int, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self.evaluations = 0
        self.one = Mixing(size, seed=3, dtype=dtype)
        self.other = self.one if kind == "shared" else Mixing(size, seed=4, dtype=dtype)
        if kind == "frozen":
            self.other.requires_grad_(False)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        self.evaluations += 1
        if self.evaluations > MOST:
            reject()  # torchdyn may take ever smaller steps backwards in time
        y = bounded(y)
        slope: Tensor = self.one(t, y)
        if self.kind == "switching":
            other: Tensor = self.other(t, y)
            return torch.where(y.detach().real > 0.2, slope, other)
        if self.kind == "by turns":
            return slope if float(t.detach().real) < 0.45 else self.other(t, y)
        if self.kind == "autonomous":
            return torch.tanh(y) * self.one.bias.sum()
        if self.kind == "time alone":
            return torch.ones_like(y) * torch.sin(self.one.frequency * t.real).to(y.dtype)
        result: Tensor = slope + 0.3 * self.other(t, bounded(slope))
        return result


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, str, Problem, dict[str, Any]]:
    """A mode, a method, a problem for it, and options."""
    mode, method = draw(EVERY_MODE), draw(st.sampled_from(list(METHODS)))
    row, shape = METHODS[method], draw(SHAPES)
    of_dyn = method in OF_TORCHDYN
    assume(not (of_dyn and not shape))  # its states have dimensions
    dtype = draw(st.sampled_from([DOUBLE, torch.complex128] if not (of_dyn and row.adaptive) else [DOUBLE]))
    kinds = ["smooth", "shared", "frozen", "autonomous", "time alone"]
    if not (of_dyn and row.adaptive):  # torchdyn's reject at a jump forever
        kinds.append("by turns")
    # Implicit methods need not converge on a field that jumps, and adaptive ones reject at its jumps forever.
    kind = draw(st.sampled_from(kinds if row.adaptive or "adams" in method else [*kinds, "switching"]))
    size = torch.Size(shape).numel()
    width = (*shape[:-1], 2 * shape[-1]) if row.halves else shape
    y0 = uniform(*width, seed=draw(st.integers(0, 99)), dtype=dtype).requires_grad_(draw(st.booleans()))
    gaps = draw(st.lists(st.floats(0.05, 0.4), min_size=1, max_size=4))
    t = torch.tensor([0.1, *gaps], dtype=DOUBLE).cumsum(0)
    t = (t.flip(0) if draw(st.booleans()) else t).clone().requires_grad_(draw(st.booleans()))
    problem = Problem(Field(size, kind, dtype), y0, t)
    if callable(row.solver):
        problem.settings["solver"] = row.solver(dtype, size)
    options: dict[str, Any] = {}
    if row.host == "torchdiffeq" and not row.adaptive:
        options["step_size"] = draw(st.sampled_from([None, 0.07, 0.19]))
        options["interp"] = draw(st.sampled_from(["linear", "cubic"]))
        options["perturb"] = draw(st.booleans())
    elif row.host == "torchdiffeq":
        options["first_step"] = draw(st.sampled_from([0.02, 0.1]))
        problem.settings |= {"rtol": 1e-2, "atol": 1e-3}
    return mode, method, problem, options


def exact(case: tuple[str, str, Problem, dict[str, Any]]) -> None:
    mode, method, problem, options = case
    settings: dict[str, Any] = {"options": options} if options else {}
    assert_exact(problem, mode, method, **settings)


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_are_backpropagations(budget: settings) -> None:
    budget(given(problems())(exact))()


def again(case: tuple[str, str, Problem, dict[str, Any]]) -> None:
    """The gradient's gradient."""
    mode, method, problem, options = case
    assume(problem.y0.requires_grad and not callable(METHODS[method].solver) and problem.y0.numel() < 6)
    own = {**problem.settings, **({"options": options} if options else {})}
    wanted = problem.wanted()

    def run(mode: str) -> list[Tensor]:
        loss = loss_of(solve(mode, problem.field, problem.y0, problem.t, method, **own))
        (first,) = torch.autograd.grad(loss, problem.y0, create_graph=True)
        found = gradients_of(first.abs().square().sum() + loss, wanted)
        return [torch.zeros_like(wanted[name]) if value is None else value for name, value in found.items()]

    assert error(run(mode), run(BACKPROPAGATION)) < 1e-9


@pytest.mark.parametrize("budget", BUDGETS)
def test_second_derivatives_are_backpropagations(budget: settings) -> None:
    settings(budget, max_examples=budget.max_examples // 2)(given(problems())(again))()


@st.composite
def cotangents(draw: st.DrawFn) -> tuple[str, str, list[bool]]:
    method = draw(st.sampled_from(["rk4", "dopri5", "adaptive_heun", "explicit_adams"]))
    return draw(EVERY_MODE), method, draw(st.lists(st.booleans(), min_size=5, max_size=5))


def splits(case: tuple[str, str, list[bool]]) -> None:
    """The gradient of a loss of some outputs and that of the others add up to that of all."""
    mode, method, chosen = case
    mask = torch.tensor(chosen, dtype=DOUBLE)[:, None]
    y0, t = uniform(3, seed=8).requires_grad_(), torch.tensor([0.0, 0.2, 0.21, 0.5, 0.9], dtype=DOUBLE)
    field = Mixing(3)
    solution = solve(mode, field, y0, t, method, adjoint_params=tuple(field.parameters()))
    weights = uniform(5, 3, seed=9)
    losses = [(solution * weights * part).sum() for part in (mask, 1 - mask, torch.ones_like(mask))]
    wanted = [y0, *field.parameters()]
    one, other, both = (torch.autograd.grad(loss, wanted, retain_graph=True) for loss in losses)
    assert error([a + b for a, b in zip(one, other, strict=True)], both) < 1e-12


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_of_some_outputs_add_up(budget: settings) -> None:
    settings(budget, max_examples=budget.max_examples // 2)(given(cotangents())(splits))()
