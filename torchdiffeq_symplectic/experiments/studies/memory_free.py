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

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.hosts.torchdiffeq import tableau_of
from torchdiffeq_symplectic.resnet import ResidualField
from torchdiffeq_symplectic.resnet.studies.common import (
    Sheet,
    Tell,
    column,
    curve,
    depth_axis,
    quiet,
    slope,
    sloped,
    tanh_blocks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DEPTHS", "METHODS", "GradientError", "draw", "gradients", "run", "sheets", "summary"]

DEPTHS = (8, 16, 32, 64, 128, 256)
METHODS = {"euler": "Euler", "heun2": "Heun"}  # torchdiffeq's name -> what tables and pictures call it
BATCH, WIDTH = 32, 16


@dataclass(frozen=True)
class GradientError:
    """‖g - g*‖ / ‖g*‖ for one network, g by ``memory_free`` and g* by ``symplectic``, which is exact."""

    method: str = column("method")
    depth: int = column("depth N [blocks]")
    x: float = column("error of the gradient in x [relative]", ".2e")
    parameters: float = column("error of the gradient in all parameters [relative]", ".2e")
    largest: float = column("largest error of one parameter's gradient [relative]", ".2e")


def run(
    depths: Sequence[int] = DEPTHS, seed: int = 0, device: torch.device | str = "cpu", tell: Tell = quiet
) -> list[GradientError]:
    """The errors of both methods at every depth; where torchdiffeq has no Heun (before 0.2.5), those of Euler's.

    Args:
        depths: numbers of blocks N, each at least 2.
        seed: of input, target and weights; the global random state is not used.
        device: where gradients are computed, in float64.
        tell: is told of progress.
    """
    rows: list[GradientError] = []
    methods = _methods()
    for method, name in methods.items():
        for depth in depths:
            tell(f"{name}, {depth} blocks", len(rows) / (len(methods) * len(depths)))
            generator = torch.Generator().manual_seed(seed)
            x, target = torch.randn(2, BATCH, WIDTH, generator=generator, dtype=torch.float64).to(device)
            field = ResidualField(tanh_blocks(depth, WIDTH, generator), residual=True).to(device)
            exact = gradients(field, x, target, method, "symplectic")
            found = gradients(field, x, target, method, "memory_free")
            rows.append(
                GradientError(
                    name,
                    depth,
                    _error(found[:1], exact[:1]),
                    _error(found[1:], exact[1:]),
                    max(_error([g], [g_exact]) for g, g_exact in zip(found[1:], exact[1:], strict=True)),
                )
            )
    return rows


def gradients(field: ResidualField, x: Tensor, target: Tensor, method: str, adjoint_method: str) -> tuple[Tensor, ...]:
    """Gradients of ½‖x_N - target‖² / batch with respect to the input x_0, then to the field's parameters.

    Args:
        field: the network.
        x: its input, shape ``(batch, width)``.
        target: in the same shape.
        method: "euler" or "heun2".
        adjoint_method: the gradient mode.
    """
    grid = field.grid(method, dtype=x.dtype, device=x.device)
    options: dict[str, Any] = {"grid_constructor": lambda func, y0, t: grid}
    leaf = x.detach().requires_grad_()
    output = odeint_adjoint(field, leaf, grid[[0, -1]], method=method, options=options, adjoint_method=adjoint_method)[
        -1
    ]
    loss = (output - target).square().sum() / (2 * len(x))
    return torch.autograd.grad(loss, (leaf, *field.parameters()))


def sheets(rows: Sequence[GradientError]) -> list[Sheet]:
    """What to write and to show."""
    return [Sheet("memory-free", "How far the memory-free gradient is from the exact one", rows, rows)]


def summary(rows: Sequence[GradientError]) -> list[str]:
    """A sentence for each method: the powers of N by which its errors go."""
    sentences = []
    for name, of in _by_method(rows).items():
        depths = [row.depth for row in of]
        if len(depths) < 2:
            continue
        in_x, in_parameters = slope(depths, [row.x for row in of]), slope(depths, [row.parameters for row in of])
        sentences.append(
            f"{name}: the error in x goes as N^{in_x:.2f}, that in the parameters as N^{in_parameters:.2f}"
        )
    return sentences


def draw(rows: Sequence[GradientError], figure: Figure) -> None:
    """The errors over depth, both logarithmic, a curve for each method and kind of gradient."""
    axes = figure.subplots()
    style = 0
    for name, of in _by_method(rows).items():
        depths = [row.depth for row in of]
        for kind, values in ("x", [row.x for row in of]), ("all parameters", [row.parameters for row in of]):
            curve(axes, depths, values, style, sloped(f"{name}, {kind}", depths, values))
            style += 1
    depth_axis(axes, depths)
    axes.set_yscale("log")
    axes.set(ylabel="relative error of the gradient", title="The memory-free gradient, for weights smooth in depth")
    axes.legend()


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖g - g*‖ / ‖g*‖ over all entries of all tensors."""
    g, g_exact = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (found, exact))
    return float((g - g_exact).norm() / g_exact.norm())


def _methods() -> dict[str, str]:
    """Those of `METHODS` that the installed torchdiffeq has."""
    found = {}
    for method, name in METHODS.items():
        with contextlib.suppress(KeyError):
            tableau_of(method)
            found[method] = name
    return found


def _by_method(rows: Sequence[GradientError]) -> dict[str, list[GradientError]]:
    return {name: [row for row in rows if row.method == name] for name in dict.fromkeys(row.method for row in rows)}
