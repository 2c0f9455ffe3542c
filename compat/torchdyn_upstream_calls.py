"""Calls of torchdyn in its own modes, and everything that can be seen of their outcome.

``test_unchanged.py`` runs them with this package registered, taken back, and, as a script in a process of its
own, never imported: ``python torchdyn_upstream_calls.py FILE`` writes the outcomes to a file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import MultipleShootingLayer, NeuralODE, ODEProblem
from torchdyn.models import CNF, HNN
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import DataControl, DepthCat
from torchdyn.numerics import Euler, HyperEuler, Lorenz, VanDerPol, odeint
from torchdyn.numerics.solvers.ode import RungeKutta4, str_to_solver

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
Outcome = dict[str, Any]
ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Field(nn.Module):
    """Asymmetric, changing with time; keeps a log of its evaluations."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.matrix = nn.Parameter(torch.randn(size, size, generator=generator, dtype=torch.float64))
        self.log: list[tuple[tuple[int, ...], float, float]] = []

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        self.log.append((tuple(t.shape), float(t.detach()), float(x.detach().sum())))
        return torch.tanh(x @ self.matrix) * torch.cos(5 * t) - 0.5 * x


class UnusedField(Field):
    """With a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))


class RaisingField(Field):
    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        if len(self.log) > 6:
            raise OverflowError("too many evaluations")
        return super().forward(t, x, args)


class OwnSolver(Euler):  # type: ignore[misc]
    """A solver of the user's."""

    def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> tuple[Any, ...]:
        return None, x + dt * f(t + dt / 3, x), None


class OfTime(nn.Module):
    """A network of time and state, of a hypersolver or of a field that has one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(3, 2)

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(torch.cat([x, torch.ones_like(x[:, :1]) * t], 1))
        return result


def initial(columns: int = 2) -> Tensor:
    return torch.linspace(-1, 2, 3 * columns, dtype=torch.float64).reshape(3, columns).requires_grad_()


def net(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def parts_of(solution: Any) -> list[Tensor]:
    if isinstance(solution, dict):
        return list(solution.values())
    return [solution]


def seen_of(model: Any) -> Outcome:
    """What a model shows of itself besides its parameters' values."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        "repr": repr(model),
        "attributes": {name: [sorted(vars(module)), type(module).__name__] for name, module in model.named_modules()},
        "state": {name: value.detach().clone() for name, value in model.state_dict().items()},
        # But for the mark that torch.compile leaves on the class of each module, in whatever test ran before.
        "names": sorted(set(dir(model)) - {"___needs_generation_tag_patch"}),
        "sensitivities": [getattr(model, name, None) for name in ("sensitivity", "sensalg")],
        "evaluations": getattr(getattr(model, "vf", None), "nfe", None),
    }


def outcome_of(make: Callable[[], Any], call: Callable[[Any], Any], x: Any = None) -> Outcome:
    """The model before and after, solution, gradients, evaluations, words, warnings and the error of one pass."""
    torch.manual_seed(11)
    outcome: Outcome = {}
    model: Any = None
    words = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(words):
        warnings.simplefilter("always")
        try:
            model = make()
            outcome["made"] = seen_of(model)
            result = call(model)
            tensors = [part for item in result for part in parts_of(item)]
            outcome["solution"] = [tensor.detach().clone() for tensor in tensors]
            outcome["graphs"] = [type(tensor.grad_fn).__name__ for tensor in tensors]
            loss = sum(tensor.abs().pow(3).sum() for tensor in tensors if tensor.requires_grad)
            if isinstance(loss, Tensor):
                loss.backward()
        except (*ERRORS, OverflowError) as error:
            outcome["error"] = (type(error).__name__, str(error))
    if isinstance(model, nn.Module):
        outcome["gradients"] = {name: parameter.grad for name, parameter in model.named_parameters()}
        outcome["after"] = seen_of(model)
        outcome["logs"] = [list(module.log) for module in model.modules() if isinstance(module, Field)]
    outcome["gradients of inputs"] = [leaf.grad for leaf in ([] if x is None else x)]
    outcome["words"] = words.getvalue()
    outcome["warnings"] = [(warning.category.__name__, str(warning.message)) for warning in caught]
    outcome["random"] = torch.rand(1)
    return outcome


def solve(
    sensitivity: str,
    field: Callable[[], Any] = Field,
    t: Any = T,
    *,
    problem: Any = NeuralODE,
    columns: int = 2,
    call: dict[str, Any] | None = None,
    times: bool = False,
    **settings: Any,
) -> Callable[[], Outcome]:
    """A solve of three initial values in one of torchdyn's modes; gradients of the times where asked for."""

    def run() -> Outcome:
        x = initial(columns)
        span = t.clone().requires_grad_() if times else t
        leaves = [x, span] if times else [x]

        def make() -> Any:
            given: dict[str, Any] = {"solver": "dopri5", "sensitivity": sensitivity, **settings}
            solver = given["solver"]
            return problem(field(), **{**given, "solver": solver if isinstance(solver, str) else solver()})

        return outcome_of(make, lambda model: model(x, span, **(call or {})), leaves)

    return run


def along_a_trajectory(sensitivity: str, grad: bool) -> Callable[[], Outcome]:
    def run() -> Outcome:
        x = initial()

        def call(model: Any) -> Any:
            with torch.set_grad_enabled(grad):
                return [model.trajectory(x, T)]

        return outcome_of(lambda: NeuralODE(Field(), "tsit5", sensitivity=sensitivity), call, [x])

    return run


def assigned(before: str, after: str, attribute: str) -> Callable[[], Outcome]:
    """A sensitivity that is changed after construction."""

    def run() -> Outcome:
        def make() -> Any:
            model = NeuralODE(Field(), "rk4", sensitivity=before)
            setattr(model, attribute, after)
            return model

        x = initial()
        return outcome_of(make, lambda model: model(x, T), [x])

    return run


def multiple_shooting(sensitivity: str, solver: str = "mszero") -> Callable[[], Outcome]:
    def run() -> Outcome:
        x, t = initial(), torch.linspace(0, 1, 8, dtype=torch.float64)
        return outcome_of(
            lambda: MultipleShootingLayer(Field(), solver, sensitivity=sensitivity), lambda model: model(x, t), [x]
        )

    return run


def functional(solver: Any, **settings: Any) -> Callable[[], Outcome]:
    def run() -> Outcome:
        x = initial()
        return outcome_of(Field, lambda field: odeint(field, x, T, solver, **settings), [x])

    return run


def noise() -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))


def in_each(name: str, **settings: Any) -> dict[str, Callable[[], Outcome]]:
    return {f"{name}, {sensitivity}": solve(sensitivity, **settings) for sensitivity in SENSITIVITIES}


def with_a_parameter(*args: Any, **settings: Any) -> Any:
    return NeuralODE(*args, optimizable_params=[nn.Parameter(torch.ones(1))], **settings)


def first_column(t: Tensor, x: Tensor) -> Tensor:
    return 0.1 * x[:, :1]


CALLS: dict[str, Callable[[], Outcome]] = {
    # solvers
    **in_each("dopri5"),
    **in_each("tsit5", solver="tsit5"),
    **in_each("rk4", solver="rk4"),
    **in_each("euler", solver="euler"),
    **in_each("midpoint", solver="midpoint"),
    **in_each("instance", solver=RungeKutta4),
    **in_each("double precision", solver=lambda: str_to_solver("dopri5", torch.float64)),
    **in_each("own solver", solver=OwnSolver),
    **in_each("hypersolver", solver=lambda: HyperEuler(OfTime()), solver_adjoint="euler"),
    **in_each("implicit", solver="ieuler"),
    **in_each("leapfrog", solver="alf", field=functools.partial(Field, 1)),
    **in_each("interpolated", interpolator="4th"),
    **in_each("unknown solver", solver="no such solver"),
    # the adjoint's settings
    **in_each("solver of the adjoint", solver="rk4", solver_adjoint="dopri5", rtol_adjoint=1e-3, atol_adjoint=1e-3),
    **in_each("unknown solver of the adjoint", solver="rk4", solver_adjoint="no such solver"),
    **in_each("module as solver of the adjoint", solver="rk4", solver_adjoint=Euler()),
    **in_each("seminorm", seminorm=True),
    **in_each("tolerances", atol=1e-5, rtol=1e-5, atol_adjoint=1e-5, rtol_adjoint=1e-5),
    # calls
    **in_each("times", times=True),
    **in_each("two times", t=T[1:], times=True),
    **in_each("decreasing", t=T.flip(0)),
    **in_each("one time", t=T[:1]),
    **in_each("list of numbers", t=[0.0, 1.0]),
    **in_each("no times", t=None),
    **in_each("save_at", solver="rk4", call={"save_at": T[-1:]}),
    **in_each("args", solver="rk4", call={"args": {"u": 1}}),
    **in_each("one state", columns=2, problem=lambda *a, **k: NeuralODE(*a, **k, return_t_eval=False)),
    # fields
    **in_each("unused parameter", field=UnusedField),
    **in_each("raising field", field=RaisingField),
    **in_each("field of the state alone", field=lambda: net(2, 2), solver="rk4"),
    **in_each("function", field=lambda: lambda t, x, args=None: -x * torch.cos(t), solver="rk4"),
    **in_each("no parameters", field=lambda: VanDerPol(0.5), problem=ODEProblem),
    **in_each("parameters never used", field=Lorenz, columns=3, problem=ODEProblem, solver="rk4"),
    **in_each("optimizable", field=lambda: lambda t, x, args=None: -x, problem=with_a_parameter),
    **in_each("depth", field=lambda: nn.Sequential(DepthCat(1), net(3, 2))),
    **in_each("control", field=lambda: nn.Sequential(DataControl(), net(4, 2))),
    **in_each("second order", field=lambda: net(4, 2), columns=4, order=2, solver="rk4"),
    **in_each("Hamiltonian", field=lambda: HNN(net(2, 1)), solver="rk4"),
    **in_each("flow", field=lambda: CNF(net(2, 2)), columns=3),
    **in_each("Hutchinson", field=lambda: CNF(net(2, 2), trace_estimator=hutch_trace, noise_dist=noise()), columns=3),
    # losses along the way
    **in_each("integral loss", solver="rk4", columns=2, field=OfTime, integral_loss=first_column),
    "integral loss in front, autograd": solve("autograd", OfTime, columns=3, integral_loss=first_column),
    # other entries
    **{f"problem, {name}": solve(name, problem=ODEProblem) for name in SENSITIVITIES},
    **{f"trajectory, {name}": along_a_trajectory(name, grad=True) for name in SENSITIVITIES},
    **{f"trajectory without gradient, {name}": along_a_trajectory(name, grad=False) for name in SENSITIVITIES},
    **{f"multiple shooting, {name}": multiple_shooting(name) for name in SENSITIVITIES},
    "multiple shooting, backward": multiple_shooting("autograd", "msbackward"),
    "sensitivity assigned": assigned("autograd", "adjoint", "sensitivity"),
    "sensitivity assigned, back": assigned("adjoint", "autograd", "sensitivity"),
    "sensalg assigned": assigned("autograd", "adjoint", "sensalg"),
    "odeint, dopri5": functional("dopri5"),
    "odeint, rk4": functional("rk4", save_at=T[1:]),
    "odeint, all evaluations": functional("tsit5", return_all_eval=True),
}


if __name__ == "__main__":
    torch.save({name: call() for name, call in CALLS.items()}, sys.argv[1])
    if "torchdiffeq_symplectic" in sys.modules:
        sys.exit("torchdiffeq_symplectic was imported")
