"""FSDP2: a model that contains its solve may be sharded, a field may not."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import DOUBLE, Net, each_mode, initial, loss_of, solve, times
from torch import Tensor, nn

fsdp = pytest.importorskip("torch.distributed.fsdp")


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this release of PyTorch has fully_shard elsewhere")
    store: Any = getattr(dist, "HashStore")()  # noqa: B009 (not exported, to type checkers)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=30))
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, mode: str, method: str) -> None:
        super().__init__()
        self.field = Net()
        self.mode, self.method = mode, method

    def forward(self, y0: Tensor) -> Any:
        return solve(self.mode, self.field, y0, times(), self.method).clone()


def sharded(module: nn.Module) -> nn.Module:
    return fsdp.fully_shard(module, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))  # type: ignore[no-any-return]


METHODS = pytest.mark.parametrize("method", ["rk4", "torchdyn-rk4"])


@METHODS
@each_mode
@pytest.mark.usefixtures("alone")
def test_a_sharded_field_is_refused(mode: str, method: str) -> None:
    net = sharded(Net())
    with pytest.raises(NotImplementedError, match="fully_shard"):
        solve(mode, net, initial(), times(), method)


@METHODS
@each_mode
@pytest.mark.usefixtures("alone")
def test_a_sharded_model_has_the_gradient_of_a_whole_one(mode: str, method: str) -> None:
    found = []
    for wrap in (sharded, lambda module: module):
        model = wrap(Model(mode, method))
        loss_of(model(initial())).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        found.append([getattr(part, "full_tensor", lambda part=part: part)() for part in gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert one.dtype == DOUBLE
        assert one.abs().sum() > 0
