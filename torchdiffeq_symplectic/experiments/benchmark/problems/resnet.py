"""``resnet``: a residual network of tanh blocks that are smooth in depth, as the Euler scheme of its ODE."""

from __future__ import annotations

from functools import partial

import torch

from torchdiffeq_symplectic.experiments.benchmark.problem import Axis, Case, Problem, Series
from torchdiffeq_symplectic.experiments.benchmark.problems.network import mean_square
from torchdiffeq_symplectic.experiments.blocks import tanh_blocks
from torchdiffeq_symplectic.resnet import ResidualField

__all__ = ["RESNET"]

WIDTH, BATCH = 32, 256
# At each evaluation it works on the gradients of all blocks, and the record of its allocations fills the memory.
QUADRATIC_UP_TO = 256
QUADRATIC = {"adjoint": "takes time quadratic in the number of blocks"}


def _build(depth: int, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    field = ResidualField(tanh_blocks(depth, WIDTH, generator), residual=True).float()
    y0 = torch.randn(BATCH, WIDTH, generator=generator)
    t = torch.tensor([0.0, 1.0])
    return Problem(field, y0, t, mean_square, "euler", options={"step_size": field.step_size})


RESNET = Series(
    "resnet",
    "What do more blocks of a residual network cost?",
    tuple(
        Case(f"{depth} blocks", partial(_build, depth), depth, without=QUADRATIC if depth > QUADRATIC_UP_TO else {})
        for depth in (16, 64, 256, 1024)
    ),
    Axis("depth N [blocks]"),
    shows=("gradient_error", "peak_bytes", "relative_time"),
)
