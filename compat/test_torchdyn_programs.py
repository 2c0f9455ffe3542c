"""Programs such as torchdyn's tutorials, trained in each mode as by ``sensitivity="autograd"``.

A program is whole: data, a ``Sequential`` with a ``NeuralODE`` in it, loss and optimiser. What is compared is what a
user sees: the losses of a training, bit for bit at its first step, and the parameters at each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy

pytest.importorskip("torchdyn")

from harness import each_mode
from outcomes import is_replayed
from torchdyn.core import NeuralODE
from torchdyn.datasets import ToyDataset
from torchdyn.models import CNF
from torchdyn.models.cnf import autograd_trace, hutch_trace
from torchdyn.nn import Augmenter, DepthCat
from torchdyn_training import Build, assert_same_training, built

# Upstream says so to everyone whose tolerances are not odeint's defaults, its own adjoint among them.
pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning"),
]


def standard_normal() -> MultivariateNormal:
    return MultivariateNormal(torch.zeros(2), torch.eye(2))


@functools.cache
def moons() -> tuple[Tensor, Tensor]:
    points, labels = ToyDataset().generate(n_samples=24, noise=0.0, dataset_type="moons")
    return points.double() + 0.1 * torch.sin(torch.arange(48) ** 2).reshape(24, 2), labels


class Last(nn.Module):
    """The state at the last time, of all that a solve returns."""

    def forward(self, solution: Tensor) -> Tensor:
        return solution[-1]


@dataclasses.dataclass(frozen=True)
class Program:
    """What is trained.

    Attributes:
        front, field, head: what comes before the solve, its vector field, and what comes after it.
        loss: of what the head makes of a batch of moons.
        order: of the differential equation.
    """

    front: Callable[[], nn.Module]
    field: Callable[[], nn.Module]
    head: Callable[[], nn.Module]
    loss: Callable[[Tensor], Tensor]
    order: int = 1

    def building(self, solver: str) -> Build:
        """The model as a function of the sensitivity."""

        def build(sensitivity: str) -> nn.Sequential:
            tolerances = dict.fromkeys(("atol", "rtol", "atol_adjoint", "rtol_adjoint"), 1e-6)
            node = NeuralODE(
                self.field(), solver, self.order, sensitivity=sensitivity, return_t_eval=False, **tolerances
            )
            if solver == "rk4":
                node.t_span = torch.linspace(0, 1, 6)
            return nn.Sequential(self.front(), node, Last(), self.head())

        return build

    def loss_of(self, model: nn.Module, step: int) -> Tensor:
        return self.loss(model(moons()[0]))


def classification(logits: Tensor) -> Tensor:
    return cross_entropy(logits, moons()[1])


def negative_log_likelihood(end: Tensor) -> Tensor:
    """The first column has minus the integral of the trace."""
    return (end[:, 0] - standard_normal().log_prob(end[:, 1:])).mean()  # type: ignore[no-any-return]


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs))


def depth_dependent() -> nn.Sequential:
    return nn.Sequential(DepthCat(1), nn.Linear(5, 16), nn.Tanh(), DepthCat(1), nn.Linear(17, 2))


def flow(trace: Callable[[], dict[str, Any]]) -> Program:
    return Program(
        lambda: Augmenter(augment_idx=1, augment_dims=1),
        lambda: CNF(nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 2)), **trace()),
        nn.Identity,
        negative_log_likelihood,
    )


PROGRAMS: dict[str, Program] = {
    "classifier": Program(nn.Identity, lambda: mlp(2, 2), nn.Identity, classification),
    "augmented classifier": Program(
        lambda: Augmenter(1, 2), lambda: mlp(4, 4), lambda: nn.Linear(4, 2), classification
    ),
    "second order": Program(
        lambda: Augmenter(1, augment_func=nn.Linear(2, 2)),
        depth_dependent,
        lambda: nn.Linear(4, 2),
        classification,
        order=2,
    ),
    "flow, exact trace": flow(lambda: {"trace_estimator": autograd_trace}),
    "flow, Hutchinson's trace": flow(lambda: {"trace_estimator": hutch_trace, "noise_dist": standard_normal()}),
}
each_program = pytest.mark.parametrize("program", PROGRAMS)


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@each_program
@each_mode
def test_trained_as_by_backpropagation(mode: str, program: str, solver: str) -> None:
    build, loss = PROGRAMS[program].building(solver), PROGRAMS[program].loss_of
    assert not is_replayed(loss(built(build, "autograd"), 0))
    model = assert_same_training(build, loss, mode, steps=4)
    assert is_replayed(loss(model, 0))
