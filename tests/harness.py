"""One harness for every test: hosts x modes x methods, one problem, one way to solve, differentiate and compare.

A new mode or method is one row here and meets every property. The truth is backpropagation through the host's own
solve on the same steps. Both hosts differentiate their own choice of the first step, which an exact gradient of the
steps does not: torchdiffeq is given ``first_step``, torchdyn's choice is held constant (`first_step_held`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS as TORCHDIFFEQ_SOLVERS

import torchdiffeq_symplectic

State = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
Gradients = dict[str, Tensor | None]

DOUBLE = torch.float64
BACKPROPAGATION = "backprop"

# The exact modes, as arguments of odeint_adjoint; `neural_ode` translates them for torchdyn.
MODES: dict[str, dict[str, Any]] = {
    "symplectic": {"adjoint_method": "symplectic"},
    "stages": {"adjoint_method": "symplectic", "adjoint_options": {"checkpoint": "stages"}},
    "aca": {"adjoint_method": "aca"},
    "baseline": {"adjoint_method": "baseline"},
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        host: "torchdiffeq" or "torchdyn".
        solver: its name, or what makes a torchdyn solver for a dtype and a number of entries of the state.
        settings: further arguments of the solve (torchdiffeq) or of the model (torchdyn); about ten steps.
        stages: evaluations a step that are its own, of explicit Runge-Kutta methods; a slope that is handed over counts
            where it is made. 0 for other methods.
        adaptive: whether it chooses its steps.
        halves: whether its state is that of the field and as many velocities, side by side.
    """

    host: str
    solver: Any
    settings: Mapping[str, Any]
    stages: int = 0
    adaptive: bool = False
    halves: bool = False


_FIXED: dict[str, Any] = {"options": {"step_size": 0.13}}
_ADAPTIVE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6, "options": {"first_step": 0.07}}
_LOW_ORDER: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-3, "options": {"first_step": 0.07}}
# In the end they use seven slopes, and the implicit ones iterate more than once.
_ADAMS: dict[str, Any] = {"rtol": 1e-7, "options": {"step_size": 0.11, "max_iters": 12}}

_STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
_ADAPTIVE_STAGES = {"dopri5": 6, "dopri8": 13, "bosh3": 3}
_LOW_ORDER_STAGES = {"fehlberg2": 2, "adaptive_heun": 1}
_ADAMS_METHODS = ("explicit_adams", "implicit_adams", "fixed_adams")

METHODS: dict[str, Method] = {
    **{name: Method("torchdiffeq", name, _FIXED, stages) for name, stages in _STAGES.items()},
    **{name: Method("torchdiffeq", name, _ADAPTIVE, s, adaptive=True) for name, s in _ADAPTIVE_STAGES.items()},
    **{name: Method("torchdiffeq", name, _LOW_ORDER, s, adaptive=True) for name, s in _LOW_ORDER_STAGES.items()},
    **{name: Method("torchdiffeq", name, _ADAMS) for name in _ADAMS_METHODS},
}
METHODS = {name: row for name, row in METHODS.items() if name in TORCHDIFFEQ_SOLVERS}
HAS_TORCHDYN = importlib.util.find_spec("torchdyn") is not None

if HAS_TORCHDYN:
    import torchdyn_solvers
    from torchdyn.core import NeuralODE

    _TIGHT: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    METHODS |= {
        f"torchdyn-{name}": Method("torchdyn", solver, _TIGHT if adaptive else {}, stages, adaptive, halves)
        for name, (solver, stages, adaptive, halves) in torchdyn_solvers.TABLE.items()
    }

OF_TORCHDIFFEQ = [name for name, row in METHODS.items() if row.host == "torchdiffeq"]
OF_TORCHDYN = [name for name, row in METHODS.items() if row.host == "torchdyn"]
EXPLICIT = [name for name, row in METHODS.items() if row.stages]
ADAPTIVE = [name for name in OF_TORCHDIFFEQ if METHODS[name].adaptive]
# One of each kind: a fixed grid, the last slope handed over; another slope, several of them; steps of no tableau.
FEW = [n for n in ("rk4", "dopri5", "torchdyn-rk4", "torchdyn-dopri5") if n in METHODS]
KINDS = [n for n in (*FEW, "adaptive_heun", "implicit_adams", "torchdyn-hyper-euler") if n in METHODS]


def over(methods: Iterable[str], modes: Iterable[str] = MODES, every: int = 1) -> pytest.MarkDecorator:
    """Every mode with every method, most of it slow.

    By default the first mode meets all methods, or one in ``every``, and the others some by turns.
    """
    turns = list(modes)
    cases = []
    for i, method in enumerate(methods):
        for j, mode in enumerate(turns):
            is_quick = i % every == 0 if j == 0 else i % (3 * every if every > 1 else max(len(turns), 3)) == j
            cases.append(pytest.param(mode, method, marks=[] if is_quick else pytest.mark.slow))
    return pytest.mark.parametrize(("mode", "method"), cases)


each_mode = pytest.mark.parametrize("mode", MODES)
needs_torchdyn = pytest.mark.skipif(not HAS_TORCHDYN, reason="torchdyn is not installed")

# Relative error, norm of the difference over norm, that rounding may leave.
TOLERANCES = {DOUBLE: 1e-11, torch.complex128: 1e-11, torch.float32: 5e-5, torch.complex64: 5e-5}
# The gradient of a time is what is left of terms that cancel: in single precision backpropagation itself is then off by
# up to 1e-4 from the same in double precision, on the same steps.
TIME_TOLERANCES = {DOUBLE: 1e-11, torch.complex128: 1e-11, torch.float32: 3e-4, torch.complex64: 3e-4}
TIMES = ("t", "step_t", "jump_t", "step_size", "grid", "save_at")
# Where steps are accurate, a cut in two makes next to no difference: its gradient may be the rounding of what cancels.
CUTS = ("step_t", "jump_t")


# Fields and problems.


def uniform(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Entries from -1 to 1, real and imaginary part each; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        real, imaginary = (torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1 for _ in range(2))
        return torch.complex(real, imaginary).to(dtype)
    return (torch.rand(shape, generator=generator, dtype=DOUBLE) * 2 - 1).to(dtype)


class Mixing(nn.Module):
    """``f(t, y) = sin(W y + b sin(w t)) - t y / 5`` on the flattened state: no entry is like another."""

    def __init__(self, size: int, seed: int = 1, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform(size, size, seed=seed, dtype=dtype) / max(size, 1) ** 0.5)
        self.bias = nn.Parameter(uniform(size, seed=seed + 1, dtype=dtype))
        self.frequency = nn.Parameter(torch.tensor(2.3, dtype=dtype.to_real()))

    def forward(self, t: Tensor, y: Any, args: Any = None) -> Any:
        # torchdyn's nodes have the dtype of the state, so they make times complex with it.
        t = t.real.to(y.dtype.to_real()) if t.is_complex() else t
        flat = y.reshape(-1)
        slope = torch.sin(self.weight @ flat + self.bias * torch.sin(self.frequency * t)) - t * flat / 5
        return slope.view_as(y)


class MixingTuple(Mixing):
    """The same on a tuple of tensors."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], seed: int = 1, dtype: torch.dtype = DOUBLE) -> None:
        self.shapes = [torch.Size(shape) for shape in shapes]
        super().__init__(sum(shape.numel() for shape in self.shapes), seed, dtype)

    def forward(self, t: Tensor, y: Any, args: Any = None) -> Any:
        flat = torch.cat([part.reshape(-1) for part in y])
        parts = super().forward(t, flat).split([shape.numel() for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))


class Net(nn.Module):
    """A small network of time and state, row by row, with no symmetry in either; counts its evaluations."""

    def __init__(self, width: int = 3, hidden: int = 5, seed: int = 0, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Linear(width, hidden, dtype=dtype)
        self.outer = nn.Linear(hidden, width, dtype=dtype)
        self.rate = nn.Parameter(torch.empty(hidden, dtype=dtype))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.9 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        self.evaluations += 1
        result: Tensor = self.outer(torch.tanh(self.inner(y) + t * self.rate)) - 0.3 * y
        return result


def initial(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    """An initial state of unequal entries, a leaf."""
    size = torch.Size(shape or (2, 3))
    values = torch.randn(size, generator=torch.Generator().manual_seed(7), dtype=DOUBLE)
    return values.to(dtype).requires_grad_()


def times(*values: float, dtype: torch.dtype = DOUBLE) -> Tensor:
    """Output times, off the fixed grids, several in one step."""
    return torch.tensor(values or (0.1, 0.32, 0.4, 1.0), dtype=dtype)


@dataclasses.dataclass
class Problem:
    """An initial value problem, and what gradients are wanted for.

    Attributes:
        field, y0, t: of the call.
        extra: further tensors whose gradients are compared, by name; the parameters of field and solver are anyway.
        settings: further arguments of the call, options merged with those of the method.
        adjoint: arguments of odeint_adjoint alone; in torchdyn ``adjoint_options``.
        dtype: the coarsest that is computed in, that of the state if None.
    """

    field: Callable[..., Any]
    y0: Any
    t: Any
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    adjoint: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None

    def wanted(self) -> dict[str, Tensor]:
        """Every tensor whose gradient is compared, by name."""
        found = {f"y0[{i}]": part for i, part in enumerate(parts_of(self.y0))} | self.extra
        if isinstance(self.t, Tensor):
            found |= {"t": self.t}
        for prefix, part in (("", self.field), ("solver.", self.settings.get("solver"))):
            if isinstance(part, nn.Module):
                found |= {f"{prefix}{name}": parameter for name, parameter in part.named_parameters()}
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad}


def problem_for(
    method: str = "rk4",
    shape: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = DOUBLE,
    *,
    time_grad: bool = True,
    seed: int = 5,
) -> Problem:
    """The problem that most tests use: no symmetry, uneven output times, gradients wanted for everything."""
    row, size = METHODS[method], torch.Size(shape).numel()
    field = Mixing(size, seed=seed, dtype=dtype)
    width = (*shape[:-1], 2 * shape[-1]) if row.halves else shape
    y0 = uniform(*width, seed=seed + 7, dtype=dtype).requires_grad_()
    every = [0.1, 0.22, 0.34, 0.51, 0.66, 0.9, 1.0, 1.27]  # torchdyn's fixed steps lead from each to the next
    values = every if row.host == "torchdyn" and not row.adaptive else [0.1, 0.34, 0.9, 1.27]
    t = torch.tensor(values, dtype=dtype.to_real(), requires_grad=time_grad)
    problem = Problem(field, y0, t)
    if callable(row.solver):  # an instance, whose parameters are trained, too
        problem.settings["solver"] = row.solver(dtype, size)
    return problem


# Solving, in any way.


@contextlib.contextmanager
def first_step_held() -> Iterator[None]:
    """torchdyn's choice of the first step becomes a constant of the same value."""
    if not HAS_TORCHDYN:
        yield
        return
    module = sys.modules["torchdyn.numerics.odeint"]  # the package has a function of this name as well
    choose = module.init_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "init_step", lambda *args, **kwargs: choose(*args, **kwargs).detach())
        yield


def neural_ode(mode: str, field: Any, **settings: Any) -> Any:
    """torchdyn's model in one of MODES, "memory_free", or by backpropagation."""
    own: dict[str, Any] = {"sensitivity": "autograd"} if mode == BACKPROPAGATION else arguments_of(mode)
    options = {**own.pop("adjoint_options", {}), **settings.pop("adjoint_options", {})}
    make = settings.pop("make", NeuralODE)
    model = make(field, sensitivity=own.get("sensitivity", own.get("adjoint_method")), **settings)
    if options and mode != BACKPROPAGATION:
        model.adjoint_options = options
    return model


def arguments_of(mode: str) -> dict[str, Any]:
    """The arguments of odeint_adjoint for a mode; a copy."""
    own = MODES.get(mode, {"adjoint_method": mode})
    return {name: dict(value) if isinstance(value, dict) else value for name, value in own.items()}


def solve(mode: str, field: Any, y0: Any, t: Any, method: str = "rk4", **settings: Any) -> Any:
    """The solution, in torchdyn without its times.

    ``mode`` is one of MODES, "memory_free", "backprop" for the host's own graph, or "use:" and a mode, which then is
    not named by an argument but chosen by `torchdiffeq_symplectic.use`.
    """
    if mode.startswith("use:"):
        own = arguments_of(mode.removeprefix("use:"))
        options = {**own.get("adjoint_options", {}), **settings.pop("adjoint_options", {})}
        settings.pop("adjoint_params", None)
        with torchdiffeq_symplectic.use(own["adjoint_method"], **options):
            return _solve(BACKPROPAGATION, field, y0, t, method, settings, held=False)
    return _solve(mode, field, y0, t, method, settings, held=mode == BACKPROPAGATION)


def _solve(mode: str, field: Any, y0: Any, t: Any, method: str, settings: dict[str, Any], *, held: bool) -> Any:
    row = METHODS[method]
    merged = {**row.settings, **settings}
    if "options" in row.settings and isinstance(settings.get("options"), dict):
        merged["options"] = {**row.settings["options"], **settings["options"]}
    if row.host == "torchdiffeq":
        merged.setdefault("method", row.solver)
        if mode == BACKPROPAGATION:
            merged = {name: value for name, value in merged.items() if not name.startswith("adjoint_")}
            return torchdiffeq.odeint(field, y0, t, **merged)
        own = arguments_of(mode)
        if "adjoint_options" in own and "adjoint_options" in merged:
            merged["adjoint_options"] = {**merged["adjoint_options"], **own["adjoint_options"]}
        return torchdiffeq.odeint_adjoint(field, y0, t, **{**own, **merged})
    merged.pop("adjoint_params", None)
    call = merged.pop("call", {})
    first = y0.flatten() if isinstance(y0, Tensor) else next(iter(y0.values()))
    size = first.numel() // (2 if row.halves else 1)
    if "solver" not in merged:
        merged["solver"] = row.solver(first.dtype, size) if callable(row.solver) else row.solver
    model = neural_ode(mode, field, **merged)
    with first_step_held() if held else contextlib.nullcontext():
        returned = model(y0, t, **call)
    return returned[1] if isinstance(returned, tuple) else returned


def parts_of(solution: Any) -> tuple[Tensor, ...]:
    """The tensors of a tuple or a dictionary, or a tensor as a tuple of one."""
    if isinstance(solution, dict):
        return tuple(solution.values())
    return tuple(solution) if isinstance(solution, (tuple, list)) else (solution,)


def loss_of(solution: Any) -> Tensor:
    """A fixed functional of the solution that weighs every entry at every time differently, 0-d and real."""
    parts = parts_of(solution)
    total = torch.zeros((), dtype=DOUBLE, device=parts[0].device)
    for i, part in enumerate(parts):
        product = uniform(*part.shape, seed=100 + i, dtype=part.dtype).to(part.device).conj() * part
        total = total + product.sum().real.to(DOUBLE) + part.abs().square().sum() / 3
    return total


# Comparing.


def norm_of(tensor: Tensor) -> float:
    """The Euclidean norm of all entries."""
    return float(torch.linalg.vector_norm(tensor.detach().reshape(-1)))


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth; zero where both are zero."""
    assert found.shape == truth.shape
    difference = norm_of(found - truth)
    return difference / norm_of(truth) if difference else 0.0


def error(found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> float:
    """The largest `relative_error` among tensors; missing ones count as wrong."""
    pairs = list(zip(found, truth, strict=True))
    assert all(one is not None and other is not None for one, other in pairs)
    return max(relative_error(one, other) for one, other in pairs if one is not None and other is not None)


def gradients_of(loss: Tensor, wanted: Mapping[str, Tensor]) -> Gradients:
    """The gradients by name, None for tensors that the loss does not depend on."""
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=True)
    return dict(zip(wanted, found, strict=True))


def gradients(mode: str, field: Any, y0: Any, t: Any, wanted: Sequence[Tensor], **arguments: Any) -> list[Tensor]:
    """The gradients of `loss_of` the solution with respect to ``wanted``."""
    return list(torch.autograd.grad(loss_of(solve(mode, field, y0, t, **arguments)), wanted))


def assert_same_gradients(found: Gradients, truth: Gradients, dtype: torch.dtype = DOUBLE) -> None:
    """Every gradient equals the true one as far as states of ``dtype`` allow; an absent one counts as zero."""
    largest = max((norm_of(gradient) for gradient in truth.values() if gradient is not None), default=0.0)
    errors, excessive = {}, []
    for name, expected in truth.items():
        actual = found[name]
        shaped = actual if expected is None else expected
        if shaped is None:
            continue
        expected = torch.zeros_like(shaped) if expected is None else expected
        actual = torch.zeros_like(shaped) if actual is None else actual
        assert actual.dtype == expected.dtype, name
        assert actual.shape == expected.shape, name
        errors[name] = relative_error(actual, expected)
        if name in CUTS and largest:
            errors[name] *= norm_of(expected) / largest
        tolerances = TIME_TOLERANCES if name in TIMES else TOLERANCES
        if not errors[name] <= max(tolerances[dtype], tolerances[expected.dtype]):
            excessive.append(name)
    assert not excessive, errors


def assert_equal_values(found: Any, truth: Any) -> None:
    """Values bit for bit, and dtypes."""
    for actual, expected in zip(parts_of(found), parts_of(truth), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def assert_exact(
    problem: Problem, mode: str, method: str = "rk4", loss: Callable[[Any], Tensor] = loss_of, **settings: Any
) -> dict[str, Tensor]:
    """Values bit for bit those of the host, gradients those of backpropagation through it.

    Returns the gradients, without those that are None.
    """
    wanted = problem.wanted()
    assert wanted
    own = {**problem.settings, **settings}
    truth = solve(BACKPROPAGATION, problem.field, problem.y0, problem.t, method, **own)
    found = solve(mode, problem.field, problem.y0, problem.t, method, **{**own, **problem.adjoint})
    assert_equal_values(found, truth)
    gradients = gradients_of(loss(found), wanted)
    dtype = problem.dtype or parts_of(truth)[0].dtype
    assert_same_gradients(gradients, gradients_of(loss(truth), wanted), dtype)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def count(field: Net, run: Callable[[], object]) -> int:
    """How often ``run`` evaluates ``field``."""
    before = field.evaluations
    run()
    return field.evaluations - before


def register_solver(monkeypatch: pytest.MonkeyPatch, name: str, solver: type) -> None:
    """Put a solver class into torchdiffeq's table for the time of one test."""
    monkeypatch.setitem(TORCHDIFFEQ_SOLVERS, name, solver)
    monkeypatch.setitem(METHODS, name, Method("torchdiffeq", name, {"options": {"step_size": 0.17}}))
