"""The report on one network and one batch: is it a discretised ODE, and what may be relied on if it is?"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic.resnet.arguments import check_device, checked_batch, field_of
from torchdiffeq_symplectic.resnet.bounds import bound
from torchdiffeq_symplectic.resnet.field import ResidualField
from torchdiffeq_symplectic.resnet.gradients import (
    Agreement,
    Loss,
    agreement,
    network_gradient,
    network_states,
    solve_gradient,
)
from torchdiffeq_symplectic.resnet.reference import compare_with_solution
from torchdiffeq_symplectic.resnet.verdict import Evidence, judge
from torchdiffeq_symplectic.resnet.weights import weights_over_depth

__all__ = ["EquivalenceReport", "equivalence_report"]


def _methods() -> list[str]:
    """Those of ``memory_free`` that this torchdiffeq has: heun2 came with 0.2.5."""
    return [method for method in ("euler", "heun2") if method in SOLVERS]


@dataclasses.dataclass(frozen=True)
class EquivalenceReport:
    """What `equivalence_report` found. Norms are Euclidean, over the whole batch as one vector.

    Attributes:
        blocks: their number ``N``.
        interpolate: how the ODE's field lies between two blocks.
        forward_error: the host's Euler states against the network's: the largest ``‖x^host_n - x_n‖ / ‖x_n‖``.
        gradient_error: the gradient of the host's Euler solve, ``adjoint_method="symplectic"``, against backpropagation
            through the network, relative, with respect to x and all parameters.
        distance: ``‖x_n - x(n/N)‖``, ``N + 1`` numbers.
        bound: of it, ``N + 1`` numbers, from the two that follow, measured at each block; see `bounds`.
        amplification: the most that a step enlarges a distance, ``max_n ‖I + J_n/N‖``.
        step_error: the most that a step from the solution errs by.
        way: ``‖x_N - x_0‖``, how far the network takes the batch.
        relative_distance: ``distance[N] / way``, the part of the network's way that its ODE does not explain.
        jump: how much residual functions change from a block to the next, relative to their size.
        growth: how much more they change over two blocks, see `verdict.Evidence` for both.
        smoothness: ``N max_n ‖θ_{n+1} - θ_n‖``; None where the blocks are of different architectures.
        smoothness_by_layer: the same for each parameter of a block, by name.
        smoothness_reason: why there is none, or None.
        memory_free_error: by method, ``"euler"`` and ``"heun2"`` where torchdiffeq has it, the gradient of
            ``adjoint_method="memory_free"`` against the exact one of the same solve.
        verdict: "discretises an ODE", "smooth weights, too shallow" or "not an ODE".
        reasons: of the verdict, with their figures.
        weights: of the parameters that change most, by name, the entry that varies most, over depth.
    """

    blocks: int
    interpolate: str
    forward_error: float
    gradient_error: float
    distance: list[float]
    bound: list[float]
    amplification: float
    step_error: float
    way: float
    relative_distance: float
    jump: float | None
    growth: float | None
    smoothness: float | None
    smoothness_by_layer: dict[str, float]
    smoothness_reason: str | None
    memory_free_error: dict[str, Agreement]
    verdict: str
    reasons: list[str]
    weights: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Everything, by the attributes' names, as JSON takes it; a number that is not finite is None."""
        result: dict[str, Any] = _for_json(dataclasses.asdict(self))
        return result

    def rows(self) -> list[tuple[str, str]]:
        """The figures as names and texts, in the order in which they are to be read."""
        rows = [
            ("blocks", str(self.blocks)),
            ("forward error", f"{self.forward_error:.1e}"),
            ("gradient error", f"{self.gradient_error:.1e}"),
            ("distance to the ODE, at the end", f"{self.distance[-1]:.3g}"),
            ("  relative to the network's way", f"{self.relative_distance:.2g}"),
            ("bound of the distance, at the end", self._bound()),
            ("  amplification, error of a step", f"{self.amplification:.3g}, {self.step_error:.3g}"),
            ("change of f over a block, relative", _figure(self.jump)),
            ("  over two blocks, times that", _figure(self.growth)),
            ("smoothness N max ‖θ_n+1 - θ_n‖", _figure(self.smoothness)),
            *((f"  {name}", _figure(value)) for name, value in self.smoothness_by_layer.items()),
        ]
        for method, found in self.memory_free_error.items():
            cosine = "none" if found.cosine is None else f"{found.cosine:.6f}"
            rows.append((f"memory_free gradient error, {method}", f"{found.relative:.1e}, cosine {cosine}"))
        return rows

    def _bound(self) -> str:
        """A bound larger than the network's own way holds for any two networks."""
        figure = f"{self.bound[-1]:.3g}"
        return figure if self.bound[-1] <= self.way else f"says nothing ({figure}, the network's way is {self.way:.3g})"

    def __str__(self) -> str:
        """The figures in two columns, the verdict and its reasons."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        figures = "\n".join(f"{name:{width}}  {value}" for name, value in rows)
        reasons = "".join(f"\n- {reason}" for reason in self.reasons)
        return f"{figures}\nVerdict: {self.verdict}{reasons}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.blocks} blocks: {self.verdict}>"

    def plot(self, path: str | Path) -> None:
        """Write a picture: distance and bound, weights, and the memory-free gradient's errors over depth.

        Args:
            path: of the file, whose ending says its format. Needs matplotlib.
        """
        from torchdiffeq_symplectic.resnet import plotting

        plotting.draw(self, path)


def equivalence_report(
    blocks: Iterable[nn.Module] | ResidualField,
    x: Tensor,
    *,
    residual: bool = False,
    interpolate: str = "outputs",
    loss: Loss | None = None,
    dtype: torch.dtype | None = None,
    accuracy: float = 1e-3,
) -> EquivalenceReport:
    """Measure whether the residual network of ``blocks`` is the Euler scheme of an ODE, on the batch ``x``.

    The blocks are evaluated in the mode that they are in, as copies: modes, buffers, gradients and the random state
    stay as they are. In training mode a batch norm uses the batch's statistics, and so the ODE is one of the whole
    batch. Host and network are compared, and the ODE is solved, in float64 where the device has it: in float32, ReLUs
    near zero that rounding switches would show. The memory-free gradients are those in the dtype of ``x``.

    Memory: a copy of the parameters, ``N + 1`` states a few times, three gradients, the graph of two blocks. Cost:
    about 30 evaluations of each block for the gradients, and some hundred for the ODE and its constants.

    Args:
        blocks: at least 2 modules that keep the shape, or a `ResidualField`.
        x: what the first block gets, shape ``(batch, ...)``, float32 or float64, on the blocks' device.
        residual: whether a block is the residual function itself; not with a field, which has its own.
        interpolate: ``"outputs"``, ``"weights"`` or ``"piecewise"``, see `ResidualField`; not with a field.
        loss: a scalar function of the last state whose gradient is compared; the default is a sum with random weights,
            the same at each call.
        dtype: of all but the memory-free gradients; the default is float64, on "mps" float32.
        accuracy: of the distance, relative: the solver's tolerance is this part of the error of an Euler step.

    Returns:
        What was measured; ``print`` shows it.

    Raises:
        TypeError: if ``x`` is no tensor, or something in ``blocks`` is no module.
        ValueError: if a block changes the shape or draws random numbers, or an argument does not fit the others.

    Example:
        >>> import torch
        >>> blocks = [torch.nn.Tanh() for _ in range(20)]
        >>> report = equivalence_report(blocks, torch.randn(5, 3), residual=True)
        >>> report.verdict
        'discretises an ODE'
        >>> report.distance[-1] <= report.bound[-1]
        True
    """
    x = checked_batch(x)
    original = field_of(blocks, residual, interpolate)
    check_device(original, x)
    if not 0 < accuracy < 1:
        raise ValueError(f"accuracy must be between 0 and 1, but is {accuracy!r}")
    if dtype is None:
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
    with torch.random.fork_rng([x.device] if x.is_cuda else []), torch.inference_mode(False):
        own = copy.deepcopy(original)
        return _measure(own, x.clone(), _loss(loss, x), dtype, accuracy)


def _measure(field: ResidualField, x: Tensor, loss: Loss, dtype: torch.dtype, accuracy: float) -> EquivalenceReport:
    _require_no_randomness(field, x)
    memory_free = _compare_memory_free(field, x, loss)
    weights = weights_over_depth(field)
    field, x = field.to(dtype), x.to(dtype)
    forward_error, gradient_error = _compare_network(field, x, loss)
    found = compare_with_solution(field.requires_grad_(False), x, accuracy)
    evidence = Evidence.of(found)
    verdict, reasons = judge(evidence, weights, memory_free)
    return EquivalenceReport(
        blocks=len(field),
        interpolate=field.interpolate,
        forward_error=forward_error,
        gradient_error=gradient_error,
        distance=found.distance,
        bound=bound(found.amplifications, found.errors),
        relative_distance=evidence.relative_distance,
        amplification=max(found.amplifications),
        step_error=max(found.errors),
        way=found.change,
        jump=evidence.jump,
        growth=evidence.growth,
        smoothness=weights.smoothness,
        smoothness_by_layer=weights.by_layer,
        smoothness_reason=weights.reason,
        memory_free_error=memory_free,
        verdict=verdict,
        reasons=reasons,
        weights=weights.followed,
    )


@torch.no_grad()
def _require_no_randomness(field: ResidualField, x: Tensor) -> None:
    before = _random_state(x)
    times = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
    torchdiffeq.odeint(field, x, times, method="euler", options={"step_size": field.step_size})
    if not torch.equal(_random_state(x), before):
        raise ValueError(
            "blocks draw random numbers (dropout in training mode, say), so they are no functions of x, and there is "
            "no ODE to compare with. Put them in evaluation mode with .eval()."
        )


def _random_state(x: Tensor) -> Tensor:
    states = [torch.get_rng_state()]
    if x.is_cuda:
        states.append(torch.cuda.get_rng_state(x.device))
    return torch.cat(states)


def _compare_memory_free(field: ResidualField, x: Tensor, loss: Loss) -> dict[str, Agreement]:
    found = {}
    for method in _methods():
        exact = solve_gradient(field, x, loss, method, "symplectic")
        approximate = solve_gradient(field, x, loss, method, "memory_free", replay_check="ignore", corrections=0)
        found[method] = agreement(field, approximate, exact)
    return found


def _compare_network(field: ResidualField, x: Tensor, loss: Loss) -> tuple[float, float]:
    """The forward error and the gradient error."""
    states = network_states(field, x)
    with torch.no_grad():
        hosts = torchdiffeq.odeint(field, x, field.grid(dtype=torch.float64, device="cpu").to(x), method="euler")
    norm = torch.linalg.vector_norm
    errors = [float(norm(a - b)) / (float(norm(b)) or 1.0) for a, b in zip(hosts, states, strict=True)]
    del hosts
    exact = network_gradient(field, states, loss)
    of_host = solve_gradient(field, x, loss, "euler", "symplectic")
    return max(error if math.isfinite(error) else math.inf for error in errors), agreement(
        field, of_host, exact
    ).relative


def _loss(given: Loss | None, x: Tensor) -> Loss:
    """``given``, on states of the dtype of ``x``; or a sum with random weights."""
    if given is not None:
        return lambda state: given(state.to(x.dtype))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return lambda state: (weights.to(state.dtype).to(state.device) * state).sum()


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _for_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _for_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
