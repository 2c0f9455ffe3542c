"""What the adapter takes for granted of torchdiffeq's entry: the call, its normalised arguments, the field's wrappers.

Each failure says what a new torchdiffeq does otherwise; where that is used stands in
``torchdiffeq_symplectic/hosts/torchdiffeq/_host.py``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl import adjoint, misc

import torchdiffeq_symplectic
from torchdiffeq_symplectic.hosts import torchdiffeq as adapter
from torchdiffeq_symplectic.hosts.torchdiffeq._host import SOLVERS
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed

T = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
Y0 = torch.tensor([[0.2, -1.0, 0.5], [1.5, 0.1, -0.7]], dtype=torch.float64)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(3, 3, generator=generator, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.matrix) + t


class TupleField(Field):
    def forward(self, t: Tensor, y: Any) -> Any:
        return super().forward(t, y[0]), y[0].sum(dim=1) * y[1]


@pytest.fixture
def unregistered() -> Iterator[None]:
    torchdiffeq_symplectic.unregister()
    yield
    torchdiffeq_symplectic.register()


def check(func: Any, y0: Any, t: Tensor, **options: Any) -> Any:
    """torchdiffeq's normalised arguments."""
    return misc._check_inputs(func, y0, t, 1e-7, 1e-9, None, options or None, None, SOLVERS)


# The function that is called, and the class behind it.


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("module", [torchdiffeq, sys.modules["torchdiffeq._impl"]], ids=lambda module: module.__name__)
def test_odeint_adjoint_is_one_function_in_all_modules(module: ModuleType) -> None:
    assert module.odeint_adjoint is adjoint.odeint_adjoint, "odeint_adjoint is now another one elsewhere: patch both"


@pytest.mark.usefixtures("unregistered")
def test_no_further_module_holds_odeint_adjoint() -> None:
    patched = {"torchdiffeq", "torchdiffeq._impl", "torchdiffeq._impl.adjoint"}
    holders = {
        name
        for name, module in sys.modules.items()
        if name.split(".")[0] == "torchdiffeq" and getattr(module, "odeint_adjoint", None) is adjoint.odeint_adjoint
    }
    assert holders == patched, "register() must replace odeint_adjoint in these modules too, or no longer"


@pytest.mark.usefixtures("unregistered")
def test_arguments_of_odeint_adjoint_are_those_of_ours() -> None:
    theirs, ours = (
        {
            name: (parameter.kind, parameter.default)
            for name, parameter in inspect.signature(function).parameters.items()
        }
        for function in (adjoint.odeint_adjoint, torchdiffeq_symplectic.odeint_adjoint)
    )
    assert theirs == ours, "odeint_adjoint has other arguments or defaults: odeint_adjoint here must follow"


def test_arguments_of_the_autograd_function_are_those_of_ours() -> None:
    theirs = list(inspect.signature(adapter._upstream_method.forward).parameters)[1:]
    ours = list(inspect.signature(adapter._Dispatch.apply).parameters)
    assert theirs == ours, "OdeintAdjointMethod.apply has other arguments: _Dispatch.apply must follow"


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("tupled", [False, True], ids=["tensor", "tuple"])
def test_odeint_adjoint_looks_its_autograd_function_up_at_each_call(
    tupled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    class Instead:
        @staticmethod
        def apply(*arguments: Any) -> Tensor:
            seen.append(arguments)
            y0 = arguments[2]
            return torch.zeros(len(arguments[3]), *y0.shape, dtype=y0.dtype)

    monkeypatch.setattr(adjoint, "OdeintAdjointMethod", Instead)
    func = TupleField() if tupled else Field()
    y0 = (Y0, Y0[:, 0]) if tupled else Y0
    t = T.clone().requires_grad_()
    settings = {"adjoint_method": "anything", "adjoint_options": {"some": "thing"}, "adjoint_rtol": 1e-2}
    adjoint.odeint_adjoint(func, y0, t, rtol=1e-3, atol=1e-4, method="rk4", **settings)
    assert len(seen) == 1, "odeint_adjoint no longer looks OdeintAdjointMethod up: early importers miss the modes"
    *names, _ = inspect.signature(adapter._Dispatch.apply).parameters
    found = dict(zip(names, seen[0], strict=False))
    assert (found["shapes"] is not None) is tupled
    assert isinstance(found["func"], misc._PerturbFunc)
    assert found["y0"].shape == (torch.Size([8]) if tupled else Y0.shape)
    assert found["t"] is t
    assert (found["method"], found["event_fn"]) == ("rk4", None)
    assert (found["adjoint_method"], found["adjoint_rtol"], found["adjoint_atol"]) == ("anything", 1e-2, 1e-4)
    assert found["adjoint_options"]["some"] == "thing", "options of the modes no longer arrive through adjoint_options"
    assert found["t_requires_grad"] is True
    assert seen[0][len(names) :] == tuple(func.parameters()), "adjoint parameters no longer follow the other arguments"


# The normalised arguments.


def test_check_inputs_returns_the_ten_normalised_arguments() -> None:
    y0 = (Y0, torch.ones(2, dtype=torch.float64))
    given = {"first_step": 0.1}
    result = misc._check_inputs(TupleField(), y0, T, [1e-3, 1e-4], 1e-9, None, given, None, SOLVERS)
    assert len(result) == 10, "_check_inputs returns something more or less"
    shapes, func, flat, t, rtol, atol, method, options, event_fn, decreasing = result
    assert shapes == [torch.Size([2, 3]), torch.Size([2])]
    assert isinstance(func, misc._PerturbFunc)
    assert torch.equal(flat, torch.cat([part.reshape(-1) for part in y0]))
    assert t is T
    assert rtol.shape == flat.shape, "list tolerances are no longer spread over the flat state"
    assert (atol, method, event_fn, decreasing) == (1e-9, "dopri5", None, False)
    assert options is not given, "_check_inputs no longer copies options"
    assert options["first_step"] == 0.1
    assert "norm" in options


@pytest.mark.parametrize(
    ("y0", "t", "wrappers"),
    [
        (Y0, T, [misc._PerturbFunc]),
        (Y0, T.flip(0), [misc._PerturbFunc, misc._ReverseFunc]),
        ((Y0, Y0[:, 0]), T, [misc._PerturbFunc, misc._TupleFunc]),
        ((Y0, Y0[:, 0]), T.flip(0), [misc._PerturbFunc, misc._ReverseFunc, misc._TupleFunc]),
    ],
    ids=["tensor", "decreasing", "tuple", "decreasing tuple"],
)
def test_field_is_wrapped_in_known_modules_with_base_func(y0: Any, t: Tensor, wrappers: list[type]) -> None:
    given = TupleField() if isinstance(y0, tuple) else Field()
    func: Any = check(given, y0, t)[1]
    found = []
    while func is not given:
        found.append(type(func))
        func = func.base_func
    assert found == wrappers, "the field is wrapped in something else: Call.given must look through it"


# The wrappers' arithmetic.


def test_perturb_has_three_members() -> None:
    assert [member.name for member in misc.Perturb] == ["NONE", "PREV", "NEXT"], "stages may be perturbed in a new way"


TIMES = [0.0, -0.0, 0.1, -1 / 3, 1.0, 1e-30, -1e-310, 12345.678, 2.0**24 + 1]


@pytest.mark.parametrize("perturb", misc.Perturb, ids=lambda member: member.name)
@pytest.mark.parametrize(
    "state", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128], ids=str
)
@pytest.mark.parametrize("times", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_times_are_those_of_the_wrapper_bit_for_bit(
    perturb: Any, state: torch.dtype, times: torch.dtype, request: pytest.FixtureRequest
) -> None:
    if state.is_complex or times.is_complex:
        request.getfixturevalue("needs_complex")
    seen: list[Tensor] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        seen.append(t)
        return y

    y = torch.ones(3, dtype=state)
    wrapper = misc._PerturbFunc(func)
    timed = Timed(func, wrapper)
    for value in TIMES:
        t = torch.tensor(value, dtype=times)
        wrapper(t, y, perturb=perturb)
        timed(t, y, perturb=perturb)
    for expected, found in zip(seen[::2], seen[1::2], strict=True):
        assert expected.dtype == found.dtype
        same = torch.equal(expected, found) and torch.equal(expected.signbit(), found.signbit())
        assert same, "_PerturbFunc moves times otherwise: Timed must follow"


# The table of methods.


def test_solvers_are_one_table_looked_up_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    solving: Any = sys.modules["torchdiffeq._impl.odeint"]
    assert adjoint.SOLVERS is SOLVERS, "odeint_adjoint has a table of methods of its own"
    assert solving.SOLVERS is not SOLVERS, "the table is not the one through which a choice reaches odeint"
    torchdiffeq_symplectic.unregister()
    assert solving.SOLVERS is SOLVERS
    torchdiffeq_symplectic.register()
    monkeypatch.setitem(SOLVERS, "mine", SOLVERS["rk4"])
    assert torch.equal(
        torchdiffeq.odeint(Field(), Y0, T, method="mine"), torchdiffeq.odeint(Field(), Y0, T, method="rk4")
    )
