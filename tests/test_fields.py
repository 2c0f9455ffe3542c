"""The gradient is exact whatever the field does: parametrized modules, closures, gradients inside, solves inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from cases import (
    ADAPTIVE,
    METHODS,
    MODES,
    Mixing,
    Problem,
    assert_exact,
    each_family,
    each_kind,
    each_mode,
    gradients_of,
    loss_of,
    mixing_problem,
    uniform,
    with_and_without_time,
)
from torch import Tensor, nn

DOUBLE = torch.float64
MAKERS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "list": list,
    "iterator": iter,
    "generator": lambda params: (param for param in params),
}


def closed_over(func: Callable[[Tensor, Tensor], Tensor], size: int, leaf: Tensor, *listed: Tensor) -> Problem:
    """A problem whose field is a plain function; the gradient of ``leaf`` is compared."""
    t = torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE, requires_grad=True)
    y0 = uniform(2, size, seed=4).requires_grad_()
    return Problem(func, y0, t, {"leaf": leaf}, adjoint_kwargs={"adjoint_params": listed})


class UsedAtTimes(nn.Module):
    """One layer early, another late, a third never."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late, self.never = (Mixing(4, seed=seed) for seed in (11, 12, 13))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.early(t, y) if t < 0.6 else self.late(t, y)
        return slope


@with_and_without_time
@each_family
@each_mode
def test_parameters_used_only_at_some_times(mode: str, method: str, time_grad: bool) -> None:
    problem = mixing_problem((2, 2))
    problem.func = UsedAtTimes()
    problem.t = problem.t.detach().requires_grad_(time_grad)
    found = assert_exact(problem, mode, **METHODS[method])
    assert found["early.weight"].abs().max() > 0
    assert found["late.weight"].abs().max() > 0
    assert torch.equal(found["never.weight"], torch.zeros(4, 4, dtype=DOUBLE))


class ManyLayers(nn.Module):
    """More parameters than are asked for at every stage; which two are used depends on time."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(uniform(3, 3, seed=30 + i)) for i in range(layers)])
        self.shared = nn.Parameter(uniform(3, seed=29))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        position = min(int(float(t.detach()) * len(self.weights)), len(self.weights) - 2)
        slope: Tensor = torch.sin(y @ self.weights[position] + self.shared * t) @ self.weights[position + 1].t()
        return slope


@pytest.mark.parametrize("layers", [20, 80])
@each_kind
@each_mode
def test_many_parameters_each_used_at_some_times(mode: str, method: str, layers: int) -> None:
    t = torch.tensor([0.0, 0.31, 0.7], dtype=DOUBLE, requires_grad=True)
    problem = Problem(ManyLayers(layers), uniform(2, 3, seed=8).requires_grad_(), t)
    found = assert_exact(problem, mode, **METHODS[method])
    unused = [name for name, gradient in found.items() if not gradient.any()]
    assert len(found) == layers + 3
    assert unused


class WeightNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=DOUBLE))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = torch.cos(self.layer(y) * t)
        return slope


@each_kind
@each_mode
def test_parametrized_module(mode: str, method: str) -> None:
    torch.manual_seed(3)
    problem = mixing_problem((2, 3))
    problem.func = WeightNormed()
    assert any("parametrizations" in name for name in assert_exact(problem, mode, **METHODS[method]))


@pytest.mark.parametrize("make_params", MAKERS.values(), ids=MAKERS)
@each_mode
def test_plain_function_with_parameters_in_any_iterable(mode: str, make_params: Callable[[Any], Any]) -> None:
    field = Mixing(6)
    problem = mixing_problem()
    problem.func, problem.params = field.forward, dict(field.named_parameters())
    truth, found = (
        solve(lambda t, y: field(t, y), problem.y0, problem.t, **METHODS["rk4"], **extra)
        for solve, extra in (
            (torchdiffeq.odeint, {}),
            (torchdiffeq.odeint_adjoint, MODES[mode] | {"adjoint_params": make_params(list(field.parameters()))}),
        )
    )
    wanted = problem.wanted()
    expected = gradients_of(loss_of(truth), wanted)
    for name, gradient in gradients_of(loss_of(found), wanted).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("listed", ["leaf", "derived"])
@each_family
@each_mode
def test_closed_over_tensor_derived_from_a_parameter(mode: str, method: str, listed: str) -> None:
    """The graph behind it is walked again at every stage, so no stage may free it."""
    leaf = uniform(3, 3, seed=2).requires_grad_()
    derived = torch.sin(2 * leaf) @ leaf.t()
    problem = closed_over(lambda t, y: torch.sin(y @ derived + t), 3, leaf, leaf if listed == "leaf" else derived)
    assert_exact(problem, mode, **METHODS[method])


@each_kind
@each_mode
def test_parameter_listed_twice(mode: str, method: str) -> None:
    leaf = uniform(3, 3, seed=2).requires_grad_()
    problem = closed_over(lambda t, y: torch.sin(y @ leaf + t), 3, leaf, leaf, leaf)
    assert_exact(problem, mode, **METHODS[method])


@each_kind
@each_mode
def test_closed_over_output_of_an_earlier_solve(mode: str, method: str) -> None:
    leaf = uniform(2, 3, seed=2).requires_grad_()
    t = torch.tensor([0.0, 0.7], dtype=DOUBLE)
    encoder = Mixing(6, seed=40)
    context = torchdiffeq.odeint_adjoint(encoder, leaf, t, method="rk4", **MODES[mode])[-1]
    true_context = torchdiffeq.odeint(encoder, leaf, t, method="rk4")[-1]
    y0, times = uniform(2, 3, seed=4), torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE)
    truth = torchdiffeq.odeint(lambda t, y: torch.sin(y * true_context + t), y0, times, **METHODS[method])
    found = torchdiffeq.odeint_adjoint(
        lambda t, y: torch.sin(y * context + t), y0, times, **METHODS[method], **MODES[mode], adjoint_params=(context,)
    )
    wanted = {"leaf": leaf, **dict(encoder.named_parameters())}
    expected = gradients_of(loss_of(truth), wanted)
    for name, gradient in gradients_of(loss_of(found), wanted).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-13)


class Hutchinson(nn.Module):
    """FFJORD's field: the divergence by one noise vector, kinetic energy and the Jacobian's norm beside it."""

    def __init__(self, inner: nn.Module, noise: Tensor) -> None:
        super().__init__()
        self.inner, self.noise = inner, noise

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            z = state[0].requires_grad_()
            slope = self.inner(t, z)
            (product,) = torch.autograd.grad(slope, z, self.noise, create_graph=True)
        divergence = (product * self.noise).sum(1)
        return slope, -divergence, slope.square().sum(), product.square().sum(1, keepdim=True)


@with_and_without_time
@each_family
@each_mode
def test_field_that_differentiates_inside(mode: str, method: str, time_grad: bool) -> None:
    z = uniform(2, 3, seed=6).requires_grad_()
    rest = torch.zeros(2, dtype=DOUBLE), torch.zeros((), dtype=DOUBLE), torch.zeros(2, 1, dtype=DOUBLE)
    t = torch.tensor([0.9, 0.4, 0.1], dtype=DOUBLE).requires_grad_(time_grad)
    field = Hutchinson(Mixing(6), torch.sign(uniform(2, 3, seed=7)))
    assert_exact(Problem(field, (z, *rest), t), mode, **METHODS[method])


class Nested(nn.Module):
    """A field that solves another equation for its value; ``solve`` is odeint or odeint_adjoint in a mode."""

    def __init__(self, solve: Callable[..., Tensor]) -> None:
        super().__init__()
        self.outer, self.inner, self.solve = Mixing(3, seed=50), Mixing(3, seed=60), solve

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        times = torch.stack([torch.zeros_like(t), 0.3 + 0.1 * t])
        slope: Tensor = self.outer(t, self.solve(self.inner, y, times, method="heun3")[-1])
        return slope


@with_and_without_time
@each_kind
@each_mode
def test_field_that_solves_inside(mode: str, method: str, time_grad: bool) -> None:
    plain = Nested(torchdiffeq.odeint)
    nested = Nested(lambda *args, **kwargs: torchdiffeq.odeint_adjoint(*args, **kwargs, **MODES[mode]))
    t = torch.tensor([0.0, 0.5, 0.8], dtype=DOUBLE).requires_grad_(time_grad)
    y0 = uniform(3, seed=5).requires_grad_()
    wanted = [{"y0": y0, "t": t} | dict(field.named_parameters()) for field in (plain, nested)]
    if not time_grad:
        wanted = [{name: tensor for name, tensor in tensors.items() if name != "t"} for tensors in wanted]
    truth = torchdiffeq.odeint(plain, y0, t, **METHODS[method])
    found = torchdiffeq.odeint_adjoint(nested, y0, t, **METHODS[method], **MODES[mode])
    assert torch.equal(found, truth)
    expected, actual = gradients_of(loss_of(truth), wanted[0]), gradients_of(loss_of(found), wanted[1])
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-13, msg=name)


FIELDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "constant": lambda t, y, leaf: torch.ones_like(y),
    "new-tensor": lambda t, y, leaf: torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE).expand(2, 3),
    "detached": lambda t, y, leaf: torch.sin(y @ leaf).detach(),
    "no-grad-inside": lambda t, y, leaf: torch.sin(y @ leaf + t).data,
    "time-alone": lambda t, y, leaf: torch.sin(t) * torch.ones_like(y),
    "parameter-alone": lambda t, y, leaf: leaf[:2] * 2,
    "the-parameter-itself": lambda t, y, leaf: leaf[:2],
    "state-itself": lambda t, y, leaf: y,
    "view-of-state": lambda t, y, leaf: y.flip(0),
    "sometimes-detached": lambda t, y, leaf: torch.sin(y @ leaf) if t > 0.5 else torch.cos(y).detach(),
    "0-d": lambda t, y, leaf: (y @ leaf).sum() * t,
    "row": lambda t, y, leaf: torch.sin(y @ leaf)[1],
    "column": lambda t, y, leaf: torch.sin(y @ leaf)[:, 1:2] * t,
    "expanded": lambda t, y, leaf: torch.sin(y @ leaf)[:1].expand(2, 3),
    "transposed": lambda t, y, leaf: torch.sin(leaf.t() @ y.t()).t(),
}


@pytest.mark.parametrize("name", FIELDS)
@each_family
@each_mode
def test_field_of_unusual_result(mode: str, method: str, name: str) -> None:
    """No graph counts as zero, and a slope of smaller shape is broadcast to the state's."""
    if name in ("0-d", "row", "column") and method in ADAPTIVE:
        pytest.skip("torchdiffeq's interpolation takes no slope of a smaller shape")
    leaf = uniform(3, 3, seed=2).requires_grad_()
    problem = closed_over(lambda t, y: FIELDS[name](t, y, leaf), 3, leaf, leaf)
    assert_exact(problem, mode, **METHODS[method])


@each_kind
@each_mode
def test_bound_method_as_field(mode: str, method: str) -> None:
    field = Mixing(6)
    problem = mixing_problem()
    problem.func, problem.params = field.forward, dict(field.named_parameters())
    problem.adjoint_kwargs = {"adjoint_params": tuple(field.parameters())}
    assert_exact(problem, mode, **METHODS[method])


@each_kind
@each_mode
def test_no_adjoint_params_means_no_gradient_for_any(mode: str, method: str) -> None:
    problem = mixing_problem()
    wanted = problem.wanted()
    found = torchdiffeq.odeint_adjoint(
        problem.func, problem.y0, problem.t, **METHODS[method], **MODES[mode], adjoint_params=()
    )
    truth = gradients_of(loss_of(torchdiffeq.odeint(problem.func, problem.y0, problem.t, **METHODS[method])), wanted)
    gradients = gradients_of(loss_of(found), wanted)
    assert {name for name, gradient in gradients.items() if gradient is None} == {"weight", "bias", "frequency"}
    torch.testing.assert_close(gradients["y0[0]"], truth["y0[0]"], rtol=1e-11, atol=1e-13)
