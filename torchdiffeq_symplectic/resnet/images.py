"""A batch of images for a network: the user's, or parts of the photographs that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from torchdiffeq_symplectic.resnet.architectures import UNREADABLE, ArgumentError

__all__ = ["photographs", "read_images"]

# Of ImageNet's channels, which torchvision's weights are trained for.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

ENDINGS = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def read_images(path: Path, batch: int, size: int) -> Tensor:
    """At most ``batch`` images, shape ``(images, 3, height, width)``, float32.

    Args:
        path: a directory of images, with those below it, in the order of their names, or one image: the shorter side is
            scaled to ``size``, the middle cut out, channels normalised as for ImageNet. Or a .pt or .npy array of that
            shape: floats are used as they are, integers from 0 to 255 are normalised.
        batch: how many are wanted.
        size: height and width of images that are scaled.
    """
    if path.suffix in (".pt", ".pth", ".npy"):
        return _prepared(_read_array(path), path)[:batch]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS) if path.is_dir() else [path]
    if not files:
        raise ArgumentError(
            f"argument --data: {path} has no images; it may have files that end in {', '.join(sorted(ENDINGS))}"
        )
    return torch.stack([_read_image(file, size) for file in files[:batch]])


def photographs(batch: int, size: int, seed: int) -> Tensor:
    """Squares out of two photographs, at random places, of the half to the whole of the height.

    Returns:
        shape ``(batch, 3, size, size)``, float32, normalised as for ImageNet.
    """
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(seed)
    both = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    squares = []
    for i in range(batch):
        photograph = both[i % len(both)]
        height, width = photograph.shape[1:]
        side = int(torch.randint(height // 2, height + 1, (), generator=generator))
        top, left = (int(torch.randint(0, whole - side + 1, (), generator=generator)) for whole in (height, width))
        squares.append(_scaled(photograph[:, top : top + side, left : left + side], size))
    return torch.stack(squares)


def _read_image(file: Path, size: int) -> Tensor:
    import numpy
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            pixels = torch.tensor(numpy.asarray(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError as error:
        raise ArgumentError(f"argument --data: {file} is no image") from error
    except OSError as error:
        raise ArgumentError(f"argument --data: {file} cannot be read ({error.strerror or error})") from error
    side = min(pixels.shape[1:])
    top, left = ((whole - side) // 2 for whole in pixels.shape[1:])
    return _scaled(pixels[:, top : top + side, left : left + side], size)


def _read_array(path: Path) -> Tensor:
    import numpy

    try:
        loaded = torch.tensor(numpy.load(path)) if path.suffix == ".npy" else torch.load(path, weights_only=True)
    except OSError as error:
        raise ArgumentError(f"argument --data: {path} cannot be read ({error.strerror})") from error
    except UNREADABLE as error:
        raise ArgumentError(f"argument --data: {path} holds no array of numbers") from error
    if not isinstance(loaded, Tensor) or loaded.dim() != 4 or len(loaded) == 0:
        shape = tuple(loaded.shape) if isinstance(loaded, Tensor) else type(loaded).__name__
        raise ArgumentError(
            f"argument --data: {path} must hold an array of shape (images, channels, height, width), but has {shape}"
        )
    return loaded.cpu()


def _prepared(images: Tensor, path: Path) -> Tensor:
    if images.is_floating_point():
        return images.float()
    if images.shape[1] != 3 or images.is_complex():
        raise ArgumentError(f"argument --data: {path} must have 3 channels of integers from 0 to 255, or floats")
    return _normalised(images.float())


def _scaled(pixels: Tensor, size: int) -> Tensor:
    square = torch.nn.functional.interpolate(
        pixels[None].float(), (size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return _normalised(square)[0]


def _normalised(pixels: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels / 255 - mean) / deviation
