"""The modes reach torchdiffeq's function however it was imported, and go away again without a trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import Net, arguments_of, each_mode, initial, loss_of, solve, times
from torch import Tensor
from torchdiffeq._impl import adjoint

import torchdiffeq_symplectic
from torchdiffeq_symplectic import register, unregister
from torchdiffeq_symplectic.field import Field
from torchdiffeq_symplectic.modes import Mode
from torchdiffeq_symplectic.replay import ReplayCheck
from torchdiffeq_symplectic.sweep import Gradients, backpropagate
from torchdiffeq_symplectic.tape import Stepper, Tape, Times

USE = """
import torch
y0 = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
t = torch.tensor([0.0, 0.5], dtype=torch.float64)
def gradient(solver, **arguments):
    ys = solver(lambda t, y: -y.roll(1) * y, y0, t, method="euler", adjoint_params=(), **arguments)
    return torch.autograd.grad(ys[-1, 0], y0)[0]
def error(solver, **arguments):
    try:
        gradient(solver, **arguments)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "no error"
"""


def run(code: str) -> list[str]:
    """The lines that ``code`` prints in a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-c", USE + code]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture
def unregistered() -> Iterator[None]:
    unregister()
    yield
    register()


def slow(*values: object) -> Any:
    """A case that takes another interpreter, of which one is enough by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


IMPORTS = {
    "package first": "import torchdiffeq_symplectic\nfrom torchdiffeq import odeint_adjoint\n",
    "torchdiffeq first": "from torchdiffeq import odeint_adjoint\nimport torchdiffeq_symplectic\n",
    "attribute": "import torchdiffeq, torchdiffeq_symplectic\nodeint_adjoint = torchdiffeq.odeint_adjoint\n",
    "inner module": "from torchdiffeq._impl import odeint_adjoint\nimport torchdiffeq_symplectic\n",
}


@pytest.mark.parametrize("order", [name if name == "torchdiffeq first" else slow(name) for name in IMPORTS])
def test_order_of_imports(order: str) -> None:
    code = IMPORTS[order] + (
        "import torchdiffeq\n"
        "expected = gradient(torchdiffeq.odeint_adjoint, adjoint_method='symplectic')\n"
        "for mode in torchdiffeq_symplectic.MODES:\n"
        "    assert torch.allclose(gradient(odeint_adjoint, adjoint_method=mode), expected, rtol=1e-12)\n"
        "    print(mode)\n"
    )
    assert run(code) == list(torchdiffeq_symplectic.MODES)


@pytest.mark.parametrize(("order", "refused"), [slow("package first", False), slow("torchdiffeq first", True)])
def test_only_a_name_bound_earlier_keeps_upstreams_check_of_options(order: str, refused: bool) -> None:
    code = IMPORTS[order] + (
        "print(error(odeint_adjoint, options={'step_size': 0.1}, adjoint_method='symplectic'))\n"
        "print(error(odeint_adjoint, options={'step_size': 0.1}, adjoint_method='symplectic', adjoint_options={}))\n"
        "print(error(torchdiffeq_symplectic.odeint_adjoint, options={'step_size': 0.1}, adjoint_method='symplectic'))\n"
    )
    first, with_adjoint_options, package = run(code)
    assert first.startswith("ValueError: If `adjoint_method != method`" if refused else "no error")
    assert with_adjoint_options == "no error"
    assert package == "no error"


@pytest.mark.slow
def test_a_user_that_wraps_the_function_keeps_his_wrapper() -> None:
    code = (
        "import torchdiffeq\n"
        "upstream = torchdiffeq.odeint_adjoint\n"
        "def wrapper(*args, **kwargs):\n"
        "    return upstream(*args, **kwargs)\n"
        "torchdiffeq.odeint_adjoint = wrapper\n"
        "import torchdiffeq_symplectic\n"
        "print(torchdiffeq.odeint_adjoint is wrapper)\n"
        "print(error(wrapper, adjoint_method='symplectic'))\n"
        "torchdiffeq_symplectic.unregister()\n"
        "print(torchdiffeq.odeint_adjoint is wrapper)\n"
    )
    assert run(code) == ["True", "no error", "True"]


def names() -> list[object]:
    return [
        torchdiffeq.odeint_adjoint,
        sys.modules["torchdiffeq._impl"].odeint_adjoint,
        adjoint.odeint_adjoint,
        adjoint.OdeintAdjointMethod,
        torchdiffeq.odeint,
    ]


def test_register_and_unregister_are_idempotent_and_reversible() -> None:
    registered = names()
    register()
    assert names() == registered
    unregister()
    upstream = names()
    try:
        assert all(before is not after for before, after in zip(registered[:-1], upstream[:-1], strict=True))
        assert registered[-1] is upstream[-1]
        assert upstream[0].__module__ == "torchdiffeq._impl.adjoint"
        unregister()
        assert names() == upstream
    finally:
        register()
    assert names() == registered


@pytest.mark.usefixtures("unregistered")
@each_mode
def test_the_packages_own_function_needs_no_registration(mode: str) -> None:
    net, y0 = Net(), initial()
    wanted = [y0, *net.parameters()]
    solution = torchdiffeq_symplectic.odeint_adjoint(net, y0, times(), method="rk4", **arguments_of(mode))
    found = torch.autograd.grad(loss_of(solution), wanted)
    register()
    solution = torchdiffeq.odeint_adjoint(net, y0, times(), method="rk4", **arguments_of(mode))
    assert all(map(torch.equal, torch.autograd.grad(loss_of(solution), wanted), found))


@pytest.mark.usefixtures("unregistered")
def test_unregistered_torchdiffeq_knows_nothing_of_the_modes() -> None:
    loss = torchdiffeq.odeint_adjoint(Net(), initial(), times(), method="rk4", adjoint_method="symplectic").sum()
    with pytest.raises(ValueError, match=r'^Invalid method "symplectic"'):
        loss.backward()


def test_solves_begun_before_unregistering_can_still_be_differentiated() -> None:
    net, y0 = Net(), initial()
    loss = loss_of(solve("symplectic", net, y0, times()))
    unregister()
    try:
        loss.backward()
    finally:
        register()
    assert y0.grad is not None


class Oracle(Mode):
    """A mode of a user's own: the whole solve once more, and through it."""

    name = "oracle"

    def backward(
        self,
        tape: Tape,
        stepper: Stepper,
        field: Field,
        check: ReplayCheck,
        outputs: Sequence[Tensor | None],
        times: Times,
    ) -> Gradients:
        return backpropagate(tape, stepper, field, check, outputs, times, create_graph=False)


def test_a_mode_is_one_class_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torchdiffeq_symplectic.MODES, "oracle", Oracle())
    weight = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3).requires_grad_()
    y0 = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    options = {"first_step": 0.1}

    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(weight @ y) * torch.cos(t)

    solution = torchdiffeq.odeint_adjoint(
        func, y0, t, options=options, adjoint_method="oracle", adjoint_params=(weight,)
    )
    expected = torchdiffeq.odeint(func, y0, t, options=options, method="dopri5")
    found = torch.autograd.grad(solution.pow(3).sum(), (y0, weight))
    for one, other in zip(found, torch.autograd.grad(expected.pow(3).sum(), (y0, weight)), strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-13)
