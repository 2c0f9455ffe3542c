"""Learning the energy of a partial differential equation from snapshots of its solutions.

Many equations of physics move a state u(x, t), here periodic in x, along the variational derivative of an energy:

    u_t = ∂xⁿ (δH/δu)        H[u] = ∫ V(u) + (s/2) u_x² dx        δH/δu = V'(u) - s u_xx

Their flow conserves H for n = 1 and dissipates it for n = 2. A network takes the place of the density of H and learns
it from pairs of snapshots, a short time apart (Matsubara, Ishikawa and Yaguchi, NeurIPS 2020,
https://arxiv.org/abs/1905.08604), by which Matsubara, Miyatake and Yaguchi (NeurIPS 2021, section 5.2,
https://arxiv.org/abs/2102.09750) judge the symplectic adjoint method. Data and model have the same differences in x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import Case, Problem, Series, State, as_tuple
from torchdiffeq_symplectic.experiments.benchmark.problems.network import seeded

__all__ = ["CAHN_HILLIARD", "EQUATIONS", "KDV", "EnergyField", "Equation", "learning_problem", "trajectories"]

SNAPSHOTS = 25  # of a trajectory, any of which may be the first of a pair
POINTS, BATCH, WIDTH = 64, 32, 64


@dataclass(frozen=True)
class Equation:
    """An equation and how it is sampled.

    Attributes:
        name: what it is called.
        length: the period in x.
        order: n, 1 (H is conserved) or 2 (H is dissipated).
        force: V'(u).
        gradient_energy: s.
        interval: time from one snapshot to the next.
        scale: typical size of the density of H.
        initial: random initial states, from x and a generator on the CPU.
    """

    name: str
    length: float
    order: int
    force: Callable[[Tensor], Tensor]
    gradient_energy: float
    interval: float
    scale: float
    initial: Callable[[Tensor, torch.Generator], Tensor]

    @property
    def spacing(self) -> float:
        """Of the grid in x."""
        return self.length / POINTS

    def flow(self, variation: Tensor) -> Tensor:
        """Dⁿ δH/δu: the central difference, which is antisymmetric, or the second one, which is negative."""
        left, right = variation.roll(1, dims=-1), variation.roll(-1, dims=-1)
        if self.order == 1:
            return (right - left) / (2 * self.spacing)
        return (right - 2 * variation + left) / self.spacing**2

    def slope(self, t: Tensor, u: Tensor) -> Tensor:
        """The true one, in the shape of ``u``."""
        del t
        second = (u.roll(-1, dims=-1) - 2 * u + u.roll(1, dims=-1)) / self.spacing**2
        return self.flow(self.force(u) - self.gradient_energy * second)


def _solitons(x: Tensor, generator: torch.Generator) -> Tensor:
    """Sums of two solitary waves 2 κ² sech²(κ x), which travel to the left at the speed 4 κ²."""
    kappa, place = 0.5 + torch.rand(2, BATCH, 1, 1, generator=generator, dtype=torch.float64)
    second, apart = torch.rand(2, BATCH, 1, 1, generator=generator, dtype=torch.float64)
    images = torch.arange(-4, 6, dtype=torch.float64)[:, None] * 10.0

    def wave(kappa: Tensor, place: Tensor) -> Tensor:
        return (2 * kappa**2 * torch.cosh(kappa * (x + images - 10.0 * place)) ** -2).sum(1)

    return wave(kappa, place) + wave(0.5 + second, place + 0.3 + 0.4 * apart)


def _noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Small and smooth, of the eight longest waves: all that grow."""
    spectrum = torch.randn(BATCH, 9, generator=generator, dtype=torch.complex128)
    spectrum[:, 0] = 0.0
    noise: Tensor = 0.01 * torch.fft.irfft(spectrum, n=len(x), norm="forward")
    return noise


# u_t = 6 u u_x + u_xxx, and u_t = ∂xx (u³ - u - 0.0005 u_xx), which separates u into domains of -1 and 1.
KDV = Equation("Korteweg-de Vries", 10.0, 1, lambda u: 3 * u**2, -1.0, 0.02, 4.0, _solitons)
CAHN_HILLIARD = Equation("Cahn-Hilliard", 1.0, 2, lambda u: u**3 - u, 5e-4, 4e-4, 0.25, _noise)


def trajectories(equation: Equation, count: int, generator: torch.Generator) -> Tensor:
    """``count`` snapshots of random solutions: the data, float64 ``(count, BATCH, POINTS)``."""
    x = equation.spacing * torch.arange(POINTS, dtype=torch.float64)
    t = equation.interval * torch.arange(count, dtype=torch.float64)
    initial = equation.initial(x, generator)
    solution: Tensor = torchdiffeq.odeint(equation.slope, initial, t, method="dopri5", rtol=1e-7, atol=1e-9)
    return solution


class EnergyField(nn.Module):
    """The slope ``Dⁿ δH/δu`` of a learned energy H, which it conserves (n = 1) or dissipates (n = 2) by construction.

    The density of H is a convolutional network of u: each grid point sees itself and its two neighbours. The derivative
    of H with respect to u is taken by backpropagation.
    """

    def __init__(self, equation: Equation, width: int = WIDTH) -> None:
        super().__init__()
        self.equation = equation
        self.density = nn.Sequential(
            nn.Conv1d(1, width, kernel_size=3, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv1d(width, width, kernel_size=1),
            nn.Tanh(),
            nn.Conv1d(width, 1, kernel_size=1, bias=False),
        )

    def energy(self, u: Tensor) -> Tensor:
        """H, shape ``(batch,)``, of states of shape ``(batch, POINTS)``."""
        density: Tensor = self.density(u[:, None])
        return self.equation.scale * self.equation.spacing * density.sum(dim=(1, 2))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The slope, in the shape of ``u``, ``(batch, POINTS)``; it does not depend on ``t``."""
        del t
        differentiated = torch.is_grad_enabled()
        # Without gradients u is a leaf of its own: it may claim to require one, as a view taken inside an
        # autograd.Function does, but leads nowhere.
        if not (differentiated and u.requires_grad):
            u = u.detach().requires_grad_()
        with torch.enable_grad():
            (per_point,) = torch.autograd.grad(self.energy(u).sum(), u, create_graph=differentiated)
        return self.equation.flow(per_point / self.equation.spacing)


def learning_problem(equation: Equation, seed: int, intervals: int = 1) -> Problem:
    """A new ``EnergyField`` is to take snapshots to later ones: the loss is the mean square of what it misses.

    Each trajectory gives one of its first 25 snapshots as y0 and the one ``intervals`` after it as the target.
    """
    generator = torch.Generator().manual_seed(seed)
    data = trajectories(equation, SNAPSHOTS + intervals, generator).float()
    each, chosen = torch.arange(BATCH), torch.randint(SNAPSHOTS, (BATCH,), generator=generator)
    with seeded(seed):
        field = EnergyField(equation)
    return Problem(
        field=field,
        y0=data[chosen, each],
        t=torch.tensor([0.0, intervals * equation.interval]),
        loss=partial(_missed, data[chosen + intervals, each]),
        method="dopri8",
        rtol=1e-5,
        atol=1e-5,
        options={"first_step": equation.interval / 4},
    )


def _missed(target: Tensor, solution: State) -> Tensor:
    (u,) = as_tuple(solution)
    return (u[-1] - target.to(u)).square().mean()


def _series(name: str, equation: Equation) -> Series:
    """From a snapshot to the next one, as the paper does, and to the twentieth after it."""
    cases = {"": 1, ", 20 intervals": 20}
    return Series(
        name,
        f"What does learning the energy of the {equation.name} equation gain?",
        tuple(
            Case(f"{equation.name}, dopri8{label}", partial(learning_problem, equation, intervals=intervals))
            for label, intervals in cases.items()
        ),
    )


EQUATIONS = _series("kdv", KDV), _series("cahn-hilliard", CAHN_HILLIARD)
