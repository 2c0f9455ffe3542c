"""torchdyn's solvers, and those that a user may write: the rows of the harness's table.

Import this only where torchdyn is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
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


class Correction(nn.Module):
    """What a hypersolver adds to a step, of time and state."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        numbers = torch.arange(size * size, dtype=torch.float64)
        self.weight = nn.Parameter(torch.sin(numbers).reshape(size, size).to(dtype) / size)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        t = t.real if t.is_complex() else t
        result: Tensor = torch.cos(self.weight @ y.reshape(-1) + t.to(y.dtype)).view_as(y)
        return result


Make = Callable[[torch.dtype, int], nn.Module]


def _instance(solver: Callable[[torch.dtype], nn.Module]) -> Make:
    return lambda dtype, size: solver(dtype)


def _hyper(solver: Callable[..., nn.Module]) -> Make:
    return lambda dtype, size: solver(Correction(size, dtype), dtype)


def _leapfrog(dtype: torch.dtype, size: int) -> nn.Module:
    return AsynchronousLeapfrog(dtype=dtype)  # type: ignore[no-any-return]


# The solver by name or as what makes one; evaluations of its own a step, 0 if it is no explicit Runge-Kutta method;
# whether it chooses its steps; whether its state is twice as wide as the field's.
TABLE: dict[str, tuple[str | Make, int, bool, bool]] = {
    "euler": ("euler", 1, False, False),
    "midpoint": ("midpoint", 2, False, False),
    "rk4": ("rk4", 4, False, False),
    "dopri5": ("dopri5", 6, True, False),
    "tsit5": ("tsit5", 6, True, False),
    "RungeKutta4()": (_instance(RungeKutta4), 4, False, False),
    "DormandPrince45()": (_instance(DormandPrince45), 6, True, False),
    "Tsitouras45()": (_instance(Tsitouras45), 6, True, False),
    "uneven": (_instance(Uneven), 3, False, False),
    "bogacki-shampine": (_instance(BogackiShampine), 3, True, False),
    "fresh-heun": (_instance(FreshHeun), 2, True, False),
    "stale-heun": (_instance(StaleHeun), 1, True, False),
    "hyper-euler": (_hyper(HyperEuler), 0, False, False),
    "hyper-midpoint": (_hyper(HyperMidpoint), 0, False, False),
    "hyper-rk4": (_hyper(HyperRungeKutta4), 0, False, False),
    "alf": ("alf", 0, False, True),
    "AsynchronousLeapfrog()": (_leapfrog, 0, False, True),
    "normalised": (_instance(Normalised), 0, False, False),
    "exponential": (_instance(Exponential), 0, False, False),
    "shrinking": (_instance(Shrinking), 0, False, False),
    "projecting": (_instance(Projecting), 0, False, False),
    "converging": (_instance(Converging), 0, False, False),
    "learned": (_instance(Learned), 0, False, False),
}
