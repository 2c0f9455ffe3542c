"""Solves that end at an event: values as torchdiffeq's, gradients exact, also through the time of the event."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from harness import (
    DOUBLE,
    MODES,
    Mixing,
    MixingTuple,
    State,
    assert_same_gradients,
    gradients_of,
    loss_of,
    over,
    parts_of,
    uniform,
)
from torch import Tensor, nn

SOLVERS: dict[str, dict[str, Any]] = {
    "dopri5": {"method": "dopri5", "rtol": 1e-5, "atol": 1e-9, "options": {"first_step": 0.05}},
    "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-5, "options": {"first_step": 0.05}},
    "dopri5-jump": {
        "method": "dopri5",
        "atol": 1e-8,
        "options": {"first_step": 0.05, "jump_t": torch.tensor([0.3, 9.0], dtype=DOUBLE)},
    },
    "rk4": {"method": "rk4", "atol": 1e-9, "options": {"step_size": 0.07}},
    "rk4-cubic": {"method": "rk4", "atol": 1e-9, "options": {"step_size": 0.3, "interp": "cubic", "perturb": True}},
    "adams": {"method": "explicit_adams", "rtol": 1e-8, "options": {"step_size": 0.05}},
}


def crossing(t: Tensor, y: State) -> Tensor:
    """Zero when the entries, weighed, have grown enough."""
    flat = torch.cat([part.reshape(-1) for part in parts_of(y)])
    return 0.8 + 0.3 * torch.sin(t) - (flat * torch.arange(1, len(flat) + 1, dtype=DOUBLE)).sum() / len(flat)


class Growing(Mixing):
    def forward(self, t: Tensor, y: Any, args: Any = None) -> Any:
        return super().forward(t, y) / 3 + 1


class GrowingTuple(MixingTuple):
    def forward(self, t: Tensor, y: Any, args: Any = None) -> Any:
        return tuple(slope / 3 + 1 for slope in super().forward(t, y))


class Backwards(nn.Module):
    """Grows as time decreases."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, y: State) -> Any:
        slope = self.inner(t, y)
        return tuple(-part for part in slope) if isinstance(slope, tuple) else -slope


def event_problem(form: str, reverse: bool) -> tuple[nn.Module, State, Tensor, dict[str, Tensor]]:
    """Field, state, start, and everything whose gradient is compared."""
    shapes: list[tuple[int, ...]] = [(2,), (), (1, 2)]
    func: nn.Module
    if form == "tuple":
        func = GrowingTuple(shapes, seed=31)
        y0: State = tuple(uniform(*shape, seed=i).div(4).requires_grad_() for i, shape in enumerate(shapes))
    else:
        func = Growing(4, seed=31)
        y0 = uniform(2, 2, seed=3).div(4).requires_grad_()
    func = Backwards(func) if reverse else func
    t0 = torch.tensor(0.1, dtype=DOUBLE, requires_grad=True)
    wanted = {f"y0[{i}]": part for i, part in enumerate(parts_of(y0))} | {"t": t0} | dict(func.named_parameters())
    return func, y0, t0, wanted


@pytest.mark.parametrize(("form", "reverse"), [("tensor", False), ("tuple", True), ("tensor", True)])
@over(SOLVERS)
def test_event_fn(mode: str, method: str, form: str, reverse: bool) -> None:
    """The event's time is a constant here, as in odeint; the state there is differentiated."""
    func, y0, t0, wanted = event_problem(form, reverse)
    t = torch.stack([t0, t0.detach() + (-1 if reverse else 1)])
    true_t, truth = torchdiffeq.odeint(func, y0, t, event_fn=crossing, **SOLVERS[method])
    event_t, found = torchdiffeq.odeint_adjoint(func, y0, t, event_fn=crossing, **SOLVERS[method], **MODES[mode])
    assert torch.equal(event_t, true_t)
    assert abs(float(event_t.detach()) - 0.1) > 0.2
    for part, true_part in zip(parts_of(found), parts_of(truth), strict=True):
        assert torch.equal(part, true_part)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted))


@pytest.mark.parametrize(("form", "reverse"), [("tensor", False), ("tuple", True), ("tensor", True)])
@over(SOLVERS)
def test_odeint_event(mode: str, method: str, form: str, reverse: bool) -> None:
    """The same with the gradient of the event's time, which torchdiffeq adds from outside."""
    func, y0, t0, wanted = event_problem(form, reverse)
    kwargs = {"event_fn": crossing, "reverse_time": reverse, **SOLVERS[method]}
    true_t, truth = torchdiffeq.odeint_event(func, y0, t0, **kwargs)
    event_t, found = torchdiffeq.odeint_event(
        func, y0, t0, **kwargs, odeint_interface=torchdiffeq.odeint_adjoint, **MODES[mode]
    )
    assert torch.equal(event_t, true_t)
    expected = gradients_of(3 * true_t.sin() + loss_of(truth), wanted)
    assert_same_gradients(gradients_of(3 * event_t.sin() + loss_of(found), wanted), expected)


@over(["dopri5", "adaptive_heun"])
def test_event_at_the_start(mode: str, method: str) -> None:
    func, y0, t0, wanted = event_problem("tensor", reverse=False)
    t = torch.stack([t0, t0.detach() + 1])
    kwargs = {"event_fn": lambda t, y: t - 0.1, **SOLVERS[method]}
    true_t, truth = torchdiffeq.odeint(func, y0, t, **kwargs)
    event_t, found = torchdiffeq.odeint_adjoint(func, y0, t, **kwargs, **MODES[mode])
    assert torch.equal(event_t, true_t)
    assert torch.equal(found, truth)
    assert_same_gradients(gradients_of(loss_of(found), wanted), gradients_of(loss_of(truth), wanted))


class FreeFall(nn.Module):
    """Position and velocity under a gravity that is to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.gravity = nn.Parameter(torch.tensor(9.8, dtype=DOUBLE))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[1], -self.gravity * torch.ones_like(state[1])


FALLS: dict[str, dict[str, Any]] = {
    "dopri5": {"method": "dopri5", "rtol": 1e-10, "atol": 1e-12},
    "rk4": {"method": "rk4", "atol": 1e-13, "options": {"step_size": 0.01, "interp": "cubic"}},
}


@over(FALLS)
def test_bouncing_ball_against_its_closed_form(mode: str, method: str) -> None:
    """Three impacts, each solve starting at the event of the one before, with a loss of energy to be learned."""
    field = FreeFall()
    height, velocity, loss = (torch.tensor(x, dtype=DOUBLE, requires_grad=True) for x in (2.0, 0.5, 0.7))
    wanted = {"height": height, "velocity": velocity, "loss": loss, "gravity": field.gravity}
    t, state = torch.tensor(0.0, dtype=DOUBLE), (height, velocity)
    for _ in range(3):
        t, states = torchdiffeq.odeint_event(
            field,
            state,
            t,
            event_fn=lambda t, state: state[0],
            odeint_interface=torchdiffeq.odeint_adjoint,
            **FALLS[method],
            **MODES[mode],
        )
        # Off the ground by a hair, so that the next event is not this one.
        state = (states[0][-1] + 1e-9, -loss * states[1][-1])
    impact = (velocity**2 + 2 * field.gravity * height).sqrt()
    first = (velocity + impact) / field.gravity
    true_t = first + 2 * impact * (loss + loss**2) / field.gravity
    torch.testing.assert_close(t, true_t, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(state[1], loss**3 * impact, rtol=1e-7, atol=1e-7)
    expected = gradients_of(loss**3 * impact, wanted)
    for name, gradient in gradients_of(state[1], wanted).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6, msg=f"{name}: {gradient}")
