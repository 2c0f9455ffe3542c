"""The ways to differentiate a solve that are measured against each other.

Here are those of torchdiffeq. Each has a truth: backpropagation through its own solve, accepted steps held constant.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torchdiffeq
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchdiffeq_symplectic.experiments.benchmark.contender import BACKPROPAGATION, MODES, Contender, backpropagation
from torchdiffeq_symplectic.experiments.benchmark.peers import PEERS
from torchdiffeq_symplectic.experiments.benchmark.problem import Problem, State, as_tuple

__all__ = ["installed", "is_own"]

TIGHT = 1e-2  # of the tolerances, in the second run of upstream's adjoint


def installed() -> list[Contender]:
    """Those of torchdiffeq, and those of torchdyn and of other packages that are installed."""
    there = [name for name in PEERS if importlib.util.find_spec(name) is not None]
    return [*_of_torchdiffeq(), *(contender for name in there for contender in PEERS[name]())]


def is_own(name: str) -> bool:
    """Whether a contender of this name is one of this package's modes, in whatever host."""
    return name.removeprefix("torchdyn, ") in MODES


def _of_torchdiffeq() -> list[Contender]:
    return [
        Contender(BACKPROPAGATION, backpropagation, may_fail=False),
        Contender("adjoint", _odeint_adjoint),
        Contender("adjoint, tight", _tight, refusal=_has_fixed_steps),
        Contender("adjoint, seminorm", _seminorm, refusal=_has_fixed_steps),
        Contender("checkpoint", _checkpoint),
        *(
            Contender(name, functools.partial(_odeint_adjoint, **mode), may_fail=False, refusal=_only_memory_free(name))
            for name, mode in MODES.items()
        ),
    ]


def _odeint_adjoint(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    solution: State = torchdiffeq.odeint_adjoint(func, y0, t, **settings)
    return solution


def _tight(func: nn.Module, y0: State, t: Tensor, *, rtol: float, atol: float, **settings: Any) -> State:
    """Upstream's adjoint, its backward pass at a hundredth of the tolerances."""
    tolerances = {"rtol": rtol, "atol": atol, "adjoint_rtol": TIGHT * rtol, "adjoint_atol": TIGHT * atol}
    return _odeint_adjoint(func, y0, t, **tolerances, **settings)


def _seminorm(func: nn.Module, y0: State, t: Tensor, *, options: dict[str, Any], **settings: Any) -> State:
    """Upstream's adjoint without the parameters' gradients in the norm of its error; the options are those of forward.

    Kidger, Chen, Lyons, "Hey, that's not an ODE": Faster ODE Adjoints via Seminorms, ICML 2021,
    https://arxiv.org/abs/2009.09457
    """
    return _odeint_adjoint(func, y0, t, options=options, adjoint_options={**options, "norm": "seminorm"}, **settings)


def _checkpoint(func: nn.Module, y0: State, t: Tensor, **settings: Any) -> State:
    """PyTorch's checkpoint around the whole solve: no graph is kept, all of it is made again in backward."""

    def solve(*parts: Tensor) -> State:
        return backpropagation(func, parts if isinstance(y0, tuple) else parts[0], t, **settings)

    solution: State = checkpoint(solve, *as_tuple(y0), use_reentrant=False)
    return solution


def _has_fixed_steps(problem: Problem) -> str | None:
    return "no effect on fixed steps" if problem.has_fixed_steps else None


def _only_memory_free(name: str) -> Callable[[Problem], str | None]:
    def refusal(problem: Problem) -> str | None:
        return "only for euler and heun2" if problem.method not in ("euler", "heun2") else None

    return refusal if name == "memory_free" else lambda problem: None
