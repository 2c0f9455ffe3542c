"""The methods of torchdyn's problems that are patched, and what they are replaced by."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch

from torchdiffeq_symplectic.context import Choice, chosen_by, current
from torchdiffeq_symplectic.hosts.torchdyn._host import (
    MultipleShootingProblem,
    NeuralODE,
    ODEProblem,
    odeint,
    str_to_solver,
)
from torchdiffeq_symplectic.hosts.torchdyn._solving import Call, PlainField, needs_gradient, solve
from torchdiffeq_symplectic.modes import MODES, Mode

__all__ = ["patch", "unpatch"]

_OWN = ("autograd", "adjoint", "interpolated_adjoint")
_SIGNATURE = inspect.signature(ODEProblem.__init__)


def mode_of(problem: Any) -> Mode | None:
    """The gradient mode that a problem asks for, None if there is none of that name.

    torchdyn dispatches on ``sensalg``. Its adjoint modes solve with ``solver_adjoint``, which may name a mode, too.
    """
    name = problem.sensalg
    if name in _OWN[1:] and isinstance(problem.solver_adjoint, str):
        name = problem.solver_adjoint
    return MODES.get(name) if isinstance(name, str) else None


def choice_of(problem: Any, x: Any, t_span: Any) -> Choice | None:
    """The mode and the options for a solve of ``problem``: its own, or else what is in force around the call.

    What is in force concerns only what needs a gradient.
    """
    mode = mode_of(problem)
    if mode is not None:
        return chosen_by(mode.name, getattr(problem, "adjoint_options", None))
    choice = current()
    if choice is None or not needs_gradient((x, t_span), (problem.vf, problem.solver, problem.integral_loss)):
        return None
    return choice


_upstream_init = ODEProblem.__init__
_upstream_odeint = ODEProblem.odeint
_upstream_odeint_parallel = MultipleShootingProblem.odeint
_upstream_trajectory = NeuralODE.trajectory
_upstream_function = odeint


@functools.wraps(_upstream_init)
def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    if not any(isinstance(value, str) and value in MODES for value in (*args, *kwargs.values())):
        _upstream_init(self, *args, **kwargs)
        return
    bound = _SIGNATURE.bind(self, *args, **kwargs)
    chosen = bound.arguments.get("solver_adjoint")
    named = isinstance(chosen, str) and chosen in MODES
    if named:
        bound.arguments["solver_adjoint"] = None
    _upstream_init(*bound.args, **bound.kwargs)
    if named:
        del self.solver_adjoint  # a module, in whose place nothing else can be put
        self.solver_adjoint = chosen


@functools.wraps(_upstream_odeint)
def _odeint(self: Any, x: Any, t_span: Any, save_at: Any = (), args: Any = {}) -> Any:  # noqa: B006 (torchdyn's)
    choice = choice_of(self, x, t_span)
    if choice is None:
        # torchdyn would call None. A subclass may know names of its own.
        if self.sensalg not in _OWN and type(self)._autograd_func is ODEProblem._autograd_func:
            known = '", "'.join([*_OWN, *MODES])
            raise ValueError(f'sensitivity must be one of {{"{known}"}}, but is {self.sensalg!r}')
        return _upstream_odeint(self, x, t_span, save_at, args)
    # A field that carries the running cost in its state has integrated it already.
    carried = (
        getattr(self.vf, "sensitivity", None) == "autograd" and getattr(self.vf, "integral_loss", None) is not None
    )
    return solve(
        choice.mode,
        Call(
            self.vf,
            x,
            t_span,
            self.solver,
            self.atol,
            self.rtol,
            self.interpolator,
            save_at,
            args,
            None if carried else self.integral_loss,
            choice.options,
            self.sensalg == "autograd",
        ),
    )


@functools.wraps(_upstream_odeint_parallel)
def _odeint_parallel(self: Any, x: Any, t_span: Any, B0: Any = None) -> Any:  # noqa: N803 (torchdyn's)
    choice = choice_of(self, x, t_span)
    if choice is None:
        return _upstream_odeint_parallel(self, x, t_span, B0)
    raise NotImplementedError(
        f"multiple shooting (solver {self.parallel_solver!r}) cannot be differentiated by "
        f'sensitivity="{choice.mode.name}": its iterations are no steps. Use sensitivity="autograd", inside of '
        "torchdiffeq_symplectic.use within `with torchdiffeq_symplectic.use(None):`, or ODEProblem or NeuralODE with a "
        "sequential solver."
    )


@functools.wraps(_upstream_trajectory)
def _trajectory(self: Any, x: Any, t_span: Any) -> Any:
    choice = choice_of(self, x, t_span)
    if choice is None:
        return _upstream_trajectory(self, x, t_span)
    x, t_span = self._prep_integration(x, t_span)
    call = Call(self.vf, x, t_span, self.solver, self.atol, self.rtol, options=choice.options)
    call.graph = mode_of(self) is None  # torchdyn's own trajectory is a solve by autograd under every sensitivity
    return solve(choice.mode, call)[1]


@functools.wraps(_upstream_function)
def _function(f: Any, x: Any, t_span: Any, solver: Any, *args: Any, **kwargs: Any) -> Any:
    choice = current()
    given = _ARGUMENTS.bind(f, x, t_span, solver, *args, **kwargs).arguments
    if choice is None or not set(given) <= _KNOWN or not needs_gradient((x, t_span), (f, solver)):
        return _upstream_function(f, x, t_span, solver, *args, **kwargs)
    given["vf"] = f if isinstance(f, torch.nn.Module) else PlainField(f)
    del given["f"]
    if isinstance(solver, str):
        given["solver"] = str_to_solver(solver, x.dtype)
    given.setdefault("atol", _ARGUMENTS.parameters["atol"].default)
    given.setdefault("rtol", _ARGUMENTS.parameters["rtol"].default)
    return solve(choice.mode, Call(**given, options=choice.options, graph=True))


_function.__module__ = "torchdyn.numerics"  # where `pickle` finds it, with or without this package
_ARGUMENTS = inspect.signature(_upstream_function)
# Those of a `Call`. A solve that is given others is torchdyn's own, and backpropagated through.
_KNOWN = {"f", "x", "t_span", "solver", "atol", "rtol", "interpolator", "save_at", "args"}


class _Sensitivity:
    """``model.sensitivity``: assigning a mode, or going away from one, makes the model what it would have been.

    torchdyn keeps the name in three places, and dispatches on another than the one that is assigned. Assigning one of
    torchdyn's own to another of them does what it always did.
    """

    def __get__(self, problem: Any, owner: type | None = None) -> Any:
        if problem is None:
            return self
        try:
            return vars(problem)["sensitivity"]
        except KeyError:
            raise AttributeError("sensitivity") from None

    def __set__(self, problem: Any, name: Any) -> None:
        held = vars(problem)
        held["sensitivity"] = name
        before = held.get("sensalg")
        if before is not None and any(isinstance(known, str) and known in MODES for known in (name, before)):
            problem.sensalg = name
            if hasattr(problem.vf, "sensitivity"):
                problem.vf.sensitivity = name


_sensitivity = _Sensitivity()
_PATCHES: tuple[tuple[Any, str, Any, Any], ...] = (
    (ODEProblem, "__init__", _upstream_init, _init),
    (ODEProblem, "odeint", _upstream_odeint, _odeint),
    (MultipleShootingProblem, "odeint", _upstream_odeint_parallel, _odeint_parallel),
    (NeuralODE, "trajectory", _upstream_trajectory, _trajectory),
    # Where callers look the function up. In its own module it must stay, as it reads its own `__defaults__` there.
    (sys.modules["torchdyn.numerics"], "odeint", _upstream_function, _function),
)


def patch() -> None:
    """Make torchdyn's problems, and its ``odeint``, know the modes.

    Doing it again changes nothing; what others have replaced stays.
    """
    for owner, name, upstream, own in _PATCHES:
        if getattr(owner, name) is upstream:
            setattr(owner, name, own)
    if "sensitivity" not in vars(ODEProblem):
        ODEProblem.sensitivity = _sensitivity


def unpatch() -> None:
    """Put back what `patch` replaced."""
    for owner, name, upstream, own in _PATCHES:
        if getattr(owner, name) is own:
            setattr(owner, name, upstream)
    if vars(ODEProblem).get("sensitivity") is _sensitivity:
        del ODEProblem.sensitivity
