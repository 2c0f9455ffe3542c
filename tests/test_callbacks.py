"""The caller's callbacks hear of the forward pass what torchdiffeq tells them, and nothing of the replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import BACKPROPAGATION, DOUBLE, Net, each_mode, initial, loss_of, over, solve, times
from torch import Tensor, nn

NAMES = ("callback_step", "callback_accept_step", "callback_reject_step")
Event = tuple[str, float, tuple[Tensor, ...], float]


class Heard(nn.Module):
    """A field that writes down each call of its callbacks; the state is a tensor or a tuple of two."""

    def __init__(self, names: tuple[str, ...] = NAMES) -> None:
        super().__init__()
        self.net = Net()
        self.events: list[Event] = []
        for name in names:
            setattr(self, name, lambda t, y, dt, name=name: self.hear(name, t, y, dt))

    def hear(self, name: str, t: Tensor, y: Any, dt: Any) -> None:
        parts = y if isinstance(y, tuple) else (y,)
        assert all(part.grad_fn is None for part in parts)
        self.events.append((name, float(t.detach()), tuple(part.detach().clone() for part in parts), float(dt)))

    def forward(self, t: Tensor, y: Any) -> Any:
        if isinstance(y, tuple):
            slope = self.net(t, y[0]) * (1 + 20 * (t > 0.5))
            return slope, slope.sum(-1) - y[1]
        return self.net(t, y) * (1 + 20 * (t > 0.5))


# Each with what it calls: fixed-grid solvers know of no accepted and rejected steps.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rk4": ("rk4", {}),
    "dopri5": ("dopri5", {"options": {"first_step": 0.9}}),
    "adaptive_heun": ("adaptive_heun", {"options": {"first_step": 0.9}, "rtol": 1e-3}),
    "jumps": ("dopri5", {"options": {"first_step": 0.3, "jump_t": torch.tensor([0.5], dtype=DOUBLE)}}),
    "explicit_adams": ("explicit_adams", {"options": {"step_size": 0.05}}),
}


@pytest.mark.parametrize("tuple_state", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@over(CASES)
def test_callbacks(mode: str, method: str, reverse: bool, tuple_state: bool) -> None:
    state = (initial(), initial(2)) if tuple_state else initial()
    t = times().flip(0) if reverse else times()
    solver, settings = CASES[method]
    names = NAMES if "first_step" in settings.get("options", {}) else NAMES[:1]
    expected, field = Heard(names), Heard(names)
    with torch.no_grad():  # as upstream's forward pass runs
        solve(BACKPROPAGATION, expected, state, t, solver, **settings)
    solution = solve(mode, field, state, t, solver, **settings)
    assert [(name, t, dt) for name, t, _, dt in field.events] == [(name, t, dt) for name, t, _, dt in expected.events]
    for (_, _, parts, _), (_, _, others, _) in zip(field.events, expected.events, strict=True):
        assert all(map(torch.equal, parts, others))
    assert {name for name, *_ in expected.events} == set(names), "the case does not call every callback"
    heard = len(field.events)
    loss = loss_of(solution)
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(field.events) == heard


@pytest.mark.parametrize("mode", ["symplectic", "baseline"])
def test_a_callback_that_the_solver_does_not_know_warns_as_upstream(mode: str) -> None:
    with pytest.warns(UserWarning, match="Solver 'rk4' does not support callbacks"):
        solve(mode, Heard(), initial(), times())


@each_mode
def test_callbacks_of_upstreams_adjoint_are_not_called(mode: str) -> None:
    net, y0 = Net(), initial()
    called: list[object] = []
    for name in NAMES:
        setattr(net, f"{name}_adjoint", lambda *args: called.append(args))
    loss_of(solve(mode, net, y0, times())).backward()
    assert not called
