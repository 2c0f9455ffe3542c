"""Learning the energy of a partial differential equation from snapshots of its solutions.

Many equations of physics move a state u(x, t), here periodic in x, along the variational derivative of an energy:

    u_t = ∂xⁿ (δH/δu)        H[u] = ∫ V(u) + (s/2) u_x² dx        δH/δu = V'(u) - s u_xx

Their flow conserves H for n = 1 and dissipates it for n = 2; the mass ∫ u dx is conserved by both. A network takes the
place of the density of H and learns it from pairs of snapshots, a short time apart. The equations are those of
Matsubara, Ishikawa and Yaguchi, Deep Energy-Based Modeling of Discrete-Time Physics, NeurIPS 2020,
https://arxiv.org/abs/1905.08604, by which Matsubara, Miyatake and Yaguchi (NeurIPS 2021, section 5.2,
https://arxiv.org/abs/2102.09750) judge the symplectic adjoint method. Here the grid is a bit finer, 64 points for 50,
the solitons are a bit wider, snapshots further apart, and data solved by Fourier series. Quantities have no units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.experiments.benchmark.problem import Problem, State, as_tuple

__all__ = ["CAHN_HILLIARD", "KDV", "EnergyField", "Equation", "initial_states", "learning_problem", "trajectories"]

INNER_STEPS = 40  # of the data's integration, between two snapshots
SNAPSHOTS = 25  # of a trajectory


@dataclass(frozen=True)
class Equation:
    """``u_t = ∂xⁿ (δH/δu)`` with ``H = ∫ V(u) + (s/2) u_x² dx``, periodic in x, and how it is sampled.

    Attributes:
        name: what it is called.
        length: the period in x.
        points: of the grid of spacing ``length / points``, on which a state has its values.
        order: n, 1 (H is conserved) or 2 (H is dissipated).
        potential: coefficients of the polynomial V, that of u⁰ first, at most that of u⁴.
        gradient_energy: s.
        interval: time from one snapshot to the next.
        scale: typical size of the density of H.
    """

    name: str
    length: float
    points: int
    order: int
    potential: tuple[float, ...]
    gradient_energy: float
    interval: float
    scale: float

    def __post_init__(self) -> None:
        if self.order not in (1, 2) or len(self.potential) > 5:
            raise ValueError("order must be 1 or 2, and potential have at most 5 coefficients")

    @property
    def spacing(self) -> float:
        """Distance of neighbouring grid points, dx."""
        return self.length / self.points

    @property
    def wave_numbers(self) -> Tensor:
        """Those below the grid's highest, π/dx, at which a derivative has no sign: float64 ``((points + 1) // 2,)``."""
        return 2 * math.pi / self.length * torch.arange((self.points + 1) // 2, dtype=torch.float64)


# u_t = 6 u u_x + u_xxx, the paper's α = -6 and β = 1. Solitons 2 κ² sech²(κ (x + 4 κ² t)) travel to the left.
KDV = Equation(
    "Korteweg-de Vries", 10.0, 64, order=1, potential=(0, 0, 0, 1), gradient_energy=-1.0, interval=0.02, scale=4.0
)

# u_t = ∂xx (u³ - u - γ u_xx), γ = 0.0005. A small wave of wave number k grows at the rate k² (1 - γ k²), until u has
# separated into domains of -1 and 1.
CAHN_HILLIARD = Equation(
    "Cahn-Hilliard", 1.0, 64, order=2, potential=(0, 0, -0.5, 0, 0.25), gradient_energy=5e-4, interval=4e-4, scale=0.25
)


def initial_states(equation: Equation, batch: int, generator: torch.Generator) -> Tensor:
    """Random initial states, float64 of shape ``(batch, points)``, from ``generator``, which is the CPU's.

    For an equation of order 1, which must have V = a u³, sums of two solitons; for one of order 2 small smooth noise.
    """
    if equation.order == 1:
        first, second, place, distance = torch.rand(4, batch, 1, generator=generator, dtype=torch.float64)
        apart = 0.3 + 0.4 * distance
        return _soliton(equation, 0.5 + first, place) + _soliton(equation, 0.5 + second, place + apart)
    waves = 8  # all that grow in the Cahn-Hilliard equation
    spectrum = torch.randn(batch, 1 + waves, generator=generator, dtype=torch.complex128)
    spectrum[:, 0] = 0.0
    noise: Tensor = 0.01 * torch.fft.irfft(spectrum, n=equation.points, norm="forward")
    return noise


def _soliton(equation: Equation, kappa: Tensor, center: Tensor) -> Tensor:
    """Solitary waves of width 1/kappa around ``center`` periods, themselves periodic: shape ``(batch, points)``."""
    x = equation.spacing * torch.arange(equation.points, dtype=torch.float64) - equation.length * center
    images = equation.length * torch.arange(-4, 6, dtype=torch.float64).view(-1, 1, 1)
    height = -2 * equation.gradient_energy / equation.potential[3] * kappa.square()
    return height * torch.cosh(kappa * (x + images)).pow(-2).sum(dim=0)


def trajectories(equation: Equation, initial: Tensor, t: Tensor) -> Tensor:
    """Solutions at the times ``t``, from ``initial`` at ``t[0]``: the data.

    Fourier coefficients are integrated by the exponential Runge-Kutta method ETDRK4 (Cox and Matthews,
    https://doi.org/10.1006/jcph.2002.6995), in steps of ``equation.interval / 40``. Products are taken on a grid of
    twice the points, where those of up to four factors leave no aliases.

    Args:
        equation: which one.
        initial: states of shape ``(batch, points)``.
        t: output times, shape ``(T,)``, increasing.

    Returns:
        float64 tensor of shape ``(T, batch, points)``, with a relative error in time of about 1e-8.
    """
    outer = (1j * equation.wave_numbers) ** equation.order
    linear = outer * equation.gradient_energy * equation.wave_numbers.square()

    def nonlinear(spectrum: Tensor) -> Tensor:
        u = torch.fft.irfft(spectrum, n=2 * equation.points, norm="forward")
        slope: Tensor = outer * torch.fft.rfft(_potential_slope(equation, u), norm="forward")[..., : len(outer)]
        return slope

    spectra = [torch.fft.rfft(initial.double(), norm="forward")[..., : len(outer)]]
    for start, end in pairwise(t.tolist()):
        count = math.ceil(INNER_STEPS * (end - start) / equation.interval)
        step = _etdrk4(linear, nonlinear, (end - start) / count)
        spectrum = spectra[-1]
        for _ in range(count):
            spectrum = step(spectrum)
        spectra.append(spectrum)
    solution: Tensor = torch.fft.irfft(torch.stack(spectra), n=equation.points, norm="forward")
    return solution


def _potential_slope(equation: Equation, u: Tensor) -> Tensor:
    """V'(u), by Horner's rule."""
    value = torch.zeros_like(u)
    for power in range(len(equation.potential) - 1, 0, -1):
        value = value * u + power * equation.potential[power]
    return value


def _etdrk4(linear: Tensor, nonlinear: Callable[[Tensor], Tensor], h: float) -> Callable[[Tensor], Tensor]:
    """One step of length ``h`` of ``dv/dt = linear v + nonlinear(v)``, in the names of Kassam and Trefethen
    (https://doi.org/10.1137/S1064827502410633).
    """
    # A coefficient, a function of h·linear, is its own mean over a circle around there: no cancellation near 0.
    z = h * linear[:, None] + torch.exp(2j * math.pi * (torch.arange(32, dtype=torch.float64) + 0.5) / 32)
    q = h * ((torch.exp(z / 2) - 1) / z).mean(dim=1)
    f1 = h * ((-4 - z + torch.exp(z) * (4 - 3 * z + z**2)) / z**3).mean(dim=1)
    f2 = h * ((2 + z + torch.exp(z) * (z - 2)) / z**3).mean(dim=1)
    f3 = h * ((-4 - 3 * z - z**2 + torch.exp(z) * (4 - z)) / z**3).mean(dim=1)
    half, whole = torch.exp(h / 2 * linear), torch.exp(h * linear)

    def step(v: Tensor) -> Tensor:
        at_v = nonlinear(v)
        a = half * v + q * at_v
        at_a = nonlinear(a)
        at_b = nonlinear(half * v + q * at_a)
        at_c = nonlinear(half * a + q * (2 * at_b - at_v))
        return whole * v + f1 * at_v + 2 * f2 * (at_a + at_b) + f3 * at_c

    return step


class EnergyField(nn.Module):
    """The slope ``Dⁿ δH/δu`` of a learned energy H, which it conserves (n = 1) or dissipates (n = 2) by construction.

    The density of H is a convolutional network of u: each grid point sees itself and its two neighbours. The
    derivative of H with respect to u is taken by backpropagation; Dⁿ is the central difference, which is
    antisymmetric, or the second difference, which is negative semidefinite.

    Args:
        equation: gives n and the grid, and the density's scale.
        width: channels of the two hidden layers.
    """

    def __init__(self, equation: Equation, width: int = 64) -> None:
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
        """H, shape ``(batch,)``, of states of shape ``(batch, points)``."""
        density: Tensor = self.density(u[:, None])
        return self.equation.scale * self.equation.spacing * density.sum(dim=(1, 2))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """The slope, in the shape of ``u``, ``(batch, points)``; it does not depend on ``t``."""
        del t
        differentiated = torch.is_grad_enabled()
        # Without gradients u is a leaf of its own: it may claim to require one, as a view taken inside an
        # autograd.Function does, but leads nowhere.
        if not (differentiated and u.requires_grad):
            u = u.detach().requires_grad_()
        with torch.enable_grad():
            (per_point,) = torch.autograd.grad(self.energy(u).sum(), u, create_graph=differentiated)
        variation = per_point / self.equation.spacing
        left, right = variation.roll(1, dims=1), variation.roll(-1, dims=1)
        if self.equation.order == 1:
            return (right - left) / (2 * self.equation.spacing)
        return (right - 2 * variation + left) / self.equation.spacing**2


def learning_problem(
    equation: Equation,
    seed: int = 0,
    batch: int = 32,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    intervals: int = 1,
) -> Problem:
    """A new ``EnergyField`` is to take snapshots to later ones: the loss is the mean square of what it misses.

    Each of ``batch`` trajectories gives one of its first 25 snapshots as y0 and the one ``intervals`` after it as the
    target. All is drawn from ``seed``; torch's global generator stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    times = equation.interval * torch.arange(SNAPSHOTS + intervals, dtype=torch.float64)
    data = trajectories(equation, initial_states(equation, batch, generator), times).to(dtype)
    each, chosen = torch.arange(batch), torch.randint(SNAPSHOTS, (batch,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        field = EnergyField(equation, width).to(dtype)
    return Problem(
        field=field,
        y0=data[chosen, each],
        t=torch.tensor([0.0, intervals * equation.interval], dtype=dtype),
        loss=partial(_missed, data[chosen + intervals, each]),
        method="dopri8",
        rtol=1e-5,
        atol=1e-5,
        options={"first_step": equation.interval / 4},
    )


def _missed(target: Tensor, solution: State) -> Tensor:
    (u,) = as_tuple(solution)
    return (u[-1] - target.to(u)).square().mean()
