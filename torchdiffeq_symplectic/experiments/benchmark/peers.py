"""Other packages as contenders, where they are installed: torchdyn, the papers' own code, and zuko.

torch_symplectic_adjoint is that of Matsubara et al. (https://github.com/tksmatsubara/symplectic-adjoint-method), not on
PyPI; TorchDiffEqPack that of Zhuang et al., ACA and MALI.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.contenders import MODES, Contender, of_torchdiffeq
from torchdiffeq_symplectic.experiments.benchmark.problem import Problem, Solver, State
from torchdiffeq_symplectic.experiments.environment import first_step_held

__all__ = ["PEERS", "Flat", "installed"]

ADAPTIVE, FIXED = ("dopri5",), ("euler", "midpoint")  # of torchdyn, whose rk4 is not torchdiffeq's


def installed() -> list[Contender]:
    """Those of torchdiffeq, and those of other packages that are installed."""
    there = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    return [*of_torchdiffeq(), *(contender for name in there for contender in PEERS[name]())]


class Flat(nn.Module):
    """A field of one tensor, from one whose state may be a tuple like ``example``: its parts then lie in a row."""

    def __init__(self, field: nn.Module, example: State) -> None:
        super().__init__()
        self.field = field
        self._shapes = [part.shape for part in example] if isinstance(example, tuple) else None

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The slope, like ``x``. Packages give ``t`` a dimension, or another dtype than that of the state."""
        return self.pack(self.field(t.reshape(()).to(x.dtype), self.unpack(x)))

    def pack(self, y: State) -> Tensor:
        """The tensor of a state or a slope."""
        return y if isinstance(y, Tensor) else torch.cat([part.reshape(1, -1) for part in y], dim=1)

    def unpack(self, x: Tensor) -> State:
        """The state of a tensor, or the solution if that has a dimension more."""
        if self._shapes is None:
            return x
        parts = x.split([shape.numel() for shape in self._shapes], dim=-1)
        return tuple(part.reshape(*x.shape[:-2], *shape) for part, shape in zip(parts, self._shapes, strict=True))


def _unknown(options: Mapping[str, Any], *known: str) -> str | None:
    """A refusal of those of torchdiffeq's ``options`` that are not ``known``.

    A first step is advice that may be ignored, and a limit to the number of steps changes none of them.
    """
    unknown = [name for name in options if name not in ("first_step", "max_num_steps", *known)]
    return f"has no {', '.join(unknown)}" if unknown else None


def _of_torchdyn() -> list[Contender]:
    """torchdyn's three ways and this package's modes.

    ``autograd`` also differentiates the choice of the first step. ``interpolated_adjoint`` adds the gradients of output
    times between the first and the last at wrong ones. Both adjoints go the wrong way for decreasing times.
    """
    upstream = {name: {"adjoint_method": name} for name in ("autograd", "adjoint", "interpolated_adjoint")}
    return [
        Contender(f"torchdyn, {name}", partial(_torchdyn, **mode), _torchdyn_truth, _torchdyn_refusal, name in upstream)
        for name, mode in {**upstream, **MODES}.items()
    ]


def _torchdyn_refusal(problem: Problem) -> str | None:
    if problem.method not in ADAPTIVE + FIXED:
        return f"only for {', '.join(ADAPTIVE + FIXED)}"
    if problem.method in FIXED and not _grid(problem.t, problem.options)[1]:
        return "its steps must end at the output times"
    return _unknown(problem.options, "step_size")


def _grid(t: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The times between which torchdiffeq's fixed steps go, and whether ``t`` are among them."""
    size = options.get("step_size")
    if size is None:
        return t, True
    duration = t[-1] - t[0]
    number = math.ceil(abs(float(duration)) / float(size) - 1e-4)  # one more, if by rounding, would be of no length
    grid = t[0] + duration.sign() * size * torch.arange(number + 1, dtype=t.dtype, device=t.device)
    grid[-1] = t[-1]
    distance, nearest = (grid[:, None] - t).abs().min(dim=0)
    grid[nearest] = t
    return grid.to(t), bool((distance < 1e-2 * size).all())


def _torchdyn(
    func: nn.Module,
    y0: State,
    t: Tensor,
    *,
    adjoint_method: str,
    rtol: float,
    atol: float,
    method: str,
    options: Mapping[str, Any],
    adjoint_options: Mapping[str, str] | None = None,
) -> State:
    from torchdyn.core import ODEProblem

    field = Flat(func, y0)
    sign = 1 if t[1] > t[0] else -1  # it solves with decreasing times as with the increasing ones -t
    grid, outputs = t, t[:0]
    if method in FIXED:
        rtol = atol = 1e-3  # torchdyn warns of any others, as they have no effect
        (grid, _), outputs = _grid(t, options), sign * t
    tolerances = {"rtol": rtol, "atol": atol, "rtol_adjoint": rtol, "atol_adjoint": atol}
    problem = ODEProblem(field, method, sensitivity=adjoint_method, **tolerances)
    problem.adjoint_options = dict(adjoint_options or {})
    times, states = problem(field.pack(y0), grid, outputs)
    if len(times) != len(t):
        # The adjoint modes return more: that of fixed steps knows no `save_at`, the interpolated one takes all steps.
        rows = (times == sign * t[:, None]).nonzero()[:, 1]
        if len(rows) != len(t):
            raise RuntimeError(f"torchdyn returned {len(rows)} of {len(t)} output times")
        states = states[rows]
    return field.unpack(states)


def _torchdyn_truth(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    with first_step_held():
        return _torchdyn(func, y0, t, adjoint_method="autograd", **settings)


def _of_matsubara() -> list[Contender]:
    """The symplectic adjoint method by its authors: their steps end at the output times."""
    solve, truth = (partial(_matsubara, name) for name in ("odeint_symplectic_adjoint", "odeint"))
    return [Contender("torch_symplectic_adjoint", solve, truth, _matsubara_refusal)]


def _matsubara(function: str, func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    package = importlib.import_module("torch_symplectic_adjoint")
    settings["options"] = {**settings["options"], "step_t": t[1:]}
    solution: State = getattr(package, function)(func, y0, t, **settings)
    return solution


def _matsubara_refusal(problem: Problem) -> str | None:
    if problem.method not in ("dopri5", "dopri8", "bosh3"):
        return "only for dopri5, dopri8, bosh3"
    return None if problem.t[-1] > problem.t[0] else "only for increasing times"


def _restarting(solve: Callable[..., Tensor]) -> Solver:
    """A solver that goes from output to output, from one that only returns the last state."""

    def solver(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
        field = Flat(func, y0)
        states = [field.pack(y0)]
        for start, end in pairwise(t):
            states.append(solve(field, states[-1], start, end, **settings))
        return field.unpack(torch.stack(states))

    return solver


def _instead_of_dopri5(problem: Problem) -> str | None:
    return _unknown(problem.options) if problem.method == "dopri5" else "only in place of dopri5"


def _of_zuko() -> list[Contender]:
    """Its adjoint, which takes ACA's name but integrates the continuous adjoint."""
    return [Contender("zuko", _restarting(_zuko), _restarting(_zuko_truth), _instead_of_dopri5)]


def _zuko(field: Flat, x: Tensor, start: Tensor, end: Tensor, *, rtol: float, atol: float, **rest: Any) -> Tensor:
    """It chooses its first step itself: it tries the whole interval."""
    from zuko.utils import odeint

    parameters = (parameter for parameter in field.parameters() if parameter.requires_grad)
    solution: Tensor = odeint(field, x, start, end, parameters, atol, rtol)
    return solution


def _zuko_truth(field: Flat, x: Tensor, start: Tensor, end: Tensor, **settings: Any) -> Tensor:
    from zuko.utils import dopri45

    node: Any = _zuko(field, x.detach().requires_grad_(), start, end, **settings).grad_fn
    t = start
    for _, after, length in node.steps:  # of each the state and the time at its end, and its length
        x, t = dopri45(field, x, t, length), after
    return x


def _of_pack() -> list[Contender]:
    """ACA and MALI by their authors. MALI solves by its own method, of second order.

    It makes all times but the last float32, and its backward pass takes the steps' lengths from them: that is the
    gradient's error, 1e-9 to 1e-6.
    """
    ways = ("ACA", "odesolve_adjoint", "dopri5"), ("MALI", "odesolve_adjoint_sym12", "sym12async")
    return [
        Contender(
            f"TorchDiffEqPack, {name}",
            _restarting(partial(_pack, adjoint, method)),
            _restarting(partial(_pack, "odesolve_endtime", method)),
            _instead_of_dopri5,
        )
        for name, adjoint, method in ways
    ]


def _pack(
    function: str,
    name: str,
    field: Flat,
    x: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    rtol: float,
    atol: float,
    options: Mapping[str, Any],
    **rest: Any,
) -> Tensor:
    import TorchDiffEqPack

    settings = {"method": name, "t0": start, "t1": end, "h": options.get("first_step"), "rtol": rtol, "atol": atol}
    if function == "odesolve_endtime" and name == "sym12async":  # its leapfrog advances a velocity beside the state
        solver = TorchDiffEqPack.odesolve_endtime(field, x, settings, return_solver=True)
        solver.tensor_input = False  # so that it returns a tuple, as it is given one
        state: Tensor = solver.integrate((x, field(start, x)), t0=start)[0]
        return state
    solution: Tensor = getattr(TorchDiffEqPack, function)(field, x, settings)
    return solution


PEERS: dict[str, Callable[[], list[Contender]]] = {
    "torchdyn": _of_torchdyn,
    "torch_symplectic_adjoint": _of_matsubara,
    "zuko": _of_zuko,
    "TorchDiffEqPack": _of_pack,
}
