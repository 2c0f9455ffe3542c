"""Modules around torchdyn's solves: Lightning, files, copies, conversions, processes, layers with state."""

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
from harness import assert_same_gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("torchdyn")

import pytorch_lightning
from harness import each_mode, first_step_held
from torchdyn.core import NeuralODE
from torchdyn_training import built, gradients_held_by

# Upstream says so to everyone whose tolerances are not odeint's defaults.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning")

TIMES = torch.tensor([0.0, 0.3, 0.45, 1.0], dtype=torch.float64)


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


class Itself(NeuralODE):  # type: ignore[misc]
    """A NeuralODE is a LightningModule and may be the learner."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        loss: Tensor = (self(x, TIMES)[1][-1] - target).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        return batches()


def itself(sensitivity: str) -> nn.Module:
    return Itself(Field(), solver="dopri5", sensitivity=sensitivity, atol=1e-4, rtol=1e-4)


LEARNERS: dict[str, Callable[[str], nn.Module]] = {
    "around": lambda sensitivity: Learner(neural_ode(sensitivity)),
    "tsit5": lambda sensitivity: Learner(neural_ode(sensitivity, "tsit5")),
    "itself": itself,
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


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_state_dict(module: Any) -> Any:
    other = type(module)(Field(), solver="dopri5", sensitivity=module.sensitivity, atol=1e-4, rtol=1e-4)
    if hasattr(module, "adjoint_options"):
        other.adjoint_options = module.adjoint_options
    other.load_state_dict(module.state_dict())
    return other


COPIES: dict[str, Callable[..., Any]] = {
    "torch.save": saved_and_loaded,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "state_dict": through_a_state_dict,
    "saved twice": lambda module: saved_and_loaded(saved_and_loaded(module)),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # torch 2.4 to 2.5 of its own pickle
@pytest.mark.parametrize("after", ["construction", "forward", "backward"])
@pytest.mark.parametrize("copied", COPIES)
@each_mode
def test_a_model_can_be_saved(mode: str, copied: str, after: str) -> None:
    model = built(neural_ode, mode)
    if after != "construction":
        solution = model(state(), TIMES)[1]
    if after == "backward":
        solution.sum().backward()
    other = COPIES[copied](model)
    assert type(other) is type(model)
    assert other.sensitivity == model.sensitivity
    assert getattr(other, "adjoint_options", None) == getattr(model, "adjoint_options", None)
    truth = solution_and_gradients(built(neural_ode, "autograd"), held=True)
    assert_same(solution_and_gradients(model), truth)
    assert_same(solution_and_gradients(other), truth)


@each_mode
def test_states_are_those_of_torchdyn(mode: str) -> None:
    """Names and order of the entries: weights go from one mode to the other."""
    model, upstream = built(neural_ode, mode), built(neural_ode, "autograd", seed=3)
    solution_and_gradients(model)
    assert list(model.state_dict()) == list(upstream.state_dict())
    upstream.load_state_dict(model.state_dict())
    assert_same(solution_and_gradients(model), solution_and_gradients(upstream, held=True))


@pytest.mark.parametrize("after", ["construction", "backward"])
@each_mode
def test_deepcopy_fails_as_in_torchdyns_autograd_mode(mode: str, after: str) -> None:
    """With upstream's error, not another one; where this fails upstream has mended it; the test above takes over."""
    for name in ("autograd", mode):
        model = built(neural_ode, name)
        if after == "backward":
            model(state(), TIMES)[1].sum().backward()
        with pytest.raises(RuntimeError, match="support the deepcopy protocol"):
            copy.deepcopy(model)


# Conversions.


@pytest.mark.parametrize("solver", ["rk4", "dopri5", "tsit5"])
@pytest.mark.parametrize("convert", [lambda model: model.double(), lambda model: model.to(torch.float64)])
@each_mode
def test_conversion_after_construction(mode: str, solver: str, convert: Callable[[Any], Any]) -> None:
    def single(sensitivity: str) -> Any:
        return NeuralODE(Field().float(), solver=solver, sensitivity=sensitivity)

    truth = solution_and_gradients(convert(built(single, "autograd")), held=True)
    assert truth[0].dtype == torch.float64
    assert_same(solution_and_gradients(convert(built(single, mode))), truth)


# What a solve leaves behind.


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_mode
def test_a_solve_leaves_nothing_on_the_module(mode: str, solver: str) -> None:
    model = built(lambda sensitivity: neural_ode(sensitivity, solver), mode)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    solution_and_gradients(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert [
        name for module in model.modules() for name in ("_forward_hooks", "_backward_hooks") if getattr(module, name)
    ] == []


@each_mode
def test_a_model_is_freed_with_its_solution(mode: str) -> None:
    """No reference cycle: the model is gone as soon as the caller lets go, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        model = built(neural_ode, mode)
        alive = weakref.ref(model)
        solution = model(state().requires_grad_(), TIMES)[1]
        solution.sum().backward()
        del model, solution
        assert alive() is None
    finally:
        gc.enable()


# Layers with a state of their own, in the field; steps are fixed, as adaptive ones would depend on it.
