"""Problems of one network: ``steps``, ``order``, ``outputs``, ``small``, ``precision``, ``resnet`` and ``stall``.

``precision``: Matsubara et al. claim that the symplectic adjoint method is the most robust to rounding (section 4.3).

``stall``: neuralpde (https://pypi.org/project/neuralpde/) solves a convolutional network of 64 channels in float32 with
all of torchdiffeq's defaults: rtol=1e-7 and atol=1e-9 are below the rounding of float32. The forward pass manages; the
backward pass of the upstream adjoint, whose error includes that of all parameters' gradients, takes ever smaller steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Problem, Series, State, as_tuple
from torchdiffeq_symplectic.experiments.blocks import tanh_blocks
from torchdiffeq_symplectic.resnet import ResidualField

__all__ = [
    "ORDER",
    "OUTPUTS",
    "PRECISION",
    "RESNET",
    "SMALL",
    "STALL",
    "STEPS",
    "NetworkField",
    "mean_square",
    "network",
    "seeded",
    "steps_of_size",
]

LARGE = (64, 256, 256, 64)
END = 10.0  # of the solves of `precision`
METHODS = {"heun2": (2, False), "bosh3": (3, True), "dopri5": (6, True), "dopri8": (13, True)}  # stages, adaptive?


class NetworkField(nn.Module):
    """dy/dt = network(y), layers of ``sizes`` neurons with tanh between them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for entering, leaving in pairwise(sizes):
            layers += [nn.Linear(entering, leaving), nn.Tanh()]
        self.network = nn.Sequential(*layers[:-1])

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope, in the shape of ``y``."""
        slope: Tensor = self.network(y)
        return slope


def network(
    seed: int,
    sizes: tuple[int, ...],
    batch: int,
    t: Tensor,
    method: str = "dopri5",
    rtol: float = 1e-7,
    atol: float = 1e-9,
    options: Mapping[str, object] | None = None,
) -> Problem:
    """A :class:`NetworkField` in float32 on a normally distributed batch; settings as in torchdiffeq.

    Its loss is the mean square of the solution at all times but the first.
    """
    with seeded(seed):
        field = NetworkField(*sizes)
        y0 = torch.randn(batch, sizes[0])
    return Problem(field, y0, t, mean_square, method, rtol, atol, dict(options or {"first_step": 0.1}))


def steps_of_size(size: float, adaptive: bool = True) -> dict[str, float]:
    """Options by which each step is ``size`` long, where an adaptive method's tolerance would allow longer ones."""
    return {"first_step": size, "max_step": size} if adaptive else {"step_size": size}


def mean_square(solution: State) -> Tensor:
    """Of the solution at all times but the first, summed over the parts of a tuple."""
    return torch.stack([part[1:].square().mean() for part in as_tuple(solution)]).sum()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator begins at ``seed`` inside, and is afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _steps(number: int, seed: int) -> Problem:
    options = steps_of_size(1 / (number - 0.5))  # the last one ends behind t = 1, as rounding must not add another
    return network(seed, LARGE, 128, torch.linspace(0, 1, 2), rtol=1e-3, atol=1e-3, options=options)


def _order(method: str, seed: int) -> Problem:
    adaptive = METHODS[method][1]
    options = steps_of_size(1 / (30 - 0.5) if adaptive else 1 / 30, adaptive)
    return network(seed, LARGE, 128, torch.linspace(0, 1, 2), method, rtol=1e-3, atol=1e-3, options=options)


def _outputs(number: int, seed: int) -> Problem:
    return network(seed, (32, 128, 128, 32), 128, torch.linspace(0, 3, number), rtol=1e-6, atol=1e-6)


def _small(seed: int) -> Problem:
    return network(seed, (8, 32, 32, 8), 32, torch.linspace(0, 10, 2), rtol=1e-7, atol=1e-7)


def _precision(method: str, number: int, seed: int) -> Problem:
    adaptive = method == "dopri5"
    options = steps_of_size(END / (number - 0.5 if adaptive else number), adaptive)
    t = torch.tensor([0.0, END])
    return network(seed, (16, 32, 32, 16), 16, t, method, rtol=1e-1, atol=1e-1, options=options)


def _stall(seed: int) -> Problem:
    with seeded(seed):
        conv = partial(nn.Conv2d, kernel_size=3, padding=1, padding_mode="circular")
        field = NetworkField()
        field.network = nn.Sequential(conv(1, 64), nn.ReLU(), conv(64, 64), nn.GELU(), conv(64, 1))
        y0 = torch.randn(4, 1, 16, 16)
    return Problem(field, y0, torch.tensor([0.0, 1.0]), _square)


def _square(solution: State) -> Tensor:
    return torch.stack([part[-1].square().sum() for part in as_tuple(solution)]).sum()


def _resnet(depth: int, seed: int) -> Problem:
    """A residual network of tanh blocks that are smooth in depth, as the Euler scheme of its ODE."""
    generator = torch.Generator().manual_seed(seed)
    field = ResidualField(tanh_blocks(depth, 32, generator), residual=True).float()
    y0 = torch.randn(256, 32, generator=generator)
    return Problem(field, y0, torch.tensor([0.0, 1.0]), mean_square, "euler", options={"step_size": field.step_size})


# At each evaluation it works on the gradients of all blocks, and the record of its allocations fills the memory.
QUADRATIC = {"adjoint": "takes time quadratic in the number of blocks"}

STEPS = Series(
    "steps",
    "What do more steps cost?",
    tuple(Case(f"{number} steps", partial(_steps, number), number) for number in (10, 30, 100, 300, 1000)),
    axis="steps N",
    shows=("peak_bytes", "relative_time"),
)
ORDER = Series(
    "order",
    "What do more stages cost?",
    tuple(Case(method, partial(_order, method), stages) for method, (stages, _) in METHODS.items()),
    axis="evaluations per step (heun2, bosh3, dopri5, dopri8)",
    shows=("peak_bytes", "relative_time"),
)
OUTPUTS = Series(
    "outputs",
    "What do more output times cost?",
    tuple(Case(f"{number} outputs", partial(_outputs, number), number) for number in (2, 5, 20, 100, 500)),
    axis="output times",
    shows=("relative_time", "peak_bytes"),
)
SMALL = Series(
    "small", "What does a step cost in a tiny network?", (Case("1,600 weights, batch 32", _small),), budget=10_000
)
PRECISION = Series(
    "precision",
    "How far does rounding in float32 take the gradient?",
    tuple(
        Case(f"{method}, {number} steps", partial(_precision, method, number), number, method)
        for method, numbers in {"rk4": (10, 30, 100, 300, 1000), "dopri5": (10, 30, 100, 300)}.items()
        for number in numbers
    ),
    axis="steps N",
    shows=("gradient_error",),
    rounding=True,
)
STALL = Series(
    "stall",
    "Does backward come to an end with the default tolerances in float32?",
    (Case("convolutions, torchdiffeq's defaults", _stall),),
    budget=2000,
)
RESNET = Series(
    "resnet",
    "What do more blocks of a residual network cost?",
    tuple(
        Case(f"{depth} blocks", partial(_resnet, depth), depth, without=QUADRATIC if depth > 256 else {})
        for depth in (16, 64, 256, 1024)
    ),
    axis="depth N [blocks]",
)
