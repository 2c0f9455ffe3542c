"""What the adapter takes for granted of torchdiffeq's entry: the call, its normalised arguments, the field's wrappers.

Each failure says what a new torchdiffeq does otherwise; where that is used stands in
``torchdiffeq_symplectic/hosts/torchdiffeq/_host.py``. ``test_torchdiffeq_solver_seams.py`` has the solvers' own seams.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn
from torchdiffeq._impl import adjoint, misc

import torchdiffeq_symplectic
from torchdiffeq_symplectic.hosts import torchdiffeq as adapter
from torchdiffeq_symplectic.hosts.torchdiffeq._host import SOLVERS, RKAdaptiveStepsizeODESolver
from torchdiffeq_symplectic.hosts.torchdiffeq._timed import Timed

Replicate = Callable[[nn.Module, dict[nn.Parameter, Tensor]], nn.Module]

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


def test_check_of_options_comes_before_the_autograd_function(upstream: Callable[..., Any]) -> None:
    # Documented: a name imported before this package keeps upstream's check.
    with pytest.raises(ValueError, match="adjoint_options"):
        upstream(Field(), Y0, T, method="rk4", options={}, adjoint_method="symplectic")
    upstream(Field(), Y0, T, method="rk4", options={}, adjoint_method="symplectic", adjoint_options={})


# The parameters that are found in a module.


def test_find_parameters_takes_a_module_and_gives_all_its_parameters() -> None:
    func = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))
    func[0].weight.requires_grad_(False)
    assert list(map(id, adjoint.find_parameters(func))) == list(map(id, func.parameters()))


def test_find_parameters_finds_those_of_a_replica(replica_of: Replicate) -> None:
    # In nn.DataParallel's replicas, parameters are attributes, results of other operations.
    func = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    copies = [parameter.clone() for parameter in func.parameters()]
    replica = replica_of(func, dict(zip(func.parameters(), copies, strict=True)))
    assert list(map(id, adjoint.find_parameters(replica))) == list(map(id, copies))


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


def test_decreasing_times_are_negated_with_what_belongs_to_them() -> None:
    def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(t, T.flip(0)), "the user's grid constructor no longer sees his own times"
        return torch.cat([t, t[-1:]])

    inner = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    options = {"step_t": inner, "jump_t": 0.5 * inner, "grid_constructor": grid}
    _, func, _, t, _, _, _, options, _, decreasing = check(Field(), Y0, T.flip(0), **options)
    assert decreasing is True
    assert torch.equal(t, -T.flip(0))
    assert torch.equal(options["step_t"], -inner)
    assert options["step_t"].requires_grad, "normalised step_t is no longer part of the user's graph"
    assert torch.equal(options["jump_t"], -0.5 * inner)
    assert torch.equal(options["grid_constructor"](func, Y0, t)[:-1], t)


def test_normalised_times_and_state_carry_gradients() -> None:
    y0 = (Y0.clone().requires_grad_(), Y0[:, 0])
    _, _, flat, t, *_ = check(TupleField(), y0, T.flip(0).requires_grad_())
    assert flat.requires_grad
    assert t.requires_grad


def test_event_function_is_wrapped_to_take_what_the_solver_has() -> None:
    result = misc._check_inputs(
        TupleField(), (Y0, Y0[:, 0]), T[:2], 1e-7, 1e-9, None, None, lambda t, y: y[0].sum() - t, SOLVERS
    )
    assert result[8](T[0], result[2]).ndim == 0


@pytest.mark.usefixtures("needs_callbacks")
def test_callbacks_are_attributes_of_the_wrapped_field() -> None:
    func = check(Field(), Y0, T)[1]
    for name in ("callback_step", "callback_accept_step", "callback_reject_step"):
        assert callable(getattr(func, name)), "callbacks are no longer reached through the field: Timed hides them"


def test_flat_to_shape_undoes_the_flattening() -> None:
    shapes = [torch.Size([2, 3]), torch.Size([]), torch.Size([0, 4]), torch.Size([2])]
    flat = torch.arange(18.0).reshape(2, 9)
    parts = misc._flat_to_shape(flat, (2,), shapes)
    assert [part.shape for part in parts] == [torch.Size([2, *shape]) for shape in shapes]
    assert torch.equal(torch.cat([part.reshape(2, -1) for part in parts], dim=1), flat)


# The wrappers' arithmetic.


def test_tuple_wrapper_flattens_and_reverse_wrapper_negates() -> None:
    field = TupleField()
    y = torch.linspace(-1, 2, 8, dtype=torch.float64)
    t = torch.tensor(0.4, dtype=torch.float64)
    flat = misc._TupleFunc(field, [torch.Size([2, 3]), torch.Size([2])])
    first, second = field(t, (y[:6].reshape(2, 3), y[6:]))
    assert torch.equal(flat(t, y), torch.cat([first.reshape(-1), second]))
    assert torch.equal(misc._ReverseFunc(flat, mul=-1.0)(t, y), -flat(-t, y))


def test_perturb_has_three_members() -> None:
    assert [member.name for member in misc.Perturb] == ["NONE", "PREV", "NEXT"], "stages may be perturbed in a new way"


STATES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]
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


@pytest.mark.parametrize("name", ["base_func", "callback_step"])
@pytest.mark.usefixtures("needs_callbacks")
def test_timed_shows_the_attributes_of_the_wrapper(name: str) -> None:
    wrapper = check(Field(), Y0, T)[1]
    assert getattr(Timed(wrapper.base_func, wrapper), name) is getattr(wrapper, name)


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


def test_odeint_asks_the_table_at_each_call_and_solves_by_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of odeint that was imported earlier looks up the same global, so it is reached, too."""
    asked: list[tuple[Any, ...]] = []

    class Solver:
        @classmethod
        def valid_callbacks(cls) -> set[str]:
            return set()

        def __init__(self, **arguments: Any) -> None:
            asked.append(tuple(sorted(arguments)))

        def integrate(self, t: Tensor) -> Tensor:
            return torch.full((len(t), *Y0.shape), 5.0, dtype=Y0.dtype)

    class Watching(dict[str, Any]):
        def __getitem__(self, method: str) -> Any:
            return Solver

    monkeypatch.setattr(sys.modules["torchdiffeq._impl.odeint"], "SOLVERS", Watching(rk4=None))
    solution = torchdiffeq.odeint(Field(), Y0, T, method="rk4", options={"step_size": 0.1})
    assert torch.equal(solution, torch.full((len(T), *Y0.shape), 5.0, dtype=Y0.dtype))
    assert asked == [("atol", "func", "norm", "rtol", "step_size", "y0")]


@pytest.mark.parametrize("method", sorted(SOLVERS))
def test_every_method_is_of_a_known_family_or_refused(method: str) -> None:
    """A method that a release adds must be exact or refused before it starts, without a line about it here."""
    settings: dict[str, Any] = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    if issubclass(SOLVERS[method], RKAdaptiveStepsizeODESolver):
        settings["options"] = {"first_step": 0.05}
    field, y0 = Field(), Y0.clone().requires_grad_()
    inputs = [y0, *field.parameters()]
    try:
        found = torchdiffeq.odeint_adjoint(field, y0, T, adjoint_method="aca", **settings)
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match=f'method="{method}".*adjoint_method="aca"'):
            torchdiffeq.odeint_adjoint(field, y0, T, adjoint_method="aca", **settings)
        return
    expected = torchdiffeq.odeint(field, y0, T, **settings)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.pow(3).sum(), inputs),
        torch.autograd.grad(expected.pow(3).sum(), inputs),
        strict=True,
    ):
        assert (one - other).norm() < 1e-11 * other.norm()


@pytest.mark.parametrize(
    "method", ["euler", "midpoint", "rk4", "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
)
def test_methods_that_are_promised_are_there(method: str) -> None:
    assert method in SOLVERS, "torchdiffeq has dropped a method that the documentation names"
