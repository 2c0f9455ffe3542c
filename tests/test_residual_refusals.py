"""What `ResidualField` refuses, in words that name the block and say what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet import ResidualField

REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "none": ([], {}, ValueError, r"at least 2, but 0 given"),
    "one": ([nn.Tanh()], {}, ValueError, r"at least 2, but 1 given, block 0 \(Tanh\)\. Pass a longer stage"),
    "a module that holds none": (nn.Tanh(), {}, TypeError, r"iterable of modules, but is a Tanh\. Pass a list"),
    "a function": (
        [nn.Tanh(), torch.tanh],
        {},
        TypeError,
        r"block 1 must be a torch.nn.Module, but is a builtin.*Wrap",
    ),
    "interpolation": ([nn.Tanh(), nn.Tanh()], {"interpolate": "cubic"}, ValueError, r"one of \('outputs', .*'cubic'"),
}
ARCHITECTURES: dict[str, tuple[list[nn.Module], str]] = {
    "modules": ([nn.Tanh(), nn.ReLU()], r"block 0 \(Tanh\) has Tanh\(\) where block 1 \(ReLU\) has ReLU\(\)"),
    "settings": (
        [nn.ELU(1.0), nn.ELU(1.0), nn.ELU(0.5)],
        r"block 0 .*alpha=1.0.* where block 2 \(ELU\) has .*alpha=0.5",
    ),
    "parts": ([nn.Sequential(nn.Tanh()), nn.Sequential(nn.Tanh(), nn.Tanh())], r"has 2 parts where .* has 3 parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_field_is_refused(case: str) -> None:
    blocks, keywords, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        ResidualField(blocks, **keywords)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_weights_between_architectures_are_refused(case: str) -> None:
    blocks, message = ARCHITECTURES[case]
    with pytest.raises(ValueError, match=message):
        ResidualField(blocks, interpolate="weights")
    ResidualField(blocks, interpolate="piecewise")


class Raising(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


MISFITS: dict[str, tuple[nn.Module, tuple[int, ...], type[Exception], str]] = {
    "wider": (nn.Linear(3, 4), (2, 3), ValueError, r"block 1 \(Linear\) turns a state of shape \(2, 3\) into \(2, 4\)"),
    "smaller": (
        nn.MaxPool2d(2),
        (2, 2, 4, 4),
        ValueError,
        r"block 1 \(MaxPool2d\) turns .* into \(2, 2, 2, 2\).*Leave",
    ),
    "broadcast": (nn.AdaptiveAvgPool1d(1), (2, 3), ValueError, r"block 1 \(AdaptiveAvgPool1d\) turns .* into \(2, 1\)"),
    "features": (
        nn.Linear(4, 4),
        (2, 3),
        ValueError,
        r"block 1 \(Linear\) failed on a state of shape \(2, 3\), .*: mat1",
    ),
    "channels": (nn.Conv2d(5, 5, 1), (2, 3, 4, 4), ValueError, r"block 1 \(Conv2d\) failed .*leave out this block"),
    "rank": (nn.BatchNorm2d(3), (2, 3), ValueError, r"block 1 \(BatchNorm2d\) failed .* expected 4D input"),
    "a pair": (Pair(), (2, 3), TypeError, r"block 1 \(Pair\) returned a tuple\. Wrap it"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_block_that_does_not_fit_is_named(case: str) -> None:
    block, shape, kind, message = MISFITS[case]
    field, x = ResidualField([nn.Tanh(), block, nn.Tanh()]), torch.ones(shape)
    with pytest.raises(kind, match=message):
        torchdiffeq.odeint(field, x, field.grid(), method="euler")


class NoMemoryError(RuntimeError):
    """As PyTorch's OutOfMemoryError is one."""


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_error_in_a_block_is_still_of_its_kind(kind: type[Exception]) -> None:
    error = kind("a budget is spent")
    with pytest.raises(kind, match=r"block 1 \(Raising\) .* a budget is spent") as raised:
        ResidualField([nn.Tanh(), Raising(error)])(0.5, torch.ones(2))
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("kind", [KeyError, NoMemoryError])
def test_an_error_that_is_not_about_the_state_passes_unchanged(kind: type[Exception]) -> None:
    error = kind("spent")
    with pytest.raises(kind) as raised:
        ResidualField([nn.Tanh(), Raising(error)])(0.5, torch.ones(2))
    assert raised.value is error


def test_a_grid_for_another_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method must be one of \('euler', 'heun2'\).*'rk4'"):
        ResidualField([nn.Tanh(), nn.Tanh()]).grid("rk4")
