"""A continuous normalizing flow learns a table by the symplectic adjoint; then the ways to its gradient are compared.

The table is the breast-cancer data of scikit-learn: 569 tumours, 30 measures of each. Needs the extra ``demo``.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchdiffeq import odeint

from torchdiffeq_symplectic import odeint_adjoint
from torchdiffeq_symplectic.experiments.benchmark import Problem, compare, installed, publication
from torchdiffeq_symplectic.experiments.benchmark.problems.flow import FlowField, initial_state, loss
from torchdiffeq_symplectic.experiments.environment import one_thread
from torchdiffeq_symplectic.experiments.figures import dots, grid, save

__all__ = ["DemoOutcome", "run"]

WIDTH = 64
BATCH = 128
LEARNING_RATE = 2e-3
SOLVER: dict[str, Any] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5, "options": {"first_step": 0.05}}
ROUNDS = 5  # of timing
POINTS = 25  # of the held-out curve
CONTENDERS = ("backpropagation", "adjoint", "aca", "baseline", "symplectic", "symplectic, stages")


@dataclass(frozen=True)
class DemoOutcome:
    """What a run found. Likelihoods are negative logarithms in nats per dimension: less is better.

    Attributes:
        training: estimate on each step's batch, before the step.
        held_out: pairs of a number of steps, from 0 to all, and the estimate on the held-out rows after them.
        rows: the comparison on the trained flow.
    """

    training: list[float]
    held_out: list[tuple[int, float]]
    rows: pd.DataFrame


@one_thread()
def run(device: torch.device | str, seed: int, steps: int, out: Path) -> DemoOutcome:
    """Train the flow, compare the gradients, print a table, and write ``demo.png`` and ``demo.csv``.

    Args:
        device: where the flow is trained.
        seed: of the split, the initial parameters, the batches and the noise; the global random state is not used.
        steps: of the optimiser, at least 1.
        out: the directory for the files, made if need be.
    """
    console = Console()
    train, test = _read_table(seed, torch.device(device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        field = FlowField(train.shape[1], WIDTH).to(train)
    console.print(f"A flow learns {len(train)} rows of {train.shape[1]} measures; {len(test)} rows are held out.")
    training, held_out = _train(field, train, test, seed, steps, console)
    console.print(
        "Held-out negative log-likelihood in nats per dimension: "
        f"{held_out[0][1]:.3f} before, [bold]{held_out[-1][1]:.3f}[/bold] after {steps} steps."
    )
    with console.status("Comparing the gradients of the trained flow"):
        field.draw_noise(len(train), torch.Generator().manual_seed(seed))
        problem = Problem(field, initial_state(train), _times(train), loss, **SOLVER)
        rows = compare(problem, [one for one in installed() if one.name in CONTENDERS], ROUNDS)
    console.print(publication.table(rows))
    outcome = DemoOutcome(training, held_out, rows)
    out.mkdir(parents=True, exist_ok=True)
    rows.to_csv(out / "demo.csv", index=False)
    _draw(outcome, out / "demo.png")
    console.print(f"Wrote {out / 'demo.png'} and {out / 'demo.csv'}")
    return outcome


def _read_table(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Training and held-out rows, shape ``(rows, 30)``; each column has mean 0 and variance 1 in the training rows."""
    parts = train_test_split(load_breast_cancer().data, test_size=0.25, random_state=seed)
    scaler = StandardScaler().fit(parts[0])
    train, test = (torch.tensor(scaler.transform(part), dtype=torch.float32, device=device) for part in parts)
    return train, test


def _train(
    field: FlowField, train: Tensor, test: Tensor, seed: int, steps: int, console: Console
) -> tuple[list[float], list[tuple[int, float]]]:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(field.parameters(), lr=LEARNING_RATE)
    training: list[float] = []
    held_out = [(0, _held_out(field, test, seed))]
    shown = TextColumn("{task.fields[nats]:6.3f} nats per dimension")
    with Progress(*Progress.get_default_columns(), shown, console=console) as progress:
        task = progress.add_task("training", total=steps, nats=held_out[0][1])
        for step in range(1, steps + 1):
            batch = train[torch.randperm(len(train), generator=generator)[:BATCH].to(train.device)]
            field.draw_noise(len(batch), generator)
            nats = loss(
                odeint_adjoint(field, initial_state(batch), _times(batch), adjoint_method="symplectic", **SOLVER)
            )
            optimizer.zero_grad()
            nats.backward()
            optimizer.step()
            training.append(nats.item())
            if step % max(1, steps // POINTS) == 0 or step == steps:
                held_out.append((step, _held_out(field, test, seed)))
            progress.update(task, advance=1, nats=training[-1])
    return training, held_out


@torch.no_grad()
def _held_out(field: FlowField, test: Tensor, seed: int) -> float:
    """Estimate on the held-out rows, with the same noise at each call. It is unbiased, as E[e eᵀ] = 1."""
    field.draw_noise(len(test), torch.Generator().manual_seed(seed))
    return float(loss(odeint(field, initial_state(test), _times(test), **SOLVER)))


def _times(x: Tensor) -> Tensor:
    return torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device)


def _draw(outcome: DemoOutcome, path: Path) -> None:
    """The likelihood during training on the left, then the comparison."""
    figure, ((training, *others),) = grid(1, 4, height=3.8)
    training.plot(range(len(outcome.training)), outcome.training, color="0.7", linewidth=0.8, label="training batch")
    training.plot(*zip(*outcome.held_out, strict=True), color="black", marker=".", label="held out")
    training.set(xlabel="step", ylabel="negative log-likelihood [nats per dimension]", title="Training by symplectic")
    training.grid(alpha=0.3)
    training.legend()
    for axes, quantity in zip(others, ("gradient_error", "peak_bytes", "relative_time"), strict=True):
        dots(outcome.rows, quantity, axes)
        axes.set_title("Gradients of the trained flow")
    save(figure, path, legend=False)
