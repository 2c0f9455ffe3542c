"""How far the memory-free gradient is from the exact one *during* training, over depth, and what accuracy that costs.

Networks of several depths learn scikit-learn's digits, as Euler's scheme and as Heun's, backpropagated and memory-free,
from the same weights (untied, equal at first) on the same batches. After each epoch the memory-free gradient of one
batch is compared with the exact one. Heun's error falls faster with the depth, so it needs fewer layers.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612, section 4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.studies.common import METHODS, Device, Study, Tell, curves, quiet
from torchdiffeq_symplectic.experiments.studies.digits import (
    BATCH,
    Images,
    Network,
    accuracy,
    epochs_of,
    read_digits,
)
from torchdiffeq_symplectic.experiments.studies.memory_free import error

__all__ = ["DEPTHS", "EPOCHS", "STUDY", "gradient", "run"]

DEPTHS = (4, 8, 16, 32)
EPOCHS = 10
RATE = 1e-3
WAYS = ("backpropagation", "memory_free")


def run(
    depths: Sequence[int] = DEPTHS, epochs: int = EPOCHS, seed: int = 0, device: Device = "cpu", tell: Tell = quiet
) -> dict[str, pd.DataFrame]:
    """The training of each network, epoch by epoch.

    ``gradient error`` is ‖g - g*‖ / ‖g*‖ over all parameters, g by ``memory_free`` and g* by ``symplectic``;
    ``test error`` is the fraction of test images that are told wrong.

    Args:
        depths: numbers of blocks N, each at least 3, as Heun's network takes N - 1 steps.
        epochs: passes over the training images.
        seed: of the split, parameters and batches; the global random state is not used.
        device: where the networks are, in float32.
        tell: is told of progress.
    """
    images, test = read_digits(seed, device)
    probe = Images(images.pixels[:BATCH], images.digits[:BATCH])
    rows: list[dict[str, Any]] = []
    cases = [(method, depth, way) for method in METHODS for depth in depths for way in WAYS]
    done, total = 0, sum(depth for _, depth, _ in cases)
    for method, depth, way in cases:
        network = Network(depth, seed, method).to(device).untied()
        for epoch, loss in enumerate(epochs_of(network, images, way, epochs, seed, RATE)):
            row = {"method": METHODS[method], "depth": depth, "gradient": way, "epoch": epoch, "loss": loss}
            row["gradient error"] = error(*(gradient(network, probe, mode) for mode in ("memory_free", "symplectic")))
            row["test error"] = 1 - accuracy(network, test)
            rows.append(row)
            tell(f"{METHODS[method]}, {depth} blocks, {way}", (done + depth * epoch / epochs) / total)
        done += depth
    return {"training": pd.DataFrame(rows)}


def gradient(network: Network, images: Images, way: str) -> tuple[Tensor, ...]:
    """Of the loss on ``images`` with respect to all parameters."""
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(network(images.pixels, way), images.digits)
        return torch.autograd.grad(loss, tuple(network.parameters()))


def summary(found: dict[str, pd.DataFrame]) -> list[str]:
    """What each scheme reaches memory-free, by depth."""
    last = _last(found["training"])
    last = last[last["gradient"] == "memory_free"]
    return [
        f"{row.method}, {row.depth} blocks, memory-free: test error {row[-1]:.1%}, gradient error {row[-2]:.1e}"
        for row in last.itertuples(index=False)
    ]


def draw(found: dict[str, pd.DataFrame], figure: Figure) -> None:
    """The gradient's error over the epochs, and over depth when trained; the test error over depth."""
    frame = found["training"]
    over_epochs, trained, test = figure.subplots(1, 3)
    own = frame[frame["gradient"] == "memory_free"].astype({"depth": str})
    sns.lineplot(
        own,
        x="epoch",
        y="gradient error",
        hue="method",
        size="depth",
        style="method",
        palette="colorblind",
        ax=over_epochs,
    )
    over_epochs.set(yscale="log", title="memory_free in training: error of the gradient")
    over_epochs.grid(alpha=0.3)
    over_epochs.legend(fontsize="x-small")
    last = _last(frame)
    curves(trained, last[last["gradient"] == "memory_free"], "gradient error", "method", slopes=True)
    trained.set_title("the same when trained, over depth")
    both = last.assign(way=last["method"] + ", " + last["gradient"])
    curves(test, both, "test error", "way")
    test.set(yscale="linear", title="test error when trained")


def _last(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["epoch"] == frame["epoch"].max()]


STUDY = Study(run, summary, draw, "Gradient and test error after training", (15, 4.5), _last)
