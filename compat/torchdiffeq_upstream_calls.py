"""Calls of torchdiffeq that have nothing to do with this package, and everything that can be seen of their outcome.

``test_unchanged.py`` runs them with this package registered, taken back, and, as a script in a process of
its own, never imported: ``python torchdiffeq_upstream_calls.py FILE`` writes the outcomes to a file.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
Outcome = dict[str, Any]
ERRORS = (ArithmeticError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError)


class Field(nn.Module):
    """Asymmetric, changing with time, with a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.matrix = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.log: list[tuple[str, float, float]] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.log.append(("field", float(t.detach()), float(y.detach().sum())))
        return torch.tanh(y @ self.matrix) * torch.cos(5 * t) - 0.5 * y


class TupleField(Field):
    def forward(self, t: Tensor, y: Any) -> Any:
        return super().forward(t, y[0]), y[0].sum(dim=1) * y[1]


class CallbackField(Field):
    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.log.append(("step", float(t0.detach()), float(dt.detach())))

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.log.append(("accept", float(t0.detach()), float(dt.detach())))

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.log.append(("reject", float(t0.detach()), float(dt.detach())))

    def callback_step_adjoint(self, t0: Tensor, y0: Any, dt: Tensor) -> None:
        self.log.append(("adjoint", float(t0.detach()), float(dt.detach())))


class StepCallbackField(Field):
    def callback_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.log.append(("step", float(t0.detach()), float(dt.detach())))

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        raise AssertionError("a method of fixed steps rejects none")


class RaisingField(Field):
    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if len(self.log) > 30:
            raise OverflowError("too many evaluations")
        return super().forward(t, y)


def initial() -> Tensor:
    return torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()


def run(
    func: Any, y0: Any, t: Tensor = T, solver: str = "odeint_adjoint", params: Any = None, **settings: Any
) -> Outcome:
    """Solution, gradients, evaluations and callbacks, warnings and the error of one call and its backward pass."""
    params = func.parameters() if params is None else params
    outcome: Outcome = {}
    t = t.clone().requires_grad_()
    parts = y0 if isinstance(y0, tuple) else (y0,)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = getattr(torchdiffeq, solver)(func, y0, t, **settings)
            tensors = [part for item in result for part in (item if isinstance(item, tuple) else (item,))]
            outcome["solution"] = [tensor.detach() for tensor in tensors]
            loss = torch.stack([tensor.pow(3).sum() for tensor in tensors]).sum()
            wanted = [*parts, t, *params]
            outcome["gradients"] = torch.autograd.grad(loss, wanted, allow_unused=True)
        except ERRORS as error:
            outcome["error"] = (type(error).__name__, str(error))
    outcome["warnings"] = [(warning.category.__name__, str(warning.message)) for warning in caught]
    outcome["log"] = list(getattr(func, "log", []))
    return outcome


def adjoint(field: type[Field] = Field, **settings: Any) -> Callable[[], Outcome]:
    """A call of ``odeint_adjoint`` with a tensor or (for `TupleField`) a tuple as its state."""

    def call() -> Outcome:
        y0 = initial()
        state = (y0, torch.ones(2, dtype=torch.float64, requires_grad=True)) if field is TupleField else y0
        return run(field(), state, **{"rtol": 1e-3, "atol": 1e-3, **settings})

    return call


def seminorm(tensors: Any) -> Tensor:
    return torch.stack([tensor.abs().max() for tensor in tensors[:3]]).max()


def event(**settings: Any) -> Callable[[], Outcome]:
    def call() -> Outcome:
        tolerances: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
        return run(Field(), initial(), T[:2], event_fn=lambda t, y: t + 0.1 * y[0, 0] - 0.6, **tolerances, **settings)

    return call


def odeint_event(**settings: Any) -> Callable[[], Outcome]:
    def call() -> Outcome:
        def interface(func: nn.Module, y0: Tensor, t: Tensor, **given: Any) -> Any:
            return torchdiffeq.odeint_adjoint(func, y0, t, **given)

        def solver(func: nn.Module, y0: Tensor, t: Tensor, **given: Any) -> Any:
            return torchdiffeq.odeint_event(
                func,
                y0,
                t[0],
                event_fn=lambda t, y: t + 0.1 * y[0, 0] - 0.6,
                odeint_interface=interface,
                atol=1e-5,
                **given,
            )

        func, y0 = Field(), initial()
        event_t, solution = solver(func, y0, T, **settings)
        gradients = torch.autograd.grad(event_t + solution.pow(3).sum(), [y0, *func.parameters()])
        return {"solution": [event_t.detach(), solution.detach()], "gradients": gradients, "log": func.log}

    return call


def without_gradient() -> Outcome:
    func = Field()
    with torch.no_grad():
        solution = torchdiffeq.odeint_adjoint(func, initial(), T, adjoint_method="no such method")
    return {"solution": [solution], "requires_grad": solution.requires_grad, "log": func.log}


def plain_function(listed: bool, **settings: Any) -> Callable[[], Outcome]:
    """A field that is no module, its parameters listed or not."""

    def call() -> Outcome:
        field = Field()
        params = tuple(field.parameters())
        given: dict[str, Any] = {"adjoint_params": params} if listed else {}
        return run(lambda t, y: field(t, y), initial(), params=params, **given, **settings)

    return call


OPTIONS: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.1}}
CALLS: dict[str, Callable[[], Outcome]] = {
    **{
        f"{adjoint_method}{' tuple' * (field is TupleField)}{' decreasing' * decreasing}": adjoint(
            field, adjoint_method=adjoint_method, t=T.flip(0) if decreasing else T
        )
        for adjoint_method in (None, "dopri5", "rk4", "adaptive_heun")
        for field in (Field, TupleField)
        for decreasing in (False, True)
    },
    "rk4, options inferred": adjoint(**OPTIONS),
    "rk4, options inferred, named": adjoint(**OPTIONS, adjoint_method="rk4"),
    "rk4, options for both": adjoint(**OPTIONS, adjoint_method="euler", adjoint_options={"step_size": 0.02}),
    "options without adjoint_options": adjoint(**OPTIONS, adjoint_method="dopri5"),
    "empty options without adjoint_options": adjoint(options={}, adjoint_method="rk4"),
    "seminorm": adjoint(adjoint_options={"norm": "seminorm"}, adjoint_method="adaptive_heun"),
    "norm of one's own": adjoint(adjoint_options={"norm": seminorm}),
    "tolerances of its own": adjoint(adjoint_rtol=1e-2, adjoint_atol=1e-2),
    "first step, jumps": adjoint(options={"first_step": 0.1, "jump_t": torch.tensor([0.5])}, adjoint_options={}),
    "list tolerances": adjoint(TupleField, rtol=[1e-4, 1e-3], atol=[1e-5, 1e-5]),
    "unknown option": adjoint(**{**OPTIONS, "options": {"step_size": 0.1, "max_iters": 7}}),
    "unknown adjoint option": adjoint(adjoint_options={"checkpoint": "stages"}),
    "frozen parameter with norm": adjoint(adjoint_options={"norm": seminorm}, adjoint_params=[torch.ones(2)]),
    "no parameters": adjoint(adjoint_params=()),
    "callbacks": adjoint(CallbackField),
    "callbacks, fixed": adjoint(StepCallbackField, **OPTIONS),
    "raising field": adjoint(RaisingField),
    "unknown method": adjoint(method="no such method"),
    "unknown argument": adjoint(no_such_argument=1),
    "scipy": adjoint(method="scipy_solver"),
    "implicit_adams": adjoint(method="implicit_adams", options={"step_size": 0.1}),
    "times out of order": adjoint(t=torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)),
    "event": event(),
    "event, other adjoint": event(adjoint_method="rk4"),
    "event, fixed": event(method="rk4", options={"step_size": 0.05}),
    "odeint_event": odeint_event(),
    "odeint_event, fixed": odeint_event(method="rk4", options={"step_size": 0.05}, adjoint_method="rk4"),
    "function without adjoint_params": plain_function(listed=False),
    "function with adjoint_params": plain_function(listed=True, adjoint_method="rk4"),
    "odeint": adjoint(solver="odeint"),
    "odeint, fixed": adjoint(solver="odeint", **OPTIONS),
    "no gradient wanted, unknown adjoint method": without_gradient,
}


if __name__ == "__main__":
    torch.save({name: call() for name, call in CALLS.items()}, sys.argv[1])
    if "torchdiffeq_symplectic" in sys.modules:
        sys.exit("torchdiffeq_symplectic was imported")
