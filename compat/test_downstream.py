"""Packages that call torchdiffeq or torchdyn, as PyPI has them, trained for a few steps under each mode.

Most expose no argument for a gradient mode, so they are switched by `use`. Each gradient is compared with the package's
own, by backpropagation through the same steps. A package that is not installed is skipped.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torchdiffeq
from outcomes import is_replayed
from torch import Tensor, nn

from torchdiffeq_symplectic import use

STEPS = 3


@pytest.fixture
def switch(mode: dict[str, Any]) -> use:
    return use(mode["adjoint_method"], **mode.get("adjoint_options", {}))


def package(name: str) -> Any:
    """The installed package; some warn while they are imported, or print."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def gradients(loss: Tensor, tensors: Iterable[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(tensors), allow_unused=True))


def train_and_compare(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    truth_of: Callable[[nn.Module], Tensor],
    switch: use,
    assert_agree: Callable[..., None],
    tolerance: float = 1e-10,
) -> None:
    """Some steps of training under ``switch``; at each, value and gradient are those of ``truth_of`` outside of it.

    Random numbers are the same for both. The model is copied for the truth, as some keep state of their last solve.
    """
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        reference = copy.deepcopy(model)
        torch.manual_seed(step)
        truth = truth_of(reference)
        torch.manual_seed(step)
        with switch:
            loss = loss_of(model)
        assert is_replayed(loss)
        assert torch.equal(loss, truth)
        optimizer.zero_grad()
        loss.backward()
        wanted = [p for p in model.parameters() if p.requires_grad]
        expected = gradients(truth, [p for p in reference.parameters() if p.requires_grad])
        pairs = [(p.grad, e) for p, e in zip(wanted, expected, strict=True) if p.grad is not None or e is not None]
        assert pairs
        assert_agree([found for found, _ in pairs], [e for _, e in pairs], tolerance)
        optimizer.step()


# torchcde: odeint_adjoint, looked up at each call, with all of its arguments.


class ControlledField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        result: Tensor = self.net(z).tanh().view(*z.shape[:-1], 3, 2)
        return result


def controlled_path(torchcde: Any, interpolation: str) -> tuple[Tensor, Tensor, Any]:
    """Data, the coefficients that are computed from it, and the path."""
    torch.manual_seed(11)
    data = torch.randn(4, 6, 2, dtype=torch.float64).cumsum(1).requires_grad_()
    if interpolation == "linear":
        coefficients = torchcde.linear_interpolation_coeffs(data.sin())
        return data, coefficients, torchcde.LinearInterpolation(coefficients)
    coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(data)
    return data, coefficients, torchcde.CubicSpline(coefficients)


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("adjoint", [True, False], ids=["adjoint", "backprop"])
def test_torchcde(interpolation: str, adjoint: bool, switch: use, assert_agree: Callable[..., None]) -> None:
    """With gradients of the data behind the spline, listed in ``adjoint_params`` or found by ``odeint``."""
    torchcde = package("torchcde")
    field = ControlledField()
    z0 = torch.randn(4, 3, dtype=torch.float64).requires_grad_()

    def loss_of(adjoint: bool) -> tuple[Tensor, Tensor]:
        data, coefficients, path = controlled_path(torchcde, interpolation)
        t = path.interval.detach().clone().requires_grad_()
        extra: dict[str, Any] = {}
        if adjoint:
            extra["adjoint_params"] = (*field.parameters(), coefficients)
        solution = torchcde.cdeint(
            X=path, func=field, z0=z0, t=t, adjoint=adjoint, method="rk4", options={"step_size": 0.5}, **extra
        )
        return solution[:, -1].square().sum(), data

    truth, data = loss_of(adjoint=False)
    wanted = [z0, *field.parameters()]
    expected = gradients(truth, [data, *wanted])
    with switch:
        loss, data = loss_of(adjoint)
    assert is_replayed(loss)
    assert torch.equal(loss, truth)
    assert_agree(gradients(loss, [data, *wanted]), expected)


# stribor: odeint_adjoint with a tuple as state and options of its own, no argument for the adjoint.


@pytest.mark.parametrize("divergence", ["compute", "approximate"])
@pytest.mark.parametrize("use_adjoint", [True, False], ids=["adjoint", "backprop"])
def test_stribor(divergence: str, use_adjoint: bool, switch: use, assert_agree: Callable[..., None]) -> None:
    stribor = package("stribor")
    net = stribor.net.DiffeqMLP(3, [16], 2)
    flow = stribor.ContinuousTransform(
        2, net=net, divergence=divergence, use_adjoint=use_adjoint, solver="rk4", solver_options={"step_size": 0.2}
    ).double()
    x = torch.randn(8, 2, dtype=torch.float64)

    def loss_of(flow: Any) -> Tensor:
        y, log_det = flow.forward_and_log_det_jacobian(x)
        return (y.square().sum(-1, keepdim=True) / 2 - log_det).mean()  # type: ignore[no-any-return]

    def truth_of(flow: Any) -> Tensor:
        flow.integrate = torchdiffeq.odeint
        return loss_of(flow)

    train_and_compare(flow, loss_of, truth_of, switch, assert_agree)


# neuralpde: odeint_adjoint of a bound method, with the parameters from a generator, and a dictionary of arguments.

FIRST_STEP = {"options": {"first_step": 0.1}, "rtol": 1e-4, "atol": 1e-4}


def convolutional(solver: dict[str, Any], use_adjoint: bool = True) -> Any:
    module = package("neuralpde.model.solver")
    model = module.CNNSolver(2, cnn_hidden_size=4, solver=solver, use_adjoint=use_adjoint)
    return model.double()


def test_neuralpde(switch: use, assert_agree: Callable[..., None]) -> None:
    model = convolutional({"method": "dopri5", **FIRST_STEP})
    train_and_compare(model, field_loss, field_loss_by_backprop, switch, assert_agree)


def field_loss(model: Any) -> Tensor:
    u = torch.sin(torch.arange(2 * 2 * 8 * 8, dtype=torch.float64)).view(2, 2, 8, 8)
    result: Tensor = model(u, [0.0, 0.5, 1.0]).square().mean()
    return result


def field_loss_by_backprop(model: Any) -> Tensor:
    model.use_adjoint = False
    return field_loss(model)


# torchflows: odeint, imported at each call, with a string for the solver.


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # torchflows indexes by lists
@pytest.mark.parametrize("kind", ["FFJORD", "RNODE", "OTFlowBijection"])
def test_torchflows(kind: str, switch: use, assert_agree: Callable[..., None]) -> None:
    package("torchflows")
    continuous = package(f"torchflows.bijections.continuous.{kind.lower().removesuffix('bijection')}")
    flow = package("torchflows.flows").Flow(getattr(continuous, kind)((3,), solver="rk4")).double()
    x = torch.randn(8, 3, dtype=torch.float64)

    def loss_of(flow: Any) -> Tensor:
        result: Tensor = -flow.log_prob(x).mean()
        return result

    train_and_compare(flow, loss_of, loss_of, switch, assert_agree)


# flow_matching: odeint of a closure, with a string for the method, to sample under a loss.


@pytest.mark.parametrize(("method", "step_size"), [("midpoint", 0.1), ("heun3", 0.25)])
def test_flow_matching(method: str, step_size: float, switch: use, assert_agree: Callable[..., None]) -> None:
    package("flow_matching")
    solver_of = package("flow_matching.solver").ODESolver
    x = torch.randn(8, 2, dtype=torch.float64)

    class Velocity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2)).double()

        def forward(self, x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
            result: Tensor = self.net(torch.cat([x, t.expand(len(x), 1)], dim=1)) * scale
            return result

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.velocity, self.encoder = Velocity(), nn.Linear(1, 2).double()

    def loss_of(model: Any) -> Tensor:
        context = model.encoder(torch.ones(1, dtype=torch.float64))
        sample = solver_of(velocity_model=model.velocity).sample(
            x_init=x, step_size=step_size, method=method, enable_grad=True, scale=context
        )
        result: Tensor = (sample - 1.0).square().mean()
        return result

    train_and_compare(Model(), loss_of, loss_of, switch, assert_agree)


# torchcfm: torchdyn's NeuralODE around a wrapped network, and its trajectory.


def test_torchcfm(switch: use, assert_agree: Callable[..., None]) -> None:
    package("torchdyn")
    models, utils = package("torchcfm.models.models"), package("torchcfm.utils")
    from torchdyn.core import NeuralODE

    model = models.MLP(dim=2, w=16, time_varying=True).double()
    x = torch.randn(8, 2, dtype=torch.float64)
    t_span = torch.linspace(0, 1, 6, dtype=torch.float64)

    def loss_of(model: Any) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            node = NeuralODE(utils.torch_wrapper(model), solver="euler", sensitivity="adjoint", atol=1e-3, rtol=1e-3)
        result: Tensor = (node.trajectory(x, t_span)[-1] - 1.0).square().mean()
        return result

    train_and_compare(model, loss_of, loss_of, switch, assert_agree)
