"""The table that the property tests of torchdyn's adapter run over, solver x mode, and the truth they compare with.

The truth is the same model with ``sensitivity="autograd"``, with torchdyn's choice of the first step held constant: an
exact gradient of the steps does not differentiate it. Import this after ``pytest.importorskip("torchdyn")``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Mixing, assert_same_gradients, gradients_of, loss_of, uniform
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.numerics.solvers.hyper import HyperEuler, HyperMidpoint, HyperRungeKutta4
from torchdyn.numerics.solvers.ode import (
    AsynchronousLeapfrog,
    DormandPrince45,
    Euler,
    Midpoint,
    RungeKutta4,
    SolverTemplate,
    Tsitouras45,
)
from torchdyn.numerics.solvers.templates import DiffEqSolver

import torchdiffeq_symplectic  # noqa: F401 (registers the modes)

DOUBLE = torch.float64
State = Tensor | dict[str, Tensor]

# Keyword arguments of the constructor, and what is set on the model afterwards.
MODES: dict[str, dict[str, Any]] = {
    "symplectic": {"sensitivity": "symplectic"},
    "symplectic-stages": {"sensitivity": "symplectic", "adjoint_options": {"checkpoint": "stages"}},
    "aca": {"sensitivity": "aca"},
    "baseline": {"sensitivity": "baseline"},
}


class Field(Mixing):
    """`Mixing` with torchdyn's signature; it computes in the dtype of the state, whatever that of the time is."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        # torchdyn's nodes have the dtype of the state, so they make times complex with it.
        return super().forward(t.real.to(y.dtype.to_real()), y)


class Stiffening(Field):
    """A field that becomes fast half-way, so that steps are rejected."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        time = t.to(y.dtype)
        fast = 1 + 12 * torch.sigmoid(30 * (time - 0.5))
        return super().forward(t, y) * fast + torch.sin(25 * time) * y.flip(0)


# Solvers of Runge-Kutta form that the package has never seen.


class Uneven(SolverTemplate):  # type: ignore[misc]
    """Three stages; nodes, row sums and weights have nothing to do with each other, and none is zero."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(order=1)
        self.dtype = dtype
        self.stepping_class = "fixed"

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        first = f(t + 0.1 * dt, x)
        second = f(t + 0.85 * dt, x + dt * (0.25 * first))
        third = f(t + 0.3 * dt, x - dt * (0.4 * first - 1.1 * second))
        return None, x + dt * (0.2 * first + 0.35 * second + 0.45 * third), None


class BogackiShampine(DiffEqSolver):  # type: ignore[misc]
    """The 3(2) pair of Bogacki and Shampine (https://doi.org/10.1016/0893-9659(89)90079-7), first same as last."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(order=3, stepping_class="adaptive")
        self.dtype = dtype

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        k1 = f(t, x) if k1 is None else k1
        k2 = f(t + dt / 2, x + dt / 2 * k1)
        k3 = f(t + 3 / 4 * dt, x + 3 / 4 * dt * k2)
        solution = x + dt * (2 / 9 * k1 + 1 / 3 * k2 + 4 / 9 * k3)
        k4 = f(t + dt, solution)
        return k4, solution, dt * (-5 / 72 * k1 + 1 / 12 * k2 + 1 / 9 * k3 - 1 / 8 * k4), (k1, k2, k3, k4)


class FreshHeun(DiffEqSolver):  # type: ignore[misc]
    """Hands no slope on, so that every step but the first evaluates its own first one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(order=2, stepping_class="adaptive")
        self.dtype = dtype

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        k1 = f(t, x) if k1 is None else k1
        k2 = f(t + dt, x + dt * k1)
        return self.carried(k2), x + dt / 2 * (k1 + k2), dt / 2 * (k2 - k1), (k1, k2)

    def carried(self, last: Tensor) -> Tensor | None:
        return None


class StaleHeun(FreshHeun):
    """Hands on a slope that is not the one at the end of the step."""

    def carried(self, last: Tensor) -> Tensor | None:
        return last


# Solvers whose steps are of another form, which autograd can follow all the same.


class Normalised(Euler):  # type: ignore[misc]
    """Nonlinear in the slope."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        return None, x + dt * slope / (1 + slope.abs()), None


class Exponential(Euler):  # type: ignore[misc]
    """Linear in the slope, with a weight that is no multiple of the step size."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        return None, x + (1 - torch.exp(-dt)) * f(t, x), None


class Shrinking(Euler):  # type: ignore[misc]
    """Scales the state besides adding slopes."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        return None, (1 - 0.1 * dt) * x + dt * f(t, x), None


class Projecting(Midpoint):  # type: ignore[misc]
    """Puts the state back onto a sphere after each step."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        _, solution, _ = super().step(f, x, t, dt)
        return None, solution / solution.norm(), None


class Converging(Euler):  # type: ignore[misc]
    """The implicit midpoint rule, iterated: the number of evaluations depends on the values."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        slope = f(t, x)
        for _ in range(50):
            before, slope = slope, f(t + dt / 2, x + dt / 2 * slope)
            if float((slope - before).detach().abs().max()) < 1e-6:
                break
        return None, x + dt * slope, None


class Learned(Euler):  # type: ignore[misc]
    """Of Runge-Kutta form at each moment, but the coefficients are trained."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.alpha = nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        first = f(t, x)
        second = f(t + self.alpha * dt, x + self.alpha * dt * first)
        share = 1 / (2 * self.alpha)
        return None, x + dt * ((1 - share) * first + share * second), None


@dataclasses.dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes:
        make: the solver for a dtype and a number of entries of the state, by name or as an instance.
        adaptive: whether it chooses its steps.
        halves: whether its state is that of the field and as many velocities, side by side.
    """

    make: Callable[[torch.dtype, int], str | nn.Module]
    adaptive: bool = False
    halves: bool = False


def _named(name: str) -> Callable[[torch.dtype, int], str]:
    return lambda dtype, size: name


def _instance(solver: Callable[[torch.dtype], nn.Module]) -> Callable[[torch.dtype, int], nn.Module]:
    return lambda dtype, size: solver(dtype)


def _hyper(solver: Callable[..., nn.Module]) -> Callable[[torch.dtype, int], nn.Module]:
    return lambda dtype, size: solver(Field(size, seed=41, dtype=dtype), dtype)


EXPLICIT: dict[str, Solver] = {
    "euler": Solver(_named("euler")),
    "midpoint": Solver(_named("midpoint")),
    "rk4": Solver(_named("rk4")),
    "dopri5": Solver(_named("dopri5"), adaptive=True),
    "tsit5": Solver(_named("tsit5"), adaptive=True),
    "Euler()": Solver(_instance(Euler)),
    "Midpoint()": Solver(_instance(Midpoint)),
    "RungeKutta4()": Solver(_instance(RungeKutta4)),
    "DormandPrince45()": Solver(_instance(DormandPrince45), adaptive=True),
    "Tsitouras45()": Solver(_instance(Tsitouras45), adaptive=True),
    "uneven": Solver(_instance(Uneven)),
    "bogacki-shampine": Solver(_instance(BogackiShampine), adaptive=True),
    "fresh-heun": Solver(_instance(FreshHeun), adaptive=True),
    "stale-heun": Solver(_instance(StaleHeun), adaptive=True),
}
OF_ANOTHER_FORM: dict[str, Solver] = {
    "hyper-euler": Solver(_hyper(HyperEuler)),
    "hyper-midpoint": Solver(_hyper(HyperMidpoint)),
    "hyper-rk4": Solver(_hyper(HyperRungeKutta4)),
    "alf": Solver(_named("alf"), halves=True),
    "AsynchronousLeapfrog()": Solver(lambda dtype, size: AsynchronousLeapfrog(dtype=dtype), halves=True),
    "normalised": Solver(_instance(Normalised)),
    "exponential": Solver(_instance(Exponential)),
    "shrinking": Solver(_instance(Shrinking)),
    "projecting": Solver(_instance(Projecting)),
    "converging": Solver(_instance(Converging)),
    "learned": Solver(_instance(Learned)),
}
SOLVERS = EXPLICIT | OF_ANOTHER_FORM

each_mode = pytest.mark.parametrize("mode", MODES)
each_solver = pytest.mark.parametrize("solver", SOLVERS)
each_explicit_solver = pytest.mark.parametrize("solver", EXPLICIT)
# One of each kind: fixed steps, adaptive ones with the first slope carried over, and steps replayed whole.
each_kind = pytest.mark.parametrize("solver", ["rk4", "dopri5", "hyper-euler"])
each_named_kind = pytest.mark.parametrize("solver", ["rk4", "dopri5"])
with_and_without_time = pytest.mark.parametrize("time_grad", [False, True], ids=["t-fixed", "t-grad"])


@dataclasses.dataclass
class Problem:
    """A model, the call of it, and what gradients are wanted for.

    Attributes:
        field, x, t_span: of the model and the call.
        settings: further arguments of the constructor, the solver among them.
        call: further arguments of the call.
        params: further tensors whose gradients are compared, by name; those of field and solver if they are modules.
        options: the model's ``adjoint_options``, besides those of the mode.
        make: what is constructed.
    """

    field: Callable[..., Any]
    x: State
    t_span: Any
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    params: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    make: Callable[..., nn.Module] = NeuralODE

    def wanted(self) -> dict[str, Tensor]:
        """Every tensor whose gradient is compared, by name; the times as "t", which `cases` knows."""
        found = self.x if isinstance(self.x, dict) else {"x": self.x}
        if isinstance(self.t_span, Tensor):
            found = found | {"t": self.t_span}
        found = found | self.params
        for name, part in (("field", self.field), ("solver", self.settings.get("solver"))):
            if isinstance(part, nn.Module):
                found = found | {f"{name}.{key}": value for key, value in part.named_parameters()}
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad}

    def model(self, mode: str) -> nn.Module:
        """The model in one of MODES, or in "autograd"."""
        own: dict[str, Any] = {"sensitivity": "autograd"} if mode == "autograd" else MODES[mode]
        arguments = {name: value for name, value in own.items() if name != "adjoint_options"}
        model = self.make(self.field, **self.settings, **arguments)
        if mode != "autograd" and (options := self.options | own.get("adjoint_options", {})):
            model.adjoint_options = options
        return model

    def solve(self, mode: str) -> tuple[Tensor, State]:
        """What the call of the model returns; in "autograd" with the first step held constant."""
        with first_step_held() if mode == "autograd" else contextlib.nullcontext():
            return self.model(mode)(self.x, self.t_span, **self.call)  # type: ignore[no-any-return]

    def gradients(self, mode: str, loss: Callable[[Tensor, State], Tensor] | None = None) -> dict[str, Tensor | None]:
        """Those of a loss of the times and the solution that `solve` returns, by default `weighed`."""
        return gradients_of((loss or weighed)(*self.solve(mode)), self.wanted())


def problem_for(
    solver: str, shape: tuple[int, ...] = (2, 3), dtype: torch.dtype = DOUBLE, *, time_grad: bool = True
) -> Problem:
    """The problem that most tests use: no symmetry, uneven times, gradients wanted for everything."""
    row, size = SOLVERS[solver], torch.Size(shape).numel()
    field = Field(size, seed=5, dtype=dtype)
    x = uniform(*((*shape[:-1], 2 * shape[-1]) if row.halves else shape), seed=12, dtype=dtype).requires_grad_()
    times = [0.1, 0.34, 0.9, 1.27] if row.adaptive else [0.1, 0.22, 0.34, 0.51, 0.66, 0.9, 1.0, 1.27]
    t_span = torch.tensor(times, dtype=dtype.to_real(), requires_grad=time_grad)
    return Problem(field, x, t_span, {"solver": row.make(dtype, size)})


@contextlib.contextmanager
def first_step_held() -> Iterator[None]:
    """torchdyn's choice of the first step becomes a constant of the same value."""
    module = sys.modules["torchdyn.numerics.odeint"]  # the package has a function of this name as well
    choose = module.init_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "init_step", lambda *args, **kwargs: choose(*args, **kwargs).detach())
        yield


def parts_of(solution: State) -> tuple[Tensor, ...]:
    """The tensors of a dictionary, or a tensor as a tuple of one."""
    return tuple(solution.values()) if isinstance(solution, dict) else (solution,)


def weighed(t_eval: Tensor, solution: State) -> Tensor:
    """`cases.loss_of` the solution."""
    return loss_of(parts_of(solution))


def assert_equal_values(found: tuple[Tensor, State], truth: tuple[Tensor, State]) -> None:
    """Times and states, bit for bit."""
    for actual, expected in zip((found[0], *parts_of(found[1])), (truth[0], *parts_of(truth[1])), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def assert_exact(
    problem: Problem, mode: str, loss: Callable[[Tensor, State], Tensor] | None = None
) -> dict[str, Tensor]:
    """Values bit for bit those of torchdyn's autograd mode, gradients those of backpropagation through it.

    Returns the gradients, without those that are None.
    """
    wanted = problem.wanted()
    assert wanted
    truth, found = problem.solve("autograd"), problem.solve(mode)
    assert_equal_values(found, truth)
    assert found[0].requires_grad == truth[0].requires_grad
    gradients = gradients_of((loss or weighed)(*found), wanted)
    assert_same_gradients(gradients, gradients_of((loss or weighed)(*truth), wanted), parts_of(truth[1])[0].dtype)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@dataclasses.dataclass
class Step:
    """One call of a solver's step: the state and time it starts from, its size, and the state it arrives at."""

    x: Tensor
    t: Tensor
    dt: Tensor
    end: Tensor


@contextlib.contextmanager
def steps_recorded(solver: Any) -> Iterator[list[Step]]:
    """The calls of a solver's step, those that are rejected included."""
    calls: list[Step] = []
    step = type(solver).step

    def recording(self: Any, f: Any, x: Tensor, t: Tensor, dt: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        found: tuple[Any, ...] = step(self, f, x, t, dt, **kwargs)
        calls.append(Step(x, t, dt, found[1]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(solver), "step", recording)
        yield calls


def accepted(calls: list[Step]) -> list[Step]:
    """Those that the solver went on from, and the last."""
    followed = [one for one, other in itertools.pairwise(calls) if other.x is one.end]
    return [*followed, calls[-1]]
