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
from typing import Any

import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.experiments.blocks import smooth
from torchdiffeq_symplectic.experiments.studies.common import Device, Study, Tell, curves, quiet
from torchdiffeq_symplectic.resnet import ResidualField

__all__ = ["DEPTHS", "STARTS", "STEPS", "STUDY", "descend", "run"]

DEPTHS = (16, 32, 64, 128, 256, 512)
STEPS = 60
STARTS = ("zero", "smooth", "independent")
WIDTH = 4
LEARNING_RATE = 0.2  # η; the flow's time is η times the number of steps


class LinearBlock(nn.Module):
    """Residual functions of several networks that lie beside each other in one state, f(x)_k = x_k θ_kᵀ."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, shape ``(networks, samples, d)``, in the same shape."""
        return x @ self.theta.mT


def run(
    depths: Sequence[int] = DEPTHS, steps: int = STEPS, seed: int = 0, device: Device = "cpu", tell: Tell = quiet
) -> dict[str, pd.DataFrame]:
    """The training from each start at each depth, step by step.

    ``roughness`` is N max_n ‖θ_(n+1) - θ_n‖, and ``apart`` is max_n ‖θ_n - θ_(n/2)‖, to the weights at half the depth.

    Args:
        depths: numbers of blocks N, each at least 2.
        steps: of gradient descent.
        seed: of the map to learn and of the starts; the global random state is not used.
        device: where the networks are, in float64.
        tell: is told of progress.
    """
    rows: list[dict[str, Any]] = []
    weights: dict[int, list[Tensor]] = {}  # depth -> θ at each step, shape (N, starts, d, d)
    done, total = 0, sum(depths)
    for depth in sorted(depths):
        tell(f"{depth} blocks", done / total)
        losses, weights[depth] = descend(depth, steps, seed, device)
        half = weights.get(depth // 2) if depth % 2 == 0 else None
        for k, start in enumerate(STARTS):
            for step, theta in enumerate(weights[depth]):
                row = {"start": start, "depth": depth, "step": step, "loss": float(losses[step][k])}
                row["roughness"] = depth * _largest(theta[1:, k] - theta[:-1, k])
                row["apart"] = math.nan if half is None else _largest(theta[::2, k] - half[step][:, k])
                rows.append(row)
        done += depth
    return {"linear": pd.DataFrame(rows)}


def descend(depth: int, steps: int, seed: int, device: Device) -> tuple[list[Tensor], list[Tensor]]:
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


def summary(found: dict[str, pd.DataFrame]) -> list[str]:
    """A sentence for each start: the largest roughness during training, at the depths where it is least and most."""
    largest = found["linear"].groupby(["start", "depth"], sort=False)["roughness"].max()
    return [
        f"{start} weights at the start: the largest N max‖θ_(n+1) - θ_n‖ in training is {of.min():.3g} to "
        f"{of.max():.3g}, by depth"
        for start, of in largest.groupby("start", sort=False)
    ]


def draw(found: dict[str, pd.DataFrame], figure: Figure) -> None:
    """The roughness over the steps, its largest value over depth, and how far networks of half the depth are."""
    frame = found["linear"]
    over_steps, over_depth, halves = figure.subplots(1, 3)
    # From zero, the first step leaves no more than roundings, which need not be seen.
    seen = frame[frame["roughness"] > frame["roughness"].max() * 1e-9]
    sns.lineplot(seen, x="step", y="roughness", hue="start", size="depth", palette="colorblind", ax=over_steps)
    over_steps.set(
        yscale="log", xlabel="step of gradient descent", ylabel="", title="N max‖θ$_{n+1}$ - θ$_n$‖ in training"
    )
    over_steps.legend(fontsize="x-small")
    over_steps.grid(alpha=0.3)
    largest = frame.groupby(["start", "depth"], sort=False, as_index=False)["roughness"].max()
    curves(over_depth, largest, "roughness", "start")
    over_depth.set(ylabel="", title="its largest value in training")
    trained = frame[(frame["step"] == frame["step"].max()) & (frame["apart"] > 0)]
    if len(trained):
        curves(halves, trained, "apart", "start", slopes=True)
    halves.set(ylabel="", title="max‖θ$_n$ - θ$_{n/2}$ at half the depth‖, trained")


def _trained(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["step"] == frame["step"].max()]


STUDY = Study(run, summary, draw, "Linear residual networks after gradient descent", (13, 4.2), _trained)
