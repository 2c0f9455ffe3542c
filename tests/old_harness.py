"""One asymmetric problem, and every way to differentiate it: shared by the tests of how a gradient mode behaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import torchdiffeq_symplectic

MODES: dict[str, dict[str, Any]] = {
    "symplectic": {"adjoint_method": "symplectic"},
    "stages": {"adjoint_method": "symplectic", "adjoint_options": {"checkpoint": "stages"}},
    "aca": {"adjoint_method": "aca"},
    "baseline": {"adjoint_method": "baseline"},
}

# first_step is given, as odeint differentiates the first step where it chooses that itself.
SOLVERS: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4", "options": {"step_size": 0.17}},
    "dopri5": {"method": "dopri5", "rtol": 1e-5, "atol": 1e-6, "options": {"first_step": 0.11}},
    "adaptive_heun": {"method": "adaptive_heun", "rtol": 1e-3, "atol": 1e-4, "options": {"first_step": 0.13}},
}

each_mode = pytest.mark.parametrize("mode", MODES)
each_solver = pytest.mark.parametrize("solver", SOLVERS)


class Net(nn.Module):
    """A small network of time and state, with no symmetry in either, its parameters drawn from ``seed``."""

    def __init__(self, width: int = 3, hidden: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(width, hidden, dtype=dtype)
        self.outer = nn.Linear(hidden, width, dtype=dtype)
        self.rate = nn.Parameter(torch.empty(hidden, dtype=dtype))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.9 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        result: Tensor = self.outer(torch.tanh(self.inner(y) + t * self.rate)) - 0.3 * y
        return result


def initial(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An initial state of unequal entries, a leaf."""
    size = torch.Size(shape or (2, 3))
    values = torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return values.to(dtype).requires_grad_()


def times(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Output times, off the fixed grids, several in one step."""
    return torch.tensor(values or (0.1, 0.32, 0.4, 1.0), dtype=dtype)


def solve(mode: str, func: Any, y0: Any, t: Tensor, solver: str = "rk4", **arguments: Any) -> Any:
    """The solution; ``mode`` is one of MODES, or "backprop" for torchdiffeq's own odeint with its graph."""
    settings = {**SOLVERS[solver], **arguments}
    if mode == "backprop":
        for name in [name for name in settings if name.startswith("adjoint_")]:
            del settings[name]
        return torchdiffeq.odeint(func, y0, t, **settings)
    own = dict(MODES[mode])
    own["adjoint_options"] = {**own.get("adjoint_options", {}), **settings.pop("adjoint_options", {})}
    return torchdiffeq_symplectic.odeint_adjoint(func, y0, t, **settings, **own)


def loss_of(solution: Any) -> Tensor:
    """A nonlinear function of the whole solution in which no two entries count alike."""
    parts = solution if isinstance(solution, tuple) else (solution,)
    total = torch.zeros((), dtype=torch.float64)
    for number, part in enumerate(parts):
        weights = torch.cos(torch.arange(part.numel(), dtype=part.dtype.to_real()) * 1.3 + number).reshape(part.shape)
        total = total + (weights * part + 0.4 * weights.roll(1) * part * part).sum()
    return total


def gradients(mode: str, func: Any, y0: Any, t: Tensor, wanted: Sequence[Tensor], **arguments: Any) -> list[Tensor]:
    """The gradients of `loss_of` the solution with respect to ``wanted``."""
    return list(torch.autograd.grad(loss_of(solve(mode, func, y0, t, **arguments)), wanted))


def error(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """The largest relative error among tensors, each in its own norm; missing ones count as wrong."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert one.shape == other.shape
        difference, size = torch.linalg.vector_norm((one - other).detach()), torch.linalg.vector_norm(other.detach())
        worst = max(worst, float(difference) / max(float(size), 1e-300))
    return worst


def count(field: Net, run: Callable[[], object]) -> int:
    """How often ``run`` evaluates ``field``."""
    before = field.evaluations
    run()
    return field.evaluations - before


def is_replayed(loss: Tensor) -> bool:
    """Whether ``loss`` comes from a solve that this package differentiates."""
    stack, met = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        if node.name() == "_GradientBackward":
            return True
        met.add(node)
        stack += [following for following, _ in node.next_functions]
    return False
