"""The solution is an ordinary citizen of PyTorch's autograd: graphs, hooks, grad modes, tensors overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    Net,
    arguments_of,
    each_mode,
    error,
    gradients,
    initial,
    loss_of,
    over,
    solve,
    times,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchdiffeq_symplectic import use
from torchdiffeq_symplectic.experiments.memory import live_bytes

EXACT = 1e-11
SOME = [name for name in ("rk4", "dopri5", "adaptive_heun", "torchdyn-rk4") if name in METHODS]
BOTH = ["rk4", "dopri5"]


def leaves_of(net: Net, y0: Tensor, t: Tensor) -> list[Tensor]:
    return [y0, t.requires_grad_(), *net.parameters()]


@over(SOME)
def test_the_second_backward_of_a_retained_graph_is_the_first_and_the_third_pytorchs_error(
    mode: str, method: str
) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    loss = loss_of(solve(mode, net, y0, t, method))
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    second = torch.autograd.grad(loss, wanted)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
@over(SOME)
def test_nothing_is_recorded_without_gradients(mode: str, method: str, switch: Callable[[], Any]) -> None:
    net, y0, t = Net(), initial(), times()
    with switch():
        expected = solve(BACKPROPAGATION, net, y0, t, method)
        found = solve(mode, net, y0, t, method)
        bytes_kept = live_bytes(lambda: solve(mode, net, y0, t, method), "cpu")
    assert found.grad_fn is None
    assert found.is_inference() == expected.is_inference()
    assert torch.equal(found, expected)
    assert bytes_kept == found.nbytes


@each_mode
def test_nothing_is_recorded_where_nothing_needs_a_gradient(mode: str) -> None:
    net, y0, t = Net().requires_grad_(requires_grad=False), initial().detach(), times()
    found = solve(mode, net, y0, t)
    assert found.grad_fn is None
    assert torch.equal(found, solve(BACKPROPAGATION, net, y0, t))
    assert live_bytes(lambda: solve(mode, net, y0, t), "cpu") == found.nbytes


@pytest.mark.parametrize("moment", ["before the solve", "before backward"])
@over(SOME)
def test_hooks_of_leaves_fire_once_with_the_whole_gradient(mode: str, method: str, moment: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients(BACKPROPAGATION, net, y0, t, wanted, method=method)
    seen: dict[int, list[Tensor]] = {number: [] for number in range(len(wanted))}
    accumulated: list[int] = []

    def attach() -> None:
        for number, leaf in enumerate(wanted):
            leaf.register_hook(seen[number].append)
            leaf.register_post_accumulate_grad_hook(lambda _, number=number: accumulated.append(number))

    if moment == "before the solve":
        attach()
    loss = loss_of(solve(mode, net, y0, t, method))
    if moment == "before backward":
        attach()
    loss.backward()
    assert [len(calls) for calls in seen.values()] == [1] * len(wanted)
    assert error([calls[0] for calls in seen.values()], expected) < EXACT
    assert sorted(accumulated) == list(range(len(wanted)))
    loss_of(solve(mode, net, y0, t, method)).backward()
    assert [len(calls) for calls in seen.values()] == [2] * len(wanted), "the hooks did not survive the first backward"


@each_mode
def test_hooks_and_kept_gradients_of_computed_parameters_see_the_whole_gradient(mode: str) -> None:
    base = torch.linspace(-0.7, 0.9, 9, dtype=DOUBLE).reshape(3, 3).requires_grad_()
    results = []
    for way in (BACKPROPAGATION, mode):
        y0, seen = initial(), []  # type: tuple[Tensor, list[Tensor]]
        weight, start = torch.sin(base) @ base, 2 * y0
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


@over(BOTH)
def test_anomaly_mode_changes_nothing(mode: str, method: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients(mode, net, y0, t, wanted, method=method)
    with torch.autograd.set_detect_anomaly(True):
        found = gradients(mode, net, y0, t, wanted, method=method)
    assert all(map(torch.equal, found, expected))


@over(BOTH)
def test_gradients_are_added_to_those_already_there(mode: str, method: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients(BACKPROPAGATION, net, y0, t, wanted, method=method)
    for leaf in wanted:
        leaf.grad = torch.full_like(leaf, 0.5)
    loss_of(solve(mode, net, y0, t, method)).backward()
    assert error([leaf.grad for leaf in wanted], [0.5 + gradient for gradient in expected]) < EXACT


@pytest.mark.parametrize("victim", ["parameter", "y0"])
@over(BOTH)
def test_what_is_overwritten_before_backward_is_pytorchs_error(mode: str, method: str, victim: str) -> None:
    net, y0, t = Net(), initial(), times()
    loss = loss_of(solve(mode, net, y0, t, method))
    with torch.no_grad():
        (net.inner.weight if victim == "parameter" else y0).mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Where every step is an output, the rows of the solution are what backward starts from.
EVERY_STEP = {"rk4": {"options": {"step_size": None}}}


@pytest.mark.parametrize("way", ["multiplied", "last row multiplied", "filled behind autograd's back"])
@pytest.mark.parametrize("tuple_state", [False, True], ids=["tensor", "tuple"])
@pytest.mark.parametrize("every_step", [False, True], ids=["", "every step an output"])
@over(BOTH)
def test_a_solution_changed_in_place_is_never_silently_wrong(
    mode: str, method: str, way: str, tuple_state: bool, every_step: bool
) -> None:
    net, t = Net(), times()

    def field(t: Tensor, y: Any) -> Any:
        return (net(t, y[0]), y[0].sum(0) * y[1]) if tuple_state else net(t, y)

    def run(mode: str) -> list[Tensor]:
        y0 = (initial(), initial(3)) if tuple_state else initial()
        wanted = [*(y0 if isinstance(y0, tuple) else (y0,)), *net.parameters()]
        settings = EVERY_STEP.get(method, {}) if every_step else {}
        solution = solve(mode, field, y0, t, method, adjoint_params=tuple(net.parameters()), **settings)
        changed = solution[0] if tuple_state else solution
        if way == "filled behind autograd's back":
            loss = loss_of(tuple(part * 1.0 for part in solution) if tuple_state else solution * 1.0)
            changed.detach().zero_()
        else:
            (changed[-1] if way == "last row multiplied" else changed).mul_(-1.7)
            loss = loss_of(solution)
        return list(torch.autograd.grad(loss, wanted))

    truth = run(BACKPROPAGATION)
    try:
        found = run(mode)
    except RuntimeError as raised:
        assert method == "rk4", "rows are kept only where they are states"
        assert "modified by an inplace operation" in str(raised)  # noqa: PT017
    else:
        assert error(found, truth) < EXACT


@over(SOME)
def test_checkpoints_are_offloaded_by_save_on_cpu(mode: str, method: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = leaves_of(net, y0, t)
    expected = gradients(BACKPROPAGATION, net, y0, t, wanted, method=method)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(solve(mode, net, y0, t, method))
    assert error(torch.autograd.grad(loss, wanted), expected) < EXACT


@over(SOME)
def test_a_solve_inside_of_pytorchs_checkpoint(mode: str, method: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = [y0, *net.parameters()]
    expected = gradients(BACKPROPAGATION, net, y0, t, wanted, method=method)
    solution: Any = checkpoint(lambda y0: solve(mode, net, y0, t, method), y0, use_reentrant=False)
    assert error(torch.autograd.grad(loss_of(solution), wanted), expected) < EXACT


@over(SOME)
def test_pytorchs_checkpoint_recomputes_outside_of_use_what_was_solved_inside(mode: str, method: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = [y0, *net.parameters()]
    expected = gradients(BACKPROPAGATION, net, y0, t, wanted, method=method)
    own = {"adjoint_options": {}, **arguments_of(mode)}
    with use(own["adjoint_method"], **own["adjoint_options"]):
        solution: Any = checkpoint(lambda y0: solve(BACKPROPAGATION, net, y0, t, method), y0, use_reentrant=False)
    assert error(torch.autograd.grad(loss_of(solution), wanted), expected) < EXACT


@pytest.mark.parametrize("method", BOTH)
def test_hooks_of_times_that_nothing_depends_on_are_not_called(method: str) -> None:
    t = torch.tensor([0.3], dtype=DOUBLE, requires_grad=True)
    t.register_hook(lambda gradient: pytest.fail("called"))
    solve("symplectic", Net(), initial(), t, method).sum().backward()
    assert t.grad is None


@over(BOTH)
def test_two_solves_through_one_module_before_backward(mode: str, method: str) -> None:
    net, y0 = Net(), initial()
    wanted = [y0, *net.parameters()]

    def loss(mode: str) -> Tensor:
        middle = solve(mode, net, y0, times(0.0, 0.5), method)
        return loss_of(solve(mode, net, middle[-1], times(0.5, 0.9, 0.6 + 0.5), method)) + loss_of(middle)

    assert error(torch.autograd.grad(loss(mode), wanted), torch.autograd.grad(loss(BACKPROPAGATION), wanted)) < EXACT


@each_mode
def test_the_gradient_of_chosen_inputs_alone(mode: str) -> None:
    net, y0, t = Net(), initial(), times().requires_grad_()
    expected = gradients(BACKPROPAGATION, net, y0, t, [net.rate])
    loss = loss_of(solve(mode, net, y0, t))
    loss.backward(inputs=[net.rate])
    assert error([net.rate.grad], expected) < EXACT
    assert all(tensor.grad is None for tensor in (y0, t, net.inner.weight))
