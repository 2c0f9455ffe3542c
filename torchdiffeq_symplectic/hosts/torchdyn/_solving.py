"""One solve of torchdyn under a gradient mode: its own loop runs, recorded, and the result gets its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.closures import held_by, modules_of, tensors_of
from torchdiffeq_symplectic.gradient import Solve, attach
from torchdiffeq_symplectic.hosts.torchdyn._captured import Captured
from torchdiffeq_symplectic.hosts.torchdyn._host import DEFuncBase, Tsitouras45, odeint, str_to_interp
from torchdiffeq_symplectic.hosts.torchdyn._listening import Listener
from torchdiffeq_symplectic.hosts.torchdyn._recording import Recorder
from torchdiffeq_symplectic.hosts.torchdyn._stands import RecordingInterpolator, RecordingSolver
from torchdiffeq_symplectic.hosts.torchdyn._states import Layout, State, detached, tensors_in
from torchdiffeq_symplectic.modes import Mode, configured
from torchdiffeq_symplectic.surroundings import Surroundings
from torchdiffeq_symplectic.trajectory import Keep

__all__ = ["Call", "PlainField", "needs_gradient", "solve"]

# What torchdyn sets on modules anew at each forward pass: the noise of a trace estimate, the control of DataControl.
_SET_ANEW = ("noise", "_control")

# What torchdyn gives to a field without parameters.
_DUMMY = "dummy_parameter"


@dataclasses.dataclass
class Call:
    """The arguments of torchdyn's ``odeint``, and what its problem adds to them.

    Attributes:
        vf: the field, ``vf(t, x)``.
        x: initial state, a tensor of any shape or a dictionary of tensors.
        t_span: output times, shape ``(T,)``, or a list of such tensors.
        solver, atol, rtol, interpolator, save_at, args: as torchdyn takes them; the solver is an object.
        integral_loss: running cost ``l(t, x)``, whose integral the gradient includes, or None.
        options: of the mode.
        graph: whether the field is used to gradients that are enabled at all times.
    """

    vf: nn.Module
    x: State
    t_span: Any
    solver: Any
    atol: float
    rtol: float
    interpolator: Any = None
    save_at: Any = ()
    args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    integral_loss: Callable[[Tensor, Any], Tensor] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    graph: bool = False

    def run(self, vf: Any, x: State, solver: Any, interpolator: Any) -> tuple[Tensor, Any]:
        """The solve as torchdyn does it."""
        result: tuple[Tensor, Any] = odeint(
            vf,
            x,
            self.t_span,
            solver,
            self.atol,
            self.rtol,
            interpolator=interpolator,
            save_at=self.save_at,
            args=self.args,
        )
        return result


class PlainField(nn.Module):
    """A callable ``vf(t, x)`` that is no module, as one."""

    def __init__(self, vf: Callable[..., Any]) -> None:
        super().__init__()
        self.vf = vf

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``vf`` itself."""
        return self.vf(*args, **kwargs)


def needs_gradient(values: Iterable[Any], parts: Iterable[object]) -> bool:
    """Whether anything known asks for a gradient: tensors in ``values``, or what ``parts`` hold."""
    if not torch.is_grad_enabled():
        return False
    if any(tensor.requires_grad for value in values for tensor in tensors_in(value)):
        return True
    for part in parts:
        modules, tensors = held_by(part)
        dummies = [module._parameters.get(_DUMMY) for module in modules]
        parameters = (parameter for module in modules for parameter in module.parameters(recurse=False))
        if any(
            tensor.requires_grad and not any(tensor is dummy for dummy in dummies) for tensor in (*tensors, *parameters)
        ):
            return True
    return False


def solve(mode: Mode, call: Call) -> tuple[Tensor, State]:
    """Output times and the solution with the gradient of ``mode``.

    Raises:
        NotImplementedError: if the solver's steps cannot be replayed.
        ValueError: if an entry of ``adjoint_options`` that is the mode's own has a wrong value, or the mode is not for
            the solver.
    """
    mode, check = configured(mode, call.options)
    if not torch.is_grad_enabled():
        return call.run(call.vf, call.x, call.solver, call.interpolator)
    layout = Layout(call.x, call.integral_loss is not None)
    initial = layout.pack(call.x)
    functions = _functions(call)
    parts = (call.vf, call.solver, call.integral_loss, *functions)
    declared = list(dict.fromkeys(module for part in parts for module in modules_of(part)))
    found, hidden = held_by(parts)
    modules = list(dict.fromkeys([*declared, *found]))
    attributes = [(module, name) for module in modules for name in _SET_ANEW if name in vars(module)]
    surroundings = Surroundings(modules, initial.device, attributes)
    params = [param for module in declared for param in module.parameters(recurse=False)]
    hidden += [param for module in found for param in module.parameters(recurse=False)]
    held = [*(tensor for function in functions for tensor in tensors_of(function)), *tensors_in(call.args)]
    captured = Captured(params, declared, held, hidden)
    slopes = mode.keep is Keep.SLOPES
    listener = Listener(call.vf, call.integral_loss, layout, captured, surroundings.random, slopes, call.graph)
    interpolator = _interpolator(call, initial)
    refuse = _refusal(mode, call.solver)
    recorder = Recorder(call.solver, interpolator, listener, layout, captured, mode, call.args, refuse)
    spans = tensors_in(call.t_span)
    with torch.set_grad_enabled(any(span.requires_grad for span in spans)):
        t_eval, solution = call.run(
            listener,
            detached(call.x),
            RecordingSolver(call.solver, recorder),
            None if interpolator is None else RecordingInterpolator(interpolator, recorder),
        )
    solution = detached(solution)
    rows = recorder.finish(t_eval, layout.pack_solution(solution))
    surroundings.solved()
    if not any(tensor.requires_grad for tensor in (initial, *spans, *captured.tensors)):
        return t_eval, solution
    finished = Solve(mode, recorder.recording, _packed(recorder, call.integral_loss, layout), surroundings, check)
    result = attach(finished, rows, initial, recorder.times(), captured.tensors)
    if layout.cost:
        result = _WithCost.apply(result[: len(t_eval)], result[-1, -1])
    return t_eval, layout.unpack_solution(result)


def _functions(call: Call) -> Sequence[object]:
    """The plain functions that are evaluated; torchdyn wraps one that is given as field into a module."""
    functions = [module.vf for module in call.vf.modules() if isinstance(module, DEFuncBase | PlainField)]
    return [
        function
        for function in (*functions, call.integral_loss)
        if callable(function) and not isinstance(function, nn.Module)
    ]


class _WithCost(torch.autograd.Function):
    """The solution; the integral of the running cost adds to whatever loss there is, so its cotangent is one."""

    @staticmethod
    def forward(ctx: Any, solution: Tensor, total: Tensor) -> Tensor:
        return solution.view_as(solution)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "integral_loss adds its gradient to every backward pass, so that of a gradient is not defined, and "
                "create_graph=True not supported. To differentiate twice, carry the running cost in the state."
            )
        (cotangent,) = cotangents
        return cotangent, cotangent.new_ones(())


def _interpolator(call: Call, x: State) -> Any:
    """The interpolator that torchdyn will use, an object, or None."""
    if isinstance(call.solver, Tsitouras45) or call.solver.stepping_class != "adaptive":
        return None
    if not isinstance(call.interpolator, str):
        return call.interpolator
    interpolator = str_to_interp(call.interpolator, x.dtype)  # type: ignore[union-attr]
    interpolator.sync_device_dtype(x, None)
    return interpolator


def _packed(
    recorder: Recorder, cost: Callable[[Tensor, Any], Tensor] | None, layout: Layout
) -> Callable[[Tensor, Tensor], Tensor]:
    """The field as the solver calls it, of packed states."""
    field, sign = recorder.field, -1 if recorder.reversed else 1
    if layout.plain:
        return field

    def packed(t: Tensor, y: Tensor) -> Tensor:
        x = layout.unpack(y)
        slope = field(t, x)
        return layout.pack(slope, None if cost is None else sign * cost(sign * t, x).sum())

    return packed


def _refusal(mode: Mode, solver: Any) -> Callable[[str], Exception]:
    def refuse(reason: str) -> Exception:
        return NotImplementedError(
            f'solver {type(solver).__name__} cannot be differentiated exactly by sensitivity="{mode.name}": {reason}. '
            'Use an explicit solver of torchdyn; sensitivity="autograd", where autograd can follow the step; or '
            'sensitivity="adjoint" with an explicit solver_adjoint, which is approximate.'
        )

    return refuse
