"""With a gradient mode on, the forward solve is torchdiffeq's own: same values, same calls; and its own modes stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchdiffeq
from cases import METHODS, MODES, Mixing, each_kind, each_method, each_mode, gradients_of, loss_of, mixing_problem
from torch import Tensor

import torchdiffeq_symplectic


class Recorded(Mixing):
    """Notes every call and every report of the solver."""

    def __init__(self, size: int) -> None:
        super().__init__(size, seed=5)
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.reports: list[tuple[str, float, float]] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls.append((t.detach().clone(), y.detach().clone()))
        return super().forward(t, y)

    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.reports.append(("step", float(t0.detach()), float(dt.detach())))


@each_method
@each_mode
def test_values_calls_and_reports_are_those_of_odeint(mode: str, method: str) -> None:
    problem = mixing_problem()
    true_func, func = Recorded(6), Recorded(6)
    truth = torchdiffeq.odeint(true_func, problem.y0, problem.t, **METHODS[method])
    found = torchdiffeq.odeint_adjoint(func, problem.y0, problem.t, **METHODS[method], **MODES[mode])
    assert torch.equal(found, truth)
    assert found.requires_grad
    assert len(func.calls) == len(true_func.calls)
    for (t, y), (true_t, true_y) in zip(func.calls, true_func.calls, strict=True):
        assert t.dtype == true_t.dtype
        assert torch.equal(t, true_t)
        assert torch.equal(y, true_y)
    assert func.reports == true_func.reports
    assert func.reports


@each_mode
def test_values_with_all_defaults(mode: str) -> None:
    problem = mixing_problem()
    truth = torchdiffeq.odeint(problem.func, problem.y0, problem.t)
    adjoint = torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t)
    found = torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, **MODES[mode])
    assert torch.equal(found, truth)
    assert torch.equal(found, adjoint)


@each_kind
@each_mode
def test_values_are_the_same_where_no_gradient_is_asked_for(mode: str, method: str) -> None:
    problem = mixing_problem()
    with torch.no_grad():
        truth = torchdiffeq.odeint(problem.func, problem.y0, problem.t, **METHODS[method])
        found = torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, **METHODS[method], **MODES[mode])
    assert torch.equal(found, truth)
    assert not found.requires_grad


@each_kind
@each_mode
def test_the_entry_point_without_patches_gives_the_same_bits(mode: str, method: str) -> None:
    problem = mixing_problem()
    wanted = problem.wanted()
    patched, direct = (
        odeint_adjoint(problem.func, problem.y0, problem.t, **METHODS[method], **MODES[mode])
        for odeint_adjoint in (torchdiffeq.odeint_adjoint, torchdiffeq_symplectic.odeint_adjoint)
    )
    assert torch.equal(patched, direct)
    expected = gradients_of(loss_of(patched), wanted)
    for name, gradient in gradients_of(loss_of(direct), wanted).items():
        assert gradient is not None
        assert torch.equal(gradient, expected[name]), name  # type: ignore[arg-type]


@pytest.fixture
def unregistered() -> Iterator[Any]:
    """Upstream's own function, as it is without this package."""
    torchdiffeq_symplectic.unregister()
    upstream = torchdiffeq.odeint_adjoint
    torchdiffeq_symplectic.register()
    yield upstream
    torchdiffeq_symplectic.register()


UPSTREAM: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rk4": {"method": "rk4", "options": {"step_size": 0.2}},
    "dopri5-and-rk4": {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.1}, "rtol": 1e-4},
    "rk4-and-adaptive_heun": {"method": "rk4", "adjoint_method": "adaptive_heun", "adjoint_rtol": 1e-2},
    "seminorm": {"rtol": 1e-4, "adjoint_options": {"norm": "seminorm"}},
    "adams": {"method": "explicit_adams", "options": {"step_size": 0.2}},
}


@pytest.mark.parametrize("case", UPSTREAM)
def test_upstreams_own_modes_give_the_same_bits(case: str, unregistered: Any) -> None:
    problem = mixing_problem()
    wanted = problem.wanted()
    before = unregistered(problem.func, problem.y0, problem.t, **UPSTREAM[case])
    after = torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, **UPSTREAM[case])
    assert torchdiffeq.odeint_adjoint is not unregistered
    assert torch.equal(before, after)
    expected = gradients_of(loss_of(before), wanted)
    for name, gradient in gradients_of(loss_of(after), wanted).items():
        assert gradient is not None
        assert torch.equal(gradient, expected[name]), name  # type: ignore[arg-type]


REFUSED: dict[str, dict[str, Any]] = {
    "unknown-method": {"method": "rk5"},
    "options-without-adjoint-options": {"method": "rk4", "options": {}, "adjoint_method": "dopri5"},
    "no-module": {"func": lambda t, y: y},
    "tuple-tolerances-of-wrong-length": {"y0": (torch.ones(2),), "rtol": [1e-3, 1e-3]},
    "constant-times": {"t": torch.tensor([0.0, 0.0])},
}


@pytest.mark.parametrize("case", REFUSED)
def test_upstreams_own_errors_are_the_same(case: str, unregistered: Any) -> None:
    problem = mixing_problem()
    arguments = {"func": problem.func, "y0": problem.y0, "t": problem.t} | REFUSED[case]
    messages = []
    for odeint_adjoint in (unregistered, torchdiffeq.odeint_adjoint):
        with pytest.raises((ValueError, AssertionError)) as caught:
            odeint_adjoint(**arguments)
        messages.append((caught.type, str(caught.value)))
    assert messages[0] == messages[1]
