"""What torchdyn computes otherwise than one expects: a test that fails here says that a release has mended it.

The modes differentiate what torchdyn computes and not what it means to, so the README names these. Some are about
torchdyn's own adjoint modes, in whose place the modes of this package are used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import relative_error
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE
from torchdyn.numerics import odeint

# Upstream says so to everyone whose tolerances are not odeint's defaults, as a test below shows.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning")

DOUBLE = torch.float64
ADJOINTS = ("adjoint", "interpolated_adjoint")
each_adjoint = pytest.mark.parametrize("sensitivity", ADJOINTS)
T = torch.linspace(0, 1, 4, dtype=DOUBLE)
TIGHT: dict[str, Any] = {"atol": 1e-8, "rtol": 1e-8, "atol_adjoint": 1e-8, "rtol_adjoint": 1e-8}


class Field(nn.Module):
    """Changes with time; a single linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).double()

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return torch.tanh(self.layer(x)) * (1 + torch.sin(2 * t))


def state() -> Tensor:
    return torch.tensor([[0.3, -0.7], [1.1, 0.4]], dtype=DOUBLE, requires_grad=True)


def one() -> Tensor:
    return torch.ones(1, 1, dtype=DOUBLE)


def decay(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
    return -x


def neural_ode(sensitivity: str = "autograd", solver: Any = "dopri5", field: Any = None, **settings: Any) -> Any:
    """With the same parameters each time."""
    torch.manual_seed(2)
    return NeuralODE(field or Field(), solver, sensitivity=sensitivity, **settings)


def counted(field: Callable[..., Tensor], limit: float = math.inf) -> tuple[Callable[..., Tensor], list[float]]:
    """A field and the times at which it has been evaluated, of which there may be so many."""
    times: list[float] = []

    def counting(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        times.append(float(t.detach()))
        if len(times) > limit:
            raise TimeoutError(f"{limit} evaluations")
        return field(t, x)

    return counting, times


# The solutions.


def test_nodes_of_rk4() -> None:
    field, times = counted(decay)
    odeint(field, one(), torch.tensor([0.0, 1.0]), "rk4")
    assert times == [0, 0, 0.5, 0.5]


def test_times_of_a_decreasing_span_come_back_negated() -> None:
    times, _ = neural_ode()(state(), T.flip(0))
    assert torch.equal(times, -T.flip(0))


def test_an_output_that_rounding_misses_is_lost() -> None:
    """Two times, one state: ``solution[-1]`` is the initial one."""
    x = torch.ones(1, 1)
    times, solution = odeint(lambda t, x: 1e-3 * torch.ones_like(x), x, torch.tensor([0.11, 0.4]), "dopri5")
    assert len(times) == len(solution) == 1


def test_times_close_to_each_other_are_refused() -> None:
    """Where no ``save_at`` is given, either; close is 1e-5 relative."""
    with pytest.raises(AssertionError, match="save_at"):
        odeint(decay, one(), torch.linspace(100, 100.001, 3, dtype=DOUBLE), "euler")


def test_saved_times_that_are_no_times_of_the_solve_are_dropped() -> None:
    """And are among those returned all the same."""
    wanted = torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE)
    times, solution = odeint(decay, one(), torch.linspace(0, 1, 3, dtype=DOUBLE), "euler", save_at=wanted)
    assert (len(times), len(solution)) == (3, 2)


def test_trajectory_does_not_interpolate() -> None:
    model = neural_ode(interpolator="4th")
    assert not torch.allclose(model(state(), T)[1], model.trajectory(state(), T), atol=1e-5)


def test_tsit5_does_not_interpolate() -> None:
    plain, interpolated = (neural_ode(solver="tsit5", interpolator=given) for given in (None, "4th"))
    assert torch.equal(plain(state(), T)[1], interpolated(state(), T)[1])


def test_arguments_reach_no_field() -> None:
    seen = []

    def field(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        seen.append(args)
        return -x

    neural_ode(solver="rk4", field=field)(one(), T, args={"gain": 2})
    assert seen == [{}] * 12


def test_implicit_euler_has_no_gradient() -> None:
    """In torchdyn's "autograd", without a word; and it evaluates the field at the start of its steps."""
    model, x = neural_ode(solver="ieuler"), state()
    found = torch.autograd.grad(model(x, T)[1][-1].sum(), [x, *model.parameters()], allow_unused=True)
    assert [gradient is None or not gradient.any() for gradient in found] == [True] * 3
    field, times = counted(lambda t, x: torch.cos(t) - x)
    odeint(field, one(), torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE), "ieuler")
    assert set(times) == {0.0, 0.5}


# The gradients of torchdyn's adjoint modes.


def gradients_of_last(sensitivity: str, *leaves: Tensor, model: Any = None, t: Tensor = T) -> list[Any]:
    """Of the last state, with tight tolerances."""
    model = model or neural_ode(sensitivity, **TIGHT)
    solution = model(leaves[0], t)[1]
    return list(torch.autograd.grad(solution[-1].square().sum(), leaves, allow_unused=True))


@each_adjoint
def test_adjoint_of_a_decreasing_span_is_of_another_problem(sensitivity: str) -> None:
    """Not less accurate, but wrong. An increasing one is right."""
    for t, least, most in ((T, 0, 1e-3), (T.flip(0), 0.03, math.inf)):
        x = state()
        (truth,), (found,) = (gradients_of_last(name, x, t=t) for name in ("autograd", sensitivity))
        assert least <= relative_error(found, truth) <= most


@each_adjoint
def test_saved_times_are_ignored(sensitivity: str) -> None:
    assert len(neural_ode("autograd", "rk4")(state(), T, save_at=T[-1:])[1]) == 1
    assert len(neural_ode(sensitivity, "rk4")(state(), T, save_at=T[-1:])[1]) == 4


@each_adjoint
def test_arguments_fail(sensitivity: str) -> None:
    """They are taken for the times to save at."""
    with pytest.raises(RuntimeError, match="dict"):
        neural_ode(sensitivity, "rk4")(state(), T, args={"gain": 2})


@each_adjoint
def test_unused_parameter_fails(sensitivity: str) -> None:
    field = Field()
    field.unused = nn.Parameter(torch.ones(3, dtype=DOUBLE))
    with pytest.raises(RuntimeError, match="size of tensor a"):
        gradients_of_last("", state(), model=neural_ode(sensitivity, "rk4", field))


def test_adjoint_has_no_gradient_of_what_a_field_closes_over() -> None:
    rate = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    for sensitivity, found in (("autograd", True), ("adjoint", False)):
        solution = neural_ode(sensitivity, "rk4", lambda t, x, args=None: -rate * x)(state(), T)[1]
        (gradient,) = torch.autograd.grad(solution.sum(), rate, allow_unused=True)
        assert (gradient is not None) == found


# Models.


def test_sensitivity_assigned_later_has_no_effect() -> None:
    """Between torchdyn's own: it dispatches on ``sensalg``."""
    model, x = neural_ode(solver="rk4"), state()
    model.sensitivity = "adjoint"
    assert model(x, T)[1].grad_fn.name().startswith("StackBackward")


def test_flat_parameters_are_those_of_construction_and_cannot_be_copied() -> None:
    model = neural_ode().float()
    assert model.vf_params.dtype == DOUBLE
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
