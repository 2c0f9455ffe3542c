"""The modes reach torchdyn whenever it is imported, if it ever is, and go away again without a trace."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torchdyn")

import torch
from harness import assert_exact, each_mode, loss_of, problem_for
from torchdyn.core import MultipleShootingProblem, NeuralODE, ODEProblem
from torchdyn.core.neuralde import MultipleShootingLayer
from torchdyn_runs import model_for, returned

import torchdiffeq_symplectic
from torchdiffeq_symplectic import register, unregister

USE = """
import sys

def use():
    "What each mode of torchdyn's model gives, next to its own backpropagation."
    import torch
    import torchdiffeq_symplectic
    from torchdyn.core.neuralde import NeuralODE

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([[0.3, -0.8], [1.1, 0.4]], dtype=torch.float64))
        def forward(self, t, x, args=None):
            return torch.tanh(x @ self.weight) + t

    def gradient(sensitivity):
        field, x = Field(), torch.tensor([[0.2, -1.0]], dtype=torch.float64)
        model = NeuralODE(field, solver="euler", sensitivity=sensitivity)
        return torch.autograd.grad(model(x, torch.linspace(0, 1, 4))[1].sum(), field.weight)[0]

    expected = gradient("autograd")
    for mode in torchdiffeq_symplectic.MODES:
        assert torch.allclose(gradient(mode), expected, rtol=1e-12)
        print(mode)

def attempt(statement):
    try:
        exec(statement, globals())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
"""


def run(code: str, *flags: str) -> list[str]:
    """The lines that ``code`` prints in a fresh interpreter; nothing may be said on its standard error."""
    found = subprocess.run([sys.executable, *flags, "-c", USE + code], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    if flags:
        assert found.stderr == ""
    return found.stdout.splitlines()


STRICT = ("-W", "error")


# The order of imports.

IMPORTS = {
    "package first": "import torchdiffeq_symplectic\nfrom torchdyn.core import NeuralODE\n",
    "class bound before": "from torchdyn.core import NeuralODE\nimport torchdiffeq_symplectic\n",
    "module bound before": "import torchdyn.core.problems as problems\nimport torchdiffeq_symplectic\n",
    "models alone": "import torchdiffeq_symplectic\nimport torchdyn.models\n",
    "solvers before, the rest after": "import torchdyn.numerics\nimport torchdiffeq_symplectic\nimport torchdyn.core\n",
    "registered, unregistered and registered before": (
        "import torchdiffeq_symplectic as package\npackage.unregister()\npackage.unregister()\npackage.register()\n"
        "package.register()\nimport torchdyn.core\n"
    ),
    "inside a function of another thread": (
        "import threading, torchdiffeq_symplectic\n"
        "thread = threading.Thread(target=__import__, args=('torchdyn.core',))\nthread.start()\nthread.join()\n"
    ),
}
SLOW_IMPORTS = [name for name in IMPORTS if name not in ("package first", "class bound before")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_IMPORTS else []) for name in IMPORTS]
)
def test_order_of_imports(order: str) -> None:
    code = (
        "use()\n"
        "import inspect, sys, torchdyn.core.neuralde as module\n"
        "print(type(module.__loader__).__name__, module.__spec__.loader is module.__loader__)\n"
        "print(inspect.getsource(module.NeuralODE).splitlines()[0], 'def trajectory' in inspect.getsource(module))\n"
        "print(any('torchdiffeq_symplectic' in type(finder).__module__ for finder in sys.meta_path))\n"
    )
    lines = [line for line in run(IMPORTS[order] + code) if not line.startswith("Your vector field")]
    assert lines == [
        *torchdiffeq_symplectic.MODES,
        "SourceFileLoader True",
        "class NeuralODE(ODEProblem, pl.LightningModule): True",
        "False",
    ]


@pytest.mark.slow
def test_importing_the_package_imports_neither_torchdyn_nor_anything_else() -> None:
    code = (
        "import torch, torchdiffeq\n"
        "before = set(sys.modules)\n"
        "import torchdiffeq_symplectic\n"
        "torchdiffeq_symplectic.register()\n"
        "torchdiffeq_symplectic.unregister()\n"
        "torchdiffeq_symplectic.register()\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names)))\n"
        "print(sorted(name for name in sys.modules if 'symplectic.hosts.torchdyn.' in name))\n"
    )
    assert run(code, *STRICT) == ["['torchdiffeq_symplectic']", "[]"]


# torchdyn absent, broken, or too old.

ABSENT = {
    "not found": (
        "class Blocker:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] == 'torchdyn':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    ),
    "blocked": "sys.modules['torchdyn'] = None\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ABSENT)
def test_without_torchdyn_all_else_works_and_nothing_is_said(how: str) -> None:
    code = ABSENT[how] + (
        "import torch, torchdiffeq\n"
        "import torchdiffeq_symplectic as package\n"
        "for switch in (package.register, package.unregister, package.unregister, package.register):\n"
        "    switch()\n"
        "print(attempt('import torchdyn').split(';')[0].split(':')[0])\n"
        "print(attempt('import torchdyn.core').split(';')[0].split(':')[0])\n"
        "y0 = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)\n"
        "t = torch.tensor([0.0, 0.5], dtype=torch.float64)\n"
        "def gradient(solver, **arguments):\n"
        "    ys = solver(lambda t, y: -y.roll(1) * y, y0, t, method='euler', **arguments)\n"
        "    return torch.autograd.grad(ys.sum(), y0)\n"
        "for mode in package.MODES:\n"
        "    found = gradient(torchdiffeq.odeint_adjoint, adjoint_method=mode, adjoint_params=())\n"
        "    print(mode, torch.allclose(found[0], gradient(torchdiffeq.odeint)[0], rtol=1e-12))\n"
    )
    expected = [f"{mode} True" for mode in torchdiffeq_symplectic.MODES]
    assert run(code, *STRICT) == ["ModuleNotFoundError", "ModuleNotFoundError", *expected]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["package first", "torchdyn first"])
def test_a_torchdyn_that_lacks_a_name_is_left_alone(order: str) -> None:
    """1.0.0 and 1.0.1 have no torchdyn.numerics.solvers.ode; who knows what the next one lacks."""
    lacking = "import torchdyn.numerics.odeint, torchdyn.numerics.interpolators as module\ndel module.str_to_interp\n"
    package, host = "import torchdiffeq_symplectic\n", "import torchdyn.core\n"
    code = lacking + (package + host if order == "package first" else host + package)
    code += (
        "import torch\n"
        "from torchdyn.core import NeuralODE\n"
        "weight = torch.tensor(0.5, requires_grad=True)\n"
        "def solve(sensitivity):\n"
        "    global loss\n"
        "    model = NeuralODE(lambda t, x, args=None: weight * x, solver='rk4', sensitivity=sensitivity)\n"
        "    loss = model(torch.ones(1, 2), torch.linspace(0, 1, 3))[1].sum()\n"
        "solve('autograd')\n"
        "print(float(torch.autograd.grad(loss, weight)[0]) > 0)\n"
        "print(attempt('solve(\"symplectic\")') != 'no error')\n"
    )
    lines = [line for line in run(code) if not line.startswith("Your vector field")]
    assert lines == ["True", "True"]


# Register and unregister.

CLASSES = (ODEProblem, MultipleShootingProblem, NeuralODE, MultipleShootingLayer)


def names() -> dict[str, Any]:
    """Every attribute of torchdyn's classes and modules, by its full name."""
    found = {f"{cls.__name__}.{name}": value for cls in CLASSES for name, value in vars(cls).items()}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "torchdyn"]:
        found |= {f"{module.__name__}.{name}": value for name, value in vars(module).items()}
    return found


def different(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The names whose objects are not the same ones."""
    return {name for name in one.keys() | other.keys() if one.get(name) is not other.get(name)}


@pytest.fixture
def unregistered() -> Iterator[None]:
    unregister()
    yield
    register()


PATCHED = {
    "ODEProblem.__init__",
    "ODEProblem.odeint",
    "ODEProblem.sensitivity",
    "MultipleShootingProblem.odeint",
    "NeuralODE.trajectory",
    "torchdyn.numerics.odeint",
}


def test_register_and_unregister_are_idempotent_and_reversible() -> None:
    registered = names()
    register()
    assert different(names(), registered) == set()
    unregister()
    try:
        upstream = names()
        assert different(upstream, registered) == PATCHED
        unregister()
        assert different(names(), upstream) == set()
    finally:
        register()
    assert different(names(), registered) == set()


@pytest.mark.usefixtures("unregistered")
def test_unregistered_every_function_is_torchdyns_own() -> None:
    functions = {name: value for name, value in names().items() if name in PATCHED}
    assert functions.keys() == PATCHED - {"ODEProblem.sensitivity"}
    assert {function.__code__.co_filename.rsplit("/", 1)[-1] for function in functions.values()} == {
        "problems.py",
        "neuralde.py",
        "odeint.py",
    }
    assert all(not hasattr(function, "__wrapped__") for function in functions.values())


def test_a_user_that_wraps_a_method_keeps_his_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with torchdiffeq's function."""
    inner, calls = NeuralODE.trajectory, []

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(NeuralODE, "trajectory", wrapper)
    register()
    assert NeuralODE.trajectory is wrapper
    problem = problem_for("torchdyn-rk4")
    solution = model_for(problem, "symplectic", "torchdyn-rk4").trajectory(problem.y0, problem.t)
    assert calls == [1]
    assert solution.requires_grad
    unregister()
    try:
        assert NeuralODE.trajectory is wrapper
    finally:
        register()


# Models across a change.


@pytest.mark.parametrize("later", [False, True], ids=["made with it", "changed to it"])
@each_mode
def test_models_made_before_registering_have_the_modes(mode: str, later: bool) -> None:
    def make(field: Any, *, sensitivity: str, **settings: Any) -> Any:
        unregister()
        try:
            model = NeuralODE(field, sensitivity="autograd" if later else sensitivity, **settings)
        finally:
            register()
        model.sensitivity = sensitivity
        assert model.sensalg == model.vf.sensitivity == sensitivity
        return model

    problem = problem_for("torchdyn-rk4")
    problem.settings["make"] = make
    assert_exact(problem, mode, "torchdyn-rk4")


@each_mode
def test_solves_begun_before_unregistering_can_still_be_differentiated(mode: str) -> None:
    problem = problem_for("torchdyn-dopri5", time_grad=False)
    wanted = [problem.y0, *problem.field.parameters()]  # type: ignore[attr-defined]
    expected = torch.autograd.grad(loss_of(returned(problem, mode, "torchdyn-dopri5")[1]), wanted)
    loss = loss_of(returned(problem, mode, "torchdyn-dopri5")[1])
    unregister()
    try:
        found = torch.autograd.grad(loss, wanted)
    finally:
        register()
    assert all(map(torch.equal, found, expected))
