"""The command ``resnet``: the equivalence report on a stage of one of torchvision's networks."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet import EquivalenceReport, equivalence_report

__all__ = ["UnfitError", "photographs", "run", "stages"]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


class UnfitError(ValueError):
    """An argument does not fit the network.

    Args:
        option: its name on the command line.
        message: what is wrong, and what would do.
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


def run(
    arch: str, stage: str, batch: int, size: int, interpolate: str, device: torch.device, seed: int, out: Path
) -> EquivalenceReport:
    """Print the report and write ``report.png`` and ``report.json``.

    Args:
        arch: torchvision's name of the network, which gets random weights and is in training mode: batch norm has no
            statistics but the batch's.
        stage: the module whose children are the blocks; empty for the one with the most blocks.
        batch: number of images.
        size: their height and width.
        interpolate: as of `ResidualField`.
        device: where it is computed.
        seed: of weights and images.
        out: the directory for the files, made if need be.

    Raises:
        UnfitError: if the network is unknown, has no such stage, or refuses the images.
    """
    console = Console()
    network = _build(arch, seed).to(device)
    there = stages(network, photographs(batch, size, seed).to(device))
    if not there:
        raise UnfitError("--arch", f"{arch} has no stage of at least 2 blocks that keep the shape; resnet101 has")
    stage = stage or max(there, key=lambda name: len(there[name][0]))
    if stage not in there:
        raise UnfitError("--stage", f"{stage!r} has no 2 blocks that keep the shape; those that do: {', '.join(there)}")
    blocks, x = there[stage]
    with console.status(f"{arch}, {stage}: {len(blocks)} blocks on a state of shape {tuple(x.shape)}"):
        try:
            report = equivalence_report(blocks, x, interpolate=interpolate)
        except ValueError as error:
            raise UnfitError("--stage", str(error)) from error
    console.print(f"{arch} with random weights, {stage}: {len(blocks)} blocks on a state of shape {tuple(x.shape)}")
    console.print(str(report), highlight=False, markup=False)
    out.mkdir(parents=True, exist_ok=True)
    report.plot(out / "report.png")
    settings = {"arch": arch, "stage": stage, "batch": batch, "size": size, "seed": seed, "device": str(device)}
    text = json.dumps({"settings": settings, **report.to_dict()}, indent=1, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    console.print(f"Wrote {out / 'report.png'} and {out / 'report.json'}")
    return report


def _build(arch: str, seed: int) -> nn.Module:
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        raise UnfitError("--arch", f"{arch} is one of torchvision's networks; pip install torchvision") from error
    known = models.list_models(module=models)  # of images; those of detection would download weights
    if arch not in known:
        close = difflib.get_close_matches(arch, known) or [name for name in known if name.startswith("resnet")]
        raise UnfitError("--arch", f"torchvision has no network {arch!r} for images; it has {', '.join(close)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = models.get_model(arch, weights=None)
    return network


@torch.no_grad()
def stages(network: nn.Module, images: Tensor) -> dict[str, tuple[list[nn.Module], Tensor]]:
    """Name -> the last blocks of a sequence that keep the shape, and what the first of them gets; at least two blocks.

    Raises:
        UnfitError: if the network refuses ``images``.
    """
    shapes: dict[nn.Module, tuple[Tensor, bool]] = {}  # what a block gets, and whether it keeps the shape

    def watch(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        shapes[module] = arguments[0].clone(), getattr(output, "shape", None) == arguments[0].shape

    sequences = {
        name: list(module)
        for name, module in network.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    handles = [block.register_forward_hook(watch) for blocks in sequences.values() for block in blocks]
    try:
        network(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UnfitError("--size", f"the network refuses images of shape {tuple(images.shape)}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, blocks in sequences.items():
        while blocks and not all(block in shapes and shapes[block][1] for block in blocks):
            blocks = blocks[1:]
        if len(blocks) > 1:
            found[name] = blocks, shapes[blocks[0]][0]
    return found


def photographs(batch: int, size: int, seed: int) -> Tensor:
    """Parts of the photographs that scikit-learn ships, shape ``(batch, 3, size, size)``, normalised as ImageNet's."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    both = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    parts = []
    for photograph in (both[i % len(both)] for i in range(batch)):
        side = int(torch.randint(photograph.shape[1] // 2, photograph.shape[1], (), generator=generator))
        top, left = (int(torch.randint(whole - side, (), generator=generator)) for whole in photograph.shape[1:])
        part = photograph[None, :, top : top + side, left : left + side]
        parts.append(nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True))
    mean, deviation = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, DEVIATION))
    return (torch.cat(parts) - mean) / deviation
