"""The memory-free adjoint computes what the paper's recursion computes, and says when that is not to be trusted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from old_harness import Net, error, initial, loss_of, times
from residual_blocks import HEUN, needs_heun
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

from torchdiffeq_symplectic import MODES, ReplayError, ReplayWarning, odeint_adjoint
from torchdiffeq_symplectic.experiments.memory import live_bytes, peak_bytes

STAGES = {"euler": 1, "heun2": 2}
each_method = pytest.mark.parametrize("method", ["euler", HEUN])
ENDS = torch.tensor([0.0, 1.0], dtype=torch.float64)


def solve(func: Any, y0: Any, t: Tensor, steps: int, method: str, mode: str = "memory_free", **arguments: Any) -> Any:
    """The solution in ``steps`` equal steps a unit of time, but for what ``options`` says."""
    options = {"step_size": 1 / steps, **arguments.pop("options", {})}
    return odeint_adjoint(func, y0, t, method=method, options=options, adjoint_method=mode, **arguments)


def differentiated(wanted: Sequence[Tensor], *arguments: Any, **settings: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss_of(solve(*arguments, **settings)), wanted))


# The paper's recursion, written out: a truth that shares no code with the package.


def euler_step(field: Callable[..., Tensor], t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return y + h * field(t, y)


def euler_back(field: Callable[..., Tensor], t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return y - h * field(t, y)


def heun_step(field: Callable[..., Tensor], t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    first = field(t, y)
    return y + h / 2 * (first + field(t + h, y + h * first))


def heun_back(field: Callable[..., Tensor], t: Tensor, h: Tensor, y: Tensor) -> Tensor:
    first = field(t + h, y)
    return y - h / 2 * (first + field(t, y - h * first))


STEPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "euler": (euler_step, euler_back),
    "heun2": (heun_step, heun_back),
}


def paper(field: nn.Module, y0: Tensor, grid: Tensor, held: Sequence[int], method: str) -> list[Tensor]:
    """The gradients of `loss_of` the states ``held`` in y0 and the parameters, all other states recovered."""
    forth, back = STEPS[method]
    states = [y0.detach()]
    for t, end in itertools.pairwise(grid):
        states.append(forth(field, t, end - t, states[-1]).detach())
    solution = torch.stack([states[n] for n in held]).requires_grad_()
    rows = dict(zip(held, torch.autograd.grad(loss_of(solution), solution)[0], strict=True))
    parameters = list(field.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    state, cotangent = states[-1], rows[len(grid) - 1]
    for n in reversed(range(len(grid) - 1)):
        size = grid[n + 1] - grid[n]
        state = states[n] if n in held else back(field, grid[n], size, state).detach()
        state = state.requires_grad_()
        products = torch.autograd.grad(forth(field, grid[n], size, state), [state, *parameters], cotangent)
        cotangent = products[0] + rows.get(n, torch.zeros_like(products[0]))
        totals = [total + product for total, product in zip(totals, products[1:], strict=True)]
    return [cotangent, *totals]


@each_method
@pytest.mark.parametrize("held", [(0, 9), (0, 4, 9), (0, 1, 2, 7, 9)])
def test_gradient_is_that_of_the_papers_recursion(method: str, held: tuple[int, ...]) -> None:
    field, y0 = Net(), initial()
    grid = torch.tensor([0.0, 0.1, 0.25, 0.3, 0.45, 0.5, 0.62, 0.8, 0.85, 1.0], dtype=torch.float64)
    options = {"grid_constructor": lambda func, y0, t: grid}
    solution = odeint_adjoint(field, y0, grid[list(held)], method=method, options=options, adjoint_method="memory_free")
    found = torch.autograd.grad(loss_of(solution), [y0, *field.parameters()])
    expected = paper(field, y0, grid, held, method)
    assert error(found, expected) < 1e-13
    exact = torch.autograd.grad(
        loss_of(odeint_adjoint(field, y0, grid[list(held)], method=method, options=options, adjoint_method="aca")),
        [y0, *field.parameters()],
    )
    assert error(found, exact) > 1e-5, "the case does not tell the recursion from the exact gradient"


@each_method
def test_gradient_is_exact_where_every_state_is_an_output(method: str) -> None:
    field, y0, t = Net(), initial(), torch.linspace(0, 1, 8, dtype=torch.float64)
    wanted = [y0, *field.parameters()]
    found = torch.autograd.grad(
        loss_of(odeint_adjoint(field, y0, t, method=method, adjoint_method="memory_free")), wanted
    )
    expected = torch.autograd.grad(
        loss_of(odeint_adjoint(field, y0, t, method=method, adjoint_method="baseline")), wanted
    )
    assert error(found, expected) < 1e-13


def slope_of(values: Sequence[float], depths: Sequence[int]) -> float:
    """The slope of a straight line through log(values) over log(depths)."""
    x, y = torch.tensor(depths).double().log(), torch.tensor(values).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize(
    ("method", "steepest", "flattest"),
    [("euler", -1.15, -0.85), pytest.param("heun2", -math.inf, -2.0, marks=needs_heun)],
)
def test_error_falls_with_the_number_of_steps(method: str, steepest: float, flattest: float) -> None:
    """O(1/N) for Euler, O(1/N^2) or better for Heun: the paper's claim for smooth weights."""
    field, y0 = Net(), initial()
    wanted = [y0, *field.parameters()]
    depths = (64, 128, 256, 512)
    errors = []
    for steps in depths:
        found, exact = (
            differentiated(wanted, field, y0, ENDS, steps, method, mode) for mode in ("memory_free", "baseline")
        )
        errors.append(error(found, exact))
    assert steepest < slope_of(errors, depths) < flattest, errors


@each_method
def test_gradient_of_times_is_near_the_exact_one(method: str) -> None:
    field, y0, t = Net(), initial(), times().requires_grad_()
    exact = differentiated([t], field, y0, t, 400, method, "symplectic")
    assert 0 < error(differentiated([t], field, y0, t, 400, method), exact) < 1e-2


INPUTS: dict[str, dict[str, Any]] = {
    "decreasing times": {"t": torch.tensor([1.0, 0.55, 0.0], dtype=torch.float64)},
    "times between grid points": {"t": times()},
    "cubic interpolation": {"t": times(), "options": {"interp": "cubic"}},
    "moved times": {"t": times(), "options": {"perturb": True}},
    "two times": {"t": ENDS},
    "float32 times": {"t": times(dtype=torch.float32)},
}


@each_method
@pytest.mark.parametrize("name", INPUTS)
def test_error_falls_for_every_kind_of_call(method: str, name: str) -> None:
    settings = dict(INPUTS[name])
    t = settings.pop("t")
    field, y0 = Net(), initial()
    wanted = [y0, *field.parameters()]
    errors = []
    for steps in (100, 400):
        found, exact = (
            differentiated(wanted, field, y0, t, steps, method, mode, **settings)
            for mode in ("memory_free", "symplectic")
        )
        errors.append(error(found, exact))
    assert errors[1] < errors[0] / 3
    assert errors[1] < 1e-2


@each_method
def test_tuple_states_and_float32(method: str) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(dtype=torch.float32)

        def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return self.net(t, y[0]), y[0].sum(-1) - y[1]

    field = Pair()
    y0 = (initial(dtype=torch.float32), torch.ones(2, requires_grad=True))
    wanted = [*y0, *field.parameters()]
    found, exact = (
        differentiated(wanted, field, y0, times(dtype=torch.float32), 400, method, mode)
        for mode in ("memory_free", "symplectic")
    )
    assert error(found, exact) < 2e-2


@each_method
def test_dropout_has_the_masks_of_the_solve(method: str) -> None:
    """A field that is linear but for its masks: the same masks give the paper's recursion, others something else."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.linspace(-1, 0.5, 40, dtype=torch.float64))

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return nn.functional.dropout(y, 0.5) * self.rate

    field, y0 = Masked(), torch.linspace(0.5, 1.5, 40, dtype=torch.float64).requires_grad_()
    found = []
    for mode in ("memory_free", "symplectic"):
        torch.manual_seed(3)
        found.append(differentiated([y0, field.rate], field, y0, ENDS, 200, method, mode))
    assert error(*found) < 0.05


def test_event_keeps_the_last_state() -> None:
    field, y0 = Net(), initial()
    wanted = [y0, *field.parameters()]
    found, exact = (
        torch.autograd.grad(
            loss_of(
                odeint_adjoint(
                    field,
                    y0,
                    ENDS,
                    event_fn=lambda t, y: 0.637 - t,
                    method="euler",
                    options={"step_size": 0.005},
                    adjoint_method=mode,
                )[1]
            ),
            wanted,
        )
        for mode in ("memory_free", "symplectic")
    )
    assert 1e-9 < error(found, exact) < 2e-2


def test_other_methods_are_refused_before_the_solve() -> None:
    field, y0 = Net(), initial()
    for method in sorted(set(SOLVERS) - {*STAGES, "scipy_solver"}):
        with pytest.raises(ValueError, match=f'"euler" or "heun2".*"{method}"'):
            odeint_adjoint(field, y0, ENDS, method=method, adjoint_method="memory_free")
    assert field.evaluations == 0


# What it costs.


@each_method
def test_evaluations(method: str) -> None:
    """Euler: one back, one with its graph. Heun: two back, one for the slope, two with their graphs."""
    field, y0 = Net(), initial()
    steps, stages = 12, STAGES[method]
    for check, saved in (("warn", 0), ("ignore", stages)):
        loss = loss_of(solve(field, y0, ENDS, steps, method, adjoint_options={"replay_check": check}))
        field.evaluations = 0
        loss.backward()
        assert field.evaluations == steps * (3 * stages - 1) - saved


@each_method
def test_states_that_are_kept_are_not_recovered(method: str) -> None:
    field, y0, t = Net(), initial(), torch.linspace(0, 1, 8, dtype=torch.float64)
    loss = loss_of(odeint_adjoint(field, y0, t, method=method, adjoint_method="memory_free"))
    field.evaluations = 0
    loss.backward()
    assert field.evaluations == 7 * (2 * STAGES[method] - 1)


class Tied(nn.Module):
    """A block that every step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(-1, 0.5, 64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y * self.rate


@pytest.mark.parametrize("method", ["euler", pytest.param("heun2", marks=[pytest.mark.slow, needs_heun])])
def test_memory_does_not_grow_with_the_number_of_steps(method: str) -> None:
    field, y0 = Tied(), torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = ENDS.float()

    def kept(steps: int) -> int:
        return live_bytes(lambda: solve(field, y0, t, steps, method), "cpu")

    def peak(steps: int) -> int:
        return peak_bytes(lambda: solve(field, y0, t, steps, method)[-1].sum().backward(), "cpu")

    for figure in (kept, peak):
        figure(10)
        assert abs(figure(1000) / figure(10) - 1) < 0.05
    assert kept(1000) < 3.1 * y0.nbytes  # both outputs are the caller's; the initial state is his, too


def test_nothing_is_alive_after_backward() -> None:
    field, y0 = Net(32, 8), initial(64, 32)
    solve(field, y0, times(), 80, "euler").sum().backward()
    y0.grad = None
    field.zero_grad()

    def run() -> Tensor:
        loss: Tensor = solve(field, y0, times(), 80, "euler").sum()
        loss.backward()
        return loss

    assert live_bytes(run, "cpu") == 8 + y0.nbytes + sum(parameter.nbytes for parameter in field.parameters())


# What it says.


def stiff() -> tuple[nn.Module, Tensor]:
    """A field that contracts so fast that stepping back does not find the way."""

    class Stiff(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -6 * y

    return Stiff(), torch.tensor([1.0, -2.0], dtype=torch.float64).requires_grad_()


@each_method
def test_report_is_the_reconstruction_error(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    field, y0 = Net(), initial()
    errors: list[float] = []
    steps, (forth, back) = 25, STEPS[method]
    for report in (errors.append, True):
        solve(field, y0, ENDS, steps, method, adjoint_options={"report": report}).sum().backward()
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    with torch.no_grad():
        state = y0.detach()
        for t, end in itertools.pairwise(grid):
            state = forth(field, t, end - t, state)
        for t, end in reversed(list(itertools.pairwise(grid))):
            state = back(field, t, end - t, state)
        expected = float((state - y0).norm() / y0.norm())
    assert errors == [pytest.approx(expected, rel=1e-8)]
    assert f"reconstruction error {expected:.3g}" in capsys.readouterr().err


def test_report_is_the_worst_between_kept_states() -> None:
    field, y0, errors = Net(), initial(), list[float]()
    middle = solve(field, y0, torch.tensor([0.0, 0.5]).double(), 20, "euler", "symplectic")[-1].detach()
    for state, t in ((y0, [0.0, 0.5, 1.0]), (y0, [0.0, 0.5]), (middle.requires_grad_(), [0.5, 1.0])):
        options = {"report": errors.append}
        solve(field, state, torch.tensor(t).double(), 20, "euler", adjoint_options=options).sum().backward()
    assert errors[0] == pytest.approx(max(errors[1:]), rel=1e-9)


def test_an_initial_state_of_zero_has_a_report() -> None:
    field, errors = Net(), list[float]()
    y0 = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    solve(field, y0, ENDS, 20, "euler", adjoint_options={"report": errors.append}).sum().backward()
    assert 0 < errors[0] < 0.1


@pytest.mark.parametrize(("steps", "trusted"), [(4, False), (5, False), (2000, True)])
def test_a_gradient_that_is_not_to_be_trusted_is_told(steps: int, trusted: bool) -> None:
    """(1 - h a) (1 + h a) is not near 1 where h a is not small; the gradient is then off by as much."""
    field, y0 = stiff()
    loss = solve(field, y0, ENDS, steps, "euler").sum()
    if trusted:
        loss.backward()
        return
    with pytest.warns(ReplayWarning, match="memory_free: stepping back did not recover"):
        loss.backward()


def test_what_is_done_about_it_can_be_chosen() -> None:
    field, y0 = stiff()
    with pytest.raises(ReplayError, match="smaller steps"):
        solve(field, y0, ENDS, 4, "euler", adjoint_options={"replay_check": "error"}).sum().backward()
    assert y0.grad is None
    solve(field, y0, ENDS, 4, "euler", adjoint_options={"replay_check": "ignore"}).sum().backward()
    assert y0.grad is not None


def test_states_that_overflow_are_told() -> None:
    class Square(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -40 * y * y

    y0 = torch.tensor([3.0]).requires_grad_()
    with pytest.warns(ReplayWarning, match="by far"):
        solve(Square(), y0, ENDS.float(), 20, "euler").sum().backward()


def test_a_wrong_report_is_named() -> None:
    with pytest.raises(ValueError, match=r'adjoint_options\["report"\] must be True, False or a function.*\'yes\''):
        solve(Net(), initial(), ENDS, 4, "euler", adjoint_options={"report": "yes"})


# What autograd may do with it.


def test_backward_twice_and_an_output_overwritten() -> None:
    field, y0 = Net(), initial()
    loss = loss_of(solve(field, y0, times(), 20, "euler"))
    first = torch.autograd.grad(loss, y0, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, y0)[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, y0)
    solution = solve(field, y0, ENDS, 20, "euler")
    loss = (solution * 2).sum()
    solution.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_double_backward_is_near_that_of_the_exact_gradient() -> None:
    field, y0 = Net(), initial()
    errors = []
    for steps in (50, 400):
        found, exact = (
            torch.autograd.grad(
                torch.autograd.grad(loss_of(solve(field, y0, times(), steps, "euler", mode)), y0, create_graph=True)[0]
                .square()
                .sum(),
                [y0, *field.parameters()],
            )
            for mode in ("memory_free", "symplectic")
        )
        errors.append(error(found, exact))
    assert errors[1] < errors[0] / 5
    assert errors[1] < 1e-2


def test_it_is_the_one_mode_that_is_not_exact() -> None:
    assert [name for name, mode in MODES.items() if not mode.exact] == ["memory_free"]
