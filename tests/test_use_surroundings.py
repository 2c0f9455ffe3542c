"""Under `use` a field finds what it finds in ``odeint``: random numbers, precision, buffers, and what it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Mixing, relative_error, uniform
from torch import Tensor, nn
from torchdiffeq import odeint
from torchdiffeq_symplectic.closures import held_by

from torchdiffeq_symplectic import use

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
each_mode = pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])


def both(
    mode: str, func: Callable[..., Any], wanted: list[Tensor], *, y0: Tensor, t: Tensor = T, **solver: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Solution and gradients by backpropagation, and under ``mode``, from the same random state."""
    results = []
    for switch in (use(None), use(mode)):
        torch.manual_seed(4)
        with switch:
            solution = odeint(func, y0, t, **solver)
        loss = (solution * torch.arange(1, solution.shape[-1] + 1)).abs().square().sum()
        results.append([solution, *torch.autograd.grad(loss, wanted)])
    truth, found = results
    assert torch.equal(found[0], truth[0])
    return truth[1:], found[1:]


@each_mode
def test_dropout_has_the_same_masks(mode: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 4)).double()
    y0 = uniform(3, 4, seed=1).requires_grad_()
    wanted = [y0, *net.parameters()]
    for truth, found in zip(*both(mode, lambda t, y: net(y), wanted, y0=y0, method="rk4"), strict=True):
        assert relative_error(found, truth) < 1e-11


@each_mode
def test_batch_norm_that_a_closure_holds_moves_once(mode: str) -> None:
    norm = nn.BatchNorm1d(4).double()

    def inner(y: Tensor) -> Tensor:
        normed: Tensor = norm(y)
        return normed

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(inner(y))

    y0 = uniform(6, 4, seed=1).requires_grad_()
    with use(mode):
        solution = odeint(func, y0, T, method="euler")
    moved = int(norm.num_batches_tracked)  # type: ignore[arg-type]
    assert moved == 2
    solution.sum().backward()
    assert int(norm.num_batches_tracked) == moved  # type: ignore[arg-type]


@each_mode
def test_autocast_is_that_of_the_forward_pass(mode: str) -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    y0 = uniform(3, 4, seed=1, dtype=torch.float32).requires_grad_()
    wanted = [y0, *net.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = both(mode, lambda t, y: net(y), wanted, y0=y0, t=T.float(), method="rk4")
    for truth, found in zip(*pairs, strict=True):
        assert relative_error(found, truth) < 2e-2  # of half precision


@each_mode
def test_complex_states(mode: str) -> None:
    net = Mixing(3, dtype=torch.complex128)
    y0 = uniform(3, seed=1, dtype=torch.complex128).requires_grad_()
    try:
        odeint(net, y0, T, method="rk4")
    except (RuntimeError, TypeError):
        pytest.skip("this torchdiffeq refuses complex states")
    wanted = [y0, *net.parameters()]
    for truth, found in zip(*both(mode, lambda t, y: net(t, y), wanted, y0=y0, method="rk4"), strict=True):
        assert relative_error(found, truth) < 1e-11


def test_the_search_for_what_is_held_survives_odd_objects() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.net = Mixing(2)
            self.me = self

        def slope(self, t: Tensor, y: Tensor) -> Tensor:
            result: Tensor = self.net(t, y)
            return result

    trainer, gone = Trainer(), Trainer()
    trainer.proxies = [weakref.proxy(gone), weakref.proxy(trainer)]  # type: ignore[attr-defined]
    trainer.data = [{"numbers": list(range(100_000))}, "text", torch.nn, Trainer]  # type: ignore[attr-defined]
    del gone
    modules, tensors = held_by(trainer.slope)
    assert modules == [trainer.net]
    assert {id(tensor) for tensor in tensors} == {id(parameter) for parameter in trainer.net.parameters()}
