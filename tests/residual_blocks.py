"""Residual blocks of every form, and the networks that they make: the truth that `ResidualField` is compared with."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

DOUBLE = torch.float64

needs_heun = pytest.mark.skipif("heun2" not in SOLVERS, reason="this torchdiffeq has no heun2 (before 0.2.5)")
HEUN = pytest.param("heun2", marks=needs_heun)


class Dense(nn.Module):
    """``x + g(x) * scale``, and without its skip connection ``g(x) * scale``."""

    def __init__(self, width: int = 3, skip: bool = True, scale: float = 0.3, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width + 2, bias=bias, dtype=DOUBLE)
        self.outer = nn.Linear(width + 2, width, bias=bias, dtype=DOUBLE)
        self.skip, self.scale = skip, scale
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        value: Tensor = self.scale * self.outer(torch.tanh(self.inner(x)))
        return x + value if self.skip else value


class PreActivation(nn.Module):
    """``x + conv(relu(norm(x)))``, or without a norm, where the rectifier overwrites the block's own input."""

    def __init__(self, channels: int = 2, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, dtype=DOUBLE) if norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.norm(x))
        value: Tensor = active + 0.3 * self.conv(active)
        return value


class PostActivation(nn.Module):
    """torchvision's basic block: ``relu(x + norm(conv(relu(norm(conv(x))))))``."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=DOUBLE)
        self.norm1 = nn.BatchNorm2d(channels, dtype=DOUBLE)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=DOUBLE)
        self.norm2 = nn.BatchNorm2d(channels, dtype=DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        value = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        result: Tensor = self.relu(x + value)
        return result


class Dropping(Dense):
    """A dense block with dropout in front."""

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.scale * self.outer(nn.functional.dropout(self.inner(x), 0.4, self.training))
        return x + value


class Telling(nn.Module):
    """Writes its number down, and leaves the state as it is."""

    def __init__(self, number: int, seen: list[int]) -> None:
        super().__init__()
        self.number, self.seen = number, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.number)
        return x


def sequence_of(kind: Callable[..., nn.Module], count: int, seed: int = 0, **arguments: Any) -> list[nn.Module]:
    """``count`` blocks of one kind with weights and statistics of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [kind(**arguments) for _ in range(count)]
        for block in blocks:
            for name, buffer in block.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(0.5 + torch.rand(buffer.shape) if "var" in name else 0.3 * torch.randn(buffer.shape))
    return blocks


def telling(count: int) -> tuple[list[nn.Module], list[int]]:
    """Blocks that write their numbers down, and where."""
    seen: list[int] = []
    return [Telling(n, seen) for n in range(count)], seen


def state(*shape: int, seed: int = 7) -> Tensor:
    """A state of unequal entries, a leaf in float64."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return values.requires_grad_()


def hidden_states(blocks: Iterable[nn.Module], x: Tensor, residual: bool = False) -> Tensor:
    """The states of the residual network itself, shape ``(N + 1, *x.shape)``."""
    modules = list(blocks)
    states = [x]
    for block in modules:
        value = block(states[-1].clone())
        states.append(states[-1] + value / len(modules) if residual else value)
    return torch.stack(states)


def heun_states(blocks: Sequence[nn.Module], x: Tensor, residual: bool = False) -> Tensor:
    """The states of the Heun network, ``x + (r_n(x) + r_{n+1}(x + r_n(x))) / 2``, shape ``(N, *x.shape)``."""

    def increment(block: nn.Module, y: Tensor) -> Tensor:
        value: Tensor = block(y.clone())
        return value / len(blocks) if residual else value - y

    states = [x]
    for block, following in itertools.pairwise(blocks):
        first = increment(block, states[-1])
        states.append(states[-1] + (first + increment(following, states[-1] + first)) / 2)
    return torch.stack(states)


def calls(run: Callable[[], object]) -> int:
    """How many functions, Python's and built-in ones, ``run`` calls: what its Python work costs, without a clock."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


def forms() -> dict[str, tuple[list[nn.Module], dict[str, Any], tuple[int, ...]]]:
    """Every form of a residual network: blocks, keywords of `ResidualField`, and the shape of a state."""
    tied = sequence_of(Dense, 2)
    return {
        "dense": (sequence_of(Dense, 7), {}, (4, 3)),
        "bare residual": (sequence_of(Dense, 7, skip=False), {"residual": True}, (4, 3)),
        "tied": ([tied[0]] * 5, {}, (4, 3)),
        "partly tied": ([tied[0], tied[1], tied[0], tied[0], tied[1]], {}, (4, 3)),
        "one block after the other": (list(nn.Sequential(*sequence_of(Dense, 3, seed=5))), {}, (2, 2, 3)),
        "pre-activation": (sequence_of(PreActivation, 4), {}, (2, 2, 4, 3)),
        "pre-activation, norm": ([b.eval() for b in sequence_of(PreActivation, 4, norm=True)], {}, (2, 2, 4, 3)),
        "post-activation": ([b.eval() for b in sequence_of(PostActivation, 4)], {}, (2, 2, 4, 3)),
        "post-activation, training": (sequence_of(PostActivation, 4), {}, (3, 2, 4, 3)),
        "mixed": ([*sequence_of(PreActivation, 2), *sequence_of(PostActivation, 2)], {}, (3, 2, 4, 3)),
    }


FORMS = tuple(forms())
