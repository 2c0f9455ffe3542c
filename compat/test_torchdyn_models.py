"""torchdyn's layers and models in the field, trained in each mode against ``sensitivity="autograd"`` step by step.

They set and keep what a replay must find again: depth, control and noise of the last forward call, gradients switched
on inside the field, weights that are computed from the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

pytest.importorskip("torchdyn")

from harness import each_mode
from torchdyn.core import NeuralODE
from torchdyn.models import CNF, GNF, HNN
from torchdyn.models.cnf import autograd_trace, hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, Fourier, GalLinear, GaussianRBF
from torchdyn_training import assert_same_training

pytestmark = pytest.mark.usefixtures("double_precision")  # models and data are of the default type

each_solver = pytest.mark.parametrize("solver", ["rk4", "dopri5", pytest.param("tsit5", marks=pytest.mark.slow)])
POINTS = torch.linspace(-1.2, 1.6, 10, dtype=torch.float64).reshape(5, 2)
TARGET = torch.linspace(0.7, -0.4, 10, dtype=torch.float64).reshape(5, 2)
TIMES = torch.tensor([0.0, 0.15, 0.5, 1.0], dtype=torch.float64)


def net(inputs: int, outputs: int, hidden: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Softplus(), nn.Linear(hidden, outputs))


def to_the_target(model: Any, step: int) -> Any:
    """All outputs, each weighed differently; the state may have more columns than the target."""
    _, solution = model(POINTS, TIMES)
    weights = torch.linspace(0.4, 1.3, len(solution))
    return (weights * (solution - TARGET).square().mean((1, 2))).sum()


def of_field(field: Callable[[], nn.Module], solver: str, **settings: Any) -> Callable[[str], nn.Module]:
    return lambda sensitivity: NeuralODE(field(), solver=solver, sensitivity=sensitivity, **settings)


# Continuous normalizing flows.


def noise(dimensions: int = 2) -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(dimensions), torch.eye(dimensions))


def conditional() -> Any:
    """A flow whose network sees depth and data."""
    return CNF(nn.Sequential(DepthCat(1), nn.Linear(3, 6), nn.Tanh(), DepthCat(1), nn.Linear(7, 2)))


FLOWS: dict[str, Callable[[], nn.Module]] = {
    "exact trace": lambda: CNF(net(2, 2)),
    "exact trace, named": lambda: CNF(net(2, 2), trace_estimator=autograd_trace),
    "of depth": conditional,
    "Hutchinson": lambda: CNF(net(2, 2), trace_estimator=hutch_trace, noise_dist=noise()),
    "Hutchinson, inside": lambda: nn.Sequential(CNF(net(2, 2), trace_estimator=hutch_trace, noise_dist=noise())),
}
each_flow = pytest.mark.parametrize("flow", FLOWS)


def flow_model(flow: str, solver: str) -> Callable[[str], nn.Module]:
    def build(sensitivity: str) -> nn.Module:
        tolerances = {} if solver == "rk4" else {"atol": 1e-4, "rtol": 1e-4}
        node = NeuralODE(FLOWS[flow](), solver=solver, sensitivity=sensitivity, return_t_eval=False, **tolerances)
        node.t_span = TIMES if solver == "rk4" else None
        return nn.Sequential(Augmenter(1, 1), node)

    return build


def negative_log_likelihood(model: nn.Module, x: Tensor) -> Tensor:
    end = model(x)[-1]
    loss: Tensor = -(noise().log_prob(end[:, 1:]) + end[:, 0]).mean()
    return loss


@each_flow
@each_mode
def test_flow_of_two_batches_before_one_backward(mode: str, flow: str) -> None:
    """The second solve draws noise for itself: the first one's is no longer on the module in backward."""

    def loss(model: nn.Module, step: int) -> Tensor:
        return negative_log_likelihood(model, torch.randn(6, 2)) + 2 * negative_log_likelihood(model, torch.randn(6, 2))

    assert_same_training(flow_model(flow, "dopri5"), loss, mode)


# Depth and data.


def depth_field() -> nn.Module:
    return nn.Sequential(DepthCat(1), nn.Linear(3, 6), nn.Tanh(), DepthCat(1), nn.Linear(7, 2))


def controlled_field() -> nn.Module:
    return nn.Sequential(DataControl(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def both_field() -> nn.Module:
    return nn.Sequential(DataControl(), DepthCat(1), nn.Linear(5, 6), nn.Tanh(), DataControl(), nn.Linear(8, 2))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "DepthCat": depth_field,
    "DataControl": controlled_field,
    "DepthCat, DataControl": both_field,
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


@each_layer
@each_mode
def test_layer_of_two_batches_before_one_backward(mode: str, layer: str) -> None:
    """Depth and control on the module are those of the second solve when the first is replayed."""

    def loss(model: Any, step: int) -> Any:
        first, second = model(POINTS, TIMES)[1], model(POINTS[:3] + 2, TIMES * 2 + 1)[1]
        return first.square().mean() + second[1:].pow(3).mean()

    assert_same_training(of_field(LAYERS[layer], "dopri5"), loss, mode)


# Galerkin layers: weights are computed from the time, which DepthCat puts into the last column, and kept on the layer.


def galerkin(layer: nn.Module) -> nn.Module:
    """Coefficients that are not zero, which is what torchdyn starts from."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape) + (name == "dilation"))
    return layer


@pytest.mark.parametrize("basis", [Fourier, GaussianRBF])
@each_mode
def test_galerkin_layer(mode: str, basis: Any) -> None:
    def field() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), DepthCat(1), galerkin(GalLinear(4, 2, expfunc=basis(3))))

    assert_same_training(of_field(field, "rk4"), to_the_target, mode)


# Dynamics of second order, and fields that are gradients of an energy.


ENERGIES: dict[str, Callable[[], nn.Module]] = {
    "HNN": lambda: HNN(net(2, 1)),
    "GNF": lambda: GNF(net(2, 1)),
}


@each_solver
@pytest.mark.parametrize("energy", ENERGIES)
@each_mode
def test_energy(mode: str, energy: str, solver: str) -> None:
    assert_same_training(of_field(ENERGIES[energy], solver), to_the_target, mode)
