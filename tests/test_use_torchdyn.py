"""torchdyn under `use`: exact whatever `sensitivity` says, by NeuralODE, ODEProblem and the functional ``odeint``."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchdiffeq_symplectic
from torchdiffeq_symplectic import register, set_default, unregister, use

pytest.importorskip("torchdyn")
import torchdyn.numerics
from torchdyn.core import MultipleShootingLayer, NeuralODE, ODEProblem
from torchdyn.numerics import Euler, RungeKutta4

MODES: dict[str, Callable[[], use]] = {
    "symplectic": lambda: use("symplectic"),
    "symplectic-stages": lambda: use("symplectic", checkpoint="stages"),
    "aca": lambda: use("aca"),
    "baseline": lambda: use("baseline"),
}
each_mode = pytest.mark.parametrize("mode", MODES)
each_sensitivity = pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
SPAN = torch.linspace(0.0, 1.0, 5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield
    register()
    set_default(None)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(torch.cat([x, t.expand(len(x), 1)], dim=1))
        return result


def quietly(make: Callable[[], Any]) -> Any:
    """torchdyn prints remarks."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def state() -> Tensor:
    return torch.randn(4, 2, dtype=torch.float64).requires_grad_()


def is_recorded(solution: Tensor) -> bool:
    """Whether the solution is the output of this package's autograd function."""
    return solution.grad_fn is not None and solution.grad_fn.name() == "_GradientBackward"


def compare(solve: Callable[[], Tensor], wanted: list[Tensor], mode: str, tolerance: float = 1e-11) -> None:
    """``solve()`` under ``mode`` gives the values and the gradients of ``solve()`` under torchdyn's autograd."""
    weights = torch.randn(2, dtype=torch.float64)
    torch.manual_seed(3)
    truth = solve()
    torch.manual_seed(3)
    with MODES[mode]():
        found = solve()
    assert not is_recorded(truth)
    assert is_recorded(found)
    assert torch.equal(found, truth)
    losses = [(solution.square() * weights).sum() for solution in (found, truth)]
    gradients, true_gradients = (torch.autograd.grad(loss, wanted) for loss in losses)
    for one, other in zip(gradients, true_gradients, strict=True):
        assert float((one - other).norm()) <= tolerance * float(other.norm())


@each_mode
@each_sensitivity
@pytest.mark.parametrize("solver", ["rk4", "euler"])
def test_neural_odes_are_exact_whatever_their_sensitivity(solver: str, sensitivity: str, mode: str) -> None:
    net, x = Net(), state()
    model = quietly(lambda: NeuralODE(net, solver=solver, sensitivity=sensitivity, return_t_eval=False))
    reference = quietly(lambda: NeuralODE(net, solver=solver, return_t_eval=False))
    weights = torch.randn(2, dtype=torch.float64)
    truth = reference(x, SPAN)
    with MODES[mode]():
        found = model(x, SPAN)
    assert torch.equal(found, truth)
    wanted = [x, *net.parameters()]
    gradients, true_gradients = (
        torch.autograd.grad((solution.square() * weights).sum(), wanted) for solution in (found, truth)
    )
    for one, other in zip(gradients, true_gradients, strict=True):
        assert float((one - other).norm()) <= 1e-11 * float(other.norm())


@each_mode
@pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
def test_adaptive_solvers_are_exact_but_for_the_choice_of_the_first_step(solver: str, mode: str) -> None:
    """That choice is differentiated by autograd, and is clipped at steps of fixed sizes only."""
    net, x = Net(), state()
    model = quietly(lambda: NeuralODE(net, solver=solver, return_t_eval=False, atol=1e-6, rtol=1e-6))
    compare(lambda: model(x, SPAN), [x, *net.parameters()], mode, tolerance=1e-5)


@each_mode
def test_trajectories_problems_and_the_function_are_reached(mode: str) -> None:
    net, x = Net(), state()
    wanted = [x, *net.parameters()]
    model = quietly(lambda: NeuralODE(net, solver="rk4"))
    compare(lambda: model.trajectory(x, SPAN), wanted, mode)
    problem = quietly(lambda: ODEProblem(net, "rk4", atol=1e-3, rtol=1e-3))
    compare(lambda: problem(x, SPAN)[1], wanted, mode)
    compare(lambda: torchdyn.numerics.odeint(net, x, SPAN, "rk4")[1], wanted, mode)
    solver = Euler(torch.float64)
    compare(lambda: torchdyn.numerics.odeint(f=net, x=x, t_span=SPAN.flip(0), solver=solver)[1], wanted, mode)


def test_plain_functions_and_what_they_close_over() -> None:
    weight, net, x = torch.randn(2, dtype=torch.float64).requires_grad_(), Net(), state()

    def field(t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = net(t, x)
        return slope * weight

    model = quietly(lambda: NeuralODE(field, solver="rk4", return_t_eval=False))
    compare(lambda: model(x, SPAN), [x, weight, *net.parameters()], "symplectic")
    compare(lambda: torchdyn.numerics.odeint(field, x, SPAN, "rk4")[1], [x, weight, *net.parameters()], "symplectic")


@each_mode
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_fields_that_differentiate_need_not_enable_gradients(solver: str, mode: str) -> None:
    """Under torchdyn's autograd they are enabled; a replay must find the same."""
    net = nn.Linear(2, 1).double()

    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            (force,) = torch.autograd.grad(torch.tanh(self.net(x)).sum(), x, create_graph=True)
            return force

    x = state()
    model = quietly(lambda: NeuralODE(Force(), solver=solver, return_t_eval=False))
    for solve in (model, model.trajectory):
        compare(functools.partial(solve, x, SPAN), [x, net.weight], mode, tolerance=1e-5)


def test_a_running_cost_stays_where_the_model_has_it() -> None:
    """Under "autograd" torchdyn carries it in the state, and so it does under a choice."""
    net = Net()
    x = torch.cat([torch.zeros(4, 1, dtype=torch.float64), state()], dim=1).detach().requires_grad_()

    def cost(t: Tensor, x: Tensor) -> Tensor:
        return x.square().sum(1)

    model = quietly(lambda: NeuralODE(net, solver="rk4", return_t_eval=False, integral_loss=cost))
    truth = model(x, SPAN)
    with use("symplectic"):
        found = model(x, SPAN)
    assert torch.equal(found, truth)
    gradients, true_gradients = (
        torch.autograd.grad(solution[-1, :, 0].sum() + solution[-1].sum(), [x, *net.parameters()])
        for solution in (found, truth)
    )
    for one, other in zip(gradients, true_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)


def test_a_model_that_names_a_mode_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quietly(lambda: NeuralODE(Net(), solver="rk4", sensitivity="symplectic", return_t_eval=False))
    model.adjoint_options = {"checkpoint": "sages"}
    with use("aca"), pytest.raises(ValueError, match="checkpoint"):
        model(state(), SPAN)


def test_scope_threads_nesting_and_the_default() -> None:
    net, x = Net(), state()
    model = quietly(lambda: NeuralODE(net, solver="rk4", return_t_eval=False))

    def recorded() -> bool:
        return is_recorded(model(x, SPAN))

    assert not recorded()
    with use("symplectic"), ThreadPoolExecutor(1) as other:
        assert recorded()
        assert not other.submit(recorded).result()
        with use(None):
            assert not recorded()
    assert use("aca")(recorded)()
    assert not recorded()
    set_default("aca")
    assert recorded()
    unregister()
    assert not recorded()


def test_unregistered_the_function_is_torchdyns_own() -> None:
    unregister()
    own = torchdyn.numerics.odeint
    register()
    assert torchdyn.numerics.odeint is not own
    assert own.__globals__["odeint"] is own
    unregister()
    assert torchdyn.numerics.odeint is own


class Linear(nn.Linear):
    """Takes states of any shape, as multiple shooting has them."""

    def __init__(self, trained: bool) -> None:
        super().__init__(2, 2, dtype=torch.float64)
        self.requires_grad_(trained)

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def test_what_needs_no_gradient_runs_as_upstream() -> None:
    x, span = state().detach(), SPAN
    for model in (
        quietly(lambda: NeuralODE(Linear(trained=False), solver="ieuler", return_t_eval=False)),
        quietly(lambda: NeuralODE(lambda t, x, args=None: -x, solver="ieuler", return_t_eval=False)),
        quietly(lambda: MultipleShootingLayer(Linear(trained=False), solver="zero")),
    ):
        solution = model(x, span)
        with use("symplectic"):
            found = model(x, span)
        pairs = [(found, solution)] if isinstance(found, Tensor) else zip(found, solution, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_what_cannot_be_replayed_is_refused_where_a_gradient_is_needed() -> None:
    implicit = quietly(lambda: NeuralODE(Net(), solver="ieuler", return_t_eval=False))
    shooting = quietly(lambda: MultipleShootingLayer(Linear(trained=True), solver="zero"))
    for model in (implicit, shooting):
        with use("symplectic"):
            with pytest.raises(NotImplementedError):
                model(state(), SPAN)
            with torch.no_grad():
                model(state(), SPAN)
            with use(None):
                model(state(), SPAN)


def test_arguments_of_the_function_that_no_mode_knows_leave_the_solve_to_torchdyn() -> None:
    net, x = Net(), state()
    with use("symplectic"):
        _, solution = torchdyn.numerics.odeint(net, x, SPAN, "dopri5", return_all_eval=True)
    assert solution.requires_grad
    assert not is_recorded(solution)


def test_the_packages_own_name_of_the_solver_object_is_not_changed() -> None:
    solver = RungeKutta4(torch.float64)
    before = dict(vars(solver))
    with use("symplectic"):
        torchdyn.numerics.odeint(Net(), state(), SPAN, solver)
    assert vars(solver).keys() == before.keys()
    assert torchdiffeq_symplectic.context.current() is None
