"""How code in the wild calls torchdiffeq, in each mode, against backpropagation through ``odeint`` on the same steps.

Adaptive methods get ``first_step``, as ``odeint`` also differentiates its own choice of it. What fields do in the wild
is in ``test_torchdiffeq_field_patterns.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

Mode = dict[str, Any]
Agree = Callable[..., None]
T = torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64)
FIRST = {"first_step": 0.1}


class Dynamics(nn.Module):
    """An asymmetric network that changes with time and counts its evaluations."""

    def __init__(self, size: int = 3, hidden: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.inner = nn.Parameter(torch.randn(size, hidden, generator=generator, dtype=torch.float64))
        self.outer = nn.Parameter(torch.randn(hidden, size, generator=generator, dtype=torch.float64) / hidden)
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        return torch.tanh(y @ self.inner + torch.sin(3 * t)) @ self.outer - 0.3 * y


def initial(*shape: int) -> Tensor:
    shape = shape or (4, 3)
    count = torch.Size(shape).numel()
    return torch.linspace(-1.3, 2.1, count, dtype=torch.float64).reshape(shape).requires_grad_()


def gradients(solution: Any, inputs: Any) -> tuple[Tensor | None, ...]:
    """Gradients of an asymmetric loss over all outputs."""
    parts = solution if isinstance(solution, tuple) else (solution,)
    loss = torch.stack(
        [(part * torch.linspace(0.5, 2, part.numel()).reshape(part.shape)).sum() for part in parts]
    ).sum()
    result: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss + sum(part.pow(3).sum() for part in parts), tuple(inputs), allow_unused=True
    )
    return result


def merged(mode: Mode, **adjoint_options: Any) -> Mode:
    """``mode`` with further ``adjoint_options``."""
    return {**mode, "adjoint_options": {**mode.get("adjoint_options", {}), **adjoint_options}}


@pytest.fixture
def compare(mode: Mode, assert_agree: Agree) -> Callable[..., None]:
    """Solve by ``odeint`` and in the mode, and compare solutions (to the bit) and gradients."""

    def run(func: Any, y0: Any, t: Tensor, inputs: Any, *, adjoint: Mode | None = None, **settings: Any) -> None:
        inputs = tuple(inputs)
        expected = torchdiffeq.odeint(func, y0, t, **settings)
        found = torchdiffeq.odeint_adjoint(func, y0, t, **settings, **mode, **(adjoint or {}))
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)
        assert_agree(gradients(found, inputs), gradients(expected, inputs))

    return run


# Methods and options.

SETTINGS: dict[str, dict[str, Any]] = {
    "bare": {},
    "rk4, step size (torchcde's README)": {"method": "rk4", "options": {"step_size": 0.09}},
    "euler, step size": {"method": "euler", "options": {"step_size": 0.06}},
    "midpoint on the outputs": {"method": "midpoint"},
    "cubic": {"method": "rk4", "options": {"step_size": 0.21, "interp": "cubic"}},
    "perturbed": {"method": "rk4", "options": {"step_size": 0.21, "perturb": True}},
    "few steps at most": {"options": {**FIRST, "max_num_steps": 1000}, "rtol": 1e-4, "atol": 1e-4},
    "single precision times": {"options": {**FIRST, "dtype": torch.float32}, "rtol": 1e-4, "atol": 1e-4},
    "a list of one tolerance (SiT)": {"options": FIRST, "rtol": [1e-4], "atol": [1e-5]},
    "step_t": {"options": {**FIRST, "step_t": torch.tensor([0.2, 0.37])}, "rtol": 1e-3, "atol": 1e-3},
    "adams": {"method": "explicit_adams", "options": {"step_size": 0.05}},
}


@pytest.mark.parametrize("settings", list(SETTINGS.values()), ids=list(SETTINGS))
def test_options(settings: dict[str, Any], mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Dynamics(), initial()
    inputs = [y0, *func.parameters()]
    expected = torchdiffeq.odeint(func, y0, T, **settings)
    found = torchdiffeq.odeint_adjoint(func, y0, T, **settings, **mode)
    assert torch.equal(found, expected)
    # Without first_step, odeint's gradient has that of its choice of the first step in it.
    tolerance = 1e-3 if "options" not in settings and "method" not in settings else 1e-11
    assert_agree(gradients(found, inputs), gradients(expected, inputs), tolerance)


@pytest.mark.parametrize("adjoint", [{"adjoint_rtol": 9.0, "adjoint_atol": 1e-30}, {"norm": "seminorm"}], ids=str)
def test_what_upstreams_adjoint_needs_has_no_effect(adjoint: Mode, mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Dynamics(), initial()
    inputs = [y0, *func.parameters()]
    settings: dict[str, Any] = {"options": FIRST, "rtol": 1e-4, "atol": 1e-4}
    call = {**mode, **adjoint} if "norm" not in adjoint else merged(mode, **adjoint, step_size=0.1)
    found = torchdiffeq.odeint_adjoint(func, y0, T, **settings, **call)
    assert_agree(gradients(found, inputs), gradients(torchdiffeq.odeint(func, y0, T, **settings), inputs))


def test_unknown_options_only_warn(mode: Mode) -> None:
    func, y0 = Dynamics(), initial()
    with pytest.warns(UserWarning, match=r"Unexpected arguments.*max_iters"):
        solution = torchdiffeq.odeint_adjoint(func, y0, T, options={**FIRST, "max_iters": 5}, **mode)
    solution.sum().backward()
    assert y0.grad is not None


# Names bound early.


def test_a_name_imported_before_this_package_reaches_the_modes(
    upstream: Callable[..., Any], mode: Mode, assert_agree: Agree
) -> None:
    func, y0 = Dynamics(), initial()
    t = T.clone().requires_grad_()
    inputs = [y0, t, *func.parameters()]
    settings: dict[str, Any] = {"options": FIRST, "rtol": 1e-4, "atol": 1e-4}
    found = upstream(func, y0, t, **settings, **merged(mode))
    expected = torchdiffeq.odeint(func, y0, t, **settings)
    assert torch.equal(found, expected)
    assert_agree(gradients(found, inputs), gradients(expected, inputs))


def test_a_name_imported_early_finds_events(upstream: Callable[..., Any], mode: Mode) -> None:
    func, y0 = Dynamics(), initial()
    settings: dict[str, Any] = {"options": FIRST, "event_fn": lambda t, y: t - 0.6 + 0.01 * y[0, 0]}
    at, solution = upstream(func, y0, T[:2], **settings, **merged(mode))
    expected_at, expected = torchdiffeq.odeint(func, y0, T[:2], **settings)
    assert torch.equal(at, expected_at)
    assert torch.equal(solution, expected)
    assert solution.requires_grad


# What the parameters are given as.


@pytest.mark.parametrize("form", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_parameters_of_a_function_are_listed(form: Any, compare: Callable[..., None]) -> None:
    func, y0 = Dynamics(), initial()
    params = tuple(func.parameters())
    settings: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.2}}
    compare(lambda t, y: func(t, y), y0, T, [y0, *params], adjoint={"adjoint_params": form(params)}, **settings)


def test_neuromancers_integrator(upstream: Callable[..., Any], mode: Mode, assert_agree: Agree) -> None:
    """A lambda over a block and its input, a list of parameters, and a norm that upstream's adjoint cannot use."""
    block, x = Dynamics(), initial()
    u = torch.linspace(0, 1, 12, dtype=torch.float64).reshape(4, 3)

    def norm(state: Tensor) -> Tensor:
        raise AssertionError("the norm of the adjoint is not needed")

    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    settings: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5, "method": "dopri5", "options": FIRST}
    for odeint_adjoint in (torchdiffeq.odeint_adjoint, upstream):
        adjoint = {"adjoint_params": list(block.parameters()), **merged(mode, norm=norm)}
        found = odeint_adjoint(lambda t, x: block(t, x) + u, x, t, **adjoint, **settings)[-1]
        expected = torchdiffeq.odeint(lambda t, x: block(t, x) + u, x, t, **settings)[-1]
        inputs = [x, *block.parameters()]
        assert_agree(gradients(found, inputs), gradients(expected, inputs))


# Many outputs, and times.


def test_a_latent_odes_many_outputs(mode: Mode, assert_agree: Agree) -> None:
    func, encoder = Dynamics(), nn.Linear(6, 3).double()
    series = torch.randn(4, 6, dtype=torch.float64)
    t = torch.linspace(0, 2, 101, dtype=torch.float64)
    settings: dict[str, Any] = {"options": FIRST, "rtol": 1e-3, "atol": 1e-4}
    inputs = [*encoder.parameters(), *func.parameters()]
    found = torchdiffeq.odeint_adjoint(func, encoder(series), t, **settings, **mode).permute(1, 0, 2)
    forward, func.nfe = func.nfe, 0
    assert forward < 101, "the outputs are meant to be many in each step"
    gradient = gradients(found, inputs)
    assert func.nfe <= 2 * forward
    expected = torchdiffeq.odeint(func, encoder(series), t, **settings).permute(1, 0, 2)
    assert_agree(gradient, gradients(expected, inputs))


def test_a_trained_end_time(mode: Mode, assert_agree: Agree) -> None:
    func, y0 = Dynamics(), initial()
    root = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    inputs = [y0, root, *func.parameters()]
    settings: dict[str, Any] = {"options": FIRST, "rtol": 1e-4, "atol": 1e-4}
    found = torchdiffeq.odeint_adjoint(func, y0, torch.stack([0 * root, root * root]), **settings, **mode)
    expected = torchdiffeq.odeint(func, y0, torch.stack([0 * root, root * root]), **settings)
    assert_agree(gradients(found, inputs), gradients(expected, inputs))


def test_end_times_of_single_samples_by_rescaled_time(mode: Mode, assert_agree: Agree) -> None:
    rate = nn.Parameter(torch.tensor([-0.7, 0.4], dtype=torch.float64))

    def func(s: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        y, start, end = state
        span = (end - start)[:, None]
        t = start[:, None] + s * span
        return rate * torch.cos(t) * y * span, torch.zeros_like(start), torch.zeros_like(end)

    y0 = initial(3, 2)
    start = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64, requires_grad=True)
    end = torch.tensor([1.0, 2.5, 0.25], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)
    settings: dict[str, Any] = {"options": FIRST, "rtol": 1e-10, "atol": 1e-12}
    inputs = [y0, start, end, rate]
    state = (y0, start, end)
    found = torchdiffeq.odeint_adjoint(func, state, s, adjoint_params=(rate,), **settings, **mode)[0][-1]
    expected = torchdiffeq.odeint(func, state, s, **settings)[0][-1]
    closed = y0 * torch.exp(rate * (torch.sin(end) - torch.sin(start))[:, None])
    gradient = gradients(found, inputs)
    assert_agree(gradient, gradients(expected, inputs))
    assert_agree(gradient, gradients(closed, inputs), 1e-8)  # the solver's tolerance


# Controlled differential equations.


class Spline:
    """Linear interpolation of data at times that may need gradients, as torchcde's."""

    def __init__(self, coefficients: Tensor, times: Tensor) -> None:
        self.coefficients, self.times = coefficients, times

    def derivative(self, t: Tensor) -> Tensor:
        last = len(self.times) - 2
        index = int(torch.bucketize(t.detach(), self.times.detach(), right=False).sub(1).clamp(0, last))
        width = self.times[index + 1] - self.times[index]
        return (self.coefficients[:, index + 1] - self.coefficients[:, index]) / width


@pytest.mark.parametrize("method", ["dopri5", "adaptive_heun", "rk4"])
def test_a_neural_cdes_spline_and_jumps(method: str, mode: Mode, assert_agree: Agree) -> None:
    """The spline is derived from a network and listed in adjoint_params; its times are jumps and ends of the solve."""
    embed, readin = nn.Linear(2, 3, bias=False).double(), nn.Linear(3, 6).double()
    data = torch.randn(4, 6, 2, dtype=torch.float64)
    times = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.1, 1.6], dtype=torch.float64, requires_grad=True)
    z0 = initial(4, 2)

    def solve(solver: Callable[..., Tensor], **adjoint: Any) -> Tensor:
        spline = Spline(embed(data), times)

        def func(t: Tensor, z: Tensor) -> Tensor:
            matrix = torch.tanh(readin(torch.cat([z, z[:, :1] * t], dim=1))).reshape(4, 2, 3)
            return (matrix @ spline.derivative(t)[:, :, None]).squeeze(-1)

        if adjoint:
            adjoint["adjoint_params"] = (*readin.parameters(), spline.coefficients, times)
        options: dict[str, Any] = {**FIRST, "jump_t": times} if method != "rk4" else {"step_size": 0.1}
        t = torch.stack([times[0], times[0] + 1.05, times[-1]])
        return solver(func, z0, t, method=method, options=options, rtol=1e-3, atol=1e-4, **adjoint)

    inputs = [z0, times, *embed.parameters(), *readin.parameters()]
    found, expected = solve(torchdiffeq.odeint_adjoint, **mode), solve(torchdiffeq.odeint)
    assert torch.equal(found, expected)
    assert_agree(gradients(found, inputs), gradients(expected, inputs))


# Events.
