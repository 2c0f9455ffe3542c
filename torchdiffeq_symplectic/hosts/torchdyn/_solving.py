"""One solve of torchdyn under a gradient mode: its own loop runs, recorded, and the result gets its gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.errors import UnsupportedSolverError
from torchdiffeq_symplectic.graph import edge_of, is_behind
from torchdiffeq_symplectic.held import refuse_sharded, search
from torchdiffeq_symplectic.hosts.torchdyn._host import PLAIN_SOLVERS, Tsitouras45, odeint, str_to_interp
from torchdiffeq_symplectic.hosts.torchdyn._in_place_of import RecordingInterpolator, RecordingSolver
from torchdiffeq_symplectic.hosts.torchdyn._recording import NOT_FOLLOWED, Recorder
from torchdiffeq_symplectic.hosts.torchdyn._states import State, parts_of, state_of, tensors_in
from torchdiffeq_symplectic.hosts.torchdyn._steps import Cost, SolverStepper
from torchdiffeq_symplectic.listener import Listener, detached, differentiable, with_graph
from torchdiffeq_symplectic.modes import Mode, configured
from torchdiffeq_symplectic.recording import Recording
from torchdiffeq_symplectic.replay import Conditions
from torchdiffeq_symplectic.solve_function import Solve, attach, warn_of_escaped
from torchdiffeq_symplectic.transforms import Untransformed, is_followed, is_vmapped, value_of
from torchdiffeq_symplectic.uses import Captured

__all__ = ["Call", "PlainField", "needs_gradient", "solve"]

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
    return any(tensor.requires_grad for tensor in _watched(*parts)[1])


def _watched(*parts: object) -> tuple[Any, list[Tensor]]:
    """What ``parts`` hold, and the tensors among it that an evaluation may reach."""
    held = search(*parts)
    dummies = {id(module._parameters.get(_DUMMY)) for module in held.modules}
    return held, [tensor for tensor in held.tensors if id(tensor) not in dummies]


def solve(mode: Mode, call: Call) -> tuple[Tensor, State]:
    """Output times and the solution with the gradient of ``mode``.

    Raises:
        UnsupportedSolverError: if the solver's steps cannot be replayed.
        ValueError: if an entry of ``adjoint_options`` that is the mode's own has a wrong value.
    """
    if torch.compiler.is_compiling():  # one graph break, and no more
        return torch.compiler.disable(solve)(mode, call)  # type: ignore[no-any-return]
    mode, check = configured(mode, call.options)
    if is_followed():
        return _followed(mode, call)
    if not torch.is_grad_enabled():
        return call.run(call.vf, call.x, call.solver, call.interpolator)
    keys = None if isinstance(call.x, Tensor) else list(call.x)
    parts = parts_of(call.x, keys)
    held, watched = _watched(call.vf, call.solver, call.integral_loss, call.args)
    refuse_sharded(call.vf, held)
    conditions = Conditions(held, parts[0].device)
    captured = Captured(held.tensors, conditions.random, watched)
    func = with_graph(call.vf) if call.graph else call.vf
    costs: list[Tensor] | None = None if call.integral_loss is None else []
    listener = Listener(_charged(func, call, costs), conditions, captured)
    recording = Recording(mode.keep, parts)
    solver, interpolator = call.solver, _interpolator(call)
    recorder = Recorder(
        solver,
        listener,
        captured,
        recording,
        keys,
        costs,
        type(solver) not in PLAIN_SOLVERS or _has_gradients(solver),
        _refusal(mode, solver),
    )
    if costs is not None and keys is not None:
        raise _refusal(mode, solver)("integral_loss is integrated along with states that are tensors only")
    spans = tensors_in(call.t_span)
    with torch.set_grad_enabled(any(span.requires_grad for span in spans)):
        t_eval, solution = call.run(
            listener,
            detached(call.x),
            RecordingSolver(solver, recorder),
            None if interpolator is None else RecordingInterpolator(interpolator, recorder),
        )
    solution = detached(solution)
    rows = recorder.finish(t_eval, parts_of(solution, keys), call.x, adds_final=call.integral_loss is not None)
    listener.close()
    conditions.solved()
    if captured.escaped:
        warn_of_escaped()
    targets = captured.tensors if call.graph else tuple(dict.fromkeys((*captured.tensors, *_declared(call))))
    if not any(tensor.requires_grad for tensor in (*parts, *spans, *targets)):
        return t_eval, solution
    field = func if recorder.field is None else recorder.field
    cost = None
    if call.integral_loss is not None:
        listener.replace(func)  # the replay adds the running cost itself
        cost = Cost(call.integral_loss, 1 if field is listener else -1, parts[0].shape)
        field = cost.field(field)
    stepper = SolverStepper(solver, call.args, keys, cost, interpolator, recorder.has_tensors)
    finished = Solve(mode, recording, stepper, field, conditions, check, retains=captured.walked_through)
    times = recorder.times(parts[0].device)
    result = attach(finished, rows, parts, times, targets)
    return t_eval, state_of([part[: len(t_eval)] for part in result], keys)


def _followed(mode: Mode, call: Call) -> tuple[Tensor, State]:
    """torchdyn's own solve, for a transform of ``torch.func`` or forward-mode differentiation to follow."""
    if call.integral_loss is not None:
        raise NotImplementedError(
            f'sensitivity="{mode.name}" with integral_loss cannot be followed by torch.func or forward-mode '
            "differentiation. Make the running cost a part of the state, or differentiate by torch.autograd.grad."
        )
    if is_vmapped() and call.solver.stepping_class == "adaptive":
        raise NotImplementedError(
            f'solver {type(call.solver).__name__} under sensitivity="{mode.name}": torch.func.vmap cannot follow it, '
            'as its steps depend on values. Use a fixed-step solver, such as "rk4"; or put the batch into a dimension '
            "of the state, and differentiate by torch.autograd.grad, which takes is_grads_batched=True."
        )
    if type(call.solver) not in PLAIN_SOLVERS and not _steps_from_its_state(call):
        raise _refusal(mode, call.solver)(NOT_FOLLOWED)
    return call.run(call.vf, call.x, call.solver, call.interpolator)


def _steps_from_its_state(call: Call) -> bool:
    """Whether autograd leads from a step's result to the state that it starts from: the first step is tried."""
    keys = None if isinstance(call.x, Tensor) else list(call.x)
    with Untransformed() as untransformed, torch.enable_grad():
        start = [value_of(part) for part in parts_of(call.x, keys)]
        for part in start:
            part.requires_grad_(differentiable(part))
        span = torch.cat([value_of(part).reshape(-1) for part in tensors_in(call.t_span)])
        _, span = call.solver.sync_device_dtype(start[0], span)
        vf, state = untransformed.values_of(call.vf), state_of(start, keys)
        k1 = vf(span[0], state) if call.solver.stepping_class == "adaptive" else None
        _, end, *_ = call.solver.step(vf, state, span[0], span[1] - span[0], k1=k1, args=call.args)
        edges = {edge_of(part) for part in start if part.requires_grad}
        return any(is_behind(part, edges) for part in parts_of(end, keys))


def _declared(call: Call) -> list[Tensor]:
    """The parameters of what the user passed, which get zeros where they are not used."""
    modules = [part for part in (call.vf, call.solver, call.integral_loss) if isinstance(part, nn.Module)]
    named = [entry for module in modules for entry in module.named_parameters()]
    return [parameter for name, parameter in named if parameter.requires_grad and not name.endswith(_DUMMY)]


def _charged(func: Callable[..., Any], call: Call, costs: list[Tensor] | None) -> Callable[..., Any]:
    """The field, which also evaluates the running cost, for its value, and so that what it uses is found."""
    if costs is None or call.integral_loss is None:
        return func
    cost = call.integral_loss

    def charged(t: Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
        slope = func(t, x, *args, **kwargs)
        value = cost(t, x).sum()
        costs.append(value.detach())
        return _Used.apply(slope, value)

    return charged


class _Used(torch.autograd.Function):
    """The first tensor, with the others in its graph."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, *used: Tensor) -> Tensor:
        return slope.view_as(slope)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise NotImplementedError  # the graph is looked at, not differentiated


def _has_gradients(solver: Any) -> bool:
    """Whether something in the solver needs a gradient."""
    return any(tensor.requires_grad for tensor in search(solver).tensors)


def _interpolator(call: Call) -> Any:
    """The interpolator that torchdyn will use, an object, or None."""
    if isinstance(call.solver, Tsitouras45) or call.solver.stepping_class != "adaptive":
        return None
    if not isinstance(call.interpolator, str):
        return call.interpolator
    interpolator = str_to_interp(call.interpolator, call.x.dtype)  # type: ignore[union-attr]
    interpolator.sync_device_dtype(call.x, None)
    return interpolator


def _refusal(mode: Mode, solver: Any) -> Callable[[str], Exception]:
    def refuse(reason: str) -> Exception:
        return UnsupportedSolverError(
            f'solver {type(solver).__name__} cannot be differentiated exactly by sensitivity="{mode.name}": {reason}. '
            'Use an explicit solver of torchdyn; sensitivity="autograd", where autograd can follow the step; or '
            'sensitivity="adjoint" with an explicit solver_adjoint, which is approximate.'
        )

    return refuse
