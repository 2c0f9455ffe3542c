"""How far a residual network is from the ODE through its blocks, over depth.

The network x_{n+1} = x_n + f_n(x_n)/N is Euler's method for x'(s) = φ(s, x), where φ(n/N, ·) = f_n and φ is linear in
s between. One step from x_n misses the ODE's solution from there by

    (f_{n+1} - f_n)(x_n) / 2N  +  ∂f_n(x_n) f_n(x_n) / 2N²  +  terms of higher order.

- Residual functions smooth in depth: f_{n+1} - f_n is O(1/N), a step errs by O(1/N²), and N steps by O(1/N).
- Independent at scale 1/√N, x_{n+1} = x_n + ξ_n ⊙ x_n / √N, that is f_n(x) = √N ξ_n ⊙ x, ξ_n standard normal: the
  distance does not fall. The ODE's solution is x_0 exp(Σ ξ_n/√N), but for the weights of the first and last ξ. The
  network is x_0 Π (1 + ξ_n/√N), whose logarithm is Σ ξ_n/√N - Σ ξ_n²/2N + ..., and Σ ξ_n²/2N tends to 1/2, not to 0.
  So for deep networks the two are Itô's x_0 exp(W - 1/2) and Stratonovich's x_0 exp(W), W standard normal for each
  entry, and their distance is e - √e = 1.07 in units of ‖x_0‖.
- Independent at scale 1/N, f_n(x) = tanh(W_n x) with weights of size one, is not smooth either: f_{n+1} - f_n is of
  size one, a step errs by O(1/N), and a bound that adds up the sizes, as the paper's, does not fall. But what is
  independent averages out at this scale: the first terms of all steps telescope to O(1/N), as x_n moves by O(1/N) only
  from one to the next, and the second ones add up to O(1/N), too. The distance falls as 1/N.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchdiffeq import odeint

from torchdiffeq_symplectic.experiments.blocks import tanh_blocks
from torchdiffeq_symplectic.experiments.studies.common import Device, Study, Tell, curves, quiet, slope
from torchdiffeq_symplectic.resnet import ResidualField

__all__ = ["DEPTHS", "FAMILIES", "STUDY", "Family", "distances", "run"]

DEPTHS = (16, 32, 64, 128, 256, 512)
TOLERANCE = 1e-8  # of the reference solution, relative and absolute
KIND, LARGEST, FINAL = "residual functions", "largest distance [norm of x_0]", "distance at the end [norm of x_0]"


@dataclass(frozen=True)
class Family:
    """Networks of any depth.

    Attributes:
        shape: of the state, ``(batch, width)``.
        blocks: the N residual functions f_n, from N and a generator on the CPU.
    """

    shape: tuple[int, int]
    blocks: Callable[[int, torch.Generator], list[nn.Module]]


class NoiseBlock(nn.Module):
    """f(x) = √N ξ ⊙ x."""

    def __init__(self, rate: Tensor) -> None:
        super().__init__()
        self.register_buffer("rate", rate)
        self.rate: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, shape ``(batch, width)``, in the same shape."""
        return self.rate * x


class IndependentBlock(nn.Module):
    """f(x) = tanh(W x)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, shape ``(batch, width)``, in the same shape."""
        return torch.tanh(nn.functional.linear(x, self.weight))


def _smooth(depth: int, generator: torch.Generator) -> list[nn.Module]:
    return tanh_blocks(depth, 16, generator)


def _noise(depth: int, generator: torch.Generator) -> list[nn.Module]:
    rates = torch.randn(depth, 4096, generator=generator, dtype=torch.float64) * math.sqrt(depth)
    return [NoiseBlock(rate) for rate in rates]


def _independent(depth: int, generator: torch.Generator) -> list[nn.Module]:
    weights = torch.randn(depth, 16, 16, generator=generator, dtype=torch.float64) / 4
    return [IndependentBlock(weight) for weight in weights]


FAMILIES = {
    "smooth in depth": Family((32, 16), _smooth),
    "independent, scale 1/√N": Family((1, 4096), _noise),
    "independent, scale 1/N": Family((32, 16), _independent),
}


def run(
    depths: Sequence[int] = DEPTHS, seed: int = 0, device: Device = "cpu", tell: Tell = quiet
) -> dict[str, pd.DataFrame]:
    """Distances of the hidden states x_n from the ODE's x(n/N), in units of ‖x_0‖, of every family at every depth.

    Args:
        depths: numbers of blocks N, each at least 2.
        seed: of input and weights; the global random state is not used.
        device: where the states are computed, in float64.
        tell: is told of progress.
    """
    rows: list[tuple[str, int, float, float]] = []
    for name, family in FAMILIES.items():
        for depth in depths:
            tell(f"{name}, {depth} blocks", len(rows) / (len(FAMILIES) * len(depths)))
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(family.shape, generator=generator, dtype=torch.float64).to(device)
            field = ResidualField(family.blocks(depth, generator), residual=True).to(device)
            found = distances(field, x) / x.norm()
            rows.append((name, depth, float(found.max()), float(found[-1])))
    return {"depth": pd.DataFrame(rows, columns=[KIND, "depth", LARGEST, FINAL])}


@torch.no_grad()
def distances(field: ResidualField, x: Tensor) -> Tensor:
    """‖x_n - x(n/N)‖ for n = 0 ... N, over all entries of the state, shape ``(N + 1,)``.

    Args:
        field: the network.
        x: its input, x_0, float64.
    """
    grid = field.grid(dtype=x.dtype, device=x.device)
    network = odeint(field, x, grid, method="euler")
    # φ has a kink at each n/N, so a step must end there: across it, a step is not of its order.
    options = {"step_t": grid[1:-1]}
    ode = odeint(field, x, grid, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE, options=options)
    apart: Tensor = (network - ode).flatten(1).norm(dim=1)
    return apart


def summary(found: dict[str, pd.DataFrame]) -> list[str]:
    """A sentence for each family: the power of N by which its distance goes."""
    return [
        f"{name}: the largest distance goes as N^{slope(of['depth'], of[LARGEST]):.2f}"
        for name, of in found["depth"].groupby(KIND, sort=False)
        if len(of) > 1
    ]


def draw(found: dict[str, pd.DataFrame], figure: Figure) -> None:
    """The largest distance over depth, both logarithmic, a curve for each family beside a line of slope -1."""
    axes, frame = figure.subplots(), found["depth"]
    first = frame.iloc[0]
    depths = frame["depth"].unique()
    axes.plot(depths, first[LARGEST] * first["depth"] / depths / 3, color="0.6", linewidth=1)
    axes.annotate("1/N", (depths[-1], first[LARGEST] * first["depth"] / depths[-1] / 3), color="0.4")
    curves(axes, frame, LARGEST, KIND, slopes=True)
    axes.set(ylabel="largest distance of network and ODE [norm of the input]")
    axes.set_title("Is the network a discretised ODE?")


STUDY = Study(run, summary, draw, "How far the network is from the ODE through its blocks")
