"""Training with tied weights, then refining the untied blocks memory-free, on real images.

First all blocks are one, so that the weights are smooth in depth; then each becomes a block of its own, and the network
is refined in two ways from the same weights on the same batches: by ``memory_free``, whose gradient is approximate, and
by backpropagation. What the first keeps does not grow with depth: the memory of one forward and backward pass is
counted exactly, over depth. Blocks that are not tied have gradients of their own, which take memory in every way, so
tied and untied blocks are both counted.

M. Sander, P. Ablin, G. Peyré, Do Residual Neural Networks Discretize Neural Ordinary Differential Equations?, NeurIPS
2022, https://arxiv.org/abs/2205.14612
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import nn

from torchdiffeq_symplectic.experiments.memory import MIB, peak_bytes
from torchdiffeq_symplectic.experiments.studies.common import Device, Study, Tell, curves, quiet
from torchdiffeq_symplectic.experiments.studies.digits import (
    BATCH,
    WAYS,
    Images,
    Network,
    accuracy,
    epochs_of,
    read_digits,
)

__all__ = ["DEPTH", "DEPTHS", "EPOCHS", "STUDY", "memory", "run"]

DEPTHS = (4, 8, 16, 32, 64, 128)
DEPTH = 12  # of the network that is trained
EPOCHS = 12  # of each of the two stages
RATES = {"tied": 3e-3, "untied": 5e-4}  # Adam's learning rates


def run(
    depths: Sequence[int] = DEPTHS,
    depth: int = DEPTH,
    epochs: int = EPOCHS,
    seed: int = 0,
    device: Device = "cpu",
    tell: Tell = quiet,
) -> dict[str, pd.DataFrame]:
    """Train, untie, refine in two ways; count memory.

    Args:
        depths: numbers of blocks whose memory is counted, each at least 2.
        depth: number of blocks of the network that is trained, at least 2.
        epochs: of each of the two stages.
        seed: of the split, parameters and batches; the global random state is not used.
        device: where the networks are, in float32.
        tell: is told of progress.
    """
    images, test = read_digits(seed, device)
    network = Network(depth, seed).to(device)
    rows: list[dict[str, Any]] = []
    ways = [("tied", "symplectic"), ("untied", "memory_free"), ("untied", "backpropagation")]
    for done, (kind, way) in enumerate(ways):
        current = network if kind == "tied" else network.untied()
        for epoch, loss in enumerate(epochs_of(current, images, way, epochs, seed, RATES[kind])):
            reached = accuracy(current, test)
            rows.append({"blocks": kind, "gradient": way, "epoch": epoch, "loss": loss, "accuracy": reached})
            tell(f"{kind}, {way}: accuracy {reached:.3f}", (done + epoch / epochs) / 4)
    counted = []
    for done, count in enumerate(depths):
        tell(f"memory of {count} blocks", 0.75 + done / (4 * len(depths)))
        counted.append(memory(count, images, seed))
    return {"tied": pd.DataFrame(rows), "tied-memory": pd.concat(counted, ignore_index=True)}


def memory(depth: int, images: Images, seed: int) -> pd.DataFrame:
    """The most bytes that a pass over a batch has alive at once, parameters and images left out.

    In every way, of a new network of ``depth`` blocks, tied and untied.
    """
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
            rows.append(
                {"blocks": kind, "gradient": way, "depth": depth, "peak": peak_bytes(both_passes, pixels.device)}
            )
    return pd.DataFrame(rows)


def summary(found: dict[str, pd.DataFrame]) -> list[str]:
    """How well the two refinements did, and what a block costs in memory in each way."""
    last = _last(found["tied"]).set_index("gradient")["accuracy"]
    sentences = [
        f"test images told right after refining: {last['memory_free']:.1%} by memory_free, "
        f"{last['backpropagation']:.1%} by backpropagation"
    ]
    for (blocks, gradient), of in found["tied-memory"].groupby(["blocks", "gradient"], sort=False):
        if len(of) > 1:
            more = (of["peak"].iloc[-1] - of["peak"].iloc[0]) / (of["depth"].iloc[-1] - of["depth"].iloc[0])
            sentences.append(f"{blocks} blocks, {gradient}: a block more takes {more / 1024:.1f} KiB more")
    return sentences


def draw(found: dict[str, pd.DataFrame], figure: Figure) -> None:
    """Accuracy over the epochs of both stages on the left, memory over depth on the right."""
    left, right = figure.subplots(1, 2)
    training = found["tied"].copy()
    training.loc[training["blocks"] == "untied", "epoch"] += training["epoch"].max()
    training["way"] = training["blocks"] + " blocks, " + training["gradient"]
    training["accuracy"] *= 100
    sns.lineplot(training, x="epoch", y="accuracy", hue="way", style="way", markers=True, palette="colorblind", ax=left)
    left.set(ylabel="accuracy on test images [%]", title="Trained tied, then refined untied")
    left.set_ylim(bottom=max(0.0, training.loc[training["epoch"] > 0, "accuracy"].min() - 3))
    left.grid(alpha=0.3)
    left.legend(title=None)
    counted = found["tied-memory"]
    counted = counted.assign(way=counted["blocks"] + " blocks, " + counted["gradient"], peak=counted["peak"] / MIB)
    curves(right, counted, "peak", "way")
    right.set(ylabel="peak memory of forward and backward [MiB]", title=f"Memory of a pass over {BATCH} images")


def _last(frame: pd.DataFrame) -> pd.DataFrame:
    """The last epochs, and all of the memory."""
    return frame[frame["epoch"] == frame["epoch"].max()] if "epoch" in frame else frame


STUDY = Study(run, summary, draw, "Training with tied blocks, then refining them untied", (11, 4.5), _last)
