"""What the evaluations of a field move themselves, a running mean, say, is moved by the solve and not by backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DOUBLE, FEW, Net, initial, loss_of, over, solve, times
from torch import Tensor, nn


class Running(nn.Module):
    """Keeps a running mean of its states, somewhere."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = Net(), kind
        mean = torch.zeros(3, dtype=DOUBLE)
        self.kept: Any = {"in a dictionary": {"mean": mean}, "in a list": [mean]}.get(kind)
        if kind == "buffer":
            self.register_buffer("mean", mean)
        elif self.kept is None:
            self.mean = mean

    @property
    def value(self) -> Tensor:
        if self.kept is None:
            return self.mean
        result: Tensor = self.kept["mean" if isinstance(self.kept, dict) else 0]
        return result

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        mean = 0.9 * self.value + 0.1 * y.detach().mean(0)
        if self.kind == "in place":
            self.mean.copy_(mean)
        elif self.kept is not None:
            self.kept["mean" if isinstance(self.kept, dict) else 0] = mean
        else:
            self.mean = mean
        result: Tensor = self.net(t, y)
        return result


@pytest.mark.parametrize("kind", ["buffer", "attribute", "in place", "in a dictionary", "in a list"])
@over(FEW)
def test_backward_does_not_move_it_again(mode: str, method: str, kind: str) -> None:
    field = Running(kind)
    for _ in range(3):  # a new tensor may have the address of an old one
        loss = loss_of(solve(mode, field, initial(), times(0.0, 0.3, 0.6, 1.0), method))
        after = field.value
        value = after.clone()
        assert value.any()
        loss.backward()
        assert field.value is after
        assert torch.equal(after, value)
