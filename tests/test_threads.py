"""Several threads at once: over one module, in backward, and with choices of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
