"""scikit-learn's digits, and the convolutional residual network that learns them; shared by ``tied`` and ``training``.

x_{n+1} = x_n + f_n(x_n)/N with f_n(x) = tanh(B_n * tanh(A_n * x + a_n) + b_n), or the Heun network of the same blocks.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.experiments.studies.common import Device
from torchdiffeq_symplectic.resnet import ResidualField

__all__ = ["BATCH", "CHANNELS", "WAYS", "ConvolutionBlock", "Images", "Network", "accuracy", "epochs_of", "read_digits"]

CHANNELS = 16
BATCH = 64
WAYS: dict[str, Callable[..., Any]] = {
    "backpropagation": torchdiffeq.odeint,
    "symplectic": functools.partial(odeint_adjoint, adjoint_method="symplectic"),
    "memory_free": functools.partial(odeint_adjoint, adjoint_method="memory_free", adjoint_options={"corrections": 0}),
}


@dataclass(frozen=True)
class Images:
    """Images with pixels in [0, 1], shape ``(count, 1, 8, 8)``, and the digits that they show, shape ``(count,)``."""

    pixels: Tensor
    digits: Tensor


class ConvolutionBlock(nn.Module):
    """A bare residual function, f(x) = tanh(B * tanh(A * x + a) + b), of images with ``channels`` channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Of ``x``, shape ``(batch, channels, height, width)``, in the same shape."""
        return torch.tanh(self.outer(torch.tanh(self.inner(x))))


class Network(nn.Module):
    """A convolution, the residual network of tied blocks, and a linear map of the quarters' means to ten logits.

    Args:
        depth: number of uses of the one block, N.
        seed: of the parameters; the global random state stays as it is.
        method: "euler" or "heun2".
    """

    def __init__(self, depth: int, seed: int, method: str = "euler") -> None:
        super().__init__()
        self.method = method
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.GroupNorm(4, CHANNELS))
            self.field = ResidualField([ConvolutionBlock(CHANNELS)] * depth, residual=True)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, 10))

    def forward(self, pixels: Tensor, way: str = "symplectic") -> Tensor:
        """Logits, shape ``(batch, 10)``, whose gradient is computed in ``way``, one of `WAYS`."""
        x = self.stem(pixels)
        grid = self.field.grid(self.method, dtype=x.dtype, device=x.device)
        options = {"grid_constructor": lambda func, y0, t: grid}
        states = WAYS[way](self.field, x, grid[[0, -1]], method=self.method, options=options)
        logits: Tensor = self.head(states[-1])
        return logits

    def untied(self) -> Network:
        """The same network, with a block of its own at each depth."""
        network = copy.deepcopy(self)
        network.field = ResidualField([copy.deepcopy(block) for block in self.field], residual=True)
        return network


def read_digits(seed: int, device: Device) -> tuple[Images, Images]:
    """Scikit-learn's digits, three quarters to train with and the rest to test with."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, shown = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(pixels / 16, shown, random_state=seed, stratify=shown)
    return _images(train_x, train_y, device), _images(test_x, test_y, device)


def _images(pixels: Any, shown: Any, device: Device) -> Images:
    return Images(
        torch.tensor(pixels, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8),
        torch.tensor(shown, dtype=torch.long, device=device),
    )


def epochs_of(network: Network, images: Images, way: str, epochs: int, seed: int, rate: float) -> Iterator[float]:
    """Train by Adam, batches drawn from ``seed``; the mean loss after each epoch, before which comes a NaN."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    yield math.nan
    for _ in range(epochs):
        losses = []
        order = torch.randperm(len(images.digits), generator=generator).to(images.digits.device)
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images.pixels[batch], way), images.digits[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        yield float(torch.stack(losses).mean())


@torch.no_grad()
def accuracy(network: Network, images: Images) -> float:
    """The fraction of ``images`` that are told right."""
    return float((network(images.pixels).argmax(dim=1) == images.digits).double().mean())
