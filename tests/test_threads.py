"""Several threads at once: over one module, in backward, and with choices of their own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import (
    BACKPROPAGATION,
    FEW,
    Net,
    error,
    initial,
    loss_of,
    over,
    solve,
    times,
    uniform,
)
from torch import Tensor, nn

import torchdiffeq_symplectic


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs return, all started before any goes on; an error of one is raised."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)
    failures: list[BaseException] = []

    def work(i: int, job: Callable[[], Any]) -> None:
        try:
            barrier.wait(10)
            results[i] = job()
        except BaseException as problem:  # noqa: BLE001 (raised again below)
            failures.append(problem)

    threads = [threading.Thread(target=work, args=(i, job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for failure in failures:
        raise failure
    return results


class Normalised(nn.Module):
    """Has what a replay restores: flags, buffers, random numbers, and an attribute that is set before each solve."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm, self.shift = Net(), nn.BatchNorm1d(3, dtype=torch.float64), torch.zeros(())
        self.norm.requires_grad_(False)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(t, self.norm(y)) + self.shift
        return result


@over(FEW)
def test_two_threads_in_backward_over_one_module(mode: str, method: str) -> None:
    """What one replay puts back on the module must not reach the other."""
    field, states = Normalised(), [initial(4, 3), uniform(4, 3, seed=9).requires_grad_()]
    t = times(0.0, 0.3, 0.6, 1.0)

    def losses(mode: str) -> list[Tensor]:
        found = []
        for i, y0 in enumerate(states):
            field.shift = torch.tensor(0.5 * i, dtype=torch.float64)
            found.append(loss_of(solve(mode, field, y0, t, method)))
        return found

    def gradients(loss: Tensor, y0: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [y0, *field.net.parameters()])

    truths = [gradients(loss, y0) for loss, y0 in zip(losses(BACKPROPAGATION), states, strict=True)]
    for _ in range(3):
        first, second = losses(mode)
        found = in_threads(lambda a=first: gradients(a, states[0]), lambda b=second: gradients(b, states[1]))  # type: ignore[misc]
        assert max(error(one, truth) for one, truth in zip(found, truths, strict=True)) < 1e-11


@over(FEW)
def test_two_threads_that_solve_and_differentiate(mode: str, method: str) -> None:
    field, states = Net(), [initial(), uniform(4, 3, seed=9).requires_grad_()]
    t = times(0.0, 0.3, 0.6, 1.0)

    def run(mode: str, y0: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(solve(mode, field, y0, t, method)), [y0, *field.parameters()])

    # torchdyn's first step is held by a patch, so that the truth is computed in one thread.
    truths = [run(BACKPROPAGATION, y0) for y0 in states]
    found = in_threads(*(lambda y0=y0: run(mode, y0) for y0 in states))
    assert max(error(one, truth) for one, truth in zip(found, truths, strict=True)) < 1e-11


@over(FEW)
def test_backward_in_another_thread_than_the_solve(mode: str, method: str) -> None:
    field, y0, t = Net(), initial(), times(0.0, 0.3, 0.6, 1.0)
    wanted = [y0, *field.parameters()]
    truth = torch.autograd.grad(loss_of(solve(BACKPROPAGATION, field, y0, t, method)), wanted)
    loss = loss_of(solve(mode, field, y0, t, method))
    (found,) = in_threads(lambda: torch.autograd.grad(loss, wanted))
    assert error(found, truth) < 1e-11


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_threads_choose_for_themselves(method: str) -> None:
    """One under `use`, one by backpropagation, at the same time over one field."""
    field, y0, t = Net(), initial(), times()
    wanted = [y0, *field.parameters()]

    def run(mode: str) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss_of(solve(mode, field, y0, t, method)), wanted)

    one, other, truth = in_threads(run("use:symplectic"), run("use:aca"), run(BACKPROPAGATION))
    assert max(error(one, truth), error(other, truth)) < 1e-11


class Dropping(nn.Module):
    """Draws its masks anew at every evaluation, and keeps them, so that the truth can be computed with the same."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = Net(seed=seed)
        self.masks: list[Tensor] = []
        self.given: list[Tensor] | None = None

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        if self.given is not None:
            mask = self.given.pop(0)
        else:
            mask = torch.bernoulli(torch.full_like(y, 0.7)) / 0.7
            self.masks.append(mask)
        result: Tensor = self.net(t, mask * y)
        return result


LOOSE = {"dopri5": {"rtol": 1.0, "atol": 10.0}, "torchdyn-dopri5": {"rtol": 1.0, "atol": 10.0}}


def trains(mode: str, method: str, field: Dropping, found: list[Any]) -> Callable[[], None]:
    """A few solves with backward; what they gave, or the ReplayError, and the masks of the forward pass."""

    def job() -> None:
        for _ in range(3):
            y0 = initial()
            field.masks = []
            loss = loss_of(solve(mode, field, y0, times(0.0, 0.3, 0.6, 1.0), method, **LOOSE.get(method, {})))
            masks = list(field.masks)
            wanted = [y0, *field.parameters()]
            try:
                found.append((masks, torch.autograd.grad(loss, wanted)))
            except torchdiffeq_symplectic.ReplayError as problem:
                found.append((masks, problem))

    return job


def truth_of(method: str, field: Dropping, masks: list[Tensor]) -> tuple[Tensor, ...]:
    y0, field.given = initial(), list(masks)
    loss = loss_of(solve(BACKPROPAGATION, field, y0, times(0.0, 0.3, 0.6, 1.0), method, **LOOSE.get(method, {})))
    return torch.autograd.grad(loss, [y0, *field.parameters()])


@over(FEW)
def test_four_threads_that_train_with_dropout(mode: str, method: str) -> None:
    fields, found = [Dropping(seed) for seed in range(4)], [[] for _ in range(4)]  # type: ignore[var-annotated]
    in_threads(*(trains(mode, method, field, results) for field, results in zip(fields, found, strict=True)))
    for field, results in zip(fields, found, strict=True):
        for masks, gradients in results:
            assert not isinstance(gradients, Exception), str(gradients)
            assert error(gradients, truth_of(method, field, masks)) < 1e-11


@contextlib.contextmanager
def another_that_draws() -> Iterator[list[tuple[float, ...]]]:
    """A thread that draws random numbers meanwhile, and what it drew."""
    stop, drawn = threading.Event(), list[tuple[float, ...]]()

    def draw() -> None:
        while not stop.is_set():
            drawn.append(tuple(torch.rand(4).tolist()))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        yield drawn
    finally:
        stop.set()
        thread.join(60)


@over(FEW)
def test_dropout_beside_a_thread_that_draws_is_never_silently_wrong(mode: str, method: str) -> None:
    field, found = Dropping(0), []  # type: tuple[Dropping, list[Any]]
    with another_that_draws():
        trains(mode, method, field, found)()
    for masks, gradients in found:
        if isinstance(gradients, Exception):
            assert "another thread drew random numbers" in str(gradients)
        else:
            assert error(gradients, truth_of(method, field, masks)) < 1e-11


@over(FEW)
def test_a_thread_that_draws_beside_a_field_that_does_not_sees_no_number_twice(mode: str, method: str) -> None:
    field, y0 = Net(), initial()
    with another_that_draws() as drawn:
        for _ in range(4):
            loss_of(solve(mode, field, y0, times(0.0, 0.3, 0.6, 1.0), method)).backward()
    assert len(drawn) > 100
    assert len(set(drawn)) == len(drawn)


class Switching(nn.Module):
    """Differs in training, and in the parameter's gradient sees a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = Net(), nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(t, self.norm(y)) * (1.0 if self.training else 0.7)
        return result


@over([name for name in FEW if "dopri5" not in name])
def test_flags_buffers_and_hooks_of_a_module_that_two_threads_differentiate(mode: str, method: str) -> None:
    """One solve was done in training and one in evaluation: both replays set the flags of one module."""
    field, states = Switching(), [initial(4, 3), uniform(4, 3, seed=9).requires_grad_()]
    t, fired = times(0.0, 0.3, 0.6, 1.0), []  # type: tuple[Tensor, list[Tensor]]

    def losses(mode: str) -> list[Tensor]:
        for buffer in (field.norm.running_mean, field.norm.running_var):
            assert buffer is not None
            buffer.zero_().add_(0.5)
        found = []
        for training, y0 in zip((True, False), states, strict=True):
            field.train(training)
            found.append(loss_of(solve(mode, field, y0, t, method)))
        return found

    def gradients(loss: Tensor, y0: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [y0, *field.parameters()])

    truths = [gradients(loss, y0) for loss, y0 in zip(losses(BACKPROPAGATION), states, strict=True)]
    field.net.rate.register_hook(fired.append)
    for _ in range(4):
        first, second = losses(mode)
        buffers = [buffer.clone() for buffer in field.buffers()]
        fired.clear()
        found = in_threads(lambda a=first: gradients(a, states[0]), lambda b=second: gradients(b, states[1]))  # type: ignore[misc]
        assert max(error(one, truth) for one, truth in zip(found, truths, strict=True)) < 1e-11
        assert len(fired) == 2
        assert not any(module.training for module in field.modules())
        assert all(map(torch.equal, field.buffers(), buffers))
