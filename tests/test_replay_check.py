"""No silent wrong gradient: a replay that is not the solve is reported, whatever made it another."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    Net,
    each_mode,
    error,
    gradients,
    initial,
    loss_of,
    over,
    solve,
    times,
)
from torch import Tensor, nn

from torchdiffeq_symplectic import ReplayError, ReplayWarning

DIFFERS = r"after step \d+ by ([\d.e+-]+|nan) where the state has size [\d.e+-]+"
EXACT = 1e-11
SOME = [name for name in ("rk4", "dopri5", "adaptive_heun", "torchdyn-rk4", "torchdyn-dopri5") if name in METHODS]


class Graph(nn.Module):
    """A graph network: its edges and its source term are attributes that the model sets before each solve."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
        self.source = torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(4, 3)

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        messages = torch.zeros_like(y).index_add(0, self.edges[1], self.net(t, y)[self.edges[0]])
        return messages + 0.2 * self.source


def edges_overwritten(field: Graph) -> None:
    field.edges[0, 2] = 3


def source_overwritten(field: Graph) -> None:
    field.source.mul_(1.001)


def edges_replaced(field: Graph) -> None:
    field.edges = torch.tensor([[0, 1, 3], [1, 3, 0]])


def source_replaced(field: Graph) -> None:
    field.source = field.source + 1e-6


@pytest.mark.parametrize("change", [edges_overwritten, source_overwritten], ids=lambda change: change.__name__)
@over(SOME)
def test_attributes_that_are_overwritten(mode: str, method: str, change: Callable[[Graph], None]) -> None:
    field, y0 = Graph(), initial(4, 3)
    loss = loss_of(solve(mode, field, y0, times(0.1, 0.2, 0.4, 0.6), method))
    change(field)
    with pytest.raises(ReplayError, match=DIFFERS):
        loss.backward()
    assert y0.grad is None
    assert all(parameter.grad is None for parameter in field.parameters())


@pytest.mark.parametrize("change", [edges_replaced, source_replaced], ids=lambda change: change.__name__)
@over(SOME)
def test_attributes_that_are_replaced_are_put_back(mode: str, method: str, change: Callable[[Graph], None]) -> None:
    """The gradient is that of the solve; the attribute is the new one afterwards."""
    field, y0, t = Graph(), initial(4, 3), times(0.1, 0.2, 0.4, 0.6)
    wanted = [y0, *field.parameters()]
    expected = gradients(BACKPROPAGATION, field, y0, t, wanted, method=method)
    loss = loss_of(solve(mode, field, y0, t, method))
    change(field)
    present = field.edges, field.source
    assert error(torch.autograd.grad(loss, wanted), expected) < EXACT
    assert field.edges is present[0]
    assert field.source is present[1]


class Spectral(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(norm(nn.Linear(3, 7, dtype=DOUBLE)), nn.Tanh(), nn.Linear(7, 3, dtype=DOUBLE))
        with torch.no_grad():
            for name, buffer in self.named_buffers():  # the power iteration must not have converged
                if name.endswith(("_u", "_v")):
                    buffer.copy_(nn.functional.normalize(torch.linspace(-1, 2, len(buffer), dtype=DOUBLE), dim=0))

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.layers(y) * (1 + t)
        return result


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "hook": torch.nn.utils.spectral_norm,
    "parametrization": torch.nn.utils.parametrizations.spectral_norm,
}


@pytest.mark.parametrize("kind", NORMS)
@each_mode
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning")
def test_spectral_norm_is_reported_in_training_and_exact_in_evaluation(mode: str, kind: str) -> None:
    """In training every evaluation takes a step of the power iteration, so the weight is another one."""
    field, y0, t = Spectral(NORMS[kind]), initial(), times()
    wanted = [y0, *field.parameters()]
    loss = loss_of(solve(mode, field, y0, t))
    buffers = {name: buffer.clone() for name, buffer in field.named_buffers()}
    with pytest.raises(ReplayError, match=DIFFERS):
        torch.autograd.grad(loss, wanted)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in field.named_buffers())
    field.eval()
    expected = gradients(BACKPROPAGATION, field, y0, t, wanted)
    loss = loss_of(solve(mode, field, y0, t))
    field.train()
    assert error(torch.autograd.grad(loss, wanted), expected) < EXACT


@pytest.mark.parametrize("offset", [1e-5, float("nan")], ids=["moved", "nan"])
@pytest.mark.parametrize("mode", ["symplectic", "stages", "aca"])
def test_checkpoints_that_a_hook_hands_out_changed(mode: str, offset: float) -> None:
    """Pytorch's own version check cannot see it."""
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
    """Only the states after 0.91 are moved, and the step from 0.9 is the only one that shows it."""
    switch = {"at": 2.0}
    net, y0 = Net(), initial()

    def field(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = net(t, y)
        return result + 1.0 if t > switch["at"] else result

    settings: dict[str, Any] = {"options": {"step_size": 0.1}, "adjoint_params": tuple(net.parameters())}
    loss = loss_of(solve("symplectic", field, y0, times(0.0, 1.0), **settings))
    switch["at"] = 0.91
    with pytest.raises(ReplayError, match=r"after step 9 by .* \(in 1 steps\)") as raised:
        loss.backward()
    found = re.search(r"by ([\d.e+-]+) where the state has size ([\d.e+-]+)", str(raised.value))
    assert found is not None
    # Three of the four slopes of the last step are too large by one: weights 3/8, 3/8, 1/8 of a step of 0.1.
    assert float(found[1]) == pytest.approx(0.1 * 7 / 8, rel=0.2)


@pytest.mark.parametrize("draw", [lambda: np.random.rand(), random.random], ids=["numpy", "python"])  # noqa: NPY002
@over(SOME[:1])
def test_random_numbers_of_other_libraries(mode: str, method: str, draw: Callable[[], float]) -> None:
    net, y0 = Net(), initial()

    def field(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = net(t, y) * (1 + draw())
        return result

    loss = loss_of(solve(mode, field, y0, times(), method, adjoint_params=tuple(net.parameters())))
    with pytest.raises(ReplayError, match=DIFFERS):
        loss.backward()


@each_mode
def test_double_backward_is_checked_as_well(mode: str) -> None:
    field, y0 = Graph(), initial(4, 3)
    loss = loss_of(solve(mode, field, y0, times()))
    source_overwritten(field)
    with pytest.raises(ReplayError, match=DIFFERS):
        torch.autograd.grad(loss, y0, create_graph=True)


@pytest.mark.parametrize("check", ["warn", "ignore"])
@over(SOME)
def test_what_is_done_about_it_can_be_chosen(mode: str, method: str, check: str) -> None:
    field, y0 = Graph(), initial(4, 3)
    t = times(0.1, 0.2, 0.4, 0.6)
    loss = loss_of(solve(mode, field, y0, t, method, adjoint_options={"replay_check": check}))
    source_overwritten(field)
    if check == "warn":
        with pytest.warns(ReplayWarning, match=DIFFERS):
            loss.backward()
    else:
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
