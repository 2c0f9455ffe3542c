"""Euler's and Heun's steps on a `ResidualField` are the residual network, and their gradients its backpropagation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import MODES, each_mode, error, loss_of, needs_torchdyn, neural_ode
from residual_blocks import (
    DOUBLE,
    FORMS,
    HEUN,
    PostActivation,
    forms,
    heun_states,
    hidden_states,
    sequence_of,
    state,
)
from torch import Tensor, nn

import torchdiffeq_symplectic
from torchdiffeq_symplectic.resnet import ResidualField

EXACT = 1e-12
each_form = pytest.mark.parametrize("form", FORMS)
each_method = pytest.mark.parametrize("method", ["euler", HEUN])
PLAIN = {"euler": hidden_states, "heun2": heun_states}


def solve(mode: str, field: ResidualField, x: Tensor, t: Tensor, **settings: Any) -> Tensor:
    """The solution; ``mode`` is one of MODES, or "backprop" for torchdiffeq's own odeint with its graph."""
    solver = torchdiffeq.odeint if mode == "backprop" else torchdiffeq_symplectic.odeint_adjoint
    result: Tensor = solver(field, x, t, **settings, **MODES.get(mode, {}))
    return result


def leaves(blocks: list[nn.Module], x: Tensor) -> list[Tensor]:
    return [x, *nn.ModuleList(dict.fromkeys(blocks)).parameters()]


@each_method
@each_form
def test_the_solution_is_the_networks_hidden_states(form: str, method: str) -> None:
    blocks, keywords, shape = forms()[form]
    field, x = ResidualField(copy.deepcopy(blocks), **keywords), state(*shape)
    found = torchdiffeq.odeint(field, x, field.grid(method), method=method)
    assert error([found], [PLAIN[method](blocks, x, **keywords)]) < 1e-14


@each_method
@each_form
@pytest.mark.parametrize("mode", ["backprop", *MODES])
def test_the_gradient_is_the_networks_backpropagation(mode: str, form: str, method: str) -> None:
    blocks, keywords, shape = forms()[form]
    field, x = ResidualField(blocks, **keywords), state(*shape)
    wanted = leaves(blocks, x)
    expected = torch.autograd.grad(loss_of(PLAIN[method](blocks, x, **keywords)), wanted)
    found = torch.autograd.grad(loss_of(solve(mode, field, x, field.grid(method), method=method)), wanted)
    assert error(found, expected) < EXACT


@each_mode
def test_batch_norm_in_training_moves_its_statistics_once(mode: str) -> None:
    blocks, x = sequence_of(PostActivation, 4), state(3, 2, 4, 3)
    plain = copy.deepcopy(blocks)
    hidden_states(plain, x.detach())
    field = ResidualField(blocks)
    solution = solve(mode, field, x, field.grid(), method="euler")
    after_forward = copy.deepcopy(field.state_dict())
    loss_of(solution).backward()
    for name, buffer in nn.ModuleList(plain).named_buffers():
        torch.testing.assert_close(after_forward[f"blocks.{name}"], buffer, rtol=1e-13, atol=1e-14)
        if "num_batches" in name:
            assert int(buffer) == 1
    for name, value in field.state_dict().items():
        assert torch.equal(value, after_forward[name])


def test_basic_blocks_and_bottlenecks_of_torchvision() -> None:
    resnet = pytest.importorskip("torchvision.models.resnet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        stages = [
            (4, nn.Sequential(*[resnet.BasicBlock(4, 4) for _ in range(3)])),
            (16, nn.Sequential(*[resnet.Bottleneck(16, 4) for _ in range(3)])),
        ]
    for channels, stage in stages:
        stage.to(DOUBLE)
        blocks, x = list(stage), state(3, channels, 5, 4)
        for training in (True, False):
            stage.train(training)
            field = ResidualField(stage)
            wanted = leaves(blocks, x)
            expected = torch.autograd.grad(loss_of(stage(x)), wanted)
            found = solve("symplectic", field, x, field.grid(), method="euler")[-1]
            assert error(torch.autograd.grad(loss_of(found), wanted), expected) < EXACT


@needs_torchdyn
@each_form
@each_mode
def test_the_gradient_is_the_networks_backpropagation_in_torchdyn(
    mode: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks, keywords, shape = forms()[form]
    field, x = ResidualField(blocks, **keywords), state(*shape)
    expected = torch.autograd.grad(loss_of(hidden_states(blocks, x, **keywords)), leaves(blocks, x))
    model = neural_ode(mode, field, solver="euler", return_t_eval=False)
    assert error(torch.autograd.grad(loss_of(model(x, field.grid())), leaves(blocks, x)), expected) < EXACT
    assert "wrapped" not in capsys.readouterr().out  # what torchdyn says of a field whose arguments it does not know
