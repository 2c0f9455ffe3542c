"""The caller's callbacks hear of the forward pass what torchdiffeq tells them, and nothing of the replay."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from old_harness import MODES, Net, each_mode, initial, loss_of, solve, times
from torch import Tensor, nn

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
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


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rk4": ("rk4", {}),
    "rk4 on the output times": ("rk4", {"options": {}}),
    "dopri5": ("dopri5", {"options": {"first_step": 0.9}}),
    "adaptive_heun": ("adaptive_heun", {"options": {"first_step": 0.9}}),
    "dopri5 chooses its first step": ("dopri5", {"options": {}}),
    "dopri5 with jumps": ("dopri5", {"options": {"first_step": 0.3, "jump_t": torch.tensor([0.5]).double()}}),
    "explicit_adams": ("rk4", {"method": "explicit_adams", "options": {"step_size": 0.05}}),
}


def supported(case: str) -> tuple[str, ...]:
    """Fixed-grid solvers know of no accepted and rejected steps."""
    return NAMES[:1] if CASES[case][0] == "rk4" else NAMES


def events_of(mode: str, state: Any, t: Tensor, case: str) -> tuple[Any, Heard]:
    solver, settings = CASES[case]
    field = Heard(supported(case))
    # Upstream's forward pass runs without a graph.
    with torch.set_grad_enabled(mode != "backprop"):
        return solve(mode, field, state, t, solver, **settings), field


@pytest.mark.parametrize("tuple_state", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [mode if mode in ("symplectic", "baseline") else slow(mode) for mode in MODES])
def test_callbacks(mode: str, case: str, reverse: bool, tuple_state: bool) -> None:
    state = (initial(), initial(2)) if tuple_state else initial()
    t = times().flip(0) if reverse else times()
    _, expected = events_of("backprop", state, t, case)
    solution, field = events_of(mode, state, t, case)
    assert [(name, t, dt) for name, t, _, dt in field.events] == [(name, t, dt) for name, t, _, dt in expected.events]
    for (_, _, parts, _), (_, _, others, _) in zip(field.events, expected.events, strict=True):
        assert all(map(torch.equal, parts, others))
    assert {name for name, *_ in expected.events} == set(supported(case)), "the case does not call every callback"
    heard = len(field.events)
    loss = loss_of(solution)
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(field.events) == heard


@pytest.mark.parametrize("mode", ["symplectic", "baseline"])
def test_callback_that_the_solver_does_not_know_warns_as_upstream(mode: str) -> None:
    field = Heard()
    with pytest.warns(UserWarning, match="Solver 'rk4' does not support callbacks"):
        solve(mode, field, initial(), times())


@each_mode
def test_callback_that_raises_stops_the_solve(mode: str) -> None:
    class Stopped(Exception):  # noqa: N818
        pass

    def stop(t: Tensor, y: Tensor, dt: Tensor) -> None:
        raise Stopped

    net = Net()
    net.callback_step = stop  # type: ignore[assignment]
    with pytest.raises(Stopped):
        solve(mode, net, initial(), times())


@each_mode
def test_callbacks_of_upstreams_adjoint_are_not_called(mode: str) -> None:
    net, y0 = Net(), initial()
    called: list[object] = []
    for name in NAMES:
        setattr(net, f"{name}_adjoint", lambda *args: called.append(args))
    loss_of(solve(mode, net, y0, times())).backward()
    assert not called
