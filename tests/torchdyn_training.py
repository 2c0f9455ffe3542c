"""A torchdyn model trained in each mode, and by ``sensitivity="autograd"``: shared by the tests in ``compat/``.

Both trainings start from the same parameters and draw the same random numbers; the truth holds torchdyn's choice of the
first step constant, as the modes do. Import this after ``pytest.importorskip("torchdyn")``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from harness import MODES as ARGUMENTS
from harness import assert_same_gradients, first_step_held, relative_error
from torch import Tensor, nn
from torchdyn.core import ODEProblem

# Of the constructor, and what is set on the model afterwards.
MODES: dict[str, dict[str, Any]] = {
    name: {"sensitivity" if key == "adjoint_method" else key: value for key, value in own.items()}
    for name, own in ARGUMENTS.items()
}

# Relative error of parameters after a few steps of an optimiser that divides gradients by their size.
TRAINING_TOLERANCE = 1e-9

Build = Callable[[str], nn.Module]
Loss = Callable[[Any, int], Tensor]


def problems_of(model: nn.Module) -> list[Any]:
    """Every solve that is part of a model."""
    return [module for module in model.modules() if isinstance(module, ODEProblem)]


def built(build: Build, mode: str, seed: int = 0) -> Any:
    """What ``build(sensitivity)`` gives, in a mode of the table or one of torchdyn's; the same parameters in each."""
    settings = MODES.get(mode, {"sensitivity": mode})
    torch.manual_seed(seed)
    model = build(settings["sensitivity"])
    for problem in problems_of(model):
        if "adjoint_options" in settings:
            problem.adjoint_options = dict(settings["adjoint_options"])
    return model


def gradients_held_by(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients of the parameters, None where there is none."""
    return {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters()
    }


@dataclasses.dataclass
class Training:
    """What can be seen of a training: at each step the loss, its gradients, and the parameters that follow."""

    losses: list[Tensor] = dataclasses.field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = dataclasses.field(default_factory=list)
    parameters: list[dict[str, Tensor]] = dataclasses.field(default_factory=list)


def train(model: nn.Module, loss: Loss, steps: int = 3) -> Training:
    """Some steps of Adam on ``loss(model, step)``, which draws the same random numbers each time."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    found = Training()
    for step in range(steps):
        torch.manual_seed(1000 + step)
        optimiser.zero_grad()
        value = loss(model, step)
        value.backward()
        found.losses.append(value.detach())
        found.gradients.append(gradients_held_by(model))
        optimiser.step()
        found.parameters.append({name: value.detach().clone() for name, value in model.named_parameters()})
    return found


def assert_same_training(build: Build, loss: Loss, mode: str, *, same_losses: bool = True, steps: int = 3) -> Any:
    """Training in a mode is training by backpropagation, step by step, and the first loss is the same to the bit.

    With ``same_losses=False`` the loss in a mode may be another function that has the same gradient. Returns the model
    as trained in the mode.
    """
    with first_step_held():
        truth = train(built(build, "autograd"), loss, steps)
    assert any(gradient is not None and gradient.norm() > 0 for gradient in truth.gradients[0].values())
    model = built(build, mode)
    found = train(model, loss, steps)
    if same_losses:
        assert torch.equal(found.losses[0], truth.losses[0])
        assert len(set(map(float, truth.losses))) == steps
    assert_same_gradients(found.gradients[0], truth.gradients[0], torch.float64)
    for actual, expected in zip(found.parameters, truth.parameters, strict=True):
        errors = {name: relative_error(actual[name], value) for name, value in expected.items()}
        assert max(errors.values()) <= TRAINING_TOLERANCE, errors
    return model
