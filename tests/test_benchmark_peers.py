"""Other packages as contenders: their truth is backpropagation through their own solve, and errors are known ones."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from harness import Net, initial, loss_of, times
from torch import Tensor, nn

pytest.importorskip("pandas", reason='needs the extra "cli"')

from torchdiffeq_symplectic.experiments.benchmark import Problem, installed
from torchdiffeq_symplectic.experiments.benchmark.peers import PEERS, Flat
from torchdiffeq_symplectic.experiments.benchmark.problem import as_tuple, flatten

CONTENDERS = {contender.name: contender for contender in installed()}


class Pair(Net):
    def forward(self, t: Tensor, y: Any) -> Any:  # type: ignore[override]
        return super().forward(t, y[0]), y[0].sum(dim=1) * y[1]


def problem(**changes: Any) -> Problem:
    basic = Problem(Net(), initial().detach(), times(0.0, 0.4, 1.3), loss_of, "dopri5", 1e-4, 1e-4, {"first_step": 0.1})
    return basic.replace(**changes)


PROBLEMS: dict[str, dict[str, Any]] = {
    "three times": {},
    "two times": {"t": times(0.1, 1.3)},
    "tuple": {"field": Pair(), "y0": (initial(2, 3).detach(), initial(2).detach())},
    "stack": {"field": nn.ModuleList([Net(), Net()])},
}
each_problem = pytest.mark.parametrize("changes", PROBLEMS.values(), ids=PROBLEMS)
OWN = ["baseline", "aca", "symplectic", "symplectic, stages"]


def error(name: str, chosen: Problem) -> float:
    """Relative, of a contender's gradient."""
    if name not in CONTENDERS:
        pytest.skip(f"{name.partition(',')[0]} is not installed")
    contender = CONTENDERS[name]
    found, truth = (flatten(chosen.gradient(solve)) for solve in (contender.solve, contender.truth))
    return float((found - truth).norm() / truth.norm())


@each_problem
@pytest.mark.parametrize("name", OWN)
def test_this_packages_modes_are_exact_in_torchdyn(name: str, changes: dict[str, Any]) -> None:
    assert error(f"torchdyn, {name}", problem(**changes)) < 1e-13


@each_problem
@pytest.mark.parametrize("name", ["torchdyn, adjoint", "zuko"])
def test_adjoints_of_another_equation_are_off_by_the_tolerance(name: str, changes: dict[str, Any]) -> None:
    assert 1e-9 < error(name, problem(**changes)) < 1e-1


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("torchdyn, aca", {"method": "rk4", "options": {"step_size": 0.1}}, "only for dopri5, euler, midpoint"),
        ("torchdyn, aca", {"options": {"first_step": 0.1, "max_step": 0.1}}, "has no max_step"),
        (
            "torchdyn, aca",
            {"method": "euler", "options": {"step_size": 0.1}, "t": times(0.0, 0.45, 1.0)},
            "its steps must end at the output times",
        ),
        ("zuko", {"method": "euler", "options": {"step_size": 0.1}}, "only in place of dopri5"),
        ("zuko", {"options": {"first_step": 0.1, "max_num_steps": 1000}}, None),
    ],
)
def test_what_it_does_not_solve(name: str, changes: dict[str, Any], reason: str | None) -> None:
    if name not in CONTENDERS:
        pytest.skip("not installed")
    assert CONTENDERS[name].refusal(problem(**changes)) == reason


def test_a_flat_field_is_the_field() -> None:
    y = (initial(2, 3).detach(), initial(2).detach())
    field = Flat(Pair(), y)
    slope = field.unpack(field(torch.tensor([0.3]), field.pack(y))[None])
    for part, truth in zip(as_tuple(slope), Pair()(torch.tensor(0.3), y), strict=True):
        assert torch.equal(part[0], truth)


def test_who_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [one.name for one in installed() if one.name.partition(",")[0] in PEERS] == []
