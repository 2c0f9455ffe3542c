"""A field wrapped in torch.compile, in every mode."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import Net, each_mode, error, gradients, initial, loss_of, over, solve, times
from torch import Tensor

slow = pytest.mark.slow
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
BACKENDS = [
    "eager",
    pytest.param("aot_eager", marks=slow),
    pytest.param("inductor", marks=[slow, needs_compiler]),
]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


class Plain(Net):
    """Without the count of evaluations, for which each call would be compiled anew."""

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.outer(torch.tanh(self.inner(y) + t * self.rate)) - 0.3 * y
        return result


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@over(["rk4", "dopri5"])
def test_gradient_is_that_of_the_field_itself(mode: str, backend: str, method: str) -> None:
    net, y0, t = Plain(), initial(), times().requires_grad_()
    wanted = [y0, t, *net.parameters()]
    expected = gradients("backprop", net, y0, t, wanted, method=method)
    compiled: Any = torch.compile(net, backend=backend)
    assert error(gradients(mode, compiled, y0, t, wanted, method=method), expected) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
@each_mode
def test_training_goes_on_without_compiling_again(mode: str, backend: str) -> None:
    net, compiled_graphs = Plain(), []  # type: tuple[Plain, list[object]]
    compiler: Any = backend
    if backend == "eager":

        def compiler(graph: Any, inputs: Any) -> Any:
            compiled_graphs.append(graph)
            return graph.forward

    field: Any = torch.compile(net, backend=compiler)
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-3)
    counts = []
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(solve(mode, field, initial(), times())).backward()
        optimiser.step()
        counts.append(len(compiled_graphs))
    assert counts[0] == counts[-1]
    assert counts[-1] <= 4, "one for each combination of grad mode and inputs that need a gradient"


@each_mode
def test_compiled_function_as_field(mode: str) -> None:
    net, y0, t = Plain(), initial(), times()
    wanted = [y0, *net.parameters()]
    params = tuple(net.parameters())
    expected = gradients("backprop", net, y0, t, wanted)

    def drift(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = net(t, y)
        return result

    compiled: Any = torch.compile(drift, backend="eager")
    assert error(gradients(mode, compiled, y0, t, wanted, adjoint_params=params), expected) < 1e-11
