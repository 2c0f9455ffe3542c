"""`ResidualField` as a module and as a function of depth and state: interpolation, copies, in-place blocks, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchdiffeq
from harness import error
from residual_blocks import (
    DOUBLE,
    Dense,
    PreActivation,
    hidden_states,
    sequence_of,
    state,
)
from torch import Tensor, nn

from torchdiffeq_symplectic.resnet import ResidualField

INTERPOLATIONS = ("outputs", "weights", "piecewise")
each_interpolation = pytest.mark.parametrize("interpolate", INTERPOLATIONS)


class Rate(nn.Module):
    """The residual function ``tanh(w x)``, whose derivatives are known."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=DOUBLE))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.w * x)


def depth(value: float) -> Tensor:
    return torch.tensor(value, dtype=DOUBLE)


def test_the_field_at_a_block_is_n_times_its_residual() -> None:
    blocks, x = sequence_of(Dense, 5), state(4, 3).detach()
    field = ResidualField(blocks)
    for n, block in enumerate(blocks):
        torch.testing.assert_close(field(depth(n / 5), x), 5 * (block(x) - x), rtol=1e-14, atol=1e-14)


def test_a_residual_block_is_the_field_itself() -> None:
    blocks, x = sequence_of(Dense, 5, skip=False), state(4, 3).detach()
    field = ResidualField(blocks, residual=True)
    for n, block in enumerate(blocks):
        assert torch.equal(field(depth(n / 5), x), block(x))


@pytest.mark.parametrize("t", [0.1, 0.3, 0.62])
def test_weights_are_interpolated_linearly(t: float) -> None:
    rates, x = [0.4, -1.1, 0.7, 2.0], state(5).detach()
    field = ResidualField([Rate(w) for w in rates], residual=True, interpolate="weights")
    n = int(4 * t)
    w = rates[n] + (4 * t - n) * (rates[n + 1] - rates[n])
    torch.testing.assert_close(field(depth(t), x), torch.tanh(w * x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("interpolate", ["outputs", "weights"])
def test_derivatives_between_blocks_are_those_of_the_formula(interpolate: str) -> None:
    first, second, part = 0.4, -1.1, 0.3
    x, t = state(5), depth((1 + part) / 4).requires_grad_()
    blocks = [Rate(w) for w in (0.2, first, second, 0.9)]
    value = ResidualField(blocks, residual=True, interpolate=interpolate)(t, x).sum()
    in_t, in_x, *in_w = torch.autograd.grad(value, [t, x, *(block.w for block in blocks)], allow_unused=True)
    y = x.detach()

    def slope(w: float) -> Tensor:
        return torch.cosh(w * y).square().reciprocal()

    if interpolate == "outputs":
        formula = [
            4 * (torch.tanh(second * y) - torch.tanh(first * y)).sum(),
            (1 - part) * first * slope(first) + part * second * slope(second),
            (1 - part) * (y * slope(first)).sum(),
            part * (y * slope(second)).sum(),
        ]
    else:
        w = (1 - part) * first + part * second
        common = (y * slope(w)).sum()
        formula = [4 * (second - first) * common, w * slope(w), (1 - part) * common, part * common]
    assert error([in_t, in_x, *in_w[1:3]], formula) < 1e-13
    assert in_w[0] is in_w[3] is None


@each_interpolation
def test_between_two_places_of_a_tied_block_it_is_evaluated_once(interpolate: str) -> None:
    block = sequence_of(Dense, 1)[0]
    field, x = ResidualField([block] * 4, interpolate=interpolate), state(4, 3).detach()
    assert torch.equal(field(depth(0.3), x), 4 * (block(x) - x))
    assert block.calls == 2


def test_tied_blocks_are_registered_once() -> None:
    first, second = sequence_of(Dense, 2)
    field = ResidualField(block for block in (first, second, first, first))
    assert len(field) == 4
    assert list(field) == [first, second, first, first]
    assert len(list(field.parameters())) == 8
    assert len(field.state_dict()) == 8
    assert [n for n, _ in field.named_children()] == ["blocks"]


@pytest.mark.filterwarnings("ignore:.*weights_only=False.*:FutureWarning")  # pickle's own way, in torch 2.4 and 2.5
@pytest.mark.parametrize("tied", [False, True])
@each_interpolation
def test_copies_and_moves_are_the_same_field(interpolate: str, tied: bool) -> None:
    blocks = sequence_of(Dense, 3)
    x, t = state(4, 3).detach(), depth(0.2)
    field = ResidualField([blocks[0]] * 3 if tied else blocks, interpolate=interpolate)
    expected = field(t, x)
    buffer = io.BytesIO()
    torch.save(field, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(field), pickle.loads(pickle.dumps(field)), torch.load(buffer, weights_only=False)]
    others = sequence_of(Dense, 3, seed=9)
    fresh = ResidualField([others[0]] * 3 if tied else others, interpolate=interpolate)
    fresh.load_state_dict(field.state_dict())
    for other in [*copies, fresh]:
        assert torch.equal(other(t, x), expected)
        assert len(other) == 3
        assert len(list(other.parameters())) == len(list(field.parameters()))
        assert not {*map(id, other.parameters())} & {*map(id, field.parameters())}
    single = copy.deepcopy(field).float()
    torch.testing.assert_close(single(t.float(), x.float()), expected.float(), rtol=1e-5, atol=1e-5)
    assert single.grid().dtype == torch.float32
    assert torch.equal(single.double().to(DOUBLE).grid(), field.grid())


def test_the_grid_is_on_the_blocks_device_and_in_their_dtype() -> None:
    field = ResidualField(sequence_of(Dense, 4))
    assert torch.equal(field.grid(), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=DOUBLE))
    assert torch.equal(field.grid("heun2"), torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=DOUBLE))
    assert field.grid(dtype=torch.float32).dtype == torch.float32
    assert field.grid(device="meta").device.type == "meta"
    assert field.to(device="meta").grid().device.type == "meta"
    assert ResidualField([nn.Identity(), nn.Tanh()]).grid().dtype == torch.get_default_dtype()
    assert float(field.step_size) == pytest.approx(0.25, rel=1e-15)


@each_interpolation
@pytest.mark.parametrize("gradients", [False, True])
def test_a_block_that_overwrites_its_input_leaves_the_state_alone(gradients: bool, interpolate: str) -> None:
    blocks, x = sequence_of(PreActivation, 3), state(2, 2, 4, 3)
    field, before = ResidualField(blocks, interpolate=interpolate), x.detach().clone()
    with torch.set_grad_enabled(gradients):
        for t in (0.0, 0.1, 0.1, 1 / 3):
            field(depth(t), x)
            assert torch.equal(x, before)
    found = torchdiffeq.odeint(field, x, field.grid(), method="euler")
    assert error([found], [hidden_states(blocks, x)]) < 1e-14


def test_a_block_that_begins_to_overwrite_its_input_is_named() -> None:
    blocks = [nn.Sequential(nn.ReLU(), nn.Tanh()) for _ in range(3)]
    field, x = ResidualField(blocks), state(4, 3).detach()
    field(depth(1 / 3), x)
    blocks[1][0] = nn.ReLU(inplace=True)
    with pytest.raises(RuntimeError, match=r"block 1 \(Sequential\) changed its input in place.*inplace=False"):
        field(depth(1 / 3), x)
