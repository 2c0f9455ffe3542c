"""torchdiffeq's own modes give the same bits, errors, warnings and callbacks whether this package is there or not."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
from outcomes import differences
from torch import Tensor
from torchdiffeq._impl import adjoint
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_symplectic

SCRIPT = Path(__file__).with_name("upstream_calls.py")
CALLS = runpy.run_path(str(SCRIPT))["CALLS"]
LAST_WORDS = 'Must be one of {"'


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcomes in a process that has never imported this package."""
    path = tmp_path_factory.mktemp("alone") / "outcomes.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, str(SCRIPT), str(path)], check=True, env=environment)
    outcomes: dict[str, Any] = torch.load(path, weights_only=False)
    return outcomes


@pytest.mark.parametrize("name", CALLS)
def test_outcome_is_the_same_registered_and_unregistered(name: str) -> None:
    with_package = CALLS[name]()
    torchdiffeq_symplectic.unregister()
    without = CALLS[name]()
    assert differences(with_package, without) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_outcome_is_that_without_the_package(name: str, alone: dict[str, Any]) -> None:
    assert differences(CALLS[name](), alone[name]) == []


@pytest.mark.slow
def test_calls_reach_solutions_gradients_errors_and_warnings(alone: dict[str, Any]) -> None:
    """So that the tests above compare something."""
    solved = [name for name, outcome in alone.items() if "gradients" in outcome]
    failed = {name: outcome["error"][0] for name, outcome in alone.items() if "error" in outcome}
    assert len(solved) >= 20
    assert failed["options without adjoint_options"] == "ValueError"
    assert failed["raising field"] == "OverflowError"
    assert failed["function without adjoint_params"] == "ValueError"
    assert any("Unexpected arguments" in text for _, text in alone["unknown option"]["warnings"])
    assert alone["odeint_event"]["gradients"][0].abs().sum() > 0


def test_unknown_adjoint_method_is_upstreams_error_with_more_names() -> None:
    field, y0 = torch.nn.Linear(3, 3).double(), torch.ones(2, 3, dtype=torch.float64)
    settings: dict[str, Any] = {"adjoint_method": "no such method"}
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        result: Tensor = field(y)
        return result

    params = tuple(field.parameters())
    with pytest.raises(ValueError, match='Invalid method "no such method"') as ours:
        torchdiffeq.odeint_adjoint(func, y0, t, adjoint_params=params, **settings).sum().backward()
    torchdiffeq_symplectic.unregister()
    with pytest.raises(ValueError, match='Invalid method "no such method"') as theirs:
        torchdiffeq.odeint_adjoint(func, y0, t, adjoint_params=params, **settings).sum().backward()
    beginning = str(theirs.value).removesuffix("}.")
    assert str(ours.value).startswith(beginning)
    for name in (*SOLVERS, *torchdiffeq_symplectic.MODES):
        assert f'"{name}"' in str(ours.value)


def test_unregister_puts_back_the_very_objects() -> None:
    torchdiffeq_symplectic.unregister()
    function, method = torchdiffeq.odeint_adjoint, adjoint.OdeintAdjointMethod
    assert function.__module__ == "torchdiffeq._impl.adjoint"
    assert issubclass(method, torch.autograd.Function)
    torchdiffeq_symplectic.register()
    torchdiffeq_symplectic.register()
    assert torchdiffeq.odeint_adjoint is not function
    torchdiffeq_symplectic.unregister()
    torchdiffeq_symplectic.unregister()
    assert torchdiffeq.odeint_adjoint is function
    assert adjoint.odeint_adjoint is function
    assert adjoint.OdeintAdjointMethod is method
