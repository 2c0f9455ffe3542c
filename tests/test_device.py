"""Devices: backward does not wait for one, and the modes hold on CUDA what they hold on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import MODES, Net, error, gradients, initial, loss_of, solve, times
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.memory import peak_bytes

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

METHODS: dict[str, dict[str, Any]] = {
    "rk4": {},
    "rk4 cubic": {"method": "rk4", "options": {"step_size": 0.17, "interp": "cubic"}},
    "dopri5": {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3},
    "dopri8": {"method": "dopri8", "rtol": 1e-3, "atol": 1e-3},
    "adaptive_heun": {"method": "adaptive_heun"},
    "explicit_adams": {"method": "explicit_adams"},
}


class Valueless(nn.Module):
    """A network that can be exchanged for its twin on the meta device, whose tensors have a shape but no values."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.twin = Net().to("meta")
        self.exchanged = False

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = (self.twin if self.exchanged else self.net)(t, y)
        return result


def without_values(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


@pytest.mark.filterwarnings("ignore::torchdiffeq_symplectic.MissingGradientWarning")
@pytest.mark.parametrize("method", ["rk4", "dopri5", "dopri8"])
@pytest.mark.parametrize("mode", ["symplectic", "stages", "aca"])
def test_backward_asks_for_no_value(mode: str, method: str) -> None:
    # On an accelerator each such question would wait for the device. Here it raises, as does a mixture of devices.
    field = Valueless()
    y0, t, params = initial(), times(), tuple(field.twin.parameters())
    settings = {"adjoint_options": {"replay_check": "ignore"}, "adjoint_params": params, **METHODS[method]}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, without_values):
        solution = solve(mode, field, y0, t, **settings)
    field.exchanged = True
    with torch.no_grad():
        found = solution.grad_fn.apply(torch.empty_like(solution, device="meta"))
    gradients = [gradient for gradient in found if gradient is not None]
    assert all(gradient.device.type == "meta" for gradient in gradients)
    assert gradients[0].shape == y0.shape
    assert [gradient.shape for gradient in gradients[-len(params) :]] == [parameter.shape for parameter in params]
    assert len(gradients) == 1 + len(params)


@pytest.mark.filterwarnings("ignore::torchdiffeq_symplectic.MissingGradientWarning")
def test_the_check_of_the_replay_asks_for_a_value() -> None:
    # And so the test above can fail.
    field = Valueless()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, without_values):
        solution = solve("symplectic", field, initial(), times(), adjoint_params=tuple(field.twin.parameters()))
    field.exchanged = True
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        solution.grad_fn.apply(torch.empty_like(solution, device="meta"))


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_cuda(dtype: torch.dtype = torch.float32, *shape: int) -> tuple[Net, Tensor, Tensor, list[Tensor]]:
    net = Net(shape[-1] if shape else 3, dtype=dtype).cuda()
    y0 = initial(*shape, dtype=dtype).detach().cuda().requires_grad_()
    return net, y0, times(dtype=dtype).cuda(), [y0, *net.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=NEEDS_CUDA) for mode in MODES])
def test_cuda_gradient_is_that_of_backpropagation(mode: str, method: str, dtype: torch.dtype) -> None:
    net, y0, t, wanted = on_cuda(dtype)
    wanted.append(t.requires_grad_())
    expected = gradients("backprop", net, y0, t, wanted, **METHODS[method])
    found = gradients(mode, net, y0, t, wanted, **METHODS[method])
    assert error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-11)


# Adams methods, and any method's own step done again for `baseline`, wait as torchdiffeq's solve does.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("method", [name for name in METHODS if "adams" not in name])
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=NEEDS_CUDA) for mode in MODES if mode != "baseline"])
def test_cuda_backward_does_not_wait_for_the_device(mode: str, method: str, request: pytest.FixtureRequest) -> None:
    net, y0, t, wanted = on_cuda()
    settings = {**METHODS[method], "adjoint_options": {"replay_check": "ignore"}}
    gradients(mode, net, y0, t, wanted, **settings)  # constants are sent to the device once for good
    loss = loss_of(solve(mode, net, y0, t, **settings))
    torch.cuda.synchronize()
    request.getfixturevalue("waiting_is_an_error")
    torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=NEEDS_CUDA) for mode in MODES])
def test_cuda_dropout_has_the_same_masks(mode: str) -> None:
    net, y0, t, wanted = on_cuda()
    dropout = torch.nn.Dropout(0.3)

    def run(mode: str) -> list[Tensor]:
        torch.manual_seed(5)
        return gradients(mode, lambda t, y: dropout(net(t, y)), y0, t, wanted, adjoint_params=tuple(net.parameters()))

    expected = run("backprop")
    before = torch.cuda.get_rng_state()
    assert error(run(mode), expected) < 1e-5
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=NEEDS_CUDA) for mode in ("symplectic", "aca")])
def test_cuda_memory(mode: str) -> None:
    net, y0, t, wanted = on_cuda(torch.float32, 512, 128)

    def peak(mode: str, steps: int) -> int:
        def run() -> object:
            settings: dict[str, Any] = {"options": {"step_size": 1 / steps}, "method": "rk4"}
            ends = t[[0, -1]]
            if mode == "upstream":
                solution = torchdiffeq.odeint_adjoint(net, y0, ends, **settings, adjoint_options=settings["options"])
            else:
                solution = solve(mode, net, y0, ends, **settings)
            return torch.autograd.grad(solution.sum(), wanted)

        run()
        return peak_bytes(run, "cuda")

    few, many = peak(mode, 10), peak(mode, 50)
    assert (many - few) / 40 / y0.nbytes <= 1.1
    assert peak("symplectic", 10) <= peak("aca", 10) < peak("baseline", 10)
    assert peak("symplectic", 10) - 10 * y0.nbytes < peak("upstream", 10)


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=NEEDS_CUDA) for mode in MODES])
def test_cuda_times_on_the_cpu_and_offloaded_checkpoints(mode: str) -> None:
    net, y0, t, wanted = on_cuda(torch.float64)
    expected = gradients("backprop", net, y0, t, wanted)
    with pytest.warns(UserWarning, match="t is not on the same device as y0"):
        found = gradients(mode, net, y0, t.cpu(), wanted)
    assert error(found, expected) < 1e-11
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        loss = loss_of(solve(mode, net, y0, t))
    assert error(torch.autograd.grad(loss, wanted), expected) < 1e-11
