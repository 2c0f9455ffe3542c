"""What a gradient costs in torchdyn: counted evaluations of the field, and counted bytes."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import BACKPROPAGATION, METHODS, MODES, neural_ode, problem_for
from torch import Tensor, nn
from torchdyn.numerics.solvers.hyper import HyperEuler
from torchdyn.numerics.solvers.ode import DormandPrince45, str_to_solver
from torchdyn_runs import TOLERANCES, accepted, returned, steps_recorded

from torchdiffeq_symplectic.experiments.memory import live_bytes, peak_bytes

each_mode = pytest.mark.parametrize("mode", MODES)
STATE = torch.linspace(-1, 1, 128 * 32).reshape(128, 32)


class Counting(nn.Module):
    """A field that counts its evaluations, with more memory in its graph than in its state."""

    def __init__(self, width: int = 128, inputs: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, inputs), nn.Tanh())
        self.evaluations = 0

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        self.evaluations += 1
        slope: Tensor = self.net(x) * torch.cos(3 * t)
        return slope


# Evaluations of one step: in the solve, where the first slope may come from the step before; and in backward, where a
# symplectic step computes all slopes but the last again before it pulls back each one.
KNOWN = ["euler", "midpoint", "rk4", "dopri5", "tsit5", "bogacki-shampine", "uneven", "hyper-euler", "alf"]
NAMES = [f"torchdyn-{name}" for name in KNOWN]


@pytest.mark.parametrize("method", NAMES)
@each_mode
def test_evaluations(mode: str, method: str) -> None:
    """Backward evaluates as often as the accepted steps did, and in "symplectic" about twice."""
    problem = problem_for(method, dtype=torch.float32, time_grad=False)
    field = problem.field = Counting(5, 3)
    solver = problem.settings.get("solver") or str_to_solver(METHODS[method].solver, torch.float32)
    problem.settings["solver"] = solver
    with steps_recorded(solver) as calls:
        returned(problem, BACKPROPAGATION, method)
    steps = len(accepted(calls))
    upstream, field.evaluations = field.evaluations, 0
    solution = returned(problem, mode, method)[1]
    assert field.evaluations == upstream, "the solve itself evaluates as often as torchdyn"
    field.evaluations = 0
    solution.square().sum().backward()
    stages = METHODS[method].stages or {"torchdyn-hyper-euler": 1, "torchdyn-alf": 2}[method]
    if METHODS[method].adaptive:
        # The slope that a step starts from is that at its state: handed over, or evaluated again where it is not kept.
        assert stages * steps <= field.evaluations <= 2 * (stages + 1) * steps
        assert mode == "symplectic" or field.evaluations <= stages * steps + 1
    elif method == "torchdyn-alf":  # the first of its two evaluations leads nowhere
        assert field.evaluations == (1 if mode == "stages" else stages) * steps
    else:
        assert field.evaluations == (2 * stages - 1 if mode == "symplectic" else stages) * steps


@each_mode
def test_evaluations_do_not_depend_on_the_number_of_parameters(mode: str) -> None:
    counts = []
    for width in (8, 128):
        field = Counting(width)
        neural_ode(mode, field, solver="rk4")(STATE, torch.linspace(0, 1, 7))[1].sum().backward()
        counts.append(field.evaluations)
    assert counts[0] == counts[1]


# Bytes.


def kept(mode: str, solver: str, steps: int) -> int:
    """Bytes that a solution with its gradient keeps alive, less those of the outputs."""
    model = neural_ode(mode, Counting(), solver=solver)
    span = torch.linspace(0, 1, steps + 1)

    def run() -> Any:
        return model(STATE, span, save_at=span[[0, -1]]) if solver == "rk4" else model(STATE, span)

    run()
    return live_bytes(run, "cpu") - int(run()[1].nbytes)


@pytest.mark.parametrize(
    ("mode", "solver", "states"),
    [
        ("symplectic", "rk4", 1),
        ("aca", "rk4", 1),
        ("stages", "rk4", 5),
        ("baseline", "rk4", 0),
        ("symplectic", "dopri5", 2),
    ],
)
def test_states_that_are_kept_for_each_step(mode: str, solver: str, states: int) -> None:
    """Beside the outputs. An adaptive step starts from a slope that differs from the field's by rounding."""
    few, many = (kept(mode, solver, steps) for steps in (10, 30))
    state = STATE.nbytes
    assert 20 * states * state <= many - few <= 20 * (states + 0.05) * state


def peak(mode: str, solver: Any, steps: int, *, trajectory: bool = False) -> int:
    """Of the last state alone by a call, of all by a trajectory."""
    model, x = neural_ode(mode, Counting(), solver=solver), STATE.clone().requires_grad_()
    span = torch.linspace(0, 1, steps + 1)

    def run() -> None:
        solution = model.trajectory(x, span) if trajectory else model(x, span, save_at=span[-1:])[1]
        torch.autograd.grad(solution[-1].sum(), [x, *model.vf.parameters()], allow_unused=True)

    run()
    return peak_bytes(run, "cpu")


@pytest.mark.parametrize("trajectory", [False, True], ids=["forward", "trajectory"])
def test_peak_is_a_fraction_of_that_of_autograd(trajectory: bool) -> None:
    assert (
        peak("symplectic", "rk4", 12, trajectory=trajectory)
        < peak(BACKPROPAGATION, "rk4", 12, trajectory=trajectory) / 3
    )


def test_a_hypersolver_takes_one_state_a_step_and_the_graph_of_one_evaluation() -> None:
    """And what its own network leaves in the graph of the step."""
    hypernet = Counting()
    few, many = (peak("symplectic", HyperEuler(hypernet), steps) for steps in (10, 30))
    assert many - few <= 1.05 * 20 * STATE.nbytes
    activations = 6 * STATE.nbytes  # of a hidden layer that is four states wide, of an output and of its derivative
    assert few <= peak("symplectic", "euler", 10) + 1.05 * activations


@each_mode
def test_nothing_is_left_but_the_gradients(mode: str) -> None:
    model, x = neural_ode(mode, Counting(), solver="dopri5"), STATE.clone().requires_grad_()
    wanted = [x, *model.vf.parameters()]

    def run() -> Any:
        return torch.autograd.grad(model(x, torch.linspace(0, 1, 6))[1].sum(), wanted)

    run()
    gc.collect()
    assert live_bytes(run, "cpu") == sum(tensor.nbytes for tensor in wanted)


class Jumping(Counting):
    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        return super().forward(t, x) * (1 + 40 * (t > 0.5))


def test_rejected_steps_keep_nothing_alive() -> None:
    solver = DormandPrince45()
    model = neural_ode("symplectic", Jumping(), solver=solver, **TOLERANCES)
    with steps_recorded(solver) as calls:
        model(STATE, torch.tensor([0.0, 1.0]))
    attempts = len(calls)
    taken = len(list(itertools.groupby(calls, lambda call: id(call.x))))
    assert attempts > taken
    # States and slopes handed on, the two outputs, and small change.
    assert live_bytes(lambda: model(STATE, torch.tensor([0.0, 1.0])), "cpu") <= (2 * taken + 3) * STATE.nbytes
