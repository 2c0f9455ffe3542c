"""An image classifier in torchdyn with Lightning, on small digits: python lightning_classifier.py [--steps 60].

Prints loss, peak memory and time with the symplectic adjoint on and off. Needs the extra torchdyn.
"""

import argparse
import logging
import time
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE

import torchdiffeq_symplectic  # noqa: F401 (registers the modes)
from torchdiffeq_symplectic.experiments.memory import peak_bytes

CHANNELS = 16


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Tanh(), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        )

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = self.net(x)
        return slope


class Classifier(pl.LightningModule):
    def __init__(self, sensitivity: str) -> None:
        super().__init__()
        self.flow = NeuralODE(Field(), solver="rk4", sensitivity=sensitivity, return_t_eval=False)
        self.stem, self.head = nn.Conv2d(1, CHANNELS, 3, padding=1), nn.Linear(CHANNELS * 64, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, digits = batch
        states = self.flow(self.stem(images), torch.linspace(0, 1, 11))
        self.last = nn.functional.cross_entropy(self.head(states[-1].flatten(1)), digits)
        return self.last

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def train(sensitivity: str, steps: int) -> None:
    pl.seed_everything(0, verbose=False)
    images, digits = (torch.tensor(array) for array in load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(images.reshape(-1, 1, 8, 8).float() / 16, digits), batch_size=64, shuffle=True)
    model = Classifier(sensitivity)
    memory = peak_bytes(lambda: model.training_step(next(iter(loader)), 0).backward(), "cpu") / 2**20
    model.zero_grad()
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    start = time.perf_counter()
    pl.Trainer(max_steps=steps, accelerator="cpu", **quiet).fit(model, loader)
    print(f"{sensitivity}: loss {model.last:.4f}, {memory:.1f} MiB, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description="Digits by a neural ODE.")
    parser.add_argument("--steps", type=int, default=60)
    for sensitivity in ("symplectic", "autograd"):
        train(sensitivity, parser.parse_args().steps)
