"""Euler's and Heun's steps on a `ResidualField` are the residual network, and their gradients its backpropagation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import MODES, each_mode, error, loss_of
from residual_blocks import (
    DOUBLE,
    FORMS,
    HEUN,
    Dense,
    Dropping,
    PostActivation,
    PreActivation,
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


@pytest.mark.parametrize("count", [2, 3, 49, 61, 98, 200])
@each_mode
def test_the_hosts_own_grid_gives_the_same(mode: str, count: int) -> None:
    blocks, x = sequence_of(Dense, count, scale=1 / count), state(2, 3)
    field = ResidualField(blocks)
    wanted = leaves(blocks, x)
    settings: dict[str, Any] = {"method": "euler", "options": {"step_size": field.step_size}}
    found = solve(mode, field, x, torch.tensor([0.0, 1.0], dtype=DOUBLE), **settings)[-1]
    expected = hidden_states(blocks, x)[-1]
    assert error([found], [expected]) < EXACT
    gradients = torch.autograd.grad(loss_of(found), wanted)
    assert error(gradients, torch.autograd.grad(loss_of(expected), wanted)) < EXACT


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


@each_mode
def test_a_step_size_does_not_evaluate_the_last_block_twice(mode: str) -> None:
    """With a Python float 1/49 torchdiffeq takes a 50th step, of length zero."""
    blocks, x = sequence_of(PreActivation, 49, norm=True), state(3, 2, 4, 3)
    field, t = ResidualField(blocks), torch.tensor([0.0, 1.0], dtype=DOUBLE)
    solve(mode, field, x, t, method="euler", options={"step_size": field.step_size})
    assert {int(buffer) for name, buffer in field.named_buffers() if "num_batches" in name} == {1}


@each_mode
def test_dropout_has_the_networks_masks_in_forward_and_backward(mode: str) -> None:
    blocks, x = sequence_of(Dropping, 5), state(4, 3)
    field = ResidualField(blocks)
    wanted = leaves(blocks, x)
    torch.manual_seed(3)
    expected = hidden_states(blocks, x)
    torch.manual_seed(3)
    found = solve(mode, field, x, field.grid(), method="euler")
    assert error([found], [expected]) < 1e-14
    gradients = torch.autograd.grad(loss_of(found), wanted)
    assert error(gradients, torch.autograd.grad(loss_of(expected), wanted)) < EXACT


@each_mode
def test_backward_leaves_the_modules_as_they_are(mode: str) -> None:
    blocks, x = [*sequence_of(PostActivation, 3), *sequence_of(PreActivation, 2, norm=True)], state(3, 2, 4, 3)
    blocks[1].eval()
    bystander = sequence_of(Dense, 1)[0]
    field = ResidualField(blocks)
    solution = solve(mode, field, x, field.grid(), method="euler")
    flags = [module.training for module in field.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in field.buffers()]
    values = [parameter.detach().clone() for parameter in field.parameters()]
    random = torch.get_rng_state()
    gradients = torch.autograd.grad(loss_of(solution), leaves(blocks, x))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert flags == [module.training for module in field.modules()]
    for buffer, (same, value) in zip(field.buffers(), buffers, strict=True):
        assert buffer is same
        assert torch.equal(buffer, value)
    assert all(map(torch.equal, field.parameters(), values))
    assert all(parameter.grad is None for parameter in (*field.parameters(), *bystander.parameters()))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("interpolate", ["outputs", "weights", "piecewise"])
@each_mode
def test_between_grid_points_the_gradient_is_that_of_the_solve(mode: str, interpolate: str) -> None:
    blocks, x = sequence_of(Dense, 4), state(2, 3)
    field = ResidualField(blocks, interpolate=interpolate)
    t = torch.tensor([0.05, 0.33, 0.9], dtype=DOUBLE, requires_grad=True)
    wanted = [*leaves(blocks, x), t]
    settings: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.17}}
    expected, found = (
        torch.autograd.grad(loss_of(solve(chosen, field, x, t, **settings)), wanted) for chosen in ("backprop", mode)
    )
    assert error(found, expected) < EXACT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")  # the compiler's own
@pytest.mark.parametrize("compiled", ["blocks", "field"])
@pytest.mark.parametrize("kind", [Dense, PreActivation])
def test_compiled_it_is_the_same(kind: type[nn.Module], compiled: str) -> None:
    blocks, x = sequence_of(kind, 3), state(*((2, 2, 4, 3) if kind is PreActivation else (4, 3)))
    wanted = leaves(blocks, x)
    expected = torch.autograd.grad(loss_of(hidden_states(blocks, x)), wanted)
    torch.compiler.reset()
    if compiled == "blocks":
        compile_block: Any = torch.compile
        field: Any = ResidualField(compile_block(block, backend="aot_eager") for block in blocks)
    else:
        field = torch.compile(ResidualField(blocks), backend="aot_eager")
    found = solve("symplectic", field, x, ResidualField(blocks).grid(), method="euler")
    assert error(torch.autograd.grad(loss_of(found), wanted), expected) < EXACT


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
