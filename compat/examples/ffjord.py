"""FFJORD learns the density of two moons (Grathwohl et al., ICLR 2019): python ffjord.py [--steps 300].

The divergence is exact, by a derivative in each of the two dimensions. Prints loss, peak memory and time with the
symplectic adjoint on and off.
"""

import argparse
import math
import time

import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torchdiffeq import odeint

import torchdiffeq_symplectic
from torchdiffeq_symplectic.experiments.memory import peak_bytes

BATCH, WIDTH = 256, 64
State = tuple[Tensor, Tensor]


class Flow(nn.Module):
    """Slopes of the points, and of their log-density: the divergence."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)
        )

    def forward(self, t: Tensor, state: State) -> State:
        z = state[0] if state[0].requires_grad and torch.is_grad_enabled() else state[0].detach().requires_grad_()
        with torch.enable_grad():
            slope = self.net(torch.cat([z, t.expand(len(z), 1)], dim=1))
            rows = [torch.autograd.grad(slope[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return slope, rows[0] + rows[1]


def loss_of(flow: Flow, x: Tensor) -> Tensor:
    """The mean negative log-likelihood, in nats."""
    t = torch.tensor([0.0, 1.0])
    z, change = odeint(flow, (x, x.new_zeros(len(x))), t, method="rk4", options={"step_size": 0.05})
    normal = -z[-1].square().sum(dim=1) / 2 - math.log(2 * math.pi)
    loss: Tensor = -(normal + change[-1]).mean()
    return loss


def train(mode: str | None, steps: int) -> None:
    torch.manual_seed(0)
    flow, points = Flow(), torch.tensor(make_moons(4096, noise=0.05, random_state=0)[0], dtype=torch.float32)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        with torchdiffeq_symplectic.use(mode):  # one line switches it on
            loss = loss_of(flow, points[torch.randint(len(points), (BATCH,))])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    memory, start = peak_bytes(step, "cpu") / 2**20, time.perf_counter()
    for _ in range(steps):
        step()
    print(f"{mode or 'off'}: loss {losses[-1]:.4f}, {memory:.1f} MiB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="FFJORD on two moons.")
    parser.add_argument("--steps", type=int, default=300)
    for mode in ("symplectic", None):
        train(mode, parser.parse_args().steps)
