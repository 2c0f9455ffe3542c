"""memory_free: each step is taken back, and what that leaves is corrected, reported and judged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    METHODS,
    OF_TORCHDYN,
    Net,
    count,
    error,
    initial,
    loss_of,
    needs_torchdyn,
    neural_ode,
    solve,
    times,
)
from torch import Tensor, nn

from torchdiffeq_symplectic import ReplayError, ReplayWarning, UnsupportedSolverError
from torchdiffeq_symplectic.experiments.memory import live_bytes, peak_bytes

STEPS = {"options": {"step_size": 0.05}}
FIXED = {method: dict(STEPS) for method in ("euler", "midpoint", "rk4", "heun2", "heun3")}
ADAPTIVE: dict[str, Any] = {
    method: {"rtol": 1e-6, "atol": 1e-8, "options": {"first_step": 0.05}} for method in ("dopri5", "bosh3", "dopri8")
}
SETTINGS = {**FIXED, **ADAPTIVE}
STALE = "torchdyn-stale-heun"  # the slope that it starts from is lost
TORCHDYN = [name for name in OF_TORCHDYN if METHODS[name].stages and "()" not in name and name != STALE]


def gradient(mode: str, method: str, field: nn.Module, t: Tensor, **settings: Any) -> list[Tensor]:
    y0 = initial()
    return list(torch.autograd.grad(loss_of(solve(mode, field, y0, t, method, **settings)), [y0, *field.parameters()]))


def backpropagated(method: str, field: nn.Module, t: Tensor, **settings: Any) -> list[Tensor]:
    y0 = initial()
    found = solve(BACKPROPAGATION, field, y0, t, method, **settings)
    return list(torch.autograd.grad(loss_of(found), [y0, *field.parameters()]))


@pytest.mark.parametrize("direction", ["increasing", "decreasing"])
@pytest.mark.parametrize("method", [*SETTINGS, *TORCHDYN])
def test_corrected_steps_give_backpropagations_gradient(method: str, direction: str) -> None:
    field, t = Net(), times(0.0, 1.0) if method in SETTINGS else torch.linspace(0, 1, 25, dtype=DOUBLE)
    t = t if direction == "increasing" else t.flip(0)
    found = gradient("memory_free", method, field, t, **SETTINGS.get(method, {}))
    assert error(found, backpropagated(method, field, t, **SETTINGS.get(method, {}))) < 1e-9


@needs_torchdyn
def test_the_integral_of_a_running_cost_is_added() -> None:
    """Its value is no part of the state that is recovered."""
    t, reports = torch.linspace(0, 1, 41, dtype=DOUBLE), list[float]()
    found = []
    for mode in ("memory_free", "symplectic"):
        x, field = initial(), Net()
        model = neural_ode(mode, field, solver="euler", integral_loss=lambda t, x: x.square().mean(-1))
        if mode == "memory_free":
            model.adjoint_options = {"report": reports.append}
        loss = loss_of(model(x, t, save_at=t[[0, 20, 40]])[1])
        found.append(torch.autograd.grad(loss, [x, *field.parameters()]))
    assert error(*found) < 1e-9
    assert 0 < reports[0] < 1e-9


@needs_torchdyn
@pytest.mark.parametrize("method", ["torchdyn-hyper-euler", "torchdyn-projecting", STALE])
def test_a_step_that_cannot_be_taken_back_is_refused_or_shows_in_the_reconstruction(method: str) -> None:
    field, t, reports = Net(), torch.linspace(0, 1, 9, dtype=DOUBLE), list[float]()
    solver: Any = METHODS[method].solver(DOUBLE, 6)
    settings = {"solver": solver, "adjoint_options": {"report": reports.append, "replay_check": "ignore"}}
    if not METHODS[method].adaptive:
        settings["call"] = {"save_at": t[-1:]}
    try:
        found = gradient("memory_free", method, field, t, **settings)
    except (NotImplementedError, ValueError):
        return
    call = {"call": settings["call"]} if "call" in settings else {}
    truth = backpropagated(method, field, t, solver=solver, **call)
    assert error(found, truth) <= 5.5 * max(reports[0], 1e-12)


def paper(field: nn.Module, y0: Tensor, size: float, steps: int) -> list[Tensor]:
    """Euler's method and its adjoint at y~_n = y~_n+1 - h f(t_n, y~_n+1), and at y_0."""
    with torch.no_grad():
        y, clock = y0, [torch.tensor(n * size, dtype=DOUBLE) for n in range(steps)]
        for t in clock:
            y = y + size * field(t, y)
    after = y.requires_grad_()
    (cotangent,) = torch.autograd.grad(loss_of(torch.stack([y0.detach(), after])), after)
    totals = [torch.zeros_like(parameter) for parameter in field.parameters()]
    for n, t in reversed(list(enumerate(clock))):
        with torch.no_grad():
            before = y0.detach() if n == 0 else after - size * field(t, after)
        before.requires_grad_()
        parts = torch.autograd.grad(before + size * field(t, before), [before, *field.parameters()], cotangent)
        cotangent, own = parts[0], parts[1:]
        totals = [total + part for total, part in zip(totals, own, strict=True)]
        after = before.detach()
    return [cotangent, *totals]


def test_without_corrections_it_is_the_papers_recursion() -> None:
    """Sander, Ablin, Peyre, NeurIPS 2022: https://arxiv.org/abs/2205.14612."""
    field, y0 = Net(), initial()
    expected = paper(field, y0.detach(), 0.125, 8)
    solution = solve(
        "memory_free",
        field,
        y0,
        times(0.0, 1.0),
        "euler",
        options={"step_size": 0.125},
        adjoint_options={"corrections": 0},
    )
    found = torch.autograd.grad(loss_of(solution), [y0, *field.parameters()])
    first = torch.autograd.grad(loss_of(torch.stack([y0, solution[-1].detach()])), y0)[0]
    assert error([found[0] - first, *found[1:]], expected) < 1e-11
    assert error(found, backpropagated("euler", field, times(0.0, 1.0), options={"step_size": 0.125})) > 1e-4


class Contracting(nn.Module):
    """Forgets where it came from: no step back finds the way."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -30 * (y - 1)


def contracted(**adjoint_options: Any) -> Tensor:
    y0 = initial()
    loss: Tensor = solve(
        "memory_free",
        Contracting(),
        y0,
        times(0.0, 2.0),
        "rk4",
        options={"step_size": 0.02},
        adjoint_options=adjoint_options,
    )[-1].sum()
    return loss


def test_a_state_that_is_not_recovered_is_warned_of() -> None:
    loss = contracted()
    with pytest.warns(ReplayWarning, match="did not recover the initial state"):
        loss.backward()


def test_a_tolerance_makes_it_an_error() -> None:
    loss = contracted(tolerance=1e-3)
    with pytest.raises(ReplayError, match="did not recover the initial state"):
        loss.backward()


def test_a_state_that_is_not_finite_stops_the_steps_back() -> None:
    """Steps back from what a contraction left lead to where the field has a pole."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y.abs() > 5, torch.inf, -30 * (y - torch.sin(t)))

    loss = solve(
        "memory_free", field, initial(), times(0.0, 4.0), "rk4", options={"step_size": 0.02}, adjoint_params=()
    )[-1].sum()
    with pytest.raises(ReplayError, match="not finite"):
        loss.backward()


def test_the_warning_can_be_switched_off() -> None:
    contracted(replay_check="ignore").backward()


def test_a_tolerance_that_is_met_says_nothing() -> None:
    field = Net()
    gradient("memory_free", "rk4", field, times(0.0, 1.0), **STEPS, adjoint_options={"tolerance": 1e-9})


def test_the_report_is_of_the_reconstruction_error_and_the_largest_residual(capsys: pytest.CaptureFixture[str]) -> None:
    errors: list[float] = []
    for report in (errors.append, True):
        gradient(
            "memory_free",
            "euler",
            Net(),
            times(0.0, 1.0),
            **STEPS,
            adjoint_options={"report": report, "corrections": 0},
        )
    (found,) = errors
    field, y0 = Net(), initial().detach()
    clock = [torch.tensor(0.05 * n, dtype=DOUBLE) for n in range(20)]
    residuals = []
    with torch.no_grad():
        y = y0
        for t in clock:
            y = y + 0.05 * field(t, y)
        for t in reversed(clock):
            after, y = y, y - 0.05 * field(t, y)
            if t > 0:  # the initial state is kept
                residuals.append(float((y + 0.05 * field(t, y) - after).abs().max() / after.abs().max()))
    assert found == pytest.approx(float((y - y0).norm() / y0.norm()), rel=1e-6)
    printed = capsys.readouterr().err
    assert f"reconstruction error {found:.3g}" in printed
    assert f"largest residual {max(residuals):.3g}" in printed


@pytest.mark.parametrize("method", ["adaptive_heun", "fehlberg2", "explicit_adams", "implicit_adams", "fixed_adams"])
def test_steps_that_start_from_earlier_slopes_are_refused_before_the_solve(method: str) -> None:
    field = Net()
    with pytest.raises(UnsupportedSolverError, match=r'adjoint_method="memory_free".*"symplectic"'):
        solve("memory_free", field, initial(), times(), method)
    assert field.evaluations == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [({"tolerance": -1.0}, "tolerance"), ({"corrections": 1.5}, "corrections"), ({"report": "yes"}, "report")],
)
def test_wrong_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf'adjoint_options\["{name}"\]'):
        solve("memory_free", Net(), initial(), times(), "rk4", adjoint_options=options)


def test_evaluations_without_corrections() -> None:
    """A step of four stages is taken back, then replayed: its last evaluation serves both."""
    field, steps, solutions = Net(), 10, []
    options = {"options": {"step_size": 0.1}, "adjoint_options": {"corrections": 0}}
    count(field, lambda: solutions.append(solve("memory_free", field, initial(), times(0.0, 1.0), "rk4", **options)))
    assert count(field, lambda: loss_of(solutions[0]).backward()) == (4 + 7) * steps


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(-1, 0.5, 64))

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return y * self.rate


@pytest.mark.parametrize("method", ["euler", pytest.param("torchdyn-euler", marks=needs_torchdyn)])
def test_memory_does_not_grow_with_the_number_of_steps(method: str) -> None:
    field, y0 = Tied(), torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run(steps: int) -> Tensor:
        if method == "euler":
            t: Tensor = times(0.0, 1.0).float()
            settings: dict[str, Any] = {"options": {"step_size": 1 / steps}}
        else:
            t = torch.linspace(0, 1, steps + 1)
            settings = {"call": {"save_at": t[[0, -1]]}}
        solution: Tensor = solve("memory_free", field, y0, t, method, **settings)
        return solution

    run(5)[-1].sum().backward()
    kept = [live_bytes(lambda steps=steps: run(steps), "cpu") for steps in (5, 30)]  # type: ignore[misc]
    peak = [peak_bytes(lambda steps=steps: run(steps)[-1].sum().backward(), "cpu") for steps in (5, 30)]  # type: ignore[misc]
    assert kept[1] < 1.05 * kept[0]
    assert peak[1] < 1.05 * peak[0]
