"""Training with tied weights, then refining the untied blocks memory-free, on real images.

A convolutional residual network, x_{n+1} = x_n + f_n(x_n)/N with f_n(x) = tanh(B_n * tanh(A_n * x + a_n) + b_n),
learns scikit-learn's digits: 1797 images of 8 x 8 pixels. First all blocks are one, so that the weights cannot be
other than smooth in depth; then each becomes a block of its own, and the network is refined in two ways from the same
weights on the same batches: by ``memory_free``, whose gradient is approximate, and by backpropagation. What the first
keeps does not grow with depth: the memory of one forward and backward pass is counted exactly, over depth. Blocks that
are not tied have gradients of their own, which take memory in every way, so tied and untied blocks are both counted.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.benchmark.memory import peak_bytes
from torchdiffeq_symplectic.resnet import ResidualField
from torchdiffeq_symplectic.resnet.studies.common import Sheet, Tell, column, curve, depth_axis, quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "DEPTH",
    "DEPTHS",
    "EPOCHS",
    "SIZE",
    "WAYS",
    "Accuracy",
    "Images",
    "Memory",
    "Network",
    "Outcome",
    "digits",
    "draw",
    "memory",
    "run",
    "sheets",
    "summary",
    "train",
]

DEPTHS = (4, 8, 16, 32, 64, 128)
DEPTH = 12  # of the network that is trained
SIZE = 11, 4.5  # inches of the picture
CHANNELS = 16
BATCH = 64
EPOCHS = 12  # of each of the two stages
RATES = 3e-3, 5e-4  # Adam's learning rates, tied and untied
MIB = 2**20

WAYS: dict[str, Callable[..., Any]] = {
    "backpropagation": torchdiffeq.odeint,
    "symplectic": functools.partial(odeint_adjoint, adjoint_method="symplectic"),
    "memory_free": functools.partial(odeint_adjoint, adjoint_method="memory_free"),
}


@dataclass(frozen=True)
class Accuracy:
    """A network during its training."""

    blocks: str = column("blocks")
    gradient: str = column("gradient")
    epoch: int = column("epoch [passes over the training images]")
    loss: float = column("mean training loss of the epoch [nats]", ".3f")
    accuracy: float = column("accuracy on test images [fraction]", ".3f")


@dataclass(frozen=True)
class Memory:
    """The most bytes that a forward and backward pass has alive at once, parameters and images left out."""

    blocks: str = column("blocks")
    gradient: str = column("gradient")
    depth: int = column("depth N [blocks]")
    peak: int = column("peak memory [bytes]", ",")


@dataclass(frozen=True)
class Outcome:
    """What the study found: the training, and the memory over depth."""

    training: list[Accuracy]
    memory: list[Memory]


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
    """

    def __init__(self, depth: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            self.stem = nn.Sequential(nn.Conv2d(1, CHANNELS, 3, padding=1), nn.GroupNorm(4, CHANNELS))
            self.field = ResidualField([ConvolutionBlock(CHANNELS)] * depth, residual=True)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, 10))

    def forward(self, pixels: Tensor, way: str = "symplectic") -> Tensor:
        """Logits, shape ``(batch, 10)``, whose gradient is computed in ``way``, one of `WAYS`."""
        x = self.stem(pixels)
        t = torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)
        states = WAYS[way](self.field, x, t, method="euler", options={"step_size": self.field.step_size})
        logits: Tensor = self.head(states[-1])
        return logits

    def untied(self) -> Network:
        """The same network, with a block of its own at each depth."""
        network = copy.deepcopy(self)
        network.field = ResidualField([copy.deepcopy(block) for block in self.field], residual=True)
        return network


def run(
    depths: Sequence[int] = DEPTHS,
    depth: int = DEPTH,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tell: Tell = quiet,
) -> Outcome:
    """Train, untie, refine in two ways; count memory.

    Args:
        depths: numbers of blocks whose memory is counted, each at least 2.
        depth: number of blocks of the network that is trained, at least 2.
        epochs: of each of the two stages.
        seed: of the split, parameters and batches; the global random state is not used.
        device: where the networks are, in float32.
        tell: is told of progress.
    """
    images = digits(seed, device)
    network = Network(depth, seed).to(device)
    training = []
    refined = ("memory_free", "backpropagation")
    for done, (kind, way) in enumerate([("tied", "symplectic"), *(("untied", way) for way in refined)]):
        current = network if kind == "tied" else network.untied()
        for row in train(current, *images, kind, way, epochs, seed):
            training.append(row)
            tell(f"{kind}, {way}: accuracy {row.accuracy:.3f}", (done + row.epoch / epochs) / 4)
    rows: list[Memory] = []
    for count in depths:
        tell(f"memory of {count} blocks", 0.75 + len(rows) / (8 * len(depths) * len(WAYS)))
        rows += memory(count, images[0], seed)
    return Outcome(training, rows)


def digits(seed: int, device: torch.device | str) -> tuple[Images, Images]:
    """Scikit-learn's digits, three quarters to train with and the rest to test with; needs scikit-learn."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, shown = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(pixels / 16, shown, random_state=seed, stratify=shown)
    return _images(train_x, train_y, device), _images(test_x, test_y, device)


def _images(pixels: Any, shown: Any, device: torch.device | str) -> Images:
    return Images(
        torch.tensor(pixels, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8),
        torch.tensor(shown, dtype=torch.long, device=device),
    )


def train(
    network: Network, images: Images, test: Images, kind: str, way: str, epochs: int, seed: int
) -> Iterator[Accuracy]:
    """A row after each epoch of Adam, batches drawn from ``seed``, gradients in ``way``; one before them, too."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATES[kind == "untied"])
    yield Accuracy(kind, way, 0, math.nan, _accuracy(network, test))
    for epoch in range(1, epochs + 1):
        losses = []
        order = torch.randperm(len(images.digits), generator=generator).to(images.digits.device)
        for batch in order.split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images.pixels[batch], way), images.digits[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        yield Accuracy(kind, way, epoch, float(torch.stack(losses).mean()), _accuracy(network, test))


@torch.no_grad()
def _accuracy(network: Network, images: Images) -> float:
    return float((network(images.pixels).argmax(dim=1) == images.digits).double().mean())


def memory(depth: int, images: Images, seed: int) -> list[Memory]:
    """The memory of one pass over a batch in every way, of a new network of ``depth`` blocks, tied and untied."""
    pixels, shown = images.pixels[:BATCH], images.digits[:BATCH]
    tied = Network(depth, seed).to(pixels.device)
    rows = []
    for kind, network in ("tied", tied), ("untied", tied.untied()):
        for way in WAYS:

            def both_passes(network: Network = network, way: str = way) -> None:
                nn.functional.cross_entropy(network(pixels, way), shown).backward()

            if pixels.is_cuda:
                both_passes()  # allocates the workspaces of its libraries
            network.zero_grad()
            rows.append(Memory(kind, way, depth, peak_bytes(both_passes, pixels.device)))
    return rows


def sheets(outcome: Outcome) -> list[Sheet]:
    """What to write and to show: the last epochs, and all of the memory."""
    last = [rows[-1] for rows in _by_way(outcome.training).values()]
    return [
        Sheet("tied", "Training with tied blocks, then refining them untied", outcome.training, last),
        Sheet("tied-memory", "Memory of a forward and backward pass", outcome.memory, outcome.memory),
    ]


def summary(outcome: Outcome) -> list[str]:
    """How well the two refinements did, and what a block costs in memory in each way."""
    reached = {gradient: rows[-1].accuracy for (_, gradient), rows in _by_way(outcome.training).items()}
    sentences = [
        "test images told right after refining: "
        f"{reached['memory_free']:.1%} by memory_free, {reached['backpropagation']:.1%} by backpropagation"
    ]
    for (blocks, gradient), rows in _by_way(outcome.memory).items():
        more = (rows[-1].peak - rows[0].peak) / max(1, rows[-1].depth - rows[0].depth)
        sentences.append(f"{blocks} blocks, {gradient}: a block more takes {more / 1024:.1f} KiB more")
    return sentences


def _by_way(rows: Sequence[Any]) -> dict[tuple[str, str], list[Any]]:
    """Rows with the same blocks and gradient."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        found.setdefault((row.blocks, row.gradient), []).append(row)
    return found


def draw(outcome: Outcome, figure: Figure) -> None:
    """Accuracy over the epochs of both stages on the left, memory over depth on the right."""
    left, right = figure.subplots(1, 2)
    tied_epochs = max(row.epoch for row in outcome.training if row.blocks == "tied")
    for style, ((blocks, gradient), of) in enumerate(_by_way(outcome.training).items()):
        before = 0 if blocks == "tied" else tied_epochs
        points = [before + row.epoch for row in of], [100 * row.accuracy for row in of]
        curve(left, *points, style, f"{blocks} blocks, {gradient}", fillstyle="none")
    worst = min(row.accuracy for row in outcome.training if row.epoch)  # of those that have learnt something
    left.set_ylim(bottom=max(0, 100 * worst - 3))
    left.set(xlabel="epoch", ylabel="accuracy on test images [%]", title="Trained tied, then refined untied")
    left.grid(alpha=0.3)
    left.legend()
    for (blocks, gradient), of in _by_way(outcome.memory).items():
        points = [row.depth for row in of], [row.peak / MIB for row in of]
        look: dict[str, Any] = {"linestyle": "-" if blocks == "tied" else ":", "fillstyle": "none"}
        curve(right, *points, list(WAYS).index(gradient), f"{blocks} blocks, {gradient}", **look)
    depth_axis(right, points[0])
    right.set_yscale("log")
    right.set(ylabel="peak memory of forward and backward [MiB]", title=f"Memory of a pass over {BATCH} images")
    right.legend()
