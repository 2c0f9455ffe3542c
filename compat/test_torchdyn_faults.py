"""What torchdyn computes otherwise than one expects: a test that fails here says that a release has mended it.

The modes differentiate what torchdyn computes and not what it means to, so the README names these. Some are about
torchdyn's own adjoint modes, in whose place the modes of this package are used.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

pytest.importorskip("torchdyn")

from torchdyn.core import MultipleShootingLayer, NeuralODE, NeuralSDE, ODEProblem
from torchdyn.models import CNF, HNN
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import DataControl
from torchdyn.numerics import AsynchronousLeapfrog, HyperEuler, odeint, odeint_mshooting, odeint_symplectic
from torchdyn.numerics.solvers.ode import DormandPrince45, str_to_solver
from torchdyn.numerics.utils import adapt_step

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

PROBLEMS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "autonomous": (lambda t, x: -x.square(), 1 / 2.5),
    "of time": (lambda t, x: x * torch.cos(t), math.exp(math.sin(1.5))),
}
ORDERS = {
    ("euler", "autonomous"): 1,
    ("euler", "of time"): 1,
    ("midpoint", "autonomous"): 2,
    ("midpoint", "of time"): 2,
    ("rk4", "autonomous"): 4,
    ("rk4", "of time"): 1,  # the nodes are 0, 0, 1/2, 1/2
    ("dopri5", "autonomous"): 5,
    ("dopri5", "of time"): 5,
    ("tsit5", "autonomous"): 5,
    ("tsit5", "of time"): 5,
}


@pytest.mark.parametrize(("solver", "problem"), ORDERS)
def test_orders(solver: str, problem: str) -> None:
    """All are of the order that they should have but rk4 on fields of time; coefficients built in float64."""
    field, exact = PROBLEMS[problem]
    errors = []
    for steps in (20, 40):
        method, x, t, h = str_to_solver(solver, DOUBLE), one(), torch.zeros((), dtype=DOUBLE), 1.5 / steps
        for _ in range(steps):
            x = method.step(field, x, t, torch.tensor(h, dtype=DOUBLE))[1]
            t = t + h
        errors.append(abs(float(x) - exact))
    order = math.log2(errors[0] / errors[1])
    assert ORDERS[solver, problem] - 0.2 < order < ORDERS[solver, problem] + 0.8


def test_nodes_of_rk4() -> None:
    field, times = counted(decay)
    odeint(field, one(), torch.tensor([0.0, 1.0]), "rk4")
    assert times == [0, 0, 0.5, 0.5]


def test_solvers_that_a_model_makes_have_coefficients_of_single_precision() -> None:
    model = neural_ode(solver="rk4", field=decay)
    model(one(), T)
    assert model.solver.tableau[2].dtype == DOUBLE
    assert abs(float(model.solver.tableau[2][0]) - 1 / 6) > 1e-9


def test_solve_of_half_precision_rounds_the_coefficients_for_good() -> None:
    solver = str_to_solver("rk4", DOUBLE)
    for dtype in (torch.float16, DOUBLE):
        odeint(decay, one().to(dtype), T.to(dtype), solver)
    assert 1e-5 < abs(float(solver.tableau[2][0]) - 1 / 6) < 1e-3


def test_step_sizes_of_a_solve_in_double_precision_are_single() -> None:
    """The factors are tensors of shape (1,) in float32, which outweigh a size without shape in float64."""
    solver = DormandPrince45(DOUBLE)
    size, ratio = torch.tensor(0.1, dtype=DOUBLE), torch.tensor(0.5, dtype=DOUBLE)
    adapted = adapt_step(size, ratio, solver.safety, solver.min_factor, solver.max_factor, solver.order)
    assert adapted.dtype == torch.float32


@pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
def test_accuracy_in_double_precision_ends_at_that_of_the_step_sizes(solver: str) -> None:
    """Sizes times coefficients are rounded to float32, whatever the tolerance: 1e-10 where 1e-14 would be expected."""
    _, solution = odeint(decay, one(), torch.tensor([0.0, 1.0], dtype=DOUBLE), solver, atol=1e-13, rtol=1e-13)
    assert 1e-11 < abs(float(solution[-1]) - math.exp(-1)) < 1e-8


def test_times_of_a_decreasing_span_come_back_negated() -> None:
    times, _ = neural_ode()(state(), T.flip(0))
    assert torch.equal(times, -T.flip(0))


def test_first_step_of_a_decreasing_span_is_chosen_by_another_field() -> None:
    """By f at negated times instead of -f(-t): the same problem written forwards is solved by other steps."""
    field = neural_ode().vf
    _, backwards = odeint(field, state(), T.flip(0), "dopri5")
    _, forwards = odeint(lambda t, x: -field(-t, x), state(), -T.flip(0), "dopri5")
    assert torch.allclose(backwards, forwards, atol=1e-4)
    assert not torch.allclose(backwards, forwards, atol=1e-12)


def test_an_output_that_rounding_misses_is_lost() -> None:
    """Two times, one state: ``solution[-1]`` is the initial one."""
    x = torch.ones(1, 1)
    times, solution = odeint(lambda t, x: 1e-3 * torch.ones_like(x), x, torch.tensor([0.11, 0.4]), "dopri5")
    assert len(times) == len(solution) == 1


def test_an_output_that_rounding_misses_is_gone_back_to() -> None:
    sizes = []

    class Listening(DormandPrince45):  # type: ignore[misc]
        def step(self, f: Any, x: Any, t: Any, dt: Any, k1: Any = None, args: Any = None) -> Any:
            sizes.append(float(dt))
            return super().step(f, x, t, dt, k1, args)

    odeint(lambda t, x: 1e-3 * torch.ones_like(x), torch.ones(1, 1), torch.tensor([0.11, 0.4, 1.4]), Listening())
    assert min(sizes) < 0


def test_an_output_just_before_the_end_of_a_step_costs_many() -> None:
    """The step after an output starts from what the output cut off."""
    settings: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-6}
    ends, _ = odeint(decay, one(), torch.tensor([0.0, 2.0], dtype=DOUBLE), "dopri5", return_all_eval=True, **settings)
    evaluations = []
    for at in (ends[3], ends[3] * (1 - 1e-10)):
        field, times = counted(decay)
        odeint(field, one(), torch.tensor([0.0, float(at), 2.0], dtype=DOUBLE), "dopri5", **settings)
        evaluations.append(len(times))
    assert evaluations[1] > 2 * evaluations[0]


def test_nan_is_an_endless_loop() -> None:
    field, _ = counted(lambda t, x: x * math.nan, limit=1000)
    with pytest.raises(TimeoutError):
        odeint(field, one(), T, "dopri5")


def test_adaptive_steps_in_single_precision_need_times_in_it() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="dtype"):
        odeint(lambda t, x: layer(x), torch.ones(1, 2), T, "dopri5")


def test_times_close_to_each_other_are_refused() -> None:
    """Where no ``save_at`` is given, either; close is 1e-5 relative."""
    with pytest.raises(AssertionError, match="save_at"):
        odeint(decay, one(), torch.linspace(100, 100.001, 3, dtype=DOUBLE), "euler")


def test_saved_times_that_are_no_times_of_the_solve_are_dropped() -> None:
    """And are among those returned all the same."""
    wanted = torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE)
    times, solution = odeint(decay, one(), torch.linspace(0, 1, 3, dtype=DOUBLE), "euler", save_at=wanted)
    assert (len(times), len(solution)) == (3, 2)


@pytest.mark.parametrize(
    "times", [[0.0, 1.0], [torch.tensor([1.0]), torch.tensor([0.0])]], ids=["numbers", "backwards"]
)
def test_list_of_times(times: list[Any]) -> None:
    with pytest.raises(TypeError):
        odeint(decay, one(), times, "rk4")


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


def test_energy_models_mark_the_state_they_are_given() -> None:
    x = torch.ones(2, 2, dtype=DOUBLE)
    with torch.no_grad():
        neural_ode(solver="rk4", field=HNN(nn.Linear(2, 1).double())).trajectory(x, T)
    assert x.requires_grad


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


def test_adjoint_of_the_first_time_is_that_of_the_last() -> None:
    x, t = state(), T[[0, -1]].requires_grad_()
    (_, truth), (_, found) = (gradients_of_last(name, x, t, t=t) for name in ("autograd", "adjoint"))
    assert relative_error(found[1], truth[1]) < 1e-4
    assert relative_error(found[0], truth[1]) < 1e-4
    assert relative_error(found[0], truth[0]) > 0.5


def test_adjoint_of_more_than_two_times_fails() -> None:
    t = T.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=re.escape("got [2] but expected shape compatible with [4]")):
        gradients_of_last("adjoint", state(), t, t=t)


def test_interpolated_adjoint_returns_each_step() -> None:
    """Instead of the states at the times asked for, ..."""
    times, solution = neural_ode("interpolated_adjoint", **TIGHT)(state(), T)
    assert len(times) == len(solution) > 2 * len(T)


def test_interpolated_adjoint_has_no_gradient_of_states_along_the_way() -> None:
    """... and gives those between the gradient of others, or none."""
    gradients: list[Tensor] = []
    for sensitivity in ("autograd", "interpolated_adjoint"):
        x = state()
        times, solution = neural_ode(sensitivity, **TIGHT)(x, T)
        middle = int((times - T[2]).abs().argmin())
        gradients += torch.autograd.grad(solution[middle].sum(), x)
    assert gradients[0].abs().max() > 0.1
    assert not gradients[1].any()


def test_interpolated_adjoint_ignores_the_solver_of_the_adjoint() -> None:
    x = state()
    models = [neural_ode("interpolated_adjoint", "rk4", solver_adjoint=solver) for solver in ("euler", "dopri5")]
    first, second = (gradients_of_last("", x, model=model)[0] for model in models)
    assert torch.equal(first, second)


def test_seminorm_is_ignored() -> None:
    x = state()
    models = [neural_ode("adjoint", seminorm=seminorm, rtol_adjoint=1e-2) for seminorm in (False, True)]
    first, second = (gradients_of_last("", x, model=model)[0] for model in models)
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 2)])
def test_interpolated_adjoint_needs_states_of_rank_two(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(RuntimeError, match="permute"):
        gradients_of_last("", x, model=neural_ode("interpolated_adjoint", "rk4"))


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


@each_adjoint
def test_frozen_parameter_fails(sensitivity: str) -> None:
    field = Field()
    field.layer.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients_of_last("", state(), model=neural_ode(sensitivity, "rk4", field))


def gradient_after_another_solve(model: Any, x: Tensor, columns: slice) -> Tensor:
    """Of a solve that is not the last one before backward."""
    torch.manual_seed(3)
    loss: Tensor = model(x, T)[1][-1, :, columns].sum()
    model(x + 1, T)
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    gradient: Tensor = torch.autograd.grad(loss, parameter)[0]
    return gradient


def controlled() -> nn.Module:
    return nn.Sequential(DataControl(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def estimating() -> nn.Module:
    noise = MultivariateNormal(torch.zeros(2, dtype=DOUBLE), torch.eye(2, dtype=DOUBLE))
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return CNF(net, trace_estimator=hutch_trace, noise_dist=noise)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("field", "columns"), [(controlled, 2), (estimating, 3)], ids=["DataControl", "Hutchinson"])
def test_adjoint_takes_control_and_noise_of_the_last_forward_call(field: Any, columns: int) -> None:
    x = torch.linspace(-1, 1, 2 * columns, dtype=DOUBLE).reshape(2, columns)
    gradients = []
    for sensitivity in ("autograd", "adjoint"):
        torch.manual_seed(1)
        model = neural_ode(sensitivity, field=field().requires_grad_(), **TIGHT)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.6)
        gradients.append(gradient_after_another_solve(model, x, slice(0, 1)))
    assert relative_error(gradients[1], gradients[0]) > 0.05


def test_adjoint_trains_no_hypersolver() -> None:
    class Correction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=DOUBLE))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.weight * x

    correction = Correction()
    model = neural_ode("adjoint", HyperEuler(correction), solver_adjoint="euler")
    model(state(), T)[1].sum().backward()
    assert correction.weight.grad is None


def test_adjoint_has_no_gradient_of_what_a_field_closes_over() -> None:
    rate = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    for sensitivity, found in (("autograd", True), ("adjoint", False)):
        solution = neural_ode(sensitivity, "rk4", lambda t, x, args=None: -rate * x)(state(), T)[1]
        (gradient,) = torch.autograd.grad(solution.sum(), rate, allow_unused=True)
        assert (gradient is not None) == found


# Models.


def test_solver_of_the_adjoint_cannot_be_a_module() -> None:
    with pytest.raises(KeyError):
        neural_ode(solver="rk4", solver_adjoint=str_to_solver("rk4"))


def test_integral_loss_of_second_order_fails() -> None:
    model = neural_ode(solver="rk4", field=nn.Linear(2, 1).double(), order=2, integral_loss=lambda t, x: x[:, :1])
    with pytest.raises(AttributeError, match="horder_forward"):
        model(torch.ones(3, 3, dtype=DOUBLE), T)


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


def test_warning_about_its_own_defaults() -> None:
    with pytest.warns(UserWarning, match="Setting tolerances has no effect"):
        ODEProblem(Field(), "rk4")(state(), T)


def test_type_of_a_leapfrog_by_name_is_taken_for_its_channel() -> None:
    assert str_to_solver("alf", DOUBLE).channel_index == DOUBLE


def test_adaptive_leapfrog_fails() -> None:
    field = Field()
    field.order = 1  # type: ignore[assignment]
    with pytest.raises(ValueError, match="not enough values to unpack"):
        odeint_symplectic(field, torch.ones(2, 4, dtype=DOUBLE), T, AsynchronousLeapfrog(stepping_class="adaptive"))


def test_multiple_shooting_takes_no_notice_of_time() -> None:
    """All its pieces start at 0; a field of the state alone is right."""
    t = torch.linspace(0, 2, 11, dtype=DOUBLE)
    settings: dict[str, Any] = {"fine_steps": 20, "maxiter": 9}
    _, still = odeint_mshooting(decay, one(), t, "mszero", **settings)
    _, moving = odeint_mshooting(lambda t, x: torch.cos(t) * x, one(), t, "mszero", **settings)
    assert abs(float(still[-1]) - math.exp(-2)) < 1e-6
    assert abs(float(moving[-1]) - math.exp(math.sin(2))) > 1


@each_adjoint
def test_multiple_shooting_by_adjoints_fails(sensitivity: str) -> None:
    with pytest.raises(AttributeError, match="sync_device_dtype"):
        MultipleShootingLayer(Field(), "mszero", sensitivity=sensitivity)(state(), T)


def test_multiple_shooting_backward_fails_in_its_third_update() -> None:
    t = torch.linspace(0, 1, 8, dtype=DOUBLE)
    assert MultipleShootingLayer(Field(), "msbackward", maxiter=1)(state(), t)[1].shape == (8, 2, 2)
    with pytest.raises(IndexError):
        MultipleShootingLayer(Field(), "msbackward", maxiter=2)(state(), t)


def test_stochastic_models_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        NeuralSDE(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ImportError, match="LSDEFunc"):
        __import__("torchdyn.models.hybrid")
