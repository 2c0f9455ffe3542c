"""What a caller probably did not mean is said: by an error before the solve, or by a warning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import MODES, Net, each_mode, error, initial, loss_of, over, solve, times
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_symplectic
from torchdiffeq_symplectic import MissingGradientWarning
from torchdiffeq_symplectic.hosts.torchdiffeq import _upstream_odeint_adjoint as early_bound

ENTRY_POINTS: dict[str, Callable[..., Any]] = {
    "package": torchdiffeq_symplectic.odeint_adjoint,
    "late bound": lambda *args, **kwargs: torchdiffeq.odeint_adjoint(*args, **kwargs),
    "early bound": early_bound,
}
# By default the mode "symplectic" by every entry, the others by one each.
each_entry_point_and_mode = over(ENTRY_POINTS)
each_entry_point = pytest.mark.parametrize("method", ENTRY_POINTS)


def call(entry: str, mode: str, func: Any, **arguments: Any) -> Any:
    own = dict(MODES[mode])
    own["adjoint_options"] = {**own.get("adjoint_options", {}), **arguments.pop("adjoint_options", {})}
    y0 = arguments.pop("y0", None)
    return ENTRY_POINTS[entry](func, initial() if y0 is None else y0, times(), **{"method": "rk4", **own, **arguments})


@pytest.mark.parametrize("method", ["package", "late bound"])
@each_mode
def test_bare_tensor_as_adjoint_params(mode: str, method: str) -> None:
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=r"adjoint_params must be a sequence of tensors.*adjoint_params=\(tensor,\)"):
        call(method, mode, lambda t, y: y @ weight, adjoint_params=weight)


@pytest.mark.parametrize("bare", [torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)], ids=str)
@each_mode
def test_bare_parameter_through_the_early_bound_function(mode: str, bare: Tensor) -> None:
    # Upstream has taken it apart into its rows before the modes see it; the rows are no part of the field's graph.
    weight = nn.Parameter(bare)
    with pytest.warns(MissingGradientWarning, match=r"1 tensor\(s\)"):
        loss_of(call("early bound", mode, lambda t, y: y * weight.sum(), adjoint_params=weight)).backward()


@each_entry_point_and_mode
def test_captured_leaf_in_no_list(mode: str, method: str) -> None:
    net, forgotten = Net(), torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    loss = loss_of(call(method, mode, lambda t, y: net(t, y) * forgotten, adjoint_params=tuple(net.parameters())))
    with pytest.warns(MissingGradientWarning, match=r"1 tensor\(s\) that require a gradient .*\(3,\)") as caught:
        loss.backward()
    assert len(caught) == 1


@each_entry_point_and_mode
def test_captured_tensor_that_is_derived_from_leaves_in_no_list(mode: str, method: str) -> None:
    net, forgotten = Net(), torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    control = forgotten.square().sum()
    loss = loss_of(call(method, mode, lambda t, y: net(t, y) * control, adjoint_params=tuple(net.parameters())))
    with pytest.warns(MissingGradientWarning, match=r"1 tensor\(s\)"):
        loss.backward()
    assert forgotten.grad is None


@each_entry_point_and_mode
def test_captured_leaf_where_nothing_listed_needs_a_gradient(mode: str, method: str) -> None:
    forgotten = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    y0 = initial().detach()
    with pytest.warns(MissingGradientWarning, match=r"\(3,\)"):
        call(method, mode, lambda t, y: torch.sin(y) * forgotten, y0=y0, adjoint_params=())


@pytest.mark.parametrize("needs", [True, False], ids=["y0 needs a gradient", "nothing needs one"])
@each_entry_point_and_mode
def test_no_params_with_a_module_is_a_choice(mode: str, method: str, needs: bool) -> None:
    net = Net()
    solution = call(method, mode, net, y0=initial().detach().requires_grad_(needs), adjoint_params=())
    if needs:
        loss_of(solution).backward()
    assert all(parameter.grad is None for parameter in net.parameters())


@each_entry_point_and_mode
def test_captured_tensors_without_gradient_are_no_oversight(mode: str, method: str) -> None:
    net, fixed = Net(), torch.ones(3, dtype=torch.float64)
    net.rate.requires_grad_(False)
    y0 = initial()
    loss_of(
        call(method, mode, lambda t, y: net(t, y) * fixed, y0=y0, adjoint_params=tuple(net.parameters()))
    ).backward()
    assert net.rate.grad is None
    assert y0.grad is not None


@each_mode
def test_tensors_derived_from_listed_ones_are_no_oversight(mode: str) -> None:
    weight = torch.eye(3, dtype=torch.float64, requires_grad=True)
    derived = torch.sin(weight) + 1
    y0, t, wanted = initial(), times(), [weight]

    def run(mode: str) -> list[Tensor]:
        solution = solve(mode, lambda t, y: torch.tanh(y @ derived), y0, t, adjoint_params=(weight,))
        return list(torch.autograd.grad(loss_of(solution), wanted, retain_graph=True))

    assert error(run(mode), run("backprop")) < 1e-11


@pytest.mark.parametrize("method", ["late bound", "early bound"])
@pytest.mark.parametrize("name", ["simplectic", "ACA", "adjoint"])
def test_unknown_adjoint_method_lists_the_known_ones(name: str, method: str) -> None:
    with pytest.raises(ValueError, match=f'^Invalid method "{name}". Must be one of {{"') as raised:
        loss_of(
            ENTRY_POINTS[method](Net(), initial(), times(), method="rk4", adjoint_method=name, adjoint_options={})
        ).backward()
    message = str(raised.value)
    assert all(f'"{known}"' in message for known in (*SOLVERS, *torchdiffeq_symplectic.MODES))


@each_entry_point_and_mode
def test_unknown_adjoint_options_warn(mode: str, method: str) -> None:
    with pytest.warns(UserWarning, match=r"Unexpected arguments \{'chekpoint': 3\}"):
        call(method, mode, Net(), adjoint_options={"chekpoint": 3})


@pytest.mark.parametrize("mode", ["aca", "baseline"])
def test_an_option_of_another_mode_is_unknown(mode: str) -> None:
    with pytest.warns(UserWarning, match=r"Unexpected arguments \{'checkpoint': 'stages'\}"):
        call("package", mode, Net(), adjoint_options={"checkpoint": "stages"})


@pytest.mark.parametrize("value", ["step", "STAGES", None, 3, True, ["steps"]], ids=repr)
@each_entry_point
def test_bad_checkpoint(method: str, value: object) -> None:
    with pytest.raises(ValueError, match=r'adjoint_options\["checkpoint"\] must be one of .*"steps", "stages"'):
        call(method, "symplectic", Net(), adjoint_options={"checkpoint": value})


@pytest.mark.parametrize("value", ["raise", None, False, ["error"]], ids=repr)
@each_entry_point_and_mode
def test_bad_replay_check(mode: str, method: str, value: object) -> None:
    with pytest.raises(ValueError, match=r'adjoint_options\["replay_check"\] must be one of .*error.*warn.*ignore'):
        call(method, mode, Net(), adjoint_options={"replay_check": value})


@each_mode
def test_bad_options_are_refused_without_gradients_too(mode: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="replay_check"):
        call("package", mode, Net(), adjoint_options={"replay_check": "raise"})


@each_entry_point_and_mode
def test_scipy_solver_is_refused_before_the_solve(mode: str, method: str) -> None:
    net = Net()
    name = MODES[mode]["adjoint_method"]
    with pytest.raises(NotImplementedError, match=f'method="scipy_solver".*adjoint_method="{name}".*Use a'):
        call(method, mode, net, method="scipy_solver", options={"solver": "RK45"})
    assert net.evaluations == 0


@pytest.mark.parametrize("func", ["function", "partial", "bound method"])
@each_entry_point_and_mode
def test_func_that_is_no_module_without_params(mode: str, method: str, func: str) -> None:
    net = Net()
    fields = {"function": lambda t, y: -y, "partial": functools.partial(net), "bound method": net.forward}
    with pytest.raises(ValueError, match=r"func must be an instance of nn.Module.*`adjoint_params=\(\)`"):
        call(method, mode, fields[func])
    assert net.evaluations == 0
