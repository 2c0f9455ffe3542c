"""The command ``resnet``: the equivalence report on a stage of one of torchvision's networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet.architectures import ArgumentError, build, load_weights, split_stage, stage_input
from torchdiffeq_symplectic.resnet.images import photographs, read_images
from torchdiffeq_symplectic.resnet.report import EquivalenceReport, equivalence_report

__all__ = ["ArgumentError", "Settings", "run"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asks for.

    Attributes:
        arch: torchvision's name of the network.
        stage: the name of the module whose children are the blocks.
        weights: a checkpoint, or None for random weights.
        data: images, see `images.read_images`, or None for scikit-learn's photographs.
        batch: how many images.
        size: their height and width.
        training: whether the network is in training mode.
        interpolate: as of `ResidualField`.
        device: where it is computed.
        seed: of random weights and of the parts of photographs.
    """

    arch: str
    stage: str
    weights: Path | None
    data: Path | None
    batch: int
    size: int
    training: bool
    interpolate: str
    device: torch.device
    seed: int


def run(settings: Settings, out: Path) -> EquivalenceReport:
    """Print the report and write ``report.png`` and ``report.json`` to the directory ``out``.

    Raises:
        ArgumentError: if a setting does not fit the network or a file; the message begins with its option.
    """
    from torchdiffeq_symplectic.resnet import plotting

    console = Console()
    if settings.data is None:
        images = photographs(settings.batch, settings.size, settings.seed)
    else:
        images = read_images(settings.data, settings.batch, settings.size)
    network = build(settings.arch, settings.seed)
    stage = split_stage(network, settings.stage)
    if settings.weights is not None:
        load_weights(network, settings.weights, settings.stage)
    network.train(settings.training).to(settings.device)
    state = stage_input(network, stage[0], images.to(settings.device))
    blocks, x, words = _blocks_that_keep_the_shape(stage, state)
    console.print(_introduction(settings, images, words), highlight=False, markup=False)
    try:
        report = equivalence_report(blocks, x, interpolate=settings.interpolate, progress=True)
    except ValueError as error:
        raise ArgumentError(f"argument --stage or --mode: {error}") from error
    console.print(str(report), highlight=False, markup=False)
    plotting.draw(report, out / "report.png")
    _write(settings, words, report, out / "report.json")
    console.print(f"Wrote {out / 'report.png'} and {out / 'report.json'}")
    return report


@torch.no_grad()
def _blocks_that_keep_the_shape(stage: list[nn.Module], x: Tensor) -> tuple[list[nn.Module], Tensor, str]:
    """The blocks, what the first of them gets, and what is to be said of those before."""
    words = f"{len(stage)} blocks"
    for n, block in enumerate(stage):
        try:
            after = block(x.clone())
        except (RuntimeError, TypeError, ValueError) as error:
            raise ArgumentError(f"argument --stage: block {n} ({type(block).__name__}) failed: {error}") from error
        if not isinstance(after, Tensor) or after.shape == x.shape:
            break
        words += f"; block {n} turns {tuple(x.shape[1:])} into {tuple(after.shape[1:])}, so it is left out"
        x = after
    else:
        n = len(stage)
    if len(stage) - n < 2:
        raise ArgumentError(
            f"argument --stage: there must be at least 2 blocks that keep the shape, but it has {words}"
        )
    return stage[n:], x, words


def _introduction(settings: Settings, images: Tensor, words: str) -> str:
    origin = (
        f"random weights of seed {settings.seed}" if settings.weights is None else f"the weights of {settings.weights}"
    )
    mode = "training" if settings.training else "evaluation"
    data = "parts of scikit-learn's photographs" if settings.data is None else str(settings.data)
    return (
        f"{settings.arch} with {origin}, in {mode} mode, on {settings.device}.\n"
        f"Images: {len(images)} of {images.shape[-2]} x {images.shape[-1]} pixels, {data}.\n"
        f"Stage {settings.stage}: {words}."
    )


def _write(settings: Settings, words: str, report: EquivalenceReport, path: Path) -> None:
    own = {
        name: value if isinstance(value, int | str | None) else str(value)
        for name, value in dataclasses.asdict(settings).items()
    }
    content = {"settings": own, "stage": words, **report.to_dict()}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
