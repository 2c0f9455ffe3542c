"""Bad input is refused before the solve, by an error that names the argument, what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Net, initial, needs_torchdyn, neural_ode, times
from torchdiffeq import odeint, odeint_adjoint

import torchdiffeq_symplectic
from torchdiffeq_symplectic import use


def solve(net: Net, **arguments: Any) -> object:
    return odeint_adjoint(net, initial(), times(), method="rk4", **{"adjoint_method": "symplectic", **arguments})


CONSTRUCTOR = r"grid_constructor.* must return the times of the steps .*shape \(N,\), but returned "
PARAMS = "adjoint_params must be a sequence of tensors, but is "
CASES: dict[str, tuple[Callable[[Net], dict[str, Any]], type[Exception], str]] = {
    "options: a string": (
        lambda net: {"adjoint_options": "stages"},
        TypeError,
        "adjoint_options must be a dictionary such as .*, but is 'stages'",
    ),
    "options: a list": (lambda net: {"adjoint_options": ["stages"]}, TypeError, "adjoint_options must be a dictionary"),
    "options: a value": (lambda net: {"adjoint_options": {"checkpoint": "stage"}}, ValueError, "but is 'stage'"),
    "params: a string": (lambda net: {"adjoint_params": "inner"}, TypeError, PARAMS + r"a str\. Pass tuple"),
    "params: strings": (lambda net: {"adjoint_params": ["inner"]}, TypeError, PARAMS + "a sequence with a str in it"),
    "params: named": (lambda net: {"adjoint_params": net.named_parameters()}, TypeError, "with a tuple in it"),
    "params: a dictionary": (
        lambda net: {"adjoint_params": dict(net.named_parameters())},
        TypeError,
        PARAMS + "a dict",
    ),
    "params: None in it": (lambda net: {"adjoint_params": [None]}, TypeError, "with a NoneType in it"),
    "params: a module": (lambda net: {"adjoint_params": net}, TypeError, PARAMS + "a Net"),
    "params: a method": (lambda net: {"adjoint_params": net.parameters}, TypeError, PARAMS + "a method"),
    "grid: a list": (
        lambda net: {"options": {"grid_constructor": lambda f, y, t: [0.1, 1.0]}},
        TypeError,
        CONSTRUCTOR + "a list",
    ),
    "grid: None": (
        lambda net: {"options": {"grid_constructor": lambda f, y, t: None}},
        TypeError,
        CONSTRUCTOR + "a NoneType",
    ),
    "grid: a matrix": (
        lambda net: {"options": {"grid_constructor": lambda f, y, t: t[None]}},
        TypeError,
        CONSTRUCTOR + r"one of shape \(1, 4\)",
    ),
    "method: a list": (
        lambda net: {"adjoint_method": ["symplectic"]},
        TypeError,
        r"adjoint_method must be a name such as \"symplectic\", but is \['symplectic'\]",
    ),
    "method: a typo": (lambda net: {"adjoint_method": "symplektic"}, ValueError, 'Invalid method "symplektic"'),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments(case: str) -> None:
    arguments, kind, message = CASES[case]
    net = Net()
    with pytest.raises(kind, match=message):
        solve(net, **arguments(net))
    assert net.evaluations == 0


def test_generators_of_parameters_are_sequences() -> None:
    net = Net()
    solve(net, adjoint_params=net.parameters())
    assert net.evaluations > 0


def test_a_misspelt_option_is_warned_of_with_the_near_one() -> None:
    with pytest.warns(UserWarning, match='Unexpected arguments .*chekpoint.*Did you mean "checkpoint"'):
        solve(Net(), adjoint_options={"chekpoint": "stages"})


def test_use() -> None:
    with pytest.raises(TypeError, match=r'options are keywords, as in use\("symplectic", checkpoint="stages"\)'):
        use("symplectic", {"checkpoint": "stages"})
    with pytest.raises(TypeError, match="use needs a mode before it decorates a function, as in @use"):

        @use  # type: ignore[arg-type]
        def run() -> object:
            return odeint(Net(), initial(), times())

    for choose in (use, torchdiffeq_symplectic.set_default):
        with pytest.raises(ValueError, match=r"mode must be None or one of .*, but is \['symplectic'\]"):
            choose(["symplectic"])  # type: ignore[arg-type]


@needs_torchdyn
def test_torchdyn() -> None:
    net = Net()
    model = neural_ode("symplectic", net, solver="rk4")
    model.adjoint_options = "stages"
    with pytest.raises(TypeError, match="adjoint_options must be a dictionary"):
        model(initial(), torch.linspace(0, 1, 3))
    model.sensitivity = "symplektic"
    with pytest.raises(ValueError, match=r"sensitivity must be one of .* but is 'symplektic'"):
        model(initial(), torch.linspace(0, 1, 3))
    assert net.evaluations == 0
