"""Forward mode, batched cotangents and transforms of torch.func, against backpropagation through the host."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torchdiffeq
from harness import (
    ADAPTIVE,
    BACKPROPAGATION,
    DOUBLE,
    HAS_TORCHDYN,
    METHODS,
    MODES,
    Net,
    each_mode,
    error,
    initial,
    loss_of,
    needs_torchdyn,
    over,
    solve,
    times,
    uniform,
)
from torch import Tensor, nn

import torchdiffeq_symplectic

EXACT = 1e-11
# torchdyn differentiates its choice of the first step in forward mode, as it does by backpropagation.
FOLLOWED = [name for name, row in METHODS.items() if not (row.host == "torchdyn" and row.adaptive)]
FOLLOWED = [name for name in FOLLOWED if not METHODS[name].halves]
VMAPPED = [n for n in ("euler", "rk4", "heun3", "explicit_adams", "torchdyn-rk4", "torchdyn-euler") if n in METHODS]
each_method = pytest.mark.parametrize(
    "method",
    [pytest.param(n, marks=[] if n in ("rk4", "dopri5", "torchdyn-rk4") else pytest.mark.slow) for n in FOLLOWED],
)
HOSTS = ["rk4", "dopri5", *(["torchdyn-rk4"] if HAS_TORCHDYN else [])]
each_host = pytest.mark.parametrize("method", HOSTS)


def squares(solution: Tensor) -> Tensor:
    """A loss that draws nothing, for ``vmap``."""
    return (solution * torch.linspace(-1, 1, solution.numel(), dtype=DOUBLE).view_as(solution) + solution**2).sum()


class Model(nn.Module):
    """A solve as a module, for `torch.func.functional_call`."""

    def __init__(self, mode: str, method: str) -> None:
        super().__init__()
        self.field, self.mode, self.method = Net(), mode, method

    def forward(self, y0: Tensor, t: Tensor) -> Tensor:
        solution: Tensor = solve(self.mode, self.field, y0, t, self.method)
        return solution


def directional(solution: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]) -> Tensor:
    """The derivative by reverse mode: of the cotangent, which the products are linear in."""
    at = tuple(tensor.detach().requires_grad_() for tensor in at)
    out = solution(*at)
    cotangent = torch.zeros_like(out, requires_grad=True)
    products = torch.autograd.grad(out, at, cotangent, create_graph=True)
    total = sum((product * v).sum() for product, v in zip(products, along, strict=True))
    assert isinstance(total, Tensor)
    (derivative,) = torch.autograd.grad(total, cotangent)
    return derivative


@each_method
def test_tangents_of_state_and_times(method: str) -> None:
    net, y0, t = Net().requires_grad_(requires_grad=False), initial().detach(), times()
    at, along = (y0, t), (uniform(2, 3, seed=1), uniform(4, seed=2))
    expected = directional(lambda y, t: solve(BACKPROPAGATION, net, y, t, method), at, along)
    value, tangent, *_ = torch.func.jvp(lambda y, t: solve("symplectic", net, y, t, method), at, along)
    assert torch.equal(value, solve(BACKPROPAGATION, net, y0, t, method))
    assert error([tangent], [expected]) < EXACT
    with fwd.dual_level():
        y, time = (fwd.make_dual(*pair) for pair in zip(at, along, strict=True))
        found = fwd.unpack_dual(solve("symplectic", net, y, time, method)).tangent
    assert error([found], [expected]) < EXACT
    with torch.no_grad(), fwd.dual_level():
        found = fwd.unpack_dual(solve("symplectic", net, fwd.make_dual(y0, along[0]), t, method)).tangent
    expected = directional(lambda y: solve(BACKPROPAGATION, net, y, t, method), (y0,), along[:1])
    assert error([found], [expected]) < EXACT


@each_host
@each_mode
def test_tangents_of_weights(mode: str, method: str) -> None:
    y0, t = initial().detach(), times()
    net = Net()
    along = {name: uniform(*p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())}
    names, values = zip(*net.named_parameters(), strict=True)

    def solution(*weights: Tensor) -> Tensor:
        model = Model(BACKPROPAGATION, method)
        call = {f"field.{name}": weight for name, weight in zip(names, weights, strict=True)}
        found: Tensor = torch.func.functional_call(model, call, (y0, t))
        return found

    expected = directional(solution, values, tuple(along.values()))
    for name, parameter in list(net.named_parameters()):
        owner = net.get_submodule(name.rpartition(".")[0])
        delattr(owner, name.rpartition(".")[2])
        setattr(owner, name.rpartition(".")[2], parameter.detach())
    with fwd.dual_level():
        for name, v in along.items():
            owner, last = net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(owner, last, fwd.make_dual(getattr(owner, last), v))
        found = fwd.unpack_dual(solve(mode, net, y0, t, method)).tangent
    assert error([found], [expected]) < EXACT


def test_a_tangent_is_that_of_finite_differences() -> None:
    net, y0, v, t = Net(), initial().detach(), uniform(2, 3, seed=3), times()

    def solution(y: Tensor) -> Tensor:
        found: Tensor = torchdiffeq.odeint(net, y, t, method="dopri5", rtol=1e-10, atol=1e-12)
        return found

    def followed(y: Tensor) -> Tensor:
        found = torchdiffeq.odeint_adjoint(
            net, y, t, method="dopri5", rtol=1e-10, atol=1e-12, adjoint_method="symplectic"
        )
        assert isinstance(found, Tensor)
        return found

    h = 1e-4
    difference = (solution(y0 + h * v) - solution(y0 - h * v)) / (2 * h)
    _, tangent, *_ = torch.func.jvp(followed, (y0,), (v,))
    assert error([tangent], [difference.detach()]) < 1e-6


@each_host
def test_hessian_vector_products_forward_over_reverse(method: str) -> None:
    net, y0, v, t = Net(), initial().detach(), uniform(2, 3, seed=3), times()

    def loss(mode: str) -> Callable[[Tensor], Tensor]:
        return lambda y: loss_of(solve(mode, net, y, t, method))

    _, expected = torch.autograd.functional.hvp(loss(BACKPROPAGATION), y0, v)
    _, found, *_ = torch.func.jvp(torch.func.grad(loss("symplectic")), (y0,), (v,))
    assert error([found], [expected]) < EXACT


def test_dropout_draws_the_same_numbers_once_more() -> None:
    net = nn.Sequential(nn.Linear(3, 3, dtype=DOUBLE), nn.Dropout(0.4))
    y0, t = initial().detach(), times()

    def field(t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = net(y)
        return slope

    def solution(mode: str) -> Callable[[Tensor], Tensor]:
        def run(y: Tensor) -> Tensor:
            torch.manual_seed(3)
            found: Tensor = solve(mode, field, y, t, "bosh3", adjoint_params=(), rtol=1.0, atol=1.0)
            return found

        return run

    truth = solution(BACKPROPAGATION)
    value, tangent, *_ = torch.func.jvp(solution("symplectic"), (y0,), (y0,))
    assert torch.equal(value, truth(y0))
    assert error([tangent], [directional(truth, (y0,), (y0,))]) < EXACT


# Cotangents that are batches.


@over(["euler", "rk4", "dopri5", "adaptive_heun", "explicit_adams", *HOSTS[2:]], every=2)
def test_batched_cotangents(mode: str, method: str) -> None:
    net, y0, t = Net(), initial(), times().requires_grad_()
    wanted = [y0, t, *net.parameters()]
    cotangents = uniform(5, 4, 2, 3, seed=4)
    solution = solve(mode, net, y0, t, method)
    found = torch.autograd.grad(solution, wanted, cotangents, is_grads_batched=True)
    truth = solve(BACKPROPAGATION, net, y0, t, method)
    for i, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(truth, wanted, cotangent, retain_graph=True)
        assert error([product[i] for product in found], expected) < EXACT


@each_host
@each_mode
def test_jacobians_at_once(mode: str, method: str) -> None:
    net, y0, t = Net(), initial().detach(), times()
    expected = torch.autograd.functional.jacobian(lambda y: solve(BACKPROPAGATION, net, y, t, method), y0)
    found = torch.autograd.functional.jacobian(lambda y: solve(mode, net, y, t, method), y0, vectorize=True)
    assert isinstance(found, Tensor)
    assert error([found], [expected]) < EXACT


# torch.func.


@each_host
@each_mode
def test_gradients_by_transforms(mode: str, method: str) -> None:
    net, y0, t = Net(), initial().detach(), times()

    def solution(mode: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda y, t: solve(mode, net, y, t, method)

    leaves = y0.clone().requires_grad_(), t.clone().requires_grad_()
    truth = solution(BACKPROPAGATION)(*leaves)
    cotangent = uniform(*truth.shape, seed=2)
    expected = torch.autograd.grad(truth, leaves, cotangent, retain_graph=True)
    value, products, *_ = torch.func.vjp(solution(mode), y0, t)
    assert torch.equal(value, truth)
    assert error(products(cotangent), expected) < EXACT
    expected = torch.autograd.grad(loss_of(truth), leaves)
    found = torch.func.grad(lambda y, t: loss_of(solution(mode)(y, t)), argnums=(0, 1))(y0, t)
    assert error(found, expected) < EXACT
    jacobian = torch.autograd.functional.jacobian(lambda y: solution(BACKPROPAGATION)(y, t), y0)
    assert error([torch.func.jacrev(lambda y: solution(mode)(y, t))(y0)], [jacobian]) < EXACT


@each_host
def test_gradients_of_parameters_that_a_call_substitutes(method: str) -> None:
    y0, t = initial().detach(), times()

    def loss(mode: str, parameters: dict[str, Tensor]) -> Tensor:
        return loss_of(torch.func.functional_call(Model(mode, method), parameters, (y0, t)))

    parameters = {name: p.detach().requires_grad_() for name, p in Model(BACKPROPAGATION, method).named_parameters()}
    expected = torch.autograd.grad(loss(BACKPROPAGATION, parameters), list(parameters.values()))
    found = torch.func.grad(functools.partial(loss, "symplectic"))({n: p.detach() for n, p in parameters.items()})
    assert error([found[name] for name in parameters], expected) < EXACT


@pytest.mark.parametrize("method", VMAPPED)
def test_vmap_over_initial_states(method: str) -> None:
    net, t = Net(), times()
    many = uniform(5, 2, 3, seed=1)

    def loss(mode: str) -> Callable[[Tensor], Tensor]:
        return lambda y: squares(solve(mode, net, y, t, method))

    expected = torch.stack([solve(BACKPROPAGATION, net, y, t, method) for y in many])
    assert error([torch.func.vmap(lambda y: solve("symplectic", net, y, t, method))(many)], [expected]) < EXACT
    found = torch.func.vmap(torch.func.grad(loss("symplectic")))(many)
    one_by_one = []
    for y in many:
        leaf = y.clone().requires_grad_()
        one_by_one += torch.autograd.grad(loss(BACKPROPAGATION)(leaf), leaf)
    assert error([found], [torch.stack(one_by_one)]) < EXACT
    # Backpropagation through a batch of solves.
    leaf = many.clone().requires_grad_()
    wanted = [leaf, *net.parameters()]
    sums = torch.func.vmap(loss("symplectic"))(leaf).sum(), torch.stack([loss(BACKPROPAGATION)(y) for y in leaf]).sum()
    found_all, expected_all = (torch.autograd.grad(total, wanted) for total in sums)
    assert error(found_all, expected_all) < EXACT


@pytest.mark.parametrize("method", [name for name in HOSTS if name != "dopri5"])
def test_vmap_over_an_ensemble(method: str) -> None:
    y0, t = initial().detach(), times()
    models = [Model("symplectic", method) for _ in range(3)]
    for i, model in enumerate(models):
        model.field = Net(seed=i)
    parameters, _ = torch.func.stack_module_state(models)

    def loss(model: Model, parameters: dict[str, Tensor]) -> Tensor:
        return squares(torch.func.functional_call(model, parameters, (y0, t)))

    total = torch.func.vmap(functools.partial(loss, models[0]))(parameters).sum()
    found = torch.autograd.grad(total, list(parameters.values()))
    truth = Model(BACKPROPAGATION, method)
    for i in range(3):
        one = {name: p[i].detach().requires_grad_() for name, p in parameters.items()}
        expected = torch.autograd.grad(loss(truth, one), list(one.values()))
        assert error([p[i] for p in found], expected) < EXACT


ADAPTIVE_OF_BOTH = [*ADAPTIVE[:2], *(["torchdyn-dopri5"] if HAS_TORCHDYN else [])]


@pytest.mark.parametrize("method", [*ADAPTIVE_OF_BOTH, "implicit_adams"])
def test_vmap_over_steps_that_depend_on_values_is_refused_before_the_solve(method: str) -> None:
    net, t = Net(), times()
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap cannot follow.*is_grads_batched=True"):
        torch.func.vmap(lambda y: solve("symplectic", net, y, t, method))(uniform(5, 2, 3, seed=1))
    assert net.evaluations == 0


def test_an_event_of_an_adaptive_method_is_refused() -> None:
    net, y0, t = Net(), initial().detach(), times()
    with pytest.raises(NotImplementedError, match="search for an event"):
        torch.func.jvp(
            lambda y: solve("symplectic", net, y, t[[0, -1]], "dopri5", event_fn=lambda t, y: t - 0.4)[1], (y0,), (y0,)
        )
    assert net.evaluations == 0


@needs_torchdyn
def test_a_step_that_autograd_cannot_follow_is_refused_under_transforms_too() -> None:
    from torchdyn.core import NeuralODE

    model = NeuralODE(Net(), solver="ieuler", sensitivity="symplectic", return_t_eval=False)
    with pytest.raises(torchdiffeq_symplectic.UnsupportedSolverError, match="ImplicitEuler"):
        torch.func.grad(lambda y: model(y, times()).sum())(initial().detach())


@pytest.mark.parametrize("mode", MODES)
def test_plain_solves_inside_use_go_on_as_without_this_package(mode: str) -> None:
    net, y0, t = Net(), initial().detach(), times()
    expected = torch.func.jvp(lambda y: solve(BACKPROPAGATION, net, y, t, "rk4"), (y0,), (y0,))[1]
    found = torch.func.jvp(lambda y: solve(f"use:{mode}", net, y, t, "rk4"), (y0,), (y0,))[1]
    assert torch.equal(found, expected)
    with fwd.dual_level():  # where nothing is dual, any method is what it is without forward mode
        assert torch.equal(solve(mode, net, y0, t, "dopri8"), solve(BACKPROPAGATION, net, y0, t, "dopri8"))
