"""Benchmark: what a block of a residual network costs as a step of Euler, at 1,000 blocks against 50.

Not part of the default run. Its command, which prints the ratios (they are in ``extra_info``, too):

    OMP_NUM_THREADS=1 pytest compat/test_benchmark_resnet.py --benchmark-only -rP

Blocks are untied. Each contender's turn is 1,000 blocks, forwards and backwards: one network, or 20 shallow ones. The
network itself, backpropagated through, is there for comparison: what its ratio is above 1 is the machine's memory.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic import MODES, odeint_adjoint
from torchdiffeq_symplectic.resnet import ResidualField

SHALLOW, DEEP = 50, 1000
ROUNDS = 7
CASES = [
    *[("dense", mode, "euler") for mode in ("network", *MODES)],
    *[("dense", mode, "heun2") for mode in ("symplectic", "aca")],
    *[("convolutional", mode, "euler") for mode in ("network", "symplectic", "aca")],
]
Run = Callable[[], object]


class Dense(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = 0.01 * self.outer(torch.tanh(self.inner(x)))
        return x + value


class Convolutional(nn.Module):
    """A pre-activation block with batch norm."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = 0.01 * self.layers(x)
        return x + value


BLOCKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "dense": (Dense, (16, 16)),
    "convolutional": (Convolutional, (8, 8, 8, 8)),
}


def train(field: ResidualField, x: Tensor, mode: str, method: str) -> None:
    """Forward and backward pass; ``mode`` "network" is the network itself."""
    if mode == "network":
        y = x
        for block in field:
            y = block(y)
    else:
        y = odeint_adjoint(field, x, field.grid(method), method=method, adjoint_method=mode)[-1]
    torch.autograd.grad(y.square().sum(), [x, *field.parameters()])


def seconds(run: Run, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def ratio_in_turn(runs: Mapping[int, Run]) -> tuple[dict[int, float], float]:
    """Seconds a block, and the median over the rounds of the deep one's over the shallow one's in the same round.

    Which of them comes first changes from round to round.
    """
    found: dict[int, list[float]] = {count: [] for count in runs}
    for run in runs.values():
        run()  # to warm up
    gc.collect()
    gc.disable()
    try:
        for number in range(ROUNDS):
            for count in sorted(runs, reverse=bool(number % 2)):
                found[count].append(seconds(runs[count], DEEP // count) / count)
            gc.collect()
    finally:
        gc.enable()
    ratios = [deep / shallow for deep, shallow in zip(found[DEEP], found[SHALLOW], strict=True)]
    return {count: statistics.median(times) for count, times in found.items()}, statistics.median(ratios)


@pytest.mark.parametrize(("kind", "mode", "method"), CASES)
def test_time_a_block_does_not_grow_with_depth(benchmark: Any, kind: str, mode: str, method: str) -> None:
    if method not in SOLVERS:
        pytest.skip(f"this torchdiffeq has no {method}")
    block, shape = BLOCKS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    runs: dict[int, Run] = {
        count: partial(train, ResidualField(block() for _ in range(count)), x, mode, method)
        for count in (SHALLOW, DEEP)
    }
    benchmark.group = f"residual network, {kind}, {method}"
    times, ratio = benchmark.pedantic(ratio_in_turn, args=(runs,), rounds=1)
    name = f"{mode}: a block of {DEEP} / a block of {SHALLOW}"
    benchmark.extra_info[name] = round(ratio, 3)
    micro = " and ".join(f"{1e6 * times[count]:.0f} us of {count}" for count in (DEEP, SHALLOW))
    print(f"{benchmark.group}: {name} = {ratio:.3f} ({micro})")
