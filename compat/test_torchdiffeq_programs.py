"""Programs such as torchdiffeq's own examples, trained in each mode as by backpropagation through ``odeint``.

A program is whole: data, model, solves, loss and optimiser. What is compared is what a user sees: the losses of a
training, bit for bit at its first step, and the parameters that it ends with; then how
far the approximate mode is from them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import torchdiffeq
from outcomes import is_replayed
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdiffeq._impl import rk_common
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic import use

pytestmark = pytest.mark.usefixtures("double_precision")  # models and data are of the default type

Mode = dict[str, Any]
Agree = Callable[..., None]
Solve = Callable[..., Any]
STEPS = 4


class Program(nn.Module):
    """What is trained; ``odeint`` is the name that an example imports from torchdiffeq.

    Attributes:
        settings: arguments of the solves, as far as an instance is not given others.
        step_size: for methods on a fixed grid, small enough for the approximate mode.
        optimiser, rate: which learns, and how fast.
    """

    settings: ClassVar[Mode]
    step_size: ClassVar[float]
    optimiser: ClassVar[Callable[..., torch.optim.Optimizer]] = torch.optim.Adam
    rate: ClassVar[float] = 0.01

    def __init__(self, settings: Mode) -> None:
        super().__init__()
        self.solver = {**self.settings, **settings}

    def loss(self, odeint: Solve) -> Tensor:
        raise NotImplementedError


# A spiral: ode_demo.


@functools.cache
def spiral() -> tuple[Tensor, Tensor]:
    """Times and states of dy/dt = y^3 A."""
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    t = torch.linspace(0, 5, 100)
    return t, torchdiffeq.odeint(lambda t, y: y**3 @ matrix, torch.tensor([[2.0, 0.0]]), t, method="dopri5")


class Spiral(Program):
    """A network of y^3 learns dynamics from batches of short pieces of one trajectory."""

    settings: ClassVar[Mode] = {"method": "dopri5", "options": {"first_step": 0.05}}
    step_size = 0.025
    optimiser = torch.optim.RMSprop

    def __init__(self, settings: Mode) -> None:
        super().__init__(settings)
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.net(y**3)
        return result

    def loss(self, odeint: Solve) -> Tensor:
        t, path = spiral()
        starts, length = torch.randint(len(t) - 8, (10,)), 8
        pieces = torch.stack([path[starts + i] for i in range(length)])
        found: Tensor = odeint(self, path[starts], t[:length], **self.solver)
        return (found - pieces).abs().mean()


# Continuous normalizing flow: cnf.


class Flow(Program):
    """Density of two circles; the weights of the field are made from the time, its divergence is part of the state."""

    settings: ClassVar[Mode] = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-5, "options": {"first_step": 0.1}}
    step_size = 0.1
    rate = 0.03

    def __init__(self, settings: Mode) -> None:
        super().__init__(settings)
        self.hyper = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 7 * 6))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z = state[0]
        with torch.enable_grad():
            z.requires_grad_(True)
            inner, outer, gate, bias = self.hyper(t.reshape(1)).reshape(7, 6).split([2, 2, 2, 1])
            slope = torch.tanh(z @ inner + bias) @ (outer * torch.sigmoid(gate)).T
            rows = [torch.autograd.grad(slope[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
        return slope, -torch.stack(rows, 1).sum(1, keepdim=True)

    def loss(self, odeint: Solve) -> Tensor:
        angle, radius = 2 * math.pi * torch.rand(24), torch.tensor([1.0, 0.5]).repeat(12)
        points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(24, 2)
        t = torch.tensor([1.0, 0.0])
        base, change = (part[-1] for part in odeint(self, (points, torch.zeros(24, 1)), t, **self.solver))
        prior = MultivariateNormal(torch.zeros(2), 0.1 * torch.eye(2))
        return -(prior.log_prob(base) - change[:, 0]).mean()  # type: ignore[no-any-return]


# Events: bouncing_ball, learn_physics.


class BouncingBall(Program):
    """Thrown so that it bounces at given times and is at a given height after the last one.

    As in the example, the radius is in the state: what an event function uses gets its gradient through the state.
    The time of an event is found by bisection down to atol, which decides how much of it rounding may move.
    """

    settings: ClassVar[Mode] = {"rtol": 1e-6, "atol": 1e-12, "options": {"first_step": 0.05}}
    step_size = 0.02

    def __init__(self, settings: Mode, drag: float = 0.1) -> None:
        super().__init__(settings)
        self.position, self.velocity = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(0.5))
        self.gravity, self.log_radius = nn.Parameter(torch.tensor(9.8)), nn.Parameter(torch.tensor(-1.5))
        self.absorption, self.drag = nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(drag))

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        _, velocity, log_radius = state
        return velocity, -self.gravity - self.drag * velocity * velocity.abs(), torch.zeros_like(log_radius)

    def touching(self, t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        position, _, log_radius = state
        return position - log_radius.exp()

    def bounces(self, odeint: Solve, count: int) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Time of each bounce, and the state after it."""
        t, state = torch.tensor(0.0), (self.position, self.velocity, self.log_radius)
        for _ in range(count):
            t, states = torchdiffeq.odeint_event(
                self, state, t, event_fn=self.touching, odeint_interface=odeint, **self.solver
            )
            position, velocity, log_radius = (part[-1] for part in states)
            state = (position + 1e-7, -(1 - self.absorption) * velocity, log_radius)  # not to find this event again
            yield t, state

    def loss(self, odeint: Solve) -> Tensor:
        bounces = list(self.bounces(odeint, 3))
        t, state = bounces[-1]
        height = odeint(self, state, torch.stack([t, t + 0.2]), **self.solver)[0][-1]
        times = torch.stack([t for t, _ in bounces])
        return (times - torch.tensor([0.8, 1.9, 2.8])).square().sum() + (height - 1.0).square()  # type: ignore[no-any-return]


PROGRAMS: dict[str, type[Program]] = {
    "spiral": Spiral,
    "flow": Flow,
    "bouncing ball": BouncingBall,
}
each_program = pytest.mark.parametrize("program", PROGRAMS)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Losses, gradients of the first one, how far each parameter has moved, and whether this package was at work."""

    losses: list[float]
    gradients: list[Tensor | None]
    moved: list[Tensor]
    replayed: bool


def trained(program: str, odeint: Solve, steps: int = STEPS, **settings: Any) -> Trained:
    torch.manual_seed(1)
    model = PROGRAMS[program](settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimiser = model.optimiser(model.parameters(), lr=model.rate)
    losses: list[float] = []
    for step in range(steps):
        torch.manual_seed(100 + step)
        optimiser.zero_grad()
        loss = model.loss(odeint)
        loss.backward()
        if step == 0:
            replayed = is_replayed(loss)
            gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimiser.step()
        losses.append(float(loss.detach()))
    moved = [after.detach() - start for after, start in zip(model.parameters(), before, strict=True)]
    return Trained(losses, gradients, moved, replayed)


@functools.cache
def backpropagated(program: str) -> Trained:
    """The truth: plain ``odeint``. It also differentiates its own choice of the first step, which is held constant."""
    choose = rk_common._select_initial_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rk_common, "_select_initial_step", lambda *args, **kwargs: choose(*args, **kwargs).detach())
        return trained(program, torchdiffeq.odeint)


def in_mode(mode: Mode) -> Solve:
    return functools.partial(torchdiffeq.odeint_adjoint, **mode)


def relative_error(found: Trained, truth: Trained) -> float:
    """Of the whole gradient."""
    pairs = [(one, other) for one, other in zip(found.gradients, truth.gradients, strict=True) if other is not None]
    difference = torch.cat([(one - other).flatten() for one, other in pairs if one is not None])
    return float(difference.norm() / torch.cat([other.flatten() for _, other in pairs]).norm())


@pytest.mark.parametrize("chosen", ["by argument", "by use"])
@each_program
def test_trained_as_by_backpropagation(program: str, chosen: str, mode: Mode, assert_agree: Agree) -> None:
    truth = backpropagated(program)
    assert not truth.replayed
    if chosen == "by argument":
        found = trained(program, in_mode(mode))
    else:
        with use(mode["adjoint_method"], **mode.get("adjoint_options", {})):
            found = trained(program, torchdiffeq.odeint)
    assert found.replayed
    assert found.losses[0] == truth.losses[0]
    assert len(set(truth.losses)) == STEPS
    assert_agree(found.gradients, truth.gradients)
    # Parameters that differ by rounding move the accepted steps and the times of events: 2e-11 is the largest seen.
    assert found.losses == pytest.approx(truth.losses, rel=1e-9)
    assert_agree(found.moved, truth.moved, 1e-9)


@pytest.mark.parametrize("method", ["euler", pytest.param("heun2", marks=pytest.mark.slow)])
@each_program
def test_memory_free_trains_as_backpropagation(program: str, method: str) -> None:
    if method not in SOLVERS:
        pytest.skip(f"this torchdiffeq has no {method}")
    settings = {"method": method, "options": {"step_size": PROGRAMS[program].step_size}}
    found = trained(program, in_mode({"adjoint_method": "memory_free"}), 3, **settings)
    truth = trained(program, torchdiffeq.odeint, 3, **settings)
    assert found.replayed
    assert found.losses[0] == truth.losses[0]
    assert relative_error(found, truth) < 1e-7
