"""Whether gradient descent keeps the weights of a residual network smooth in depth.

The network is linear, x_{n+1} = x_n + θ_n x_n / N, so that x_N = Π x_0, Π = (I + θ_{N-1}/N) ... (I + θ_0/N), and it is
to learn a linear map B: the loss is ½‖Π - B‖², with the d unit vectors as data. As ∂L/∂θ_n is O(1/N), a step of
gradient descent is θ_n - η N ∂L/∂θ_n, for small η the gradient flow of the paper. Neighbours move nearly alike:

    N ∂L/∂θ_n = (Π after n)ᵀ (Π - B) (Π before n)ᵀ

changes by O(1/N) from n to n + 1, and by ever less, as the loss falls exponentially where it is small at first. So the
roughness, N max_n ‖θ_{n+1} - θ_n‖, stays bounded, in N and over the steps alike, if it is bounded at first. The
weights then tend to a function θ(s) as 1/N, at each step: so far are networks of depth N and N/2 from each other. But
descent does not smooth: roughness at the start, O(N) where the θ_n are independent, remains.

Three starts: all θ_n zero; θ_n smooth in n/N; independent standard normal entries.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612, section 3.2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.resnet import ResidualField
from torchdiffeq_symplectic.resnet.studies.common import Sheet, Tell, column, curve, depth_axis, quiet, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DEPTHS", "SIZE", "STARTS", "STEPS", "Descent", "descend", "draw", "run", "sheets", "summary"]

DEPTHS = (16, 32, 64, 128, 256, 512)
STEPS = 60
STARTS = ("zero", "smooth", "independent")
SIZE = 13, 4.2  # inches of the picture
WIDTH = 4
LEARNING_RATE = 0.2  # η; the flow's time is η times the number of steps


@dataclass(frozen=True)
class Descent:
    """A network during its training."""

    start: str = column("weights at the start")
    depth: int = column("depth N [blocks]")
    step: int = column("step [gradient steps]")
    loss: float = column("loss", ".1e")
    roughness: float = column("N times largest ‖θ_(n+1) - θ_n‖", ".3g")
    apart: float = column("largest ‖θ_n - θ_(n/2) at half the depth‖", ".2e")


class LinearBlock(nn.Module):
    """Residual functions of several networks that lie beside each other in one state, f(x)_k = x_k θ_kᵀ."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, shape ``(networks, samples, d)``, in the same shape."""
        return x @ self.theta.mT


def run(
    depths: Sequence[int] = DEPTHS,
    steps: int = STEPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tell: Tell = quiet,
) -> list[Descent]:
    """The training from each start at each depth, step by step.

    Args:
        depths: numbers of blocks N, each at least 2.
        steps: of gradient descent.
        seed: of the map to learn and of the starts; the global random state is not used.
        device: where the networks are, in float64.
        tell: is told of progress.
    """
    rows: list[Descent] = []
    weights: dict[int, list[Tensor]] = {}  # depth -> θ at each step, shape (N, starts, d, d)
    done, total = 0, sum(depths)
    for depth in sorted(depths):
        tell(f"{depth} blocks", done / total)
        losses, weights[depth] = descend(depth, steps, seed, device)
        half = weights.get(depth // 2) if depth % 2 == 0 else None
        for k, start in enumerate(STARTS):
            for step, theta in enumerate(weights[depth]):
                apart = math.nan if half is None else _largest(theta[::2, k] - half[step][:, k])
                roughness = depth * _largest(theta[1:, k] - theta[:-1, k])
                rows.append(Descent(start, depth, step, float(losses[step][k]), roughness, apart))
        done += depth
    return rows


def descend(depth: int, steps: int, seed: int, device: torch.device | str) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, shape ``(starts,)``, and weights, shape ``(N, starts, d, d)``, before each step and after the last.

    The three networks are blocks of one state: what one learns has no influence on another.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    target = (torch.eye(WIDTH, dtype=torch.float64) + noise / (2 * WIDTH)).to(device)
    field = ResidualField([LinearBlock(theta) for theta in _starts(depth, generator)], residual=True).to(device)
    x = torch.eye(WIDTH, dtype=torch.float64, device=device).expand(len(STARTS), WIDTH, WIDTH)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    parameters: list[Tensor] = list(field.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE * depth)
    losses, weights = [], []
    for step in range(steps + 1):
        output = odeint_adjoint(
            field, x, t, method="euler", options={"step_size": field.step_size}, adjoint_method="symplectic"
        )[-1]
        loss = (output - target.T).square().sum(dim=(1, 2)) / 2  # row j of output is Π e_j
        losses.append(loss.detach())
        weights.append(torch.stack(parameters).detach())
        if step < steps:
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    return losses, weights


def _starts(depth: int, generator: torch.Generator) -> Tensor:
    """The weights of the three networks at first, shape ``(N, starts, d, d)``."""
    regular = smooth(depth, WIDTH, WIDTH, generator=generator) / WIDTH
    rough = torch.randn(depth, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return torch.stack([torch.zeros_like(regular), regular, rough], dim=1)


def _largest(matrices: Tensor) -> float:
    """Of the Frobenius norms of ``matrices``, shape ``(N, d, d)``."""
    return float(matrices.flatten(1).norm(dim=1).max())


def sheets(rows: Sequence[Descent]) -> list[Sheet]:
    """What to write and to show."""
    return [Sheet("linear", "Linear residual networks after gradient descent", rows, _last(rows))]


def summary(rows: Sequence[Descent]) -> list[str]:
    """A sentence for each start: the largest roughness during training, at the depths where it is least and most."""
    sentences = []
    for start in _starts_in(rows):
        networks = _by_depth(rows, start).values()
        largest = [max(row.roughness for row in network) for network in networks]
        sentences.append(
            f"{start} weights at the start: the largest N max‖θ_(n+1) - θ_n‖ in training is "
            f"{min(largest):.3g} to {max(largest):.3g}, by depth"
        )
    return sentences


def draw(rows: Sequence[Descent], figure: Figure) -> None:
    """The roughness over the steps, its largest value over depth, and how far networks of half the depth are."""
    over_steps, over_depth, halves = figure.subplots(1, 3)
    for style, start in enumerate(_starts_in(rows)):
        networks = _by_depth(rows, start)
        depths = list(networks)
        for i, network in enumerate(networks.values()):
            points = [row.step for row in network], [row.roughness for row in network]
            label = f"{start} weights at the start" if i == len(depths) - 1 else None
            curve(over_steps, *points, style, label, marker="", linewidth=0.6 + 2 * i / len(depths))
        curve(over_depth, depths, [max(row.roughness for row in of) for of in networks.values()], style)
        apart = {depth: of[-1].apart for depth, of in networks.items() if not math.isnan(of[-1].apart)}
        if apart:
            curve(halves, list(apart), list(apart.values()), style)
    depth_axis(over_depth, depths)
    depth_axis(halves, depths)
    over_steps.grid(alpha=0.3)
    over_steps.set_xlabel(f"step of gradient descent (thin: N = {depths[0]}, thick: N = {depths[-1]})")
    over_steps.legend(fontsize="small")
    over_steps.set_title("N max‖θ$_{n+1}$ - θ$_n$‖ in training")
    over_depth.set_title("its largest value in training")
    halves.set_title("max‖θ$_n$ - θ$_{n/2}$ at half the depth‖, trained")
    for axes in (over_steps, over_depth, halves):
        axes.set_yscale("log", nonpositive="mask")
    # From zero, the first step leaves no more than roundings, which need not be seen.
    over_steps.set_ylim(bottom=min((row.roughness for row in _last(rows) if row.roughness > 0), default=1.0) / 30)


def _starts_in(rows: Sequence[Descent]) -> list[str]:
    return list(dict.fromkeys(row.start for row in rows))


def _by_depth(rows: Sequence[Descent], start: str) -> dict[int, list[Descent]]:
    """The rows of one start, by depth, in the order of the steps."""
    networks: dict[int, list[Descent]] = {}
    for row in rows:
        if row.start == start:
            networks.setdefault(row.depth, []).append(row)
    return networks


def _last(rows: Sequence[Descent]) -> list[Descent]:
    """The rows of the trained networks."""
    return [of[-1] for start in _starts_in(rows) for of in _by_depth(rows, start).values()]
