"""What a gradient costs: field evaluations, counted exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    BACKPROPAGATION,
    HAS_TORCHDYN,
    METHODS,
    OF_TORCHDYN,
    Net,
    count,
    each_mode,
    initial,
    loss_of,
    needs_torchdyn,
    over,
    problem_for,
    solve,
    times,
)
from torch import Tensor

# Own stages of a step, where a stage that is the next step's first one counts once.
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
FIXED = {name: stages for name, stages in FIXED.items() if name in METHODS}
ADAPTIVE = {"dopri5": 6, "dopri8": 13, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 1}
# Those whose last slope is the field at the new state, so that it is evaluated again instead of kept.


def backward_evaluations(mode: str, stages: int, steps: int) -> int:
    """Each stage once; in symplectic all but the last of a step once more, to have the slopes."""
    return (2 * stages - 1) * steps if mode == "symplectic" else stages * steps


class Counting(Net):
    """Counts the accepted steps as well; the field changes quickly at one time, so that steps are rejected there."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted = self.rejected = 0

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return super().forward(t, y) * (1 + 3 * torch.exp(-300 * (t - 0.6) ** 2))

    def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.rejected += 1


SHARP: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4, "options": {"first_step": 0.5}}


def evaluations(mode: str, field: Net, t: Tensor, method: str, **settings: Any) -> tuple[int, int]:
    """Those of the solve, those of backward."""
    solutions: list[Tensor] = []
    y0 = initial()
    forward = count(field, lambda: solutions.append(solve(mode, field, y0, t, method, **settings)))
    return forward, count(field, lambda: loss_of(solutions[0]).backward())


@pytest.mark.whole
@over(FIXED)
def test_fixed_grids(mode: str, method: str) -> None:
    field, t, steps = Net(), times(0.0, 0.13, 0.17, 1.0), 10
    options = {"step_size": 0.1}
    forward, backward = evaluations(mode, field, t, method, options=options)
    assert forward == FIXED[method] * steps
    assert forward == count(field, lambda: solve(BACKPROPAGATION, field, initial(), t, method, options=options))
    assert backward == backward_evaluations(mode, FIXED[method], steps)


@over(FIXED)
def test_each_output_of_cubic_interpolation_evaluates_its_slope_once(mode: str, method: str) -> None:
    """A step with outputs inside has one stage more, however many they are."""
    field, t, steps = Net(), times(0.0, 0.13, 0.17, 0.42, 0.95, 0.97), 10
    options = {"step_size": 0.1, "interp": "cubic"}
    forward, backward = evaluations(mode, field, t, method, options=options)
    assert forward == count(field, lambda: solve(BACKPROPAGATION, field, initial(), t, method, options=options))
    stages, outputs = FIXED[method], 5
    most = backward_evaluations(mode, stages, steps) + outputs * (2 if mode == "symplectic" else 1)
    assert backward_evaluations(mode, stages, steps) < backward <= most


@pytest.mark.whole
@over(ADAPTIVE)
def test_adaptive_steps(mode: str, method: str) -> None:
    field, t, stages = Counting(), times(0.0, 0.2, 0.21, 0.22, 0.9, 1.0), ADAPTIVE[method]
    forward, backward = evaluations(mode, field, t, method, **SHARP)
    steps, rejected = field.accepted, field.rejected
    assert steps > 1
    assert rejected > 0
    assert forward == 1 + stages * (steps + rejected)
    assert forward == count(field, lambda: solve(BACKPROPAGATION, field, initial(), t, method, **SHARP))
    # One slope more than those of the steps: the first step's first one, or the last step's last one.
    most = backward_evaluations(mode, stages, steps - 1) + backward_evaluations(mode, stages + 1, 1)
    assert most - 1 <= backward <= most


TORCHDYN = [name for name in OF_TORCHDYN if METHODS[name].stages and "()" not in name]
# Of the others, what a step evaluates; the first of alf's two evaluations leads nowhere.
TORCHDYN_STAGES = {name: METHODS[name].stages for name in TORCHDYN} | {"torchdyn-hyper-euler": 1, "torchdyn-alf": 2}


@needs_torchdyn
@over(TORCHDYN_STAGES if HAS_TORCHDYN else ())
def test_torchdyns_steps(mode: str, method: str) -> None:
    """Backward evaluates as often as the accepted steps did, and in "symplectic" about twice."""
    from torchdyn.numerics.solvers.ode import str_to_solver
    from torchdyn_runs import accepted, returned, steps_recorded

    problem, stages = problem_for(method, time_grad=False), TORCHDYN_STAGES[method]
    net = problem.field = Net()
    solver = problem.settings.get("solver") or str_to_solver(METHODS[method].solver, torch.float64)
    problem.settings["solver"] = solver
    with steps_recorded(solver) as calls:
        forward = count(net, lambda: returned(problem, BACKPROPAGATION, method))
    steps, solutions = len(accepted(calls)), list[Tensor]()
    assert count(net, lambda: solutions.append(returned(problem, mode, method)[1])) == forward
    backward = count(net, lambda: loss_of(solutions[0]).backward())
    if METHODS[method].adaptive:
        # The slope that a step starts from is that at its state: handed over, or evaluated again where it is not kept.
        assert stages * steps <= backward <= 2 * (stages + 1) * steps
        assert mode == "symplectic" or backward <= stages * steps + 1
    elif method == "torchdyn-alf":
        assert backward == (1 if mode == "stages" else stages) * steps
    else:
        assert backward == backward_evaluations(mode, stages, steps)


@each_mode
def test_backward_does_not_cost_more_for_more_outputs(mode: str) -> None:
    found = set()
    for outputs in (2, 20, 200):
        t = torch.linspace(0, 1, outputs, dtype=torch.float64)
        found.add(evaluations(mode, Counting(), t, "dopri5", **SHARP)[1])
    assert len(found) == 1


@each_mode
def test_a_second_backward_costs_the_same(mode: str) -> None:
    field = Net()
    loss = loss_of(solve(mode, field, initial(), times(0.0, 1.0), options={"step_size": 0.25}))
    first = count(field, lambda: loss.backward(retain_graph=True))
    assert first == backward_evaluations(mode, 4, 4)
    assert count(field, loss.backward) == first


@pytest.mark.parametrize("wanted", ["y0", "parameters", "t"])
@each_mode
def test_fewer_inputs_do_not_cost_more(mode: str, wanted: str) -> None:
    field = Net().requires_grad_(wanted == "parameters")
    y0, t = initial().detach().requires_grad_(wanted == "y0"), times(0.0, 1.0).requires_grad_(wanted == "t")
    loss = loss_of(solve(mode, field, y0, t, options={"step_size": 0.25}))
    # Times move the general step, whose last evaluation is cut as the others are.
    assert count(field, loss.backward) <= backward_evaluations(mode, 4, 4) + 4 * (
        wanted == "t" and mode == "symplectic"
    )


@each_mode
def test_one_output_time_costs_nothing(mode: str) -> None:
    field, y0 = Net(), initial()
    loss_of(solve(mode, field, y0, times(0.3), options={"step_size": None})).backward()
    assert field.evaluations == 0
    assert y0.grad is not None
