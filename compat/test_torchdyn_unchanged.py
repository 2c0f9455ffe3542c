"""torchdyn's own modes give the same bits, errors, words and warnings whether this package is there or not.

So do constructors, attributes, ``state_dict``, ``repr``, evaluations, random numbers and files.
"""

from __future__ import annotations

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

pytest.importorskip("torchdyn")

from torchdyn.core import MultipleShootingLayer, MultipleShootingProblem, NeuralODE, ODEProblem

import torchdiffeq_symplectic

# Upstream says so to everyone whose tolerances are not odeint's defaults, its own adjoint among them.
pytestmark = pytest.mark.filterwarnings("ignore:Setting tolerances has no effect on fixed-step methods:UserWarning")

SCRIPT = Path(__file__).with_name("torchdyn_upstream_calls.py")
CALLS = runpy.run_path(str(SCRIPT))["CALLS"]
CLASSES = (ODEProblem, NeuralODE, MultipleShootingProblem, MultipleShootingLayer)

LOAD = """
import sys, torch
from torchdyn.core import NeuralODE
model = torch.load(sys.argv[1], weights_only=False)
assert "torchdiffeq_symplectic" not in sys.modules
torch.save([model.sensitivity, model(torch.ones(3, 2), torch.linspace(0, 1, 4))[1].detach()], sys.argv[2])
"""


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
    solved = [name for name, outcome in alone.items() if "error" not in outcome]
    failed = {name: outcome["error"][0] for name, outcome in alone.items() if "error" in outcome}
    assert len(solved) >= 80
    assert failed["unused parameter, adjoint"] == "RuntimeError"
    assert failed["raising field, autograd"] == "OverflowError"
    assert failed["unknown solver, adjoint"] == "KeyError"
    assert any("no effect" in text for _, text in alone["parameters never used, autograd"]["warnings"])
    assert "we've wrapped it for you" in alone["field of the state alone, adjoint"]["words"]
    for name in ("dopri5, adjoint", "rk4, interpolated_adjoint", "tsit5, autograd"):
        assert alone[name]["gradients of inputs"][0].abs().sum() > 0
        assert alone[name]["logs"][0]


def outline(host: type) -> dict[str, Any]:
    """Names, signatures and documentation of a class."""
    return {
        name: (str(inspect.signature(member)), member.__doc__, member.__module__, member.__qualname__)
        for name, member in inspect.getmembers(host, inspect.isfunction)
        if member.__module__.startswith(("torchdyn", "torchdiffeq_symplectic"))
    }


@pytest.mark.parametrize("host", CLASSES)
def test_signatures_and_documentation_are_upstreams(host: type) -> None:
    registered = outline(host)
    torchdiffeq_symplectic.unregister()
    assert registered == outline(host)


def own_members(host: type) -> dict[str, Any]:
    return {name: value for name, value in vars(host).items() if name not in ("__abstractmethods__", "_abc_impl")}


def test_unregister_puts_back_the_very_objects() -> None:
    torchdiffeq_symplectic.unregister()
    before = [own_members(host) for host in CLASSES]
    torchdiffeq_symplectic.register()
    torchdiffeq_symplectic.register()
    assert [own_members(host) for host in CLASSES] != before
    torchdiffeq_symplectic.unregister()
    torchdiffeq_symplectic.unregister()
    after = [own_members(host) for host in CLASSES]
    assert [list(members) for members in after] == [list(members) for members in before]
    for found, expected in zip(after, before, strict=True):
        assert all(found[name] is value for name, value in expected.items())
    for host in CLASSES:
        assert all("torchdiffeq_symplectic" not in str(member) for member in outline(host).values())


@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint", "interpolated_adjoint"])
def test_models_outlive_registration(sensitivity: str) -> None:
    """One made before goes on after, and the other way round: nothing of registration is in the model."""
    x, t = torch.ones(3, 2), torch.linspace(0, 1, 4)
    torch.manual_seed(4)
    registered = NeuralODE(nn.Linear(2, 2), "rk4", sensitivity=sensitivity)
    torchdiffeq_symplectic.unregister()
    torch.manual_seed(4)
    unregistered = NeuralODE(nn.Linear(2, 2), "rk4", sensitivity=sensitivity)
    assert sorted(vars(registered)) == sorted(vars(unregistered))
    solutions = [registered(x, t)[1], unregistered(x, t)[1]]
    torchdiffeq_symplectic.register()
    solutions += [registered(x, t)[1], unregistered(x, t)[1]]
    assert all(torch.equal(solution, solutions[0]) for solution in solutions)
    gradients = [
        torch.autograd.grad(solution.square().sum(), model.vf.vf.vf.weight)[0]
        for solution, model in zip(solutions, 2 * [registered, unregistered], strict=True)
    ]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", ["autograd", "adjoint"])
def test_files_are_read_without_the_package(sensitivity: str, tmp_path: Path) -> None:
    """A model in one of torchdyn's modes, saved while the package is registered."""
    model = NeuralODE(nn.Linear(2, 2), "rk4", sensitivity=sensitivity)
    solution = model(torch.ones(3, 2), torch.linspace(0, 1, 4))[1]
    solution.sum().backward()
    torch.save(model, tmp_path / "model.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model.pt"), str(tmp_path / "found.pt")]
    subprocess.run(command, check=True)
    name, found = torch.load(tmp_path / "found.pt")
    assert name == sensitivity
    assert torch.equal(found, solution)


def test_unknown_sensitivity_fails_with_the_names_that_are_known() -> None:
    """Upstream's failure is that it calls None."""
    model = NeuralODE(nn.Linear(2, 2), "rk4", sensitivity="no such sensitivity")
    with pytest.raises(ValueError, match="no such sensitivity") as error:
        model(torch.ones(3, 2), torch.linspace(0, 1, 4))
    for name in ("autograd", "adjoint", "interpolated_adjoint", *torchdiffeq_symplectic.MODES):
        assert f'"{name}"' in str(error.value)
    torchdiffeq_symplectic.unregister()
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        model(torch.ones(3, 2), torch.linspace(0, 1, 4))
