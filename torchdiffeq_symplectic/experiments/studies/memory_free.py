"""How far the memory-free gradient is from the exact one, over depth, for weights that are smooth in depth.

The network is x_{n+1} = x_n + f_n(x_n)/N, f_n(x) = tanh(W_n x + b_n), W_n = W(n/N) and b_n = b(n/N), or the Heun
network of the same blocks; the loss is ½‖x_N - y‖² / batch for a random target y. The mode ``memory_free`` recovers
the states by steps back. A step of Euler's method back from x_{n+1} misses x_n by O(1/N²), N of them by O(1/N), and so
does the gradient that is taken at the recovered states. For Heun's method the paper's bound is O(1/N²), and O(1/N³) is
what is seen: the leading errors, of third order, of a step of even order and of the step back cancel each other.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.experiments.blocks import tanh_blocks
from torchdiffeq_symplectic.experiments.studies.common import METHODS, Device, Study, Tell, curves, quiet, slope
from torchdiffeq_symplectic.resnet import ResidualField

__all__ = ["DEPTHS", "STUDY", "error", "gradients", "run"]

DEPTHS = (8, 16, 32, 64, 128, 256)
BATCH, WIDTH = 32, 16
ERRORS = {
    "x": "gradient in x",
    "parameters": "gradient in all parameters",
    "largest": "gradient in the worst parameter",
    "state": "reconstructed input",
}


def run(
    depths: Sequence[int] = DEPTHS, seed: int = 0, device: Device = "cpu", tell: Tell = quiet
) -> dict[str, pd.DataFrame]:
    """Relative errors of both methods at every depth; of Euler alone where torchdiffeq has no Heun (before 0.2.5).

    ``x``, ``parameters`` and ``largest`` are ‖g - g*‖ / ‖g*‖, g by ``memory_free`` and g* by ``symplectic``, which is
    exact; ``state`` is ‖x̃_0 - x_0‖ / ‖x_0‖ of the input that stepping back recovers.

    Args:
        depths: numbers of blocks N, each at least 2.
        seed: of input, target and weights; the global random state is not used.
        device: where gradients are computed, in float64.
        tell: is told of progress.
    """
    rows: list[dict[str, Any]] = []
    for method, name in METHODS.items():
        for depth in depths:
            tell(f"{name}, {depth} blocks", len(rows) / (len(METHODS) * len(depths)))
            generator = torch.Generator().manual_seed(seed)
            x, target = torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64).to(device)
            field = ResidualField(tanh_blocks(depth, WIDTH, generator), residual=True).to(device)
            exact = gradients(field, x, target, method, "symplectic")
            reconstruction: list[float] = []
            found = gradients(field, x, target, method, "memory_free", report=reconstruction.append, corrections=0)
            each = [error([g], [truth]) for g, truth in zip(found[1:], exact[1:], strict=True)]
            errors = error(found[:1], exact[:1]), error(found[1:], exact[1:]), max(each), *reconstruction
            rows.append({"method": name, "depth": depth, **dict(zip(ERRORS, errors, strict=True))})
    return {"memory-free": pd.DataFrame(rows)}


def gradients(
    field: ResidualField, x: Tensor, target: Tensor, method: str, adjoint_method: str, **adjoint_options: Any
) -> tuple[Tensor, ...]:
    """Gradients of ½‖x_N - target‖² / batch with respect to the input x_0, then to the field's parameters.

    Args:
        field: the network.
        x: its input, shape ``(batch, width)``.
        target: in the same shape.
        method: "euler" or "heun2".
        adjoint_method: the gradient mode.
        adjoint_options: its options.
    """
    grid = field.grid(method, dtype=x.dtype, device=x.device)
    options: dict[str, Any] = {"grid_constructor": lambda func, y0, t: grid}
    leaf = x.detach().requires_grad_()
    output = odeint_adjoint(
        field,
        leaf,
        grid[[0, -1]],
        method=method,
        options=options,
        adjoint_method=adjoint_method,
        adjoint_options=adjoint_options,
    )[-1]
    loss = (output - target).square().sum() / (2 * len(x))
    return torch.autograd.grad(loss, (leaf, *field.parameters()))


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖g - g*‖ / ‖g*‖ over all entries of all tensors."""
    g, g_exact = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, exact))
    return float((g - g_exact).norm() / g_exact.norm())


def summary(found: dict[str, pd.DataFrame]) -> list[str]:
    """A sentence for each method: the powers of N by which its errors go."""
    sentences = []
    for name, of in found["memory-free"].groupby("method", sort=False):
        if len(of) > 1:
            powers = [f"{ERRORS[key]} N^{slope(of['depth'], of[key]):.2f}" for key in ("x", "parameters", "state")]
            sentences.append(f"{name}: {', '.join(powers)}")
    return sentences


def draw(found: dict[str, pd.DataFrame], figure: Figure) -> None:
    """The errors of gradient and reconstructed input over depth, a curve for each method."""
    for axes, key in zip(figure.subplots(1, 2), ("parameters", "state"), strict=True):
        curves(axes, found["memory-free"], key, "method", slopes=True)
        axes.set(ylabel="relative error", title=f"memory_free: {ERRORS[key]}")


STUDY = Study(run, summary, draw, "Relative errors of the memory-free gradient, and of the recovered input", (11, 4.5))
