"""Modules around a solve, in both hosts: Lightning, files, copies, replicas, conversions; nothing of a solve stays."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import METHODS, arguments_of, assert_same_gradients, each_mode, first_step_held, solve
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("torchdyn")

import pytorch_lightning
from torchdyn.core import NeuralODE
from torchdyn_training import built, gradients_held_by

# Upstream says so to everyone whose tolerances are not odeint's defaults.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning")

Agree = Callable[..., None]
Replicate = Callable[[nn.Module, dict[nn.Parameter, Tensor]], nn.Module]
TIMES = torch.tensor([0.0, 0.3, 0.45, 1.0], dtype=torch.float64)
each_solve = pytest.mark.parametrize(
    "method", [n for n in ("dopri5", "torchdyn-rk4", "torchdyn-dopri5") if n in METHODS]
)


class Field(nn.Module):
    """A class of the file, as whole models are saved by reference to their classes."""

    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, inputs)).double()
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = self.layers(x) * torch.cos(3 * t).to(x) - self.frozen * x
        return slope


def state() -> Tensor:
    return torch.linspace(-1.3, 2.1, 12, dtype=torch.float64).reshape(4, 3)


def neural_ode(sensitivity: str, solver: str = "dopri5") -> Any:
    return NeuralODE(Field(), solver=solver, sensitivity=sensitivity, atol=1e-4, rtol=1e-4)


def solution_and_gradients(model: Any, *, held: bool = False) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Of one pass, ``held`` for the truth of the mode "autograd"."""
    model.zero_grad()
    with first_step_held() if held else contextlib.nullcontext():
        dtype = next(model.parameters()).dtype
        solution = model(state().to(dtype), TIMES.to(dtype))[1]
        solution.pow(3).sum().backward()
    return solution.detach(), gradients_held_by(model)


def assert_same(found: tuple[Tensor, dict[str, Tensor | None]], truth: tuple[Tensor, dict[str, Tensor | None]]) -> None:
    assert torch.equal(found[0], truth[0])
    assert_same_gradients(found[1], truth[1], found[0].dtype)


# Lightning.


class Learner(pytorch_lightning.LightningModule):
    """As torchdyn's tutorials have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        solution: Tensor = self.model(x, TIMES)[1]
        return solution

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        x, target = batch
        loss = (self(x)[-1] - target).square().mean()
        self.losses.append(float(loss.detach()))
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        return batches()


def batches() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.roll(1, 1) / 2), batch_size=4)


LEARNERS: dict[str, Callable[[str], nn.Module]] = {
    "around": lambda sensitivity: Learner(neural_ode(sensitivity)),
    "tsit5": lambda sensitivity: Learner(neural_ode(sensitivity, "tsit5")),
}


def trained_by_lightning(learner: Any, folder: Path, **settings: Any) -> Any:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, default_root_dir=folder, **quiet | settings
    )
    trainer.fit(learner)
    return learner


lightning_speaks = [
    # Of its own data loading and logging; none of it is about the model.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning"),
]


def of_lightning(test: Any) -> Any:
    for mark in lightning_speaks:
        test = mark(test)
    return test


@pytest.mark.parametrize("learner", LEARNERS)
@each_mode
@of_lightning
def test_lightning_trains_the_same_model(mode: str, learner: str, tmp_path: Path) -> None:
    with first_step_held():
        truth = trained_by_lightning(built(LEARNERS[learner], "autograd"), tmp_path)
    found = trained_by_lightning(built(LEARNERS[learner], mode), tmp_path)
    assert len(found.losses) == 6
    assert found.losses == pytest.approx(truth.losses, rel=1e-9)
    assert found.losses[0] == truth.losses[0]
    assert found.losses[3] < found.losses[0]  # the same batch in the second epoch
    for one, other in zip(found.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


# Files and copies.


class OfTorchdiffeq(nn.Module):
    """As libraries wrap a field: the settings of the solve are part of the module."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.field, self.mode = Field(), mode

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        settings: dict[str, Any] = {"options": {"first_step": 0.1}, "rtol": 1e-4, "atol": 1e-5}
        if self.mode == "autograd":
            return t, torchdiffeq.odeint(self.field, x, t, **settings)
        return t, torchdiffeq.odeint_adjoint(self.field, x, t, **settings, **arguments_of(self.mode))


def of_host(host: str, mode: str) -> Any:
    if host == "torchdyn":
        return built(neural_ode, mode)
    torch.manual_seed(0)
    return OfTorchdiffeq(mode)


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[..., Any]] = {
    "torch.save": saved_and_loaded,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # torch 2.4 to 2.5 of its own pickle
@pytest.mark.parametrize("after", ["construction", "forward", "backward"])
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("host", ["torchdiffeq", "torchdyn"])
@each_mode
def test_a_model_can_be_copied(mode: str, host: str, copied: str, after: str) -> None:
    model = of_host(host, mode)
    if after != "construction":
        solution = model(state(), TIMES)[1]
    if after == "backward":
        solution.sum().backward()
    if (host, copied) == ("torchdyn", "deepcopy"):  # fails with torchdyn's own error, as in its mode "autograd"
        for one in (model, of_host(host, "autograd")):
            with pytest.raises(RuntimeError, match="support the deepcopy protocol"):
                copy.deepcopy(one)
        return
    other = COPIES[copied](model)
    assert type(other) is type(model)
    assert getattr(other, "sensitivity", None) == getattr(model, "sensitivity", None)
    assert getattr(other, "adjoint_options", None) == getattr(model, "adjoint_options", None)
    truth = solution_and_gradients(of_host(host, "autograd"), held=True)
    assert_same(solution_and_gradients(model), truth)
    assert_same(solution_and_gradients(other), truth)


@pytest.mark.parametrize("host", ["torchdiffeq", "torchdyn"])
@each_mode
def test_weights_go_from_one_mode_to_the_other(mode: str, host: str) -> None:
    model, upstream = of_host(host, mode), of_host(host, "autograd")
    with torch.no_grad():
        for parameter in upstream.parameters():
            parameter.zero_()
    assert list(model.state_dict()) == list(upstream.state_dict())
    upstream.load_state_dict(model.state_dict())
    assert_same(solution_and_gradients(model), solution_and_gradients(upstream, held=True))


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "tsit5"])
@each_mode
def test_conversion_after_construction(mode: str, solver: str) -> None:
    def single(sensitivity: str) -> Any:
        return NeuralODE(Field().float(), solver=solver, sensitivity=sensitivity)

    truth = solution_and_gradients(built(single, "autograd").double(), held=True)
    assert truth[0].dtype == torch.float64
    assert_same(solution_and_gradients(built(single, mode).double()), truth)


# What a solve leaves behind.


@each_solve
@each_mode
def test_a_solve_leaves_nothing_on_the_module(mode: str, method: str) -> None:
    field, x = Field(), state().requires_grad_()
    before = {name: set(module.__dict__) for name, module in field.named_modules()}
    solve(mode, field, x, TIMES, method).sum().backward()
    assert {name: set(module.__dict__) for name, module in field.named_modules()} == before
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, name) for module in field.modules() for name in hooks)


@each_solve
@each_mode
def test_a_module_is_freed_with_its_solution(mode: str, method: str) -> None:
    """No reference cycle: the field is gone as soon as the caller lets go, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        field = Field()
        alive = weakref.ref(field)
        solution = solve(mode, field, state().requires_grad_(), TIMES, method)
        solution.sum().backward()
        del field, solution
        assert alive() is None
    finally:
        gc.enable()


@each_mode
def test_replicas_of_data_parallel(mode: str, assert_agree: Agree, replica_of: Replicate) -> None:
    field, x = Field(), state().requires_grad_()
    wanted = [x, *field.layers.parameters()]
    expected = torchdiffeq.odeint(field, x, TIMES, method="rk4")
    parts = []
    for chunk in x.chunk(2):
        copies = {parameter: parameter.clone() for parameter in field.parameters()}
        replica = replica_of(field, copies)
        assert list(replica.parameters()) == []
        parts.append(torchdiffeq.odeint_adjoint(replica, chunk, TIMES, method="rk4", **arguments_of(mode)))
    found = torch.cat(parts, dim=1)
    assert torch.allclose(found, expected, rtol=1e-14, atol=1e-14)
    assert_agree(torch.autograd.grad(found.pow(3).sum(), wanted), torch.autograd.grad(expected.pow(3).sum(), wanted))
