"""A host's own modes give the same bits, errors, words and warnings whether this package is there or not.

So do constructors, attributes, ``state_dict``, ``repr``, evaluations, callbacks, random numbers and files.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import differences
from torch import nn

import torchdiffeq_symplectic

# Upstream says so to everyone whose tolerances are not odeint's defaults, its own adjoint among them.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning")

HAS_TORCHDYN = importlib.util.find_spec("torchdyn") is not None
needs_torchdyn = pytest.mark.skipif(not HAS_TORCHDYN, reason="torchdyn is not installed")
SCRIPTS = {
    host: Path(__file__).with_name(f"{host}_upstream_calls.py")
    for host in ("torchdiffeq", "torchdyn")[: 1 + HAS_TORCHDYN]
}
CALLS = {host: runpy.run_path(str(script))["CALLS"] for host, script in SCRIPTS.items()}
each_call = pytest.mark.parametrize(
    ("host", "name"), [pytest.param(host, name, id=f"{host}, {name}") for host in CALLS for name in CALLS[host]]
)

LOAD = """
import sys, torch
from torchdyn.core import NeuralODE
model = torch.load(sys.argv[1], weights_only=False)
assert "torchdiffeq_symplectic" not in sys.modules
torch.save([model.sensitivity, model(torch.ones(3, 2), torch.linspace(0, 1, 4))[1].detach()], sys.argv[2])
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The outcomes in processes that have never imported this package."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    outcomes = {}
    for host, script in SCRIPTS.items():
        path = tmp_path_factory.mktemp("alone") / "outcomes.pt"
        subprocess.run([sys.executable, str(script), str(path)], check=True, env=environment)
        outcomes[host] = torch.load(path, weights_only=False)
    return outcomes


@each_call
def test_outcome_is_the_same_registered_and_unregistered(host: str, name: str) -> None:
    with_package = CALLS[host][name]()
    torchdiffeq_symplectic.unregister()
    without = CALLS[host][name]()
    assert differences(with_package, without) == []


@pytest.mark.slow
@each_call
def test_outcome_is_that_without_the_package(host: str, name: str, alone: dict[str, dict[str, Any]]) -> None:
    assert differences(CALLS[host][name](), alone[host][name]) == []


@pytest.mark.slow
def test_calls_of_torchdiffeq_reach_solutions_gradients_errors_and_warnings(alone: dict[str, dict[str, Any]]) -> None:
    """So that the tests above compare something."""
    of_torchdiffeq = alone["torchdiffeq"]
    failed = {name: outcome["error"][0] for name, outcome in of_torchdiffeq.items() if "error" in outcome}
    assert len([name for name, outcome in of_torchdiffeq.items() if "gradients" in outcome]) >= 20
    assert failed["options without adjoint_options"] == "ValueError"
    assert failed["raising field"] == "OverflowError"
    assert any("Unexpected arguments" in text for _, text in of_torchdiffeq["unknown option"]["warnings"])
    assert of_torchdiffeq["odeint_event"]["gradients"][0].abs().sum() > 0


@needs_torchdyn
@pytest.mark.slow
def test_calls_of_torchdyn_reach_solutions_gradients_errors_and_warnings(alone: dict[str, dict[str, Any]]) -> None:
    of_torchdyn = alone["torchdyn"]
    failed = {name: outcome["error"][0] for name, outcome in of_torchdyn.items() if "error" in outcome}
    assert len(of_torchdyn) - len(failed) >= 80
    assert failed["unused parameter, adjoint"] == "RuntimeError"
    assert failed["raising field, autograd"] == "OverflowError"
    assert any("no effect" in text for _, text in of_torchdyn["parameters never used, autograd"]["warnings"])
    assert "we've wrapped it for you" in of_torchdyn["field of the state alone, adjoint"]["words"]
    assert of_torchdyn["rk4, interpolated_adjoint"]["gradients of inputs"][0].abs().sum() > 0


def outline(host: type) -> dict[str, Any]:
    """Names, signatures and documentation of a class."""
    return {
        name: (str(inspect.signature(member)), member.__doc__, member.__module__, member.__qualname__)
        for name, member in inspect.getmembers(host, inspect.isfunction)
        if member.__module__.startswith(("torchdyn", "torchdiffeq_symplectic"))
    }


@needs_torchdyn
def test_signatures_and_documentation_are_torchdyns() -> None:
    from torchdyn.core import MultipleShootingLayer, MultipleShootingProblem, NeuralODE, ODEProblem

    for host in (ODEProblem, NeuralODE, MultipleShootingProblem, MultipleShootingLayer):
        torchdiffeq_symplectic.register()
        registered = outline(host)
        torchdiffeq_symplectic.unregister()
        assert registered == outline(host)


@needs_torchdyn
@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_files_are_read_without_the_package(sensitivity: str, tmp_path: Path) -> None:
    """A model in one of torchdyn's modes, saved while the package is registered."""
    from torchdyn.core import NeuralODE

    model = NeuralODE(nn.Linear(2, 2), "rk4", sensitivity=sensitivity)
    solution = model(torch.ones(3, 2), torch.linspace(0, 1, 4))[1]
    solution.sum().backward()
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "found.pt")]
    subprocess.run(command, check=True)
    name, found = torch.load(tmp_path / "found.pt")
    assert name == sensitivity
    assert torch.equal(found, solution)
