"""Every solver that torchdyn knows by name, and its hypersolvers, ready to be solved."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Not in `_host`: the modes work without these, and are to be registered where one of them is gone.
from torchdyn.numerics.solvers import hyper  # the hypersolvers, made of a network that corrects their steps
from torchdyn.numerics.solvers.ode import (
    MS_SOLVER_DICT,  # name -> class of a solver for multiple shooting
    SOLVER_DICT,  # name -> solver class
    AsynchronousLeapfrog,  # its state is twice that of the field
)

from torchdiffeq_symplectic.hosts.methods import Method, Solve
from torchdiffeq_symplectic.hosts.torchdyn._host import MultipleShootingProblem, ODEProblem, Tsitouras45

__all__ = ["methods"]

# `init_step`, which chooses the first step; as an attribute of the package this name is a function.
_odeint_module: Any = importlib.import_module("torchdyn.numerics.odeint")

_INTERPOLATOR = "4th"
_TOLERANCES = {"rtol": 1e-4, "atol": 1e-6}


def methods() -> list[Method]:
    """One of each class, by one of its names; adaptive solvers once more with an interpolator."""
    found = []
    for name, solver in _by_first_name(SOLVER_DICT).items():
        found.append(Method(name, _sequential(name), halves=issubclass(solver, AsynchronousLeapfrog)))
        if solver().stepping_class == "adaptive" and not issubclass(solver, Tsitouras45):
            interpolating = _sequential(name, interpolator=_INTERPOLATOR)
            found.append(Method(f'{name} with "{_INTERPOLATOR}"', interpolating))
    for name, solver in vars(hyper).items():
        if inspect.isclass(solver) and solver.__module__ == hyper.__name__:
            found.append(Method(name, _hyper(solver)))
    # One of these names is also in the other table, of another class.
    parallel = {name: solver for name, solver in MS_SOLVER_DICT.items() if name not in SOLVER_DICT}
    found += [Method(name, _parallel(name)) for name in _by_first_name(parallel)]
    return found


def _by_first_name(table: Mapping[str, type]) -> dict[str, Any]:
    """torchdyn has several names for one class."""
    return {name: solver for name, solver in table.items() if name == next(n for n in table if table[n] is solver)}


class _Field(nn.Module):
    """A field with the signature that torchdyn looks for."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        del args
        slope: Tensor = self.field(t, x)
        return slope


def _sequential(solver: str, **settings: Any) -> Solve:
    return _solve(lambda field, mode: ODEProblem(field, solver, sensitivity=mode, **settings, **_TOLERANCES))


def _hyper(solver: type) -> Solve:
    """The network that corrects the steps is the field once more."""
    return _solve(lambda field, mode: ODEProblem(field, solver(field), sensitivity=mode, **_TOLERANCES))


def _parallel(solver: str) -> Solve:
    return _solve(lambda field, mode: MultipleShootingProblem(field, solver, sensitivity=mode))


def _solve(problem_of: Callable[[nn.Module, str], Any]) -> Solve:
    """A solve of the problem that ``problem_of(field, sensitivity)`` gives."""

    def solve(field: nn.Module, y0: Tensor, t: Tensor, mode: str | None, options: Mapping[str, object]) -> Tensor:
        problem = problem_of(_Field(field), mode or "autograd")
        problem.adjoint_options = dict(options)
        with contextlib.nullcontext() if mode else _first_step_held():
            solution: Tensor = problem(y0, t)[1]
        return solution

    return solve


@contextlib.contextmanager
def _first_step_held() -> Iterator[None]:
    """torchdyn's choice of the first step is a constant of the same value: an exact gradient does not go through it."""
    choose = _odeint_module.init_step

    @functools.wraps(choose)
    def held(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            step: Tensor = choose(*args, **kwargs)
        return step

    _odeint_module.init_step = held
    try:
        yield
    finally:
        _odeint_module.init_step = choose
