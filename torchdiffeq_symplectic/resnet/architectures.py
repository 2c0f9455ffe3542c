"""torchvision's networks, checkpoints of them, and the blocks of their stages. Needs torchvision."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UNREADABLE", "ArgumentError", "build", "load_weights", "split_stage", "stage_input"]

# What torch.load(weights_only=True) and numpy.load raise of content that is not theirs.
UNREADABLE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Where training scripts put the network's state inside of a checkpoint.
_INSIDE = ("state_dict", "model_state_dict", "model", "net", "network")


class ArgumentError(Exception):
    """An argument of the command line is wrong; the message begins with its name."""


def build(arch: str, seed: int) -> nn.Module:
    """torchvision's network of that name with random weights, which are those of ``seed``."""
    try:
        from torchvision import models
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ArgumentError(
            f"argument --arch: {arch} is one of torchvision's networks, but torchvision is missing; pip "
            "install torchvision"
        ) from error
    known = models.list_models(module=models)  # of images; those of detection would download weights
    if arch not in known:
        close = difflib.get_close_matches(arch, known) or [name for name in known if name.startswith("resnet")]
        raise ArgumentError(
            f"argument --arch: torchvision has no network {arch!r} for images; it has {', '.join(close)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = models.get_model(arch, weights=None)
    return network


def load_weights(network: nn.Module, path: Path, stage: str) -> None:
    """Take the weights of a checkpoint: a state, a whole network, or a dictionary that has one of them.

    What comes after ``stage`` is not used, so another number of classes, say, does not matter. A prefix of all names,
    such as DataParallel's ``module.``, is taken off.
    """
    found = _state_of(_load(path, network), path)
    expected = network.state_dict()
    found = _without_prefix(found, expected)
    names = [name for name, _ in network.named_children()]
    needed = {f"{name}." for name in names[: names.index(stage.partition(".")[0]) + 1]}
    wrong = []
    for name in dict.fromkeys((*expected, *found)):
        if name.partition(".")[0] + "." not in needed or name.endswith("num_batches_tracked"):
            continue
        shapes = [tuple(state[name].shape) if name in state else "nothing" for state in (expected, found)]
        if shapes[0] != shapes[1]:
            wrong.append(f"{name}: {shapes[0]} in the network, {shapes[1]} in the file")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArgumentError(
            f"argument --weights: {path} does not fit the network up to {stage}; is --arch right? "
            f"{'; '.join(wrong[:3])}{more}"
        )
    fitting = {name: value for name, value in found.items() if name.partition(".")[0] + "." in needed}
    network.load_state_dict(fitting, strict=False)


def split_stage(network: nn.Module, stage: str) -> list[nn.Module]:
    """The modules that a stage consists of, in their order; an error lists the stages that there are."""
    modules = dict(network.named_modules())
    module = modules.get(stage)
    if not isinstance(module, nn.Sequential | nn.ModuleList) or module is network:
        stages = [name for name, module in modules.items() if _is_stage(module)]
        raise ArgumentError(f"argument --stage: {stage!r} is no sequence of blocks; there are {', '.join(stages)}")
    return list(module)


def stage_input(network: nn.Module, block: nn.Module, images: Tensor) -> Tensor:
    """What ``block`` gets when the network is given ``images``; nothing after it is evaluated."""

    def stop(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Reached(arguments[0])

    handle = block.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            network(images)
    except _Reached as reached:
        return reached.state
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ArgumentError(
            f"argument --size: the network refuses images of shape {tuple(images.shape)}: {error}"
        ) from error
    finally:
        handle.remove()
    raise ArgumentError("argument --stage: the network does not evaluate it")


class _Reached(Exception):  # noqa: N818, no error: it ends the evaluation
    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


def _is_stage(module: nn.Module) -> bool:
    kinds = {type(child) for child in module.children()}
    return isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1 and len(kinds) == 1


def _load(path: Path, network: nn.Module) -> object:
    try:
        with _allowing({type(module) for module in network.modules()}):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArgumentError(f"argument --weights: {path} cannot be read ({error.strerror})") from error
    except UNREADABLE as error:
        raise ArgumentError(
            f"argument --weights: {path} is no checkpoint that can be loaded safely. It must hold tensors, or a whole "
            "network of the classes of --arch; torch.save(network.state_dict(), file) makes one."
        ) from error


@contextmanager
def _allowing(classes: set[type]) -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` make objects of these classes, too, for a network that was saved whole."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([*classes, nn.DataParallel, set])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _state_of(loaded: object, path: Path) -> Mapping[str, Tensor]:
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _INSIDE if isinstance(loaded.get(key), Mapping | nn.Module)), None)
        if inner is None:
            break
        loaded = inner
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ArgumentError(f"argument --weights: {path} holds neither a network nor its state")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def _without_prefix(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names without the prefix that leaves most of them as they are expected."""
    first = next(iter(expected))
    prefixes = {""} | {name[: -len(first)] for name in found if name.endswith(f".{first}")}
    prefix = max(sorted(prefixes), key=lambda candidate: sum(candidate + name in found for name in expected))
    return {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}
