"""Learn the diffusivity of a heat equation over 10,000 steps: python long_pde.py [--solver-steps 10000] [--steps 3].

u_t = (k(x) u_x)_x, periodic, k from a small network. Only one state a step is kept, checkpoint="steps", and one
evaluation's graph at a time. Prints loss, peak memory and time with the symplectic adjoint on and off.
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_symplectic
from torchdiffeq_symplectic.experiments.memory import peak_bytes

POINTS, END = 64, 1.0


class Heat(nn.Module):
    """Positive diffusivity k(x) between neighbouring points."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1), nn.Softplus())
        angle = 2 * torch.pi * torch.arange(POINTS) / POINTS
        self.register_buffer("places", torch.stack([angle.sin(), angle.cos()], dim=1))

    def diffusivity(self) -> Tensor:
        k: Tensor = 0.02 * self.net(self.places).squeeze(-1)
        return k

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        flux = self.diffusivity() * (u.roll(-1) - u) * POINTS
        return (flux - flux.roll(1)) * POINTS


def train(mode: str | None, solver_steps: int, steps: int) -> None:
    torch.manual_seed(0)
    field, t = Heat(), torch.tensor([0.0, END])
    u0 = torch.exp(-40 * (torch.arange(POINTS) / POINTS - 0.5).square())
    target = u0.roll(3)
    optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        options = {} if mode is None else {"checkpoint": "steps"}
        with torchdiffeq_symplectic.use(mode, **options):  # one line switches it on
            u = odeint(field, u0, t, method="euler", options={"step_size": END / solver_steps})[-1]
        loss = (u - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    memory, start = peak_bytes(step, "cpu") / 2**20, time.perf_counter()
    for _ in range(steps):
        step()
    print(f"{mode or 'off'}: loss {losses[-1]:.4f}, {memory:.1f} MiB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A heat equation over many steps.")
    parser.add_argument("--solver-steps", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=3, help="of the optimizer")
    arguments = parser.parse_args()
    for mode in ("symplectic", None):
        train(mode, arguments.solver_steps, arguments.steps)
