"""Which block stands at which depth: on every grid a host makes, for every number of blocks, dtype and direction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchdiffeq
from residual_blocks import DOUBLE, needs_heun, telling
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic.resnet import ResidualField
from torchdiffeq_symplectic.resnet.interpolation import Place, place_of, step_size

SINGLE = torch.float32
LARGEST = 10_000
# With a Python float 1/N torchdiffeq makes a step too many for 49, 98, 103 (float64) and 61, 109 (float32).
SELECTED = (2, 3, 7, 49, 61, 98, 103, 109)
each_dtype = pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])


def host_grid(count: int, dtype: torch.dtype, start: float = 0.0, end: float = 1.0) -> Tensor:
    """torchdiffeq's own grid from `step_size`, in the direction of increasing times."""
    solver = SOLVERS["euler"](None, torch.zeros((), dtype=dtype), rtol=0.0, atol=0.0, step_size=step_size(count))
    grid: Tensor = solver.grid_constructor(None, solver.y0, torch.tensor([start, end], dtype=dtype))
    return grid


def neighbours(times: Tensor) -> Iterator[Tensor]:
    """What a host may make of its times: themselves, and the floats next to them (``perturb``)."""
    yield times
    for way in (math.inf, -math.inf):
        yield torch.nextafter(times, torch.full_like(times, way))


def grids_of(count: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """All that hosts make of ``n/N``, ``n = 0 ... N``."""
    exact = torch.arange(count + 1, dtype=DOUBLE) / count
    forwards = exact.to(dtype)
    backwards = -host_grid(count, dtype, -1.0, 0.0).flip(0)
    there_and_back = forwards[:1] + (forwards - forwards[:1])  # torchdyn: t + (t1 - t)
    for grid in (forwards, host_grid(count, dtype), backwards, there_and_back):
        for times in neighbours(grid):
            yield times
            if dtype == SINGLE:
                yield from neighbours(times.double())


def check_places(count: int, dtype: torch.dtype) -> None:
    """Each grid's worst depths, and its ends, belong to their blocks; ``between`` would be seen there first."""
    numbers = torch.arange(count + 1, dtype=DOUBLE)
    for times in grids_of(count, dtype):
        assert len(times) == count + 1
        away = times.double() * count - numbers
        for n in {0, 1, count - 1, count, int(away.argmax()), int(away.argmin())}:
            assert place_of(float(times[n]), count, times.dtype) == Place(min(n, count - 1), between=False), (count, n)


@each_dtype
def test_the_host_makes_one_step_a_block_for_every_number_of_blocks(dtype: torch.dtype) -> None:
    times = torch.tensor([0.0, 1.0], dtype=dtype)
    for count in range(2, LARGEST + 1):
        # The grid's length is this; checked against the grid itself below and in the solves.
        assert math.ceil(float((times[1] - times[0]) / step_size(count) + 1)) == count + 1


@each_dtype
def test_depths_belong_to_their_blocks(dtype: torch.dtype) -> None:
    for count in (*range(2, 200), 999, 1000, 1001, 4096, 9973, LARGEST):
        check_places(count, dtype)


def expected_blocks(count: int, direction: str) -> list[int]:
    """The block of each Euler step: at the step's start, where the last block reaches to 1."""
    return list(range(count)) if direction == "forwards" else [min(n, count - 1) for n in range(count, 0, -1)]


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("direction", ["forwards", "backwards"])
@pytest.mark.parametrize("times", [SINGLE, DOUBLE], ids=["times 32", "times 64"])
@pytest.mark.parametrize("states", [SINGLE, DOUBLE], ids=["state 32", "state 64"])
def test_torchdiffeq_calls_one_block_a_step(
    states: torch.dtype, times: torch.dtype, direction: str, perturb: bool
) -> None:
    for count in SELECTED:
        blocks, seen = telling(count)
        field, x = ResidualField(blocks), torch.zeros((), dtype=states)
        grid, ends = field.grid(dtype=times), torch.tensor([0.0, 1.0], dtype=times)
        if direction == "backwards":
            grid, ends = grid.flip(0), ends.flip(0)
        options: dict[str, Any] = {"perturb": perturb}
        torchdiffeq.odeint(field, x, grid, method="euler", options=options)
        torchdiffeq.odeint(field, x, ends, method="euler", options={**options, "step_size": field.step_size})
        assert seen == 2 * expected_blocks(count, direction)


@needs_heun
@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_heun_uses_each_block_and_the_next(dtype: torch.dtype, perturb: bool) -> None:
    for count in SELECTED:
        blocks, seen = telling(count)
        field, x = ResidualField(blocks), torch.zeros((), dtype=dtype)
        torchdiffeq.odeint(field, x, field.grid("heun2", dtype), method="heun2", options={"perturb": perturb})
        assert seen == list(itertools.chain.from_iterable(itertools.pairwise(range(count))))
