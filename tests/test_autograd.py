"""The solution is an ordinary citizen of PyTorch's autograd: graphs, hooks, grad modes, double backward."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from old_harness import SOLVERS, Net, each_mode, each_solver, error, gradients, initial, loss_of, solve, times
from torch import Tensor

from torchdiffeq_symplectic.experiments.memory import live_bytes

EXACT = 1e-11
BOTH = pytest.mark.parametrize("solver", ["rk4", "dopri5"])


def leaves_of(net: Net, y0: Tensor, t: Tensor) -> list[Tensor]:
    return [y0, t.requires_grad_(), *net.parameters()]


@each_solver
@each_mode
def test_second_backward_of_a_retained_graph_is_the_first(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    loss = loss_of(solve(mode, net, y0, t, solver))
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted)


@each_mode
def test_second_backward_without_retained_graph_is_pytorchs_error(mode: str) -> None:
    loss = loss_of(solve(mode, Net(), initial(), times()))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
@each_solver
@each_mode
def test_nothing_is_recorded_without_gradients(mode: str, solver: str, switch: Callable[[], Any]) -> None:
    net, y0, t = Net(), initial(), times()
    with switch():
        expected = solve("backprop", net, y0, t, solver)
        found = solve(mode, net, y0, t, solver)
        bytes_kept = live_bytes(lambda: solve(mode, net, y0, t, solver), "cpu")
    assert found.grad_fn is None
    assert not found.requires_grad
    assert found.is_inference() == expected.is_inference()
    assert torch.equal(found, expected)
    assert bytes_kept == found.nbytes


@each_mode
def test_nothing_is_recorded_where_nothing_needs_a_gradient(mode: str) -> None:
    net, y0, t = Net().requires_grad_(requires_grad=False), initial().detach(), times()
    found = solve(mode, net, y0, t)
    assert found.grad_fn is None
    assert torch.equal(found, solve("backprop", net, y0, t))
    assert live_bytes(lambda: solve(mode, net, y0, t), "cpu") == found.nbytes


@pytest.mark.parametrize("moment", ["before the solve", "before backward"])
@each_solver
@each_mode
def test_hooks_of_leaves_fire_once_with_the_whole_gradient(mode: str, solver: str, moment: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients("backprop", net, y0, t, wanted, solver=solver)
    seen: dict[int, list[Tensor]] = {number: [] for number in range(len(wanted))}
    accumulated: list[int] = []

    def attach() -> None:
        for number, leaf in enumerate(wanted):
            leaf.register_hook(seen[number].append)
            leaf.register_post_accumulate_grad_hook(lambda _, number=number: accumulated.append(number))

    if moment == "before the solve":
        attach()
    loss = loss_of(solve(mode, net, y0, t, solver))
    if moment == "before backward":
        attach()
    loss.backward()
    assert [len(calls) for calls in seen.values()] == [1] * len(wanted)
    assert error([calls[0] for calls in seen.values()], expected) < EXACT
    assert sorted(accumulated) == list(range(len(wanted)))
    loss_of(solve(mode, net, y0, t, solver)).backward()
    assert [len(calls) for calls in seen.values()] == [2] * len(wanted), "the hooks did not survive the first backward"


@each_mode
def test_hook_that_doubles_a_gradient_doubles_it_once(mode: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients("backprop", net, y0, t, wanted)
    for leaf in wanted:
        leaf.register_hook(lambda gradient: 2 * gradient)
    loss_of(solve(mode, net, y0, t)).backward()
    assert error([leaf.grad for leaf in wanted], [2 * gradient for gradient in expected]) < EXACT


@each_mode
def test_hook_of_the_solution_sees_its_cotangent_and_may_change_it(mode: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients("backprop", net, y0, t, wanted)
    solution = solve(mode, net, y0, t)
    seen: list[Tensor] = []

    def double(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return 2 * gradient

    solution.register_hook(double)
    loss = loss_of(solution)
    (cotangent,) = torch.autograd.grad(loss_of(free := solution.detach().requires_grad_()), free)
    loss.backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], cotangent)
    assert error([leaf.grad for leaf in wanted], [2 * gradient for gradient in expected]) < EXACT


@each_mode
def test_hooks_and_kept_gradients_of_derived_parameters_see_the_whole_gradient(mode: str) -> None:
    base = torch.linspace(-0.7, 0.9, 9, dtype=torch.float64).reshape(3, 3).requires_grad_()
    results = []
    for way in ("backprop", mode):
        y0, seen = initial(), []  # type: tuple[Tensor, list[Tensor]]
        weight = torch.sin(base) @ base
        start = 2 * y0
        for tensor in (weight, start):
            tensor.retain_grad()
            tensor.register_hook(seen.append)

        def field(t: Tensor, y: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.tanh(y @ weight) * (1 + t)

        base.grad = None
        loss_of(solve(way, field, start, times(), adjoint_params=(weight,))).backward()
        assert len(seen) == 2
        results.append([base.grad, y0.grad, weight.grad, start.grad])
    assert error(results[1], results[0]) < EXACT


@BOTH
@each_mode
def test_anomaly_mode_changes_nothing(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients(mode, net, y0, t, wanted, solver=solver)
    with torch.autograd.set_detect_anomaly(True):
        found = gradients(mode, net, y0, t, wanted, solver=solver)
    assert all(map(torch.equal, found, expected))


@BOTH
@each_mode
def test_gradients_are_added_to_those_already_there(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients("backprop", net, y0, t, wanted, solver=solver)
    for leaf in wanted:
        leaf.grad = torch.full_like(leaf, 0.5)
    loss_of(solve(mode, net, y0, t, solver)).backward()
    assert error([leaf.grad for leaf in wanted], [0.5 + gradient for gradient in expected]) < EXACT


@pytest.mark.parametrize("victim", ["parameter", "y0"])
@BOTH
@each_mode
def test_what_is_overwritten_before_backward_is_pytorchs_error(mode: str, solver: str, victim: str) -> None:
    net, y0, t = Net(), initial(), times()
    loss = loss_of(solve(mode, net, y0, t, solver))
    with torch.no_grad():
        (net.inner.weight if victim == "parameter" else y0).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@BOTH
@each_mode
def test_overwritten_times_are_an_error_or_without_effect(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = [y0, *net.parameters()]
    expected = gradients("backprop", net, y0, t, wanted, solver=solver)
    loss = loss_of(solve(mode, net, y0, t, solver))
    t.mul_(1.5)
    try:
        found = torch.autograd.grad(loss, wanted)
    except RuntimeError as raised:
        assert "modified by an inplace operation" in str(raised)  # noqa: PT017
    else:
        assert error(found, expected) < EXACT


@pytest.mark.parametrize("tuple_state", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("last", [False, True], ids=["every output", "last output"])
@BOTH
@each_mode
def test_solution_changed_in_place_is_never_silently_wrong(
    mode: str, solver: str, last: bool, tuple_state: bool
) -> None:
    net, t = Net(), times()

    def field(t: Tensor, y: Any) -> Any:
        return (net(t, y[0]), y[0].sum(0) * y[1]) if tuple_state else net(t, y)

    def run(mode: str) -> list[Tensor]:
        y0 = (initial(), initial(3)) if tuple_state else initial()
        wanted = [*(y0 if isinstance(y0, tuple) else (y0,)), *net.parameters()]
        solution = solve(mode, field, y0, t, solver, adjoint_params=tuple(net.parameters()))
        changed = solution[0] if tuple_state else solution
        (changed[-1] if last else changed).mul_(-1.7)
        return list(torch.autograd.grad(loss_of(solution), wanted))

    try:
        found = run(mode)
    except RuntimeError as raised:  # where the solution's rows are the checkpoints
        assert "modified by an inplace operation" in str(raised)  # noqa: PT017
        return
    assert error(found, run("backprop")) < EXACT


@each_solver
@each_mode
def test_values_overwritten_behind_autograds_back_are_never_silently_wrong(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = [y0, *net.parameters()]
    expected = gradients("backprop", net, y0, t, wanted, solver=solver)
    solution = solve(mode, net, y0, t, solver)
    loss = loss_of(solution * 1.0)
    solution.detach().zero_()
    try:
        found = torch.autograd.grad(loss, wanted)
    except RuntimeError as raised:  # where the solution's rows are the checkpoints
        assert "modified by an inplace operation" in str(raised)  # noqa: PT017
        return
    assert error(found, expected) < EXACT


STATES_KEPT: dict[str, Callable[[int], int]] = {
    # The solution's rows are the states, and its first row is that of the initial state once more.
    "symplectic": lambda steps: steps + 2,
    "stages": lambda steps: steps + 2 + 4 * steps,
    "aca": lambda steps: steps + 2,
    "baseline": lambda steps: 1,
}


@each_mode
def test_hooks_on_saved_tensors_see_the_checkpoints(mode: str) -> None:
    net, y0, t = Net(), initial(), torch.linspace(0, 1, 9, dtype=torch.float64)
    wanted = [y0, *net.parameters()]
    expected = gradients("backprop", net, y0, t, wanted, options={})
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    def unpack(number: int) -> Tensor:
        unpacked.append(number)
        return packed[number].clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        solution = solve(mode, net, y0, t, options={})
    states = {tensor.data_ptr(): tensor.numel() for tensor in packed if tensor.shape[-2:] == y0.shape}
    assert sum(states.values()) == STATES_KEPT[mode](len(t) - 1) * y0.numel()
    assert not any(
        tensor.requires_grad
        for tensor in packed
        if tensor.data_ptr() in states.keys() - {y0.data_ptr(), solution.data_ptr()}
    )
    assert {parameter.data_ptr() for parameter in net.parameters()} <= {tensor.data_ptr() for tensor in packed}
    found = torch.autograd.grad(loss_of(solution), wanted)
    assert sorted(unpacked) == list(range(len(packed)))
    assert error(found, expected) < EXACT


@each_solver
@each_mode
def test_checkpoints_are_offloaded_by_save_on_cpu(mode: str, solver: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients("backprop", net, y0, t, wanted, solver=solver)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(solve(mode, net, y0, t, solver))
    assert error(torch.autograd.grad(loss, wanted), expected) < EXACT


@BOTH
@each_mode
def test_two_solves_through_one_module_before_backward(mode: str, solver: str) -> None:
    net, y0 = Net(), initial()
    wanted = [y0, *net.parameters()]

    def loss(mode: str) -> Tensor:
        middle = solve(mode, net, y0, times(0.0, 0.5), solver)
        return loss_of(solve(mode, net, middle[-1], times(0.5, 0.9, 0.6 + 0.5), solver)) + loss_of(middle)

    assert error(torch.autograd.grad(loss(mode), wanted), torch.autograd.grad(loss("backprop"), wanted)) < EXACT


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "twice": lambda solution: loss_of(solution) * loss_of(solution.sin()),
    "first output": lambda solution: loss_of(solution[0]),
    "two outputs": lambda solution: loss_of(solution[1:3]),
    "last output": lambda solution: loss_of(solution[-1]),
    "one entry": lambda solution: solution[2, 1, 0],
    "expanded": lambda solution: solution.sum() * 1.5,
}


@pytest.mark.parametrize("use", LOSSES)
@each_solver
@each_mode
def test_any_use_of_the_solution(mode: str, solver: str, use: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)

    def run(mode: str) -> list[Tensor]:
        found = torch.autograd.grad(LOSSES[use](solve(mode, net, y0, t, solver)), wanted, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]

    assert error(run(mode), run("backprop")) < EXACT


@each_mode
def test_backward_in_another_thread(mode: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = [y0, *net.parameters()]
    expected = gradients("backprop", net, y0, t, wanted)
    loss = loss_of(solve(mode, net, y0, t))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert error([leaf.grad for leaf in wanted], expected) < EXACT


@each_mode
def test_gradient_of_chosen_inputs_alone(mode: str) -> None:
    net, y0, t = Net(), initial(), times().requires_grad_()
    expected = gradients("backprop", net, y0, t, [net.rate])
    loss = loss_of(solve(mode, net, y0, t))
    loss.backward(inputs=[net.rate])
    assert error([net.rate.grad], expected) < EXACT
    assert y0.grad is None
    assert t.grad is None
    assert net.inner.weight.grad is None


class Owner:
    """Its method is a field, as in models that keep the network as an attribute."""

    def __init__(self) -> None:
        self.net = Net()

    def drift(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.net(t, y) * 1.1
        return result


def scaled(net: Net, t: Tensor, y: Tensor, factor: float) -> Tensor:
    result: Tensor = factor * net(t, y)
    return result


@pytest.mark.parametrize("kind", ["partial", "bound method", "lambda"])
@BOTH
@each_mode
def test_fields_that_are_no_modules(mode: str, solver: str, kind: str) -> None:
    owner, y0, t = Owner(), initial(), times()
    fields: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "partial": functools.partial(scaled, owner.net, factor=1.1),
        "bound method": owner.drift,
        "lambda": lambda t, y: 1.1 * owner.net(t, y),
    }
    wanted = [y0, *owner.net.parameters()]
    params = {"adjoint_params": tuple(owner.net.parameters()), "solver": solver}
    found = gradients(mode, fields[kind], y0, t, wanted, **params)
    assert error(found, gradients("backprop", fields[kind], y0, t, wanted, **params)) < EXACT


def test_unpatched_and_patched_entry_points_are_one() -> None:
    net, y0, t = Net(), initial(), times()
    wanted = [y0, *net.parameters()]
    own = gradients("symplectic", net, y0, t, wanted)
    patched = torchdiffeq.odeint_adjoint(net, y0, t, **SOLVERS["rk4"], adjoint_method="symplectic")
    assert all(map(torch.equal, torch.autograd.grad(loss_of(patched), wanted), own))
