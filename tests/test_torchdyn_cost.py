"""What a gradient costs in torchdyn: counted evaluations of the field, and counted bytes."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchdyn")

from torchdiffeq_symplectic.tableau import Tableau, measure
from torchdyn.core import NeuralODE
from torchdyn.numerics.solvers.ode import DormandPrince45, RungeKutta4, Tsitouras45
from torchdyn_cases import MODES, each_mode

from torchdiffeq_symplectic.experiments.memory import live_bytes, peak_bytes
from torchdiffeq_symplectic.hosts.torchdyn import _measuring

SOLVERS: dict[str, Any] = {"rk4": RungeKutta4, "dopri5": DormandPrince45, "tsit5": Tsitouras45}
STAGES = {"rk4": 4, "dopri5": 6, "tsit5": 6}
each_solver = pytest.mark.parametrize("solver", SOLVERS)
STATE = torch.linspace(-1, 1, 128 * 32).reshape(128, 32)


class Counting(nn.Module):
    """A field that counts its evaluations, with more memory in its graph than in its state."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 32), nn.Tanh())
        self.evaluations = 0

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        self.evaluations += 1
        slope: Tensor = self.net(x) * torch.cos(3 * t)
        return slope


def counted(solver: str) -> tuple[Any, list[Tensor]]:
    """A solver, and the states that it starts a step from, each attempt."""
    starts: list[Tensor] = []

    base: Any = SOLVERS[solver]

    class Watched(base):  # type: ignore[misc]
        def step(self, f: Any, x: Tensor, t: Tensor, dt: Tensor, k1: Any = None, args: Any = None) -> Any:
            if not torch.is_grad_enabled() and x.dim() == 2 and len(x) == len(STATE):
                starts.append(x)
            return super().step(f, x, t, dt, k1=k1, args=args)

    return Watched(STATE.dtype), starts


def model_of(mode: str, field: nn.Module, solver: Any) -> NeuralODE:
    settings = dict(MODES.get(mode, {"sensitivity": mode}))
    options = settings.pop("adjoint_options", None)
    model = NeuralODE(field, solver=solver, **settings)
    model.adjoint_options = options
    return model


def times(steps: int) -> Tensor:
    return torch.linspace(0, 1, steps + 1)


@each_solver
@each_mode
def test_evaluations(mode: str, solver: str) -> None:
    field = Counting()
    watched, starts = counted(solver)
    upstream = model_of("autograd", field, SOLVERS[solver](STATE.dtype))
    upstream(STATE, times(7))
    forward, field.evaluations = field.evaluations, 0
    model = model_of(mode, field, watched)
    _, solution = model(STATE.clone().requires_grad_(), times(7))
    assert field.evaluations == forward
    steps = len({id(x) for x in starts})
    assert steps >= 7
    field.evaluations = 0
    solution.square().sum().backward()
    each = 2 * STAGES[solver] - 1 if mode == "symplectic" else STAGES[solver]
    assert field.evaluations == each * steps


@each_mode
def test_evaluations_do_not_depend_on_the_number_of_parameters(mode: str) -> None:
    counts = []
    for width in (8, 128):
        field = Counting(width)
        _, solution = model_of(mode, field, "rk4")(STATE, times(6))
        solution.sum().backward()
        counts.append(field.evaluations)
    assert counts[0] == counts[1]


def kept(mode: str, solver: str, steps: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a solution with its gradient keeps alive, less those of the outputs."""
    field = Counting().to(dtype)
    x = STATE.to(dtype)
    instance = SOLVERS[solver](dtype)
    model = model_of(mode, field, instance)
    span = times(steps).to(dtype)

    def run() -> Any:
        return model(x, span, save_at=span[[0, -1]]) if solver == "rk4" else model(x, span)

    run()
    outputs = run()[1]
    return live_bytes(run, "cpu") - int(outputs.numel() * outputs.element_size())


@pytest.mark.parametrize(
    ("solver", "dtype", "states"),
    [
        ("rk4", torch.float32, 1),
        ("rk4", torch.float64, 1),
        ("dopri5", torch.float32, 1),
        ("tsit5", torch.float32, 1),
    ],
)
def test_one_state_is_kept_for_each_step(solver: str, dtype: torch.dtype, states: int) -> None:
    few, many = (kept("symplectic", solver, steps, dtype) for steps in (20, 60))
    state = STATE.numel() * dtype.itemsize
    assert 40 * states * state <= many - few <= 1.05 * 40 * states * state


def test_stages_keep_the_slopes_besides() -> None:
    few, many = (kept("symplectic-stages", "rk4", steps) for steps in (20, 60))
    state = STATE.numel() * STATE.element_size()
    assert 40 * 5 * state <= many - few <= 1.05 * 40 * 5 * state


def peak(mode: str, steps: int, trajectory: bool = False) -> int:
    model = model_of(mode, Counting(), "rk4")
    x = STATE.clone().requires_grad_()
    span = times(steps)

    def run() -> None:
        solution = model.trajectory(x, span) if trajectory else model(x, span)[1]
        torch.autograd.grad(solution[-1].sum(), [x, *model.vf.parameters()], allow_unused=True)

    run()
    return peak_bytes(run, "cpu")


@pytest.mark.parametrize("trajectory", [False, True], ids=["forward", "trajectory"])
@pytest.mark.parametrize("mode", ["symplectic", "aca"])
def test_peak_is_a_fraction_of_that_of_autograd(mode: str, trajectory: bool) -> None:
    assert peak(mode, 40, trajectory) < peak("autograd", 40) / 4


@each_mode
def test_nothing_is_left_but_the_gradients(mode: str) -> None:
    model = model_of(mode, Counting(), "dopri5")
    x = STATE.clone().requires_grad_()
    wanted = [x, *(parameter for parameter in model.vf.parameters())]

    def run() -> Any:
        solution = model(x, times(5))[1]
        return torch.autograd.grad(solution.sum(), wanted)

    run()
    gc.collect()
    assert live_bytes(run, "cpu") == sum(tensor.numel() * tensor.element_size() for tensor in wanted)


def test_rejected_steps_keep_nothing_alive() -> None:
    class Jumping(Counting):
        def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
            return super().forward(t, x) * (1 + 40 * (t > 0.5))

    watched, starts = counted("dopri5")
    model = model_of("symplectic", Jumping(), watched)
    model.atol = model.rtol = 1e-5

    def run() -> Any:
        starts.clear()
        result = model(STATE, torch.tensor([0.0, 1.0]))
        attempts = len(starts)
        accepted = len(list(itertools.groupby(starts, id)))
        starts[:] = []
        return result, attempts, accepted

    _, attempts, accepted = run()
    assert attempts > accepted
    state = STATE.numel() * STATE.element_size()
    # The states, the two outputs, and small change.
    assert live_bytes(run, "cpu") <= (accepted + 2 + 1) * state


def solve_by(solver: Any, field: nn.Module) -> None:
    model_of("symplectic", field, solver)(STATE.clone().requires_grad_(), torch.linspace(0, 1, 5))


def test_a_solver_is_measured_once_for_all_that_are_equal_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchdyn makes a new one for each model that is given a name, and at each call of its functional ``odeint``."""
    measured = 0

    def counting(*arguments: Any) -> Tableau:
        nonlocal measured
        measured += 1
        return measure(*arguments)

    monkeypatch.setattr(_measuring, "measure", counting)
    monkeypatch.setattr(_measuring, "_equal", {})
    field = Counting()
    solve_by("rk4", field)
    first = measured
    assert first > 0
    solve_by("rk4", field)
    solve_by(RungeKutta4(), field)
    assert measured == first

    class Other(RungeKutta4):  # type: ignore[misc]
        pass

    solve_by(Other(), field)
    assert measured == 2 * first
    changed = RungeKutta4()
    nodes, coefficients, weights, error = changed.tableau
    changed.tableau = (nodes, coefficients, weights.roll(1), error)
    solve_by(changed, field)
    assert measured == 3 * first
    trained = RungeKutta4()
    trained.unknown = object()  # a step may depend on it
    solve_by(trained, field)
    assert measured == 4 * first
    solve_by(Other(), field)  # a class of one's own may depend on more than its instances hold
    assert measured == 5 * first
