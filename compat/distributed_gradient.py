"""One of two processes that train one model: ``python distributed_gradient.py RANK STORE OUT HOST MODE``.

``test_distributed.py`` starts both and compares. HOST is "torchdiffeq" or "torchdyn". MODE is "single" for the whole
batch in one process by backpropagation, or the host's arguments in JSON. Rank 0 writes the gradients to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
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

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = self.net(y) * torch.cos(t)
        return slope + self.early * y if t < 0.3 else slope


class Solve(nn.Module):
    """torchdiffeq's; all parameters of the field are asked for, as ``adjoint_params``."""

    def __init__(self, mode: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.field, self.mode = Field(), mode

    def forward(self, y: Tensor) -> Tensor:
        t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        settings: Any = {"method": "rk4", "options": {"step_size": 0.1}}
        if self.mode is None:
            solution: Tensor = torchdiffeq.odeint(self.field, y, t, **settings)
        else:
            solution = torchdiffeq.odeint_adjoint(self.field, y, t, **settings, **self.mode)
        return solution[-1]


class SolveOfTorchdyn(nn.Module):
    """torchdyn's."""

    def __init__(self, mode: Mapping[str, Any] | None) -> None:
        from torchdyn.core import NeuralODE

        super().__init__()
        options = dict(mode or {"sensitivity": "autograd"})
        adjoint_options = options.pop("adjoint_options", None)
        self.node = NeuralODE(Field(), solver="rk4", return_t_eval=False, **options)
        if adjoint_options is not None:
            self.node.adjoint_options = adjoint_options

    def forward(self, x: Tensor) -> Tensor:
        solution: Tensor = self.node(x, torch.linspace(0, 1, 11, dtype=torch.float64))
        return solution[-1]


SOLVES: dict[str, Callable[[Mapping[str, Any] | None], nn.Module]] = {
    "torchdiffeq": Solve,
    "torchdyn": SolveOfTorchdyn,
}


def train(rank: int, store: str, host: str, mode: Mapping[str, Any] | None) -> list[Tensor | None]:
    """The gradients of all parameters of an encoder and a solve of its output, after one backward pass."""
    torch.manual_seed(7)
    x = torch.randn(6, 2, dtype=torch.float64)
    model: nn.Module = nn.Sequential(nn.Linear(2, 3).double(), SOLVES[host](mode))
    if mode is None:
        model(x).pow(3).mean().backward()
        return [parameter.grad for parameter in model.parameters()]
    torchdiffeq_symplectic.register()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(model)
    model(x.chunk(PROCESSES)[rank]).pow(3).mean().backward()
    found = [parameter.grad for parameter in model.parameters()]
    del model  # its reducer uses the group
    distributed.barrier()
    distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    rank, store, out, host, mode = int(sys.argv[1]), *sys.argv[2:6]
    gradients = train(rank, store, host, None if mode == "single" else json.loads(mode))
    if rank == 0:
        torch.save(gradients, out)
    # Not through the interpreter's own end: a thread of PyTorch's that asks for the interpreter then is ended in the
    # middle of C++ code, which aborts the process ("terminate called without an active exception"), seen once in many.
    os._exit(0)
