"""Modules around a solve: copies, files, replicas, processes; and that nothing of a solve stays with them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

Mode = dict[str, Any]
Agree = Callable[..., None]
Replicate = Callable[[nn.Module, dict[nn.Parameter, Tensor]], nn.Module]
T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
SETTINGS: dict[str, Any] = {"options": {"first_step": 0.1}, "rtol": 1e-4, "atol": 1e-5}


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        slope: Tensor = self.layers(y) * torch.cos(3 * t) - self.frozen * y
        return slope


class NeuralODE(nn.Module):
    """As libraries wrap a field: the settings of the solve are part of the module."""

    def __init__(self, field: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.field, self.settings = field, settings

    def forward(self, y0: Tensor) -> Tensor:
        solution: Tensor = torchdiffeq.odeint_adjoint(self.field, y0, T, **self.settings)
        return solution[-1]


def state() -> Tensor:
    return torch.linspace(-1.3, 2.1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def through_a_state_dict(module: NeuralODE) -> nn.Module:
    other = NeuralODE(Field(), **module.settings)
    other.load_state_dict(module.state_dict())
    return other


COPIES: dict[str, Callable[..., Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
    "state_dict": through_a_state_dict,
}


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # torch 2.4 to 2.5 of its own pickle
@pytest.mark.parametrize("after", ["forward", "backward"])
@pytest.mark.parametrize("copied", list(COPIES.values()), ids=list(COPIES))
def test_a_module_can_be_copied_after_a_solve(
    copied: Callable[..., nn.Module], after: str, mode: Mode, assert_agree: Agree
) -> None:
    model = NeuralODE(Field(), **SETTINGS, **mode)
    solution = model(state())
    if after == "backward":
        solution.sum().backward()
        model.zero_grad()
    other = copied(model)
    solutions = model(state()), other(state())
    assert torch.equal(*solutions)
    for one in solutions:
        one.pow(3).sum().backward()
    pairs = [(one.grad, two.grad) for one, two in zip(model.parameters(), other.parameters(), strict=True)]
    pairs = [(one, two) for one, two in pairs if two is not None]
    assert len(pairs) == 5
    assert_agree([one for one, _ in pairs], [two for _, two in pairs])


def test_a_solve_leaves_nothing_on_the_module(mode: Mode) -> None:
    field, y0 = Field(), state()
    before = {name: set(module.__dict__) for name, module in field.named_modules()}
    torchdiffeq.odeint_adjoint(field, y0, T, **SETTINGS, **mode).sum().backward()
    assert {name: set(module.__dict__) for name, module in field.named_modules()} == before
    hooks = [
        name for module in field.modules() for name in ("_forward_hooks", "_backward_hooks") if getattr(module, name)
    ]
    assert hooks == []


def test_a_module_is_freed_with_its_solution(mode: Mode) -> None:
    """No reference cycle: the field is gone as soon as the caller lets go, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        field = Field()
        alive = weakref.ref(field)
        solution = torchdiffeq.odeint_adjoint(field, state(), T, **SETTINGS, **mode)
        solution.sum().backward()
        del field, solution
        assert alive() is None
    finally:
        gc.enable()


def test_replicas_of_data_parallel(mode: Mode, assert_agree: Agree, replica_of: Replicate) -> None:
    field, y0 = Field(), state()
    wanted = [y0, *field.layers.parameters()]
    expected = torchdiffeq.odeint(field, y0, T, method="rk4")
    parts = []
    for chunk in y0.chunk(2):
        copies = {parameter: parameter.clone() for parameter in field.parameters()}
        replica = replica_of(field, copies)
        assert list(replica.parameters()) == []
        parts.append(torchdiffeq.odeint_adjoint(replica, chunk, T, method="rk4", **mode))
    found = torch.cat(parts, dim=1)
    assert torch.allclose(found, expected, rtol=1e-14, atol=1e-14)
    assert_agree(torch.autograd.grad(found.pow(3).sum(), wanted), torch.autograd.grad(expected.pow(3).sum(), wanted))
