"""No silent wrong gradient: a replay that is not the solve is reported, and one that is, never."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from old_harness import MODES, Net, each_mode, each_solver, error, gradients, initial, loss_of, solve, times
from torch import Tensor, nn

from torchdiffeq_symplectic import ReplayError, ReplayWarning

DIFFERS = r"after step \d+ by ([\d.e+-]+|nan) where the state has size [\d.e+-]+"
EXACT = 1e-11


class Noisy(nn.Module):
    """FFJORD's way: noise that is drawn once a solve and kept on the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.noise: Tensor | None = None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        if self.noise is None:
            self.noise = torch.randn(y.shape, dtype=y.dtype)
        result: Tensor = self.net(t, y) + 0.5 * self.noise
        return result


def noise_drawn_anew(field: Noisy) -> None:
    field.noise = None
    with torch.no_grad():
        solve("backprop", field, initial(), times())


def noise_removed(field: Noisy) -> None:
    field.noise = torch.zeros(())


def noise_overwritten(field: Noisy) -> None:
    assert field.noise is not None
    field.noise.mul_(1.001)


CHANGES = [noise_drawn_anew, noise_removed, noise_overwritten]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@each_solver
@each_mode
def test_noise_that_has_changed_since(mode: str, solver: str, change: Callable[[Noisy], None]) -> None:
    field, y0 = Noisy(), initial()
    loss = loss_of(solve(mode, field, y0, times(), solver))
    change(field)
    with pytest.raises(ReplayError, match=DIFFERS):
        loss.backward()
    assert y0.grad is None
    assert all(parameter.grad is None for parameter in field.parameters())


@each_mode
def test_noise_that_stays_is_no_change(mode: str) -> None:
    field, y0, t = Noisy(), initial(), times()
    wanted = [y0, *field.parameters()]
    expected = gradients("backprop", field, y0, t, wanted)
    assert error(gradients(mode, field, y0, t, wanted), expected) < EXACT


class Spectral(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            norm(nn.Linear(3, 7, dtype=torch.float64)), nn.Tanh(), nn.Linear(7, 3, dtype=torch.float64)
        )

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.layers(y) * (1 + t)
        return result


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": torch.nn.utils.spectral_norm,
    "parametrization": torch.nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", NORMS)
@each_mode
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
def test_spectral_norm_in_training_is_reported(mode: str, kind: str) -> None:
    # Every evaluation takes a step of the power iteration, so the weight is another one.
    y0, t = initial(), times()
    field = Spectral(NORMS[kind])
    with torch.no_grad():
        for name, buffer in field.named_buffers():  # the iteration must not have converged
            if name.endswith(("_u", "_v")):
                buffer.copy_(nn.functional.normalize(torch.linspace(-1, 2, len(buffer), dtype=buffer.dtype), dim=0))
    wanted = [y0, *field.parameters()]
    loss = loss_of(solve(mode, field, y0, t))
    buffers = {name: buffer.clone() for name, buffer in field.named_buffers()}
    with pytest.raises(ReplayError, match=DIFFERS):
        torch.autograd.grad(loss, wanted)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in field.named_buffers())


@pytest.mark.parametrize("kind", NORMS)
@each_mode
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
def test_spectral_norm_in_evaluation_is_exact(mode: str, kind: str) -> None:
    y0, t = initial(), times()
    field = Spectral(NORMS[kind]).eval()
    wanted = [y0, *field.parameters()]
    expected = gradients("backprop", field, y0, t, wanted)
    loss = loss_of(solve(mode, field, y0, t))
    field.train()
    assert error(torch.autograd.grad(loss, wanted), expected) < EXACT


class Graph(nn.Module):
    """A graph network: its edges and its source term are attributes that the model sets before each solve."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
        self.source = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        messages = torch.zeros_like(y).index_add(0, self.edges[1], self.net(t, y)[self.edges[0]])
        return messages + 0.2 * self.source


def edges_replaced(field: Graph) -> None:
    field.edges = torch.tensor([[0, 1, 3], [1, 3, 0]])


def edges_overwritten(field: Graph) -> None:
    field.edges[0, 2] = 3


def source_replaced(field: Graph) -> None:
    field.source = field.source + 1e-6


@pytest.mark.parametrize("change", [edges_replaced, edges_overwritten, source_replaced], ids=lambda c: c.__name__)
@each_solver
@each_mode
def test_attributes_that_have_changed_since(mode: str, solver: str, change: Callable[[Graph], None]) -> None:
    field = Graph()
    loss = loss_of(solve(mode, field, initial(4, 3), times(), solver))
    change(field)
    with pytest.raises(ReplayError, match=DIFFERS):
        loss.backward()


@each_mode
def test_captured_tensor_overwritten_in_place(mode: str) -> None:
    net, y0, control = Net(), initial(), torch.ones(2, 3, dtype=torch.float64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = net(t, y) * control
        return result

    loss = loss_of(solve(mode, field, y0, times(), adjoint_params=tuple(net.parameters())))
    control[1, 2] = 0.5
    with pytest.raises(ReplayError, match=DIFFERS):
        loss.backward()


@pytest.mark.parametrize("offset", [1e-5, float("nan")], ids=["moved", "nan"])
@pytest.mark.parametrize("mode", ["symplectic", "stages", "aca"])
def test_checkpoint_overwritten(mode: str, offset: float) -> None:
    # Saved through a hook that hands out other values than it was given; pytorch's own version check cannot see it.
    net, y0, packed = Net(), initial(), []  # type: tuple[Net, Tensor, list[Tensor]]

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.clone() if tensor.shape == y0.shape and not tensor.requires_grad else tensor)
        return packed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        solution = solve(mode, net, y0, times())
    states = [tensor for tensor in packed if tensor.shape == y0.shape and not tensor.requires_grad]
    states[2].add_(offset)
    with pytest.raises(ReplayError, match=DIFFERS):
        loss_of(solution).backward()


def test_the_step_that_differs_is_named() -> None:
    # Only the states after 0.5 are moved, and the first step that shows it is the one from 0.425.
    switch = {"at": 2.0}
    net, y0 = Net(), initial()

    def field(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = net(t, y)
        return result + 1.0 if t > switch["at"] else result

    settings: dict[str, Any] = {"options": {"step_size": 0.1}, "adjoint_params": tuple(net.parameters())}
    loss = loss_of(solve("symplectic", field, y0, times(0.0, 1.0), **settings))
    switch["at"] = 0.91
    with pytest.raises(ReplayError, match=r"after step 9 by .* \(seen in 1 of 10 steps\)") as raised:
        loss.backward()
    found = re.search(r"by ([\d.e+-]+) where the state has size ([\d.e+-]+)", str(raised.value))
    assert found is not None
    # Three of the four slopes of the last step are too large by one: weights 3/8, 3/8, 1/8 of a step of 0.1.
    assert float(found[1]) == pytest.approx(0.1 * 7 / 8, rel=0.2)


def draws_from_numpy() -> float:
    return float(np.random.rand())  # noqa: NPY002


def draws_from_python() -> float:
    return random.random()


@pytest.mark.parametrize("draw", [draws_from_numpy, draws_from_python], ids=["numpy", "python"])
@each_mode
def test_random_numbers_of_other_libraries_are_reported(mode: str, draw: Callable[[], float]) -> None:
    net, y0 = Net(), initial()

    def field(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = net(t, y) * (1 + draw())
        return result

    loss = loss_of(solve(mode, field, y0, times(), adjoint_params=tuple(net.parameters())))
    with pytest.raises(ReplayError, match=DIFFERS):
        loss.backward()


@each_mode
def test_double_backward_checks_as_well(mode: str) -> None:
    field, y0 = Noisy(), initial()
    loss = loss_of(solve(mode, field, y0, times()))
    noise_removed(field)
    with pytest.raises(ReplayError, match=DIFFERS):
        torch.autograd.grad(loss, y0, create_graph=True)


@each_solver
@each_mode
def test_warn_only_warns(mode: str, solver: str) -> None:
    field, y0 = Noisy(), initial()
    loss = loss_of(solve(mode, field, y0, times(), solver, adjoint_options={"replay_check": "warn"}))
    noise_overwritten(field)
    with pytest.warns(ReplayWarning, match=DIFFERS):
        loss.backward()
    assert y0.grad is not None


@each_solver
@each_mode
def test_ignore_is_silent(mode: str, solver: str) -> None:
    field, y0 = Noisy(), initial()
    loss = loss_of(solve(mode, field, y0, times(), solver, adjoint_options={"replay_check": "ignore"}))
    noise_overwritten(field)
    loss.backward()
    assert y0.grad is not None


@pytest.mark.parametrize("check", ["error", "warn", "ignore"])
@each_mode
def test_the_check_does_not_change_the_gradient(mode: str, check: str) -> None:
    net, y0, t = Net(), initial(), times()
    wanted = [y0, *net.parameters()]
    expected = gradients(mode, net, y0, t, wanted)
    found = gradients(mode, net, y0, t, wanted, adjoint_options={"replay_check": check})
    assert all(map(torch.equal, found, expected))


def stiff(t: Tensor, y: Tensor) -> Tensor:
    rates = torch.tensor([-30.0, -2.0, 0.1], dtype=y.dtype.to_real())
    return rates * (y - torch.cos(3 * t)) + 0.1 * y.roll(1, -1) * y


def large_and_small(t: Tensor, y: Tensor) -> Tensor:
    return y.roll(1, -1) * torch.tensor([1e3, 1e-3, 1.0], dtype=y.dtype.to_real()) + 1e4


def cancelling(t: Tensor, y: Tensor) -> Tensor:
    # Slopes far larger than the state, that nearly cancel over a step.
    return 1e3 * torch.sin(200 * t) - 5 * y


TAME: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stiff": stiff,
    "large and small": large_and_small,
    "cancelling": cancelling,
}
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", TAME)
@each_mode
def test_no_false_alarm(mode: str, name: str, dtype: torch.dtype) -> None:
    y0 = torch.tensor([0.7, -1.3, 2.1], dtype=dtype, requires_grad=True)
    t = torch.tensor([0.0, 0.51, 1.0], dtype=dtype.to_real())
    adaptive = {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3, "options": {"first_step": 0.01}}
    for settings in ({"options": {"step_size": 0.02}}, adaptive):
        solution = solve(mode, TAME[name], y0, t, adjoint_params=(), **settings)
        torch.autograd.grad(solution.abs().sum(), y0)


LONG = [(mode, kind) for mode in MODES for kind in ("float32", "float64", "complex64", "autocast")]
QUICK = [("symplectic", "float32"), ("symplectic", "autocast"), ("baseline", "float32"), ("stages", "autocast")]


@pytest.mark.parametrize(
    ("mode", "kind"), [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in LONG]
)
def test_no_false_alarm_over_a_thousand_steps(mode: str, kind: str) -> None:
    complex_state = kind == "complex64"
    dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
    net = Net(dtype=dtype)
    y0 = initial(dtype=dtype)
    t = torch.linspace(0, 20, 1001, dtype=dtype.to_real())
    options: dict[str, Any] = {"method": "euler" if complex_state else "rk4", "options": {}}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"):
        solution = solve(mode, net, y0, t, **options)
    torch.autograd.grad(solution[-1].abs().sum(), [y0, *net.parameters()])


@each_mode
def test_states_that_are_not_finite_are_no_alarm(mode: str) -> None:
    # In fixed steps: an adaptive solver refuses such states.
    net, y0 = Net(), initial()

    def field(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = net(t, y) * torch.where(t > 0.5, torch.inf, 1.0)
        return result

    loss = solve(mode, field, y0, times(), adjoint_params=tuple(net.parameters())).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = torch.autograd.grad(loss, y0)
    assert not torch.isfinite(found).all()
