"""What a field depends on besides its arguments is in the replay what it was in the solve, and untouched afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from old_harness import Net, each_mode, each_solver, error, gradients, initial, loss_of, solve, times
from torch import Tensor, nn
from torchdiffeq_symplectic.closures import modules_of

EXACT = 1e-11


class Dropping(nn.Module):
    """A network with dropout: another mask at every evaluation."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.net = Net()
        self.dropout = nn.Dropout(rate)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.net(t, self.dropout(y)) + 0.1 * self.dropout(y)
        return result


def seeded(mode: str, field: nn.Module, solver: str, **arguments: Any) -> list[Tensor]:
    y0, t = initial(), times()
    torch.manual_seed(3)
    return gradients(mode, field, y0, t, [y0, *field.parameters()], solver=solver, **arguments)


# Tolerances so wide that steps are accepted in spite of the noise.
NOISY: dict[str, dict[str, Any]] = {
    "rk4": {},
    "dopri5": {"rtol": 1.0, "atol": 0.3},
    "adaptive_heun": {"rtol": 1.0, "atol": 0.3},
    "explicit_adams": {"solver": "rk4", "method": "explicit_adams"},
}


@pytest.mark.parametrize("solver", NOISY)
@each_mode
def test_dropout_has_the_same_masks_in_the_replay(mode: str, solver: str) -> None:
    field, settings = Dropping(), {"solver": solver, **NOISY[solver]}
    assert error(seeded(mode, field, **settings), seeded("backprop", field, **settings)) < EXACT


@each_mode
def test_dropout_with_rejected_steps(mode: str) -> None:
    field = Dropping()
    settings: dict[str, Any] = {"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3, "options": {"first_step": 0.9}}
    rejected: list[float] = []
    field.callback_reject_step = lambda t, y, dt: rejected.append(float(dt))  # type: ignore[assignment]
    expected = seeded("backprop", field, **settings)
    assert rejected, "the case has no rejected step"
    assert error(seeded(mode, field, **settings), expected) < EXACT


@each_mode
def test_a_field_that_draws_only_late_in_the_solve(mode: str) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            result: Tensor = self.net(t, y)
            return result * torch.rand_like(result) if t > 0.5 else result

    field = Late()
    y0, t = initial(), times()

    def run(mode: str) -> list[Tensor]:
        torch.manual_seed(3)
        return gradients(mode, field, y0, t, [y0, *field.parameters()])

    assert error(run(mode), run("backprop")) < EXACT


@each_solver
@each_mode
def test_random_state_runs_on_as_in_upstream(mode: str, solver: str) -> None:
    field, y0, t = Dropping(), initial(), times()
    torch.manual_seed(3)
    solution = solve("backprop", field, y0, t, solver, **NOISY[solver])
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(solve(mode, field, y0, t, solver, **NOISY[solver]), solution)
    assert torch.equal(torch.get_rng_state(), expected)


@each_solver
@each_mode
def test_backward_leaves_the_random_state_alone(mode: str, solver: str) -> None:
    field, y0, t = Dropping(), initial(), times()
    loss = loss_of(solve(mode, field, y0, t, solver, **NOISY[solver]))
    torch.rand(5)
    before = torch.get_rng_state()
    loss.backward(retain_graph=True)
    assert torch.equal(torch.get_rng_state(), before)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("train_at_solve", [True, False], ids=["solved in train", "solved in eval"])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_flags_flipped_before_backward(mode: str, solver: str, train_at_solve: bool) -> None:
    field, y0, t = Dropping(), initial(), times()
    field.train(train_at_solve)
    expected = seeded("backprop", field, solver, **NOISY[solver])
    torch.manual_seed(3)
    loss = loss_of(solve(mode, field, y0, t, solver, **NOISY[solver]))
    field.train(not train_at_solve)
    field.net.training = train_at_solve
    flags = [module.training for module in field.modules()]
    found = torch.autograd.grad(loss, [y0, *field.parameters()])
    assert error(found, expected) < EXACT
    assert [module.training for module in field.modules()] == flags


class Normalised(nn.Module):
    """Batch statistics in the field, and a buffer that counts evaluations."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([0.5, 1.5, -0.7]))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.net(t, self.norm(y))
        return result


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@each_solver
@each_mode
def test_batch_norm_moves_its_statistics_once(mode: str, solver: str) -> None:
    y0, t = initial(6, 3), times()
    results = []
    for way in ("backprop", mode):
        field = Normalised()
        identities = {name: id(buffer) for name, buffer in field.named_buffers()}
        loss = loss_of(solve(way, field, y0, t, solver))
        solved = buffers_of(field)
        found = torch.autograd.grad(loss, [y0, *field.parameters()], retain_graph=True)
        again = torch.autograd.grad(loss, [y0, *field.parameters()])
        assert error(again, found) < EXACT
        assert all(torch.equal(solved[name], buffer) for name, buffer in field.named_buffers())
        assert {name: id(buffer) for name, buffer in field.named_buffers()} == identities
        results.append((solved, found))
    (expected, gradient), (solved, found) = results
    assert int(solved["calls"]) > 0
    assert all(torch.equal(solved[name], expected[name]) for name in expected)
    assert error(found, gradient) < EXACT


@each_mode
def test_batch_norm_in_evaluation(mode: str) -> None:
    y0, t, field = initial(6, 3), times(), Normalised()
    solve("backprop", field, y0, t)
    field.eval()
    wanted = [y0, *field.parameters()]
    expected = gradients("backprop", field, y0, t, wanted)
    loss = loss_of(solve(mode, field, y0, t))
    field.train()
    assert error(torch.autograd.grad(loss, wanted), expected) < EXACT
    assert field.training
    assert field.norm.training


@each_mode
def test_buffers_moved_by_hand_between_solve_and_backward_stay_as_they_are(mode: str) -> None:
    y0, t, field = initial(6, 3), times(), Normalised()
    loss = loss_of(solve(mode, field, y0, t))
    field.calls.fill_(1000)
    field.calls = torch.tensor(77)
    loss.backward()
    assert int(field.calls) == 77


@each_mode
def test_buffers_replaced_by_the_field(mode: str) -> None:
    class Replacing(Normalised):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            self.calls = self.calls + 1
            result: Tensor = self.net(t, y)
            return result

    y0, t, field = initial(), times(), Replacing()
    wanted = [y0, *field.net.parameters()]
    expected = gradients("backprop", field, y0, t, wanted)
    before = int(field.calls)
    loss = loss_of(solve(mode, field, y0, t))
    assert int(field.calls) == 2 * before
    assert error(torch.autograd.grad(loss, wanted), expected) < EXACT
    assert int(field.calls) == 2 * before


class Budget(Exception):  # noqa: N818
    """The field has been evaluated too often."""


class Budgeted(Dropping):
    """Raises at its evaluation number ``allowed``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.allowed = 10**9

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.allowed -= 1
        if self.allowed < 0:
            raise Budget
        return super().forward(t, self.norm(y))


@each_solver
@each_mode
def test_a_field_that_raises_in_the_solve_leaves_nothing_behind(mode: str, solver: str) -> None:
    field, y0, t = Budgeted(), initial(), times()
    field.allowed = 2
    with pytest.raises(Budget):
        solve(mode, field, y0, t, solver, **NOISY[solver])
    field.allowed = 10**9
    assert (
        error(seeded(mode, field, solver, **NOISY[solver]), seeded("backprop", field, solver, **NOISY[solver])) < EXACT
    )


@pytest.mark.parametrize("after", [0, 1, 2])
@each_solver
@each_mode
def test_a_field_that_raises_in_backward_leaves_nothing_behind(mode: str, solver: str, after: int) -> None:
    field, y0, t = Budgeted(), initial(), times()
    hooks: list[Tensor] = []
    field.net.rate.register_hook(hooks.append)
    torch.manual_seed(3)
    loss = loss_of(solve(mode, field, y0, t, solver, **NOISY[solver]))
    field.eval()
    flags = [module.training for module in field.modules()]
    state, buffers = torch.get_rng_state(), buffers_of(field)
    field.allowed = after
    with pytest.raises(Budget):
        loss.backward(retain_graph=True)
    assert not hooks
    assert all(leaf.grad is None for leaf in (y0, *field.parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in field.named_buffers())
    assert [module.training for module in field.modules()] == flags
    field.allowed = 10**9
    loss.backward()
    assert len(hooks) == 1, "the hooks were not put back"
    field.train()
    field.norm.reset_running_stats()
    expected = seeded("backprop", field, solver, **NOISY[solver])
    assert error([leaf.grad for leaf in (y0, *field.parameters())], expected) < EXACT


FIELDS: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: net,
    "bound method": lambda net: net.forward,
    "partial": lambda net: functools.partial(net),
}


@pytest.mark.parametrize("kind", FIELDS)
def test_modules_are_found_behind_any_callable(kind: str) -> None:
    net = Net()
    assert modules_of(FIELDS[kind](net)) == list(net.modules())


@pytest.mark.parametrize("gradients", [True, False], ids=["recorded", "no_grad"])
def test_a_field_that_marks_its_state_leaves_the_callers_unmarked(gradients: bool) -> None:
    net, y0 = Net(), initial().detach()

    def func(t: Tensor, y: Tensor) -> Tensor:
        y.requires_grad_(True)  # as FFJORD's field does, to differentiate with respect to it
        return net(t, y)  # type: ignore[no-any-return]

    parameters = tuple(net.parameters())
    with torch.set_grad_enabled(gradients):
        torchdiffeq.odeint_adjoint(
            func, y0, times().detach(), method="rk4", adjoint_method="symplectic", adjoint_params=parameters
        )
    assert not y0.requires_grad
