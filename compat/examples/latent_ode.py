"""A latent ODE learns noisy spirals (Chen et al., NeurIPS 2018): python latent_ode.py [--steps 200].

A recurrent network reads a spiral backwards, the ODE moves its latent state, a decoder turns the states into points.
Prints loss, peak memory and time with the symplectic adjoint on and off.
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_symplectic
from torchdiffeq_symplectic.experiments.memory import peak_bytes

LATENT, HIDDEN, POINTS = 4, 64, 40


def spirals(count: int) -> tuple[Tensor, Tensor]:
    """Times, and noisy points of shape (POINTS, count, 2)."""
    t = torch.linspace(0, 1, POINTS)
    turn = torch.where(torch.rand(count) < 0.5, 1.0, -1.0)
    angle = 6 * t[:, None] * turn + 6 * torch.rand(count)
    points = (0.3 + 0.7 * t[:, None, None]) * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return t, points + 0.03 * torch.randn_like(points)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, LATENT))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        slope: Tensor = self.net(z)
        return slope


class LatentODE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.posterior = nn.GRU(2, HIDDEN), nn.Linear(HIDDEN, 2 * LATENT)
        self.field, self.decoder = Field(), nn.Linear(LATENT, 2)

    def loss(self, t: Tensor, points: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self.posterior(self.encoder(points.flip(0))[1][-1]).chunk(2, dim=-1)
        z = odeint(self.field, mean + log_std.exp() * noise, t, method="rk4", options={"step_size": 0.01})
        divergence = (mean.square() + (2 * log_std).exp() - 1).sum(-1) / 2 - log_std.sum(-1)
        loss: Tensor = 10 * (self.decoder(z) - points).square().mean() + 0.01 * divergence.mean()
        return loss


def train(mode: str | None, steps: int) -> None:
    torch.manual_seed(0)
    model, (t, points) = LatentODE(), spirals(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        with torchdiffeq_symplectic.use(mode):  # one line switches it on
            loss = model.loss(t, points, torch.randn(points.shape[1], LATENT))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    memory, start = peak_bytes(step, "cpu") / 2**20, time.perf_counter()
    for _ in range(steps):
        step()
    print(f"{mode or 'off'}: loss {losses[-1]:.4f}, {memory:.1f} MiB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A latent ODE on spirals.")
    parser.add_argument("--steps", type=int, default=200)
    for mode in ("symplectic", None):
        train(mode, parser.parse_args().steps)
