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
from cases import assert_same_gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("torchdyn")

import pytorch_lightning
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn_cases import each_mode, first_step_held
from torchdyn_training import built, gradients_held_by, problems_of

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


@each_mode
@of_lightning
def test_lightning_clips_and_accumulates(mode: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    with first_step_held():
        truth = trained_by_lightning(built(LEARNERS["around"], "autograd"), tmp_path, **settings)
    found = trained_by_lightning(built(LEARNERS["around"], mode), tmp_path, **settings)
    for one, other in zip(found.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@each_mode
@of_lightning
def test_checkpoints_of_lightning(mode: str, tmp_path: Path) -> None:
    """Written after an epoch, and trained on from there."""
    learner = trained_by_lightning(built(LEARNERS["around"], mode), tmp_path)
    trainer = learner.trainer
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = Learner(built(neural_ode, mode, seed=5))
    other.load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=False)["state_dict"])
    assert_same(solution_and_gradients(other.model), solution_and_gradients(learner.model))


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


def under_no_grad(sensitivity: str) -> Any:
    with torch.no_grad():
        return neural_ode(sensitivity)


def thawed(sensitivity: str) -> Any:
    """Parameters frozen while the model was made."""
    field = Field().requires_grad_(False)
    model = NeuralODE(field, solver="dopri5", sensitivity=sensitivity, atol=1e-4, rtol=1e-4)
    field.layers.requires_grad_(True)
    return model


def loaded(sensitivity: str) -> Any:
    return saved_and_loaded(neural_ode(sensitivity))


def without_flat_parameters(sensitivity: str) -> Any:
    model = neural_ode(sensitivity)
    model.vf_params = None
    return model


# torchdyn keeps a flat copy of the parameters with its graph, which cannot be copied. These have it without one.
COPYABLE: dict[str, Callable[[str], Any]] = {
    "made under no_grad": under_no_grad,
    "frozen when made": thawed,
    "loaded from a file": loaded,
    "flat copy taken away": without_flat_parameters,
}


@pytest.mark.parametrize("after", ["construction", "forward", "backward"])
@pytest.mark.parametrize("made", COPYABLE)
@each_mode
def test_deepcopy_where_torchdyns_autograd_mode_survives_it(mode: str, made: str, after: str) -> None:
    truth, model = built(COPYABLE[made], "autograd"), built(COPYABLE[made], mode)
    for each in (truth, model):
        if after != "construction":
            solution = each(state(), TIMES)[1]
        if after == "backward":
            solution.sum().backward()
    assert_same(solution_and_gradients(copy.deepcopy(model)), solution_and_gradients(copy.deepcopy(truth), held=True))


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


@each_mode
def test_conversion_between_two_solves(mode: str) -> None:
    """From float64 to float32 and back, with a solve in each."""
    models = {name: built(neural_ode, name) for name in ("autograd", mode)}
    for dtype in (torch.float64, torch.float32, torch.float64):
        truth = solution_and_gradients(models["autograd"].to(dtype), held=True)
        assert truth[0].dtype == dtype
        assert_same(solution_and_gradients(models[mode].to(dtype)), truth)


@each_mode
def test_unused_and_frozen_parameters(mode: str) -> None:
    """Zeros for the unused, which DistributedDataParallel needs; nothing for the frozen."""
    model = built(neural_ode, mode)
    _, gradients = solution_and_gradients(model)
    field = "vf.vf."
    assert torch.equal(gradients[f"{field}unused"], torch.zeros(2, dtype=torch.float64))  # type: ignore[arg-type]
    assert gradients[f"{field}frozen"] is None


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


class Batched(nn.Module):
    """No bias comes before the layer: the gradient of one before a batch norm is zero but for rounding."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5, bias=False), layer, nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = self.layers(x) * torch.cos(t)
        return slope


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(5),
    "batch norm, no running statistics": lambda: nn.BatchNorm1d(5, track_running_stats=False),
    "dropout": lambda: nn.Dropout(0.4),
    "alpha dropout": lambda: nn.AlphaDropout(0.3),
    "layer norm": lambda: nn.LayerNorm(5),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("solver", ["euler", "rk4"])
@each_layer
@each_mode
def test_layer_with_a_state_of_its_own(mode: str, layer: str, solver: str, training: bool) -> None:
    """Gradients, and everything that the layer keeps: statistics move once, random numbers are drawn once."""
    found: list[Any] = []
    for name in ("autograd", mode):
        model = built(lambda sensitivity: NeuralODE(Batched(LAYERS[layer]()), solver, sensitivity=sensitivity), name)
        model.train(training)
        torch.manual_seed(12)
        pair = solution_and_gradients(model)
        found.append((pair, dict(model.named_buffers()), torch.rand(1), model.training))
    (truth, buffers, number, flag), (actual, own_buffers, own_number, own_flag) = found
    assert_same(actual, truth)
    assert buffers.keys() == own_buffers.keys()
    for key, value in buffers.items():
        assert torch.equal(own_buffers[key], value)
    assert torch.equal(own_number, number)
    assert flag == own_flag == training


@each_layer
@each_mode
def test_two_solves_before_one_backward(mode: str, layer: str) -> None:
    gradients = []
    for name in ("autograd", mode):
        model = built(lambda sensitivity: NeuralODE(Batched(LAYERS[layer]()), "rk4", sensitivity=sensitivity), name)
        torch.manual_seed(12)
        first, second = model(state(), TIMES)[1], model(2 - state(), TIMES)[1]
        (first.pow(3).sum() + 2 * second.square().sum()).backward()
        gradients.append(gradients_held_by(model))
    assert_same_gradients(gradients[1], gradients[0], torch.float64)


def test_a_model_is_a_module_of_torchdyn() -> None:
    """So that the helpers of these tests find what they set."""
    model = nn.Sequential(nn.Linear(1, 1), neural_ode("symplectic"))
    assert [type(problem) for problem in problems_of(model)] == [NeuralODE]
    assert issubclass(NeuralODE, ODEProblem)
