"""The benchmark's problems are what their names and labels say, and each can be differentiated exactly."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torchdiffeq

pytest.importorskip("pandas", reason='needs the extra "cli"')

from torchdiffeq_symplectic.experiments.benchmark import installed
from torchdiffeq_symplectic.experiments.benchmark.problem import Case, flatten
from torchdiffeq_symplectic.experiments.benchmark.problems import PROBLEMS
from torchdiffeq_symplectic.experiments.benchmark.problems.dynamics import ThreeBodies

NAMES = [
    "cnf",
    "kdv",
    "cahn-hilliard",
    "tolerance",
    "precision",
    "order",
    "steps",
    "outputs",
    "small",
    "resnet",
    "stall",
]
CASES = [(name, case) for name, series in PROBLEMS.items() for case in series.cases]
SYMPLECTIC = next(contender for contender in installed() if contender.name == "symplectic")


def ids(cases: list[tuple[str, Case]]) -> list[str]:
    return [f"{name}, {case.label}" for name, case in cases]


def build(name: str, label: str, seed: int = 0) -> object:
    (case,) = (case for case in PROBLEMS[name].cases if case.label == label)
    return case.build(seed)


def needs_data(label: str) -> None:
    if "breast cancer" in label and importlib.util.find_spec("sklearn") is None:
        pytest.skip("needs scikit-learn")


@pytest.mark.parametrize("name", NAMES)
def test_labels_tell_cases_apart_and_curves_have_an_axis(name: str) -> None:
    series = PROBLEMS[name]
    labels = [case.label for case in series.cases]
    assert len(set(labels)) == len(labels)
    values = [(case.panel, case.value) for case in series.cases]
    if series.axis is None:
        assert all(value is None for _, value in values)
    else:
        assert len(set(values)) == len(values)
        assert all(value is not None and value > 0 for _, value in values)


@pytest.mark.parametrize(("name", "case"), CASES, ids=ids(CASES))
def test_a_seed_gives_one_problem(name: str, case: Case) -> None:
    needs_data(case.label)
    random = torch.get_rng_state()
    one, same, other = case.build(3), case.build(3), case.build(4)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(flatten(one.leaves), flatten(same.leaves))
    if name != "tolerance":  # where nothing is drawn
        assert not torch.equal(flatten(one.leaves), flatten(other.leaves))


# The first of each panel; not where odeint also differentiates its choice of the first step.
SMALLEST = [
    (name, next(case for case in series.cases if case.panel == panel))
    for name, series in PROBLEMS.items()
    if name != "stall"
    for panel in dict.fromkeys(case.panel for case in series.cases)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), SMALLEST, ids=ids(SMALLEST))
def test_the_exact_gradient_is_backpropagations(name: str, case: Case) -> None:
    needs_data(case.label)
    problem = case.build(0).double()
    expected = flatten(problem.gradient(torchdiffeq.odeint))
    found = flatten(problem.gradient(SYMPLECTIC.solve))
    assert (found - expected).norm() < 1e-11 * expected.norm()


@pytest.mark.parametrize("case", PROBLEMS["order"].cases, ids=[case.label for case in PROBLEMS["order"].cases])
def test_a_method_has_the_evaluations_that_order_says(case: Case) -> None:
    problem = case.build(0)
    calls = 0

    class Counted(torch.nn.Module):
        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return y

    with torch.no_grad():
        problem.replace(field=Counted()).solve(torchdiffeq.odeint)
    assert case.value is not None
    assert 0 <= calls - 30 * case.value <= 2  # an adaptive method evaluates at the start


def test_three_bodies_keep_momentum_and_energy() -> None:
    field = ThreeBodies()
    case = next(case for case in PROBLEMS["tolerance"].cases if case.label == "three bodies, rtol 1e-10")
    with torch.no_grad():
        solution = case.build(0).solve(torchdiffeq.odeint)
    assert isinstance(solution, torch.Tensor)
    before, after = solution[0], solution[-1]
    masses = field.masses.detach()

    def energy(y: torch.Tensor) -> torch.Tensor:
        kinetic = (masses * y[1].square().sum(-1)).sum() / 2
        pairs = [(0, 1), (0, 2), (1, 2)]
        return kinetic - torch.stack([masses[i] * masses[j] / (y[0, i] - y[0, j]).norm() for i, j in pairs]).sum()

    momentum, later = ((masses[:, None] * y[1]).sum(0) for y in (before, after))
    assert torch.allclose(momentum, later, atol=1e-12)
    assert abs(energy(after) - energy(before)) < 1e-8
    assert (after - before).norm() > 0.5
