"""A `ResidualField` in torchdyn: the residual network and its gradient, in every sensitivity of this package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import each_mode, error, loss_of
from residual_blocks import FORMS, Dense, calls, forms, hidden_states, sequence_of, state
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdyn.core import NeuralODE, ODEProblem
from torchdyn_training import MODES

from torchdiffeq_symplectic.resnet import ResidualField


def solution_of(mode: str, field: ResidualField, x: Tensor) -> Tensor:
    settings = dict(MODES[mode])
    options = settings.pop("adjoint_options", None)
    model = NeuralODE(field, solver="euler", return_t_eval=False, **settings)
    model.adjoint_options = options
    solution: Tensor = model(x, field.grid())
    return solution


@pytest.mark.parametrize("form", FORMS)
@each_mode
def test_its_gradient_is_the_networks_backpropagation(mode: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks, keywords, shape = forms()[form]
    field, x = ResidualField(blocks, **keywords), state(*shape)
    wanted = [x, *field.parameters()]
    expected = torch.autograd.grad(loss_of(hidden_states(blocks, x, **keywords)), wanted)
    found = torch.autograd.grad(loss_of(solution_of(mode, field, x)), wanted)
    assert error(found, expected) < 1e-12
    assert "wrapped" not in capsys.readouterr().out  # what torchdyn says of a field whose arguments it does not know


@pytest.mark.parametrize("interpolate", ["outputs", "weights", "piecewise"])
@each_mode
def test_a_solver_of_more_stages_sees_the_interpolated_field(mode: str, interpolate: str) -> None:
    blocks, x = sequence_of(Dense, 4), state(4, 3)
    field = ResidualField(blocks, interpolate=interpolate)
    wanted = [x, *nn.ModuleList(blocks).parameters()]

    def gradients(sensitivity: dict[str, Any]) -> tuple[Tensor, ...]:
        options = sensitivity.pop("adjoint_options", None)
        model = NeuralODE(field, solver="rk4", return_t_eval=False, **sensitivity)
        model.adjoint_options = options
        return torch.autograd.grad(loss_of(model(x, torch.linspace(0.05, 0.95, 7, dtype=x.dtype))), wanted)

    assert error(gradients(dict(MODES[mode])), gradients({"sensitivity": "autograd"})) < 1e-12


@pytest.mark.parametrize("mode", ["symplectic", "aca"])
def test_python_work_a_block_does_not_grow_with_depth(mode: str) -> None:
    """In ODEProblem: torchdyn's NeuralODE itself looks through all modules of its field at each evaluation."""

    def calls_a_block(count: int) -> float:
        field, x = ResidualField(sequence_of(Dense, count)), state(2, 3)
        problem = ODEProblem(field, solver="euler", atol=1e-3, rtol=1e-3, **MODES[mode])

        def train() -> None:
            problem(x, field.grid())[1][-1].square().sum().backward()

        train()
        return calls(train) / count

    assert calls_a_block(200) <= 1.3 * calls_a_block(40)
