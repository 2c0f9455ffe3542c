"""The table that the property tests run over, mode x method x problem, and how gradients are compared with the truth.

A new mode or method is one row here and meets every property. The truth is backpropagation through
``torchdiffeq.odeint`` on the same steps; adaptive methods are given ``first_step``, since ``odeint`` differentiates its
own choice of it, which an exact gradient of the steps does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_symplectic  # noqa: F401 (registers the modes)

State = Tensor | tuple[Tensor, ...]

MODES: dict[str, dict[str, Any]] = {
    "symplectic": {"adjoint_method": "symplectic"},
    "symplectic-stages": {"adjoint_method": "symplectic", "adjoint_options": {"checkpoint": "stages"}},
    "aca": {"adjoint_method": "aca"},
    "baseline": {"adjoint_method": "baseline"},
}

# Keyword arguments of odeint for each method; tolerances such that a solve takes about ten steps.
_FIXED: dict[str, Any] = {"options": {"step_size": 0.13}}
_ADAPTIVE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6, "options": {"first_step": 0.07}}
FIXED = {name: {"method": name, **_FIXED} for name in ("euler", "midpoint", "heun2", "heun3", "rk4")}
ADAPTIVE = {name: {"method": name, **_ADAPTIVE} for name in ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")}
# In the end they use seven slopes, and the implicit ones iterate more than once.
ADAMS = {
    name: {"method": name, "rtol": 1e-7, "options": {"step_size": 0.11, "max_iters": 12}}
    for name in ("explicit_adams", "implicit_adams", "fixed_adams")
}
METHODS: dict[str, dict[str, Any]] = FIXED | ADAPTIVE | ADAMS

# Relative error, norm of the difference over norm, that rounding may leave.
TOLERANCES = {torch.float64: 1e-11, torch.complex128: 1e-11, torch.float32: 5e-5, torch.complex64: 5e-5}
# The gradient of a time is what is left of terms that cancel: in single precision backpropagation itself is then off by
# up to 1e-4 from the same in double precision, on the same steps.
TIME_TOLERANCES = {torch.float64: 1e-11, torch.complex128: 1e-11, torch.float32: 3e-4, torch.complex64: 3e-4}
# Names of tensors that are times, and of those that only say where a step is cut in two. Where steps are accurate the
# cut makes next to no difference, so all that is left of its gradient may be the rounding of what cancels.
TIMES = ("t", "step_t", "jump_t", "step_size", "grid")
CUTS = ("step_t", "jump_t")


def of_table(names: Iterable[str]) -> list[Any]:
    """Parameters for methods, those that the installed torchdiffeq does not have skipped."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in SOLVERS, reason=f"this torchdiffeq has no {name}"))
        for name in names
    ]


each_mode = pytest.mark.parametrize("mode", list(MODES))
each_method = pytest.mark.parametrize("method", of_table(METHODS))
# One of each kind: fixed grid, and adaptive with the first slope carried over.
each_kind = pytest.mark.parametrize("method", ["rk4", "dopri5"])
# Those, and one of each kind that carries slopes of earlier steps.
each_family = pytest.mark.parametrize("method", ["rk4", "dopri5", "adaptive_heun", "implicit_adams"])
with_and_without_time = pytest.mark.parametrize("time_grad", [False, True], ids=["t-fixed", "t-grad"])


def uniform(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Entries from -1 to 1, real and imaginary part each; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        real, imaginary = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
        return torch.complex(real, imaginary).to(dtype)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


class Mixing(nn.Module):
    """``f(t, y) = sin(W y + b sin(w t)) - t y / 5`` on the flattened state: no entry is like another."""

    def __init__(self, size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform(size, size, seed=seed, dtype=dtype) / max(size, 1) ** 0.5)
        self.bias = nn.Parameter(uniform(size, seed=seed + 1, dtype=dtype))
        self.frequency = nn.Parameter(torch.tensor(2.3, dtype=dtype.to_real()))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        flat = y.reshape(-1)
        slope = torch.sin(self.weight @ flat + self.bias * torch.sin(self.frequency * t)) - t * flat / 5
        return slope.view_as(y)


class MixingTuple(Mixing):
    """The same on a tuple of tensors."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], seed: int = 1, dtype: torch.dtype = torch.float64) -> None:
        self.shapes = [torch.Size(shape) for shape in shapes]
        super().__init__(sum(shape.numel() for shape in self.shapes), seed, dtype)

    def forward(self, t: Tensor, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # type: ignore[override]
        flat = torch.cat([part.reshape(-1) for part in y])
        parts = super().forward(t, flat).split([shape.numel() for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))


@dataclasses.dataclass
class Problem:
    """An initial value problem, and what gradients are wanted for.

    Attributes:
        func, y0, t: of the call.
        params: further tensors whose gradients are compared, by name; those of ``func`` if it is a module.
        kwargs: further arguments of the call.
        adjoint_kwargs: arguments of ``odeint_adjoint`` alone.
        dtype: the coarsest that is computed in, that of the state if None.
    """

    func: Callable[..., Any]
    y0: State
    t: Tensor
    params: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    adjoint_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None

    def wanted(self) -> dict[str, Tensor]:
        """Every tensor whose gradient is compared, by name."""
        parts = self.y0 if isinstance(self.y0, tuple) else (self.y0,)
        found = {f"y0[{i}]": part for i, part in enumerate(parts)} | {"t": self.t} | self.params
        if isinstance(self.func, nn.Module):
            found |= dict(self.func.named_parameters())
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad}


def mixing_problem(shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float64, seed: int = 5) -> Problem:
    """The problem that most tests use: no symmetry, uneven output times, gradients wanted for everything."""
    func = Mixing(torch.Size(shape).numel(), seed=seed, dtype=dtype)
    y0 = uniform(*shape, seed=seed + 7, dtype=dtype).requires_grad_()
    t = torch.tensor([0.1, 0.34, 0.9, 1.27], dtype=dtype.to_real(), requires_grad=True)
    return Problem(func, y0, t)


def parts_of(solution: State) -> tuple[Tensor, ...]:
    """A tuple state as it is, a tensor as a tuple of one."""
    return solution if isinstance(solution, tuple) else (solution,)


def loss_of(solution: State) -> Tensor:
    """A fixed functional of the solution that weighs every entry at every time differently, 0-d and real."""
    total = torch.zeros((), dtype=torch.float64)
    for i, part in enumerate(parts_of(solution)):
        product = uniform(*part.shape, seed=100 + i, dtype=part.dtype).conj() * part
        total = total + product.sum().real.to(torch.float64) + part.abs().square().sum() / 3
    return total


def gradients_of(loss: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradients by name, None for tensors that the loss does not depend on."""
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=True)
    return dict(zip(wanted, found, strict=True))


def norm_of(tensor: Tensor) -> float:
    """The Euclidean norm of all entries."""
    return float(torch.linalg.vector_norm(tensor.reshape(-1)))


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth; zero where both are zero."""
    difference = norm_of(found - truth)
    return difference / norm_of(truth) if difference else 0.0


def assert_same_gradients(
    found: Mapping[str, Tensor | None], truth: Mapping[str, Tensor | None], dtype: torch.dtype
) -> None:
    """Every gradient equals the true one as far as states of ``dtype`` allow; an absent one counts as zero."""
    largest = max((norm_of(gradient) for gradient in truth.values() if gradient is not None), default=0.0)
    errors, excessive = {}, []
    for name, expected in truth.items():
        actual = found[name]
        if expected is None and actual is None:
            continue
        shaped = actual if expected is None else expected
        assert shaped is not None
        expected = torch.zeros_like(shaped) if expected is None else expected
        actual = torch.zeros_like(shaped) if actual is None else actual
        assert actual.dtype == expected.dtype, name
        assert actual.shape == expected.shape, name
        errors[name] = relative_error(actual, expected)
        if name in CUTS:
            errors[name] *= norm_of(expected) / largest
        tolerances = TIME_TOLERANCES if name in TIMES else TOLERANCES
        if not errors[name] <= max(tolerances[dtype], tolerances[expected.dtype]):
            excessive.append(name)
    assert not excessive, errors


def solutions(problem: Problem, mode: str, **solver: Any) -> tuple[State, State]:
    """The solution by ``odeint`` and by ``odeint_adjoint`` in a mode."""
    kwargs = solver | problem.kwargs
    if "options" in solver and "options" in problem.kwargs:
        kwargs["options"] = solver["options"] | problem.kwargs["options"]
    truth = torchdiffeq.odeint(problem.func, problem.y0, problem.t, **kwargs)
    adjoint = MODES[mode] | problem.adjoint_kwargs
    if "adjoint_options" in MODES[mode] and "adjoint_options" in problem.adjoint_kwargs:
        adjoint["adjoint_options"] = problem.adjoint_kwargs["adjoint_options"] | MODES[mode]["adjoint_options"]
    return truth, torchdiffeq.odeint_adjoint(problem.func, problem.y0, problem.t, **kwargs, **adjoint)


def assert_exact(problem: Problem, mode: str, *, outputs: slice = slice(None), **solver: Any) -> dict[str, Tensor]:
    """Values bit for bit those of ``odeint``, gradients those of backpropagation through it.

    The loss is of the ``outputs`` chosen. Returns the gradients, without those that are None.
    """
    wanted = problem.wanted()
    assert wanted
    truth, found = solutions(problem, mode, **solver)
    for expected, actual in zip(parts_of(truth), parts_of(found), strict=True):
        assert torch.equal(actual, expected)
    true_loss, loss = (loss_of(tuple(part[outputs] for part in parts_of(solution))) for solution in (truth, found))
    gradients = gradients_of(loss, wanted)
    assert_same_gradients(gradients, gradients_of(true_loss, wanted), problem.dtype or parts_of(truth)[0].dtype)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def register_solver(monkeypatch: pytest.MonkeyPatch, name: str, solver: type) -> None:
    """Put a solver class into torchdiffeq's table for the time of one test."""
    monkeypatch.setitem(SOLVERS, name, solver)
