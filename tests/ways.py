"""Every way by which a user's field gets to a gradient mode, and the rule of the tensors that it uses.

The gradient is backpropagation's, or there is a clear word: a zero or partial gradient in silence is what must not be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import BACKPROPAGATION, DOUBLE, HAS_TORCHDYN, assert_same_gradients, gradients_of, solve, times, uniform
from torch import Tensor

from torchdiffeq_symplectic import ReplayError, ReplayWarning

WAYS = {
    "odeint_adjoint": ("symplectic", "rk4"),
    "odeint_adjoint, dopri5": ("symplectic", "dopri5"),
    "odeint_adjoint, aca": ("aca", "rk4"),
    "odeint_adjoint, baseline": ("baseline", "rk4"),
    "use": ("use:symplectic", "rk4"),
    "use, dopri5": ("use:symplectic", "dopri5"),
    **({"torchdyn": ("symplectic", "torchdyn-rk4")} if HAS_TORCHDYN else {}),
}
SOME = [way for way in WAYS if way in ("odeint_adjoint", "use", "torchdyn")]
each_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in SOME else pytest.mark.slow) for way in WAYS]
)
in_some_ways = pytest.mark.parametrize("way", SOME)

# The field, the state, and the tensors that are listed where the field is no module.
Solve = Callable[..., Tensor]
Case = Callable[[Solve], tuple[Tensor, dict[str, Tensor]]]


def solving(way: str, *, truth: bool) -> Solve:
    """The state at the end of a solve in a way, or by backpropagation on the same steps."""
    mode, method = WAYS[way]
    t = torch.linspace(0.1, 0.9, 5, dtype=DOUBLE) if method.startswith("torchdyn") else times(0.1, 0.9)

    def run(field: Any, y0: Tensor, params: Sequence[Tensor] | None = None) -> Tensor:
        listed = {} if params is None else {"adjoint_params": tuple(params)}
        solution: Tensor = solve(BACKPROPAGATION if truth else mode, field, y0, t, method, **listed)
        return solution[-1]

    return run


def is_clear(problem: BaseException) -> bool:
    """Whether an error, or a warning that pytest made one, says what is wrong, in the package's words or PyTorch's."""
    own = isinstance(problem, (ReplayError, ReplayWarning, NotImplementedError, ValueError))
    of_package = isinstance(problem, Warning) and type(problem).__module__.startswith("torchdiffeq_symplectic")
    of_pytorch = isinstance(problem, RuntimeError) and "modified by an inplace operation" in str(problem)
    return (own or of_package or of_pytorch) and len(str(problem)) > 40


def assert_exact_or_clear(case: Case, way: str, *, exact: bool = False) -> None:
    """Backpropagation's gradients; unless it must be ``exact``, a clear error or warning will do."""
    loss, wanted = case(solving(way, truth=True))
    truth = gradients_of(loss, wanted)
    assert any(gradient is not None and gradient.any() for gradient in truth.values())
    try:
        loss, wanted = case(solving(way, truth=False))
        found = gradients_of(loss, wanted)
    except (Exception, Warning) as problem:
        if exact or not is_clear(problem):
            raise
        return
    assert_same_gradients(found, truth)


def weighed(state: Tensor, seed: int = 0) -> Tensor:
    return (uniform(*state.shape, seed=50 + seed) * state + state.square() / 3).sum()
