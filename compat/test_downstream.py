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
from torch import Tensor, nn

import torchdiffeq_symplectic
from torchdiffeq_symplectic import use

SWITCHES: dict[str, Callable[[], use]] = {
    "symplectic": lambda: use("symplectic"),
    "stages": lambda: use("symplectic", checkpoint="stages"),
    "aca": lambda: use("aca"),
    "baseline": lambda: use("baseline"),
}
STEPS = 3


@pytest.fixture(params=list(SWITCHES))
def switch(request: pytest.FixtureRequest) -> use:
    return SWITCHES[request.param]()


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
        assert_from_this_package(loss)
        assert torch.equal(loss, truth)
        optimizer.zero_grad()
        loss.backward()
        wanted = [p for p in model.parameters() if p.requires_grad]
        expected = gradients(truth, [p for p in reference.parameters() if p.requires_grad])
        pairs = [(p.grad, e) for p, e in zip(wanted, expected, strict=True) if p.grad is not None or e is not None]
        assert pairs
        assert_agree([found for found, _ in pairs], [e for _, e in pairs], tolerance)
        optimizer.step()


def assert_from_this_package(loss: Tensor) -> None:
    """The loss was computed from a solve that was recorded here."""
    names, stack, seen = set(), [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            stack += [following for following, _ in node.next_functions]
    assert "_GradientBackward" in names, sorted(names)


# torchcde: odeint_adjoint, looked up at each call, with all of its arguments.


class ControlledField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        result: Tensor = self.net(z).tanh().view(*z.shape[:-1], 3, 2)
        return result


def controlled_path(torchcde: Any, interpolation: str) -> tuple[Tensor, Any]:
    torch.manual_seed(11)
    data = torch.randn(4, 6, 2, dtype=torch.float64).cumsum(1).requires_grad_()
    if interpolation == "linear":
        return data, torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(data))
    return data, torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(data))


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("adjoint", [True, False], ids=["adjoint", "backprop"])
def test_torchcde(interpolation: str, adjoint: bool, switch: use, assert_agree: Callable[..., None]) -> None:
    """With gradients of the data behind the spline, listed in ``adjoint_params`` or found by ``odeint``."""
    torchcde = package("torchcde")
    field = ControlledField()
    z0 = torch.randn(4, 3, dtype=torch.float64).requires_grad_()

    def loss_of(adjoint: bool) -> tuple[Tensor, Tensor]:
        data, path = controlled_path(torchcde, interpolation)
        t = path.interval.detach().clone().requires_grad_()
        extra: dict[str, Any] = {}
        if adjoint:
            extra["adjoint_params"] = (*field.parameters(), *path.buffers())
        solution = torchcde.cdeint(
            X=path, func=field, z0=z0, t=t, adjoint=adjoint, method="rk4", options={"step_size": 0.5}, **extra
        )
        return solution[:, -1].square().sum(), data

    truth, data = loss_of(adjoint=False)
    wanted = [z0, *field.parameters()]
    expected = gradients(truth, [data, *wanted])
    with switch:
        loss, data = loss_of(adjoint)
    assert_from_this_package(loss)
    assert torch.equal(loss, truth)
    assert_agree(gradients(loss, [data, *wanted]), expected)


@pytest.mark.parametrize("mode", ["symplectic", "aca", "baseline"])
def test_torchcde_by_arguments(mode: str, assert_agree: Callable[..., None]) -> None:
    torchcde = package("torchcde")
    field = ControlledField()
    z0 = torch.randn(4, 3, dtype=torch.float64).requires_grad_()

    def loss_of(**how: Any) -> Tensor:
        _, path = controlled_path(torchcde, "cubic")
        solution = torchcde.cdeint(X=path, func=field, z0=z0, t=path.interval, method="rk4", **how)
        return solution[:, -1].square().sum()  # type: ignore[no-any-return]

    wanted = [z0, *field.parameters()]
    expected = gradients(loss_of(adjoint=False, options={"step_size": 0.5}), wanted)
    path_data = controlled_path(torchcde, "cubic")[1]
    found = loss_of(
        options={"step_size": 0.5}, adjoint_method=mode, adjoint_params=(*field.parameters(), *path_data.buffers())
    ) if False else loss_of(options={"step_size": 0.5}, adjoint_method=mode, adjoint_params=tuple(field.parameters()))
    assert_agree(gradients(found, wanted), expected)
