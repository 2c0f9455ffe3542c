"""One of two processes that train one model: ``python distributed_gradient.py RANK STORE OUT MODE``.

``test_torchdiffeq_modules.py`` starts both and compares. MODE is "single" for the whole batch in one process by
backpropagation, or a mode's arguments in JSON. The gradients are written to OUT by rank 0.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import torchdiffeq_symplectic

PROCESSES = 2


class Field(nn.Module):
    """A field with a parameter that is never used and one that is used at early times alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.early = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.net(y) * torch.cos(t)
        return slope + self.early * y if t < 0.3 else slope


class Model(nn.Module):
    """An encoder and the solve of its output; all parameters of the field are asked for, as ``adjoint_params``."""

    def __init__(self, solver: Any) -> None:
        super().__init__()
        self.encoder, self.field, self.solver = nn.Linear(2, 3).double(), Field(), solver

    def forward(self, x: Tensor) -> Tensor:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        solution: Tensor = self.solver(self.field, self.encoder(x), t, method="rk4", options={"step_size": 0.1})
        return solution[-1]


def train(rank: int, store: str, mode: dict[str, Any] | None) -> list[Tensor | None]:
    """The gradients of all parameters after one backward pass."""
    torch.manual_seed(7)
    x = torch.randn(6, 2, dtype=torch.float64)
    if mode is None:
        model: nn.Module = Model(torchdiffeq.odeint)
        model(x).pow(3).mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    def solver(*args: Any, **settings: Any) -> Any:
        return torchdiffeq.odeint_adjoint(*args, **settings, **mode)

    torchdiffeq_symplectic.register()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(Model(solver))
    model(x.chunk(PROCESSES)[rank]).pow(3).mean().backward()
    found = [parameter.grad for parameter in model.parameters()]
    del model  # its reducer uses the group
    distributed.barrier()
    distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    rank, store, out, mode = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    gradients = train(rank, store, None if mode == "single" else json.loads(mode))
    if rank == 0:
        torch.save(gradients, out)
