"""The hosts and their methods, read off the hosts' own tables, ready to be solved by the host and in every mode."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.environment import first_step_held

__all__ = ["HOSTS", "Host", "HostMethod"]

# Called as (field, y0, t, mode, options of the mode); mode None is the host's own solve, which autograd follows.
# The third of the output times lies on the end of a step.
Solve = Callable[[nn.Module, Tensor, Tensor, str | None, Mapping[str, object]], Tensor]

STEPS = 4  # of a fixed grid, up to the third output time; explicit Adams methods are unstable on many
# Some steps, a few of them rejected. None is small: the slope of torchdiffeq's interpolant, and so the gradient of a
# time, is a difference of states over the step size, which loses digits there.
TOLERANCES = {"rtol": 1e-2, "atol": 1e-3}
TORCHDYN_TOLERANCES = {"rtol": 1e-4, "atol": 1e-6}


class HostMethod(NamedTuple):
    """A method of a host.

    Attributes:
        name: what the user types.
        solve: solves by it.
        halves: whether its state is that of the field and as many velocities, side by side.
    """

    name: str
    solve: Solve
    halves: bool = False


class Host(NamedTuple):
    """A library whose solves get gradient modes.

    Attributes:
        name: of its module and its distribution.
        methods: returns its methods; imports it if need be.
    """

    name: str
    methods: Callable[[], Sequence[HostMethod]]

    @property
    def installed(self) -> bool:
        """Whether it can be found, without importing it."""
        return importlib.util.find_spec(self.name) is not None


def torchdiffeq_methods() -> list[HostMethod]:
    """Every method in torchdiffeq's table as it is now, aliases included."""
    from torchdiffeq._impl.odeint import SOLVERS

    return [HostMethod(name, functools.partial(_by_torchdiffeq, name, SOLVERS[name])) for name in SOLVERS]


def _by_torchdiffeq(
    method: str,
    solver: type,
    field: nn.Module,
    y0: Tensor,
    t: Tensor,
    mode: str | None,
    options: Mapping[str, object],
) -> Tensor:
    settings: dict[str, Any] = {"method": method, **TOLERANCES, "options": _steps(solver, t.detach())}
    solution: Tensor
    if mode is None:
        solution = torchdiffeq.odeint(field, y0, t, **settings)
    else:
        solution = torchdiffeq.odeint_adjoint(
            field, y0, t, **settings, adjoint_method=mode, adjoint_options=dict(options)
        )
    return solution


def _steps(solver: type, t: Tensor) -> dict[str, Any]:
    """Options that fix the first step, which torchdiffeq would differentiate, and end a step on an output time."""
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
    from torchdiffeq._impl.solvers import FixedGridODESolver

    if issubclass(solver, FixedGridODESolver):
        return {"step_size": float(t[2] - t[0]) / STEPS}
    if issubclass(solver, RKAdaptiveStepsizeODESolver):
        return {"first_step": float(t[-1] - t[0]) / 4, "step_t": t[2:3]}
    return {}


def torchdyn_methods() -> list[HostMethod]:
    """One of each of torchdyn's solver classes, by its first name; adaptive ones once more with an interpolator."""
    from torchdyn.core import MultipleShootingProblem, ODEProblem
    from torchdyn.numerics.solvers import hyper
    from torchdyn.numerics.solvers.ode import MS_SOLVER_DICT, SOLVER_DICT

    def sequential(solver: Any, **settings: Any) -> Solve:
        # A hypersolver is given as a class; its network is the field once more.
        return _by_torchdyn(
            lambda field, mode: ODEProblem(
                field,
                solver if isinstance(solver, str) else solver(field),
                sensitivity=mode,
                **settings,
                **TORCHDYN_TOLERANCES,
            )
        )

    found = []
    for name, solver in _by_first_name(SOLVER_DICT).items():
        found.append(HostMethod(name, sequential(name), halves=solver.__name__ == "AsynchronousLeapfrog"))
        if solver().stepping_class == "adaptive" and solver.__name__ != "Tsitouras45":  # which has no interpolant
            found.append(HostMethod(f'{name} with "4th"', sequential(name, interpolator="4th")))
    for name, solver in inspect.getmembers(hyper, inspect.isclass):
        if solver.__module__ == hyper.__name__:
            found.append(HostMethod(name, sequential(solver)))
    # One of these names is also in the other table, for another class.
    for name in _by_first_name({name: solver for name, solver in MS_SOLVER_DICT.items() if name not in SOLVER_DICT}):
        parallel = functools.partial(_shooting, MultipleShootingProblem, name)
        found.append(HostMethod(name, _by_torchdyn(parallel)))
    return found


def _shooting(problem: Callable[..., Any], solver: str, field: nn.Module, mode: str) -> Any:
    return problem(field, solver, sensitivity=mode)


def _by_first_name(table: Mapping[str, type]) -> dict[str, Any]:
    """torchdyn has several names for one class."""
    return {name: solver for name, solver in table.items() if name == next(n for n in table if table[n] is solver)}


def _by_torchdyn(problem_of: Callable[[nn.Module, str], Any]) -> Solve:
    def solve(field: nn.Module, y0: Tensor, t: Tensor, mode: str | None, options: Mapping[str, object]) -> Tensor:
        problem = problem_of(_WithArguments(field), mode or "autograd")
        problem.adjoint_options = dict(options)
        with contextlib.nullcontext() if mode else first_step_held():
            solution: Tensor = problem(y0, t)[1]
        return solution

    return solve


class _WithArguments(nn.Module):
    """A field with the signature that torchdyn looks for."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        del args
        slope: Tensor = self.field(t, x)
        return slope


HOSTS = {host.name: host for host in (Host("torchdiffeq", torchdiffeq_methods), Host("torchdyn", torchdyn_methods))}
