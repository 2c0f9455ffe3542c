"""Parameters that are others by the time of backward: replaced, substituted, parametrized, frozen, cached.

Each case is a row: it solves, changes what the field finds, gives a loss and the tensors whose gradients are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DOUBLE, Net, gradients_of, initial
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from ways import Case, Solve, assert_exact_or_clear, each_way, weighed

# Parameters that are other ones by the time of backward.


class Block(nn.Module):
    """A model whose forward solves."""

    def __init__(self, run: Solve) -> None:
        super().__init__()
        self.field, self.run = Net(), run

    def forward(self, y0: Tensor) -> Tensor:
        return self.run(self.field, y0)


def functional_call_with_copies(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
    block, y0 = Block(run), initial()
    params = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    return weighed(torch.func.functional_call(block, params, (y0,))), {"y0": y0, **params}


def functional_call_with_adapted_values(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
    """MAML's inner step."""
    block, y0 = Block(run), initial()
    own = dict(block.named_parameters())
    params = {name: p - 0.1 * p.square().sum() * torch.sin(p) for name, p in own.items()}
    return weighed(torch.func.functional_call(block, params, (y0,))), {"y0": y0, **own}


def functional_call_of_the_field(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
    net, y0 = Net(), initial()
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}

    def field(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = torch.func.functional_call(net, params, (t, y))
        return result

    return weighed(run(field, y0, tuple(params.values()))), {"y0": y0, **params}


def state_assigned(field: Net) -> None:
    field.load_state_dict({name: p.detach().clone() for name, p in field.named_parameters()}, assign=True)


def parameter_registered_anew(field: Net) -> None:
    field.inner.weight = nn.Parameter(field.inner.weight.detach().clone())


def module_replaced(field: Net) -> None:
    inner = nn.Linear(3, 5, dtype=DOUBLE)
    inner.load_state_dict(field.inner.state_dict())
    field.inner = inner


def parametrized() -> Net:
    field = Net()
    parametrizations.weight_norm(field.inner)
    return field


def parametrization_added(field: Net) -> None:
    parametrizations.weight_norm(field.inner)


def parametrization_removed(field: Net) -> None:
    parametrize.remove_parametrizations(field.inner, "weight")


def frozen(field: Net) -> None:
    """Frozen for the next solve, as in alternating training; backpropagation's own graph does not mind."""
    field.inner.weight.requires_grad_(False)


def data_replaced(field: Net) -> None:
    for parameter in field.parameters():
        parameter.data = parameter.data.clone()


def after_the_solve(change: Callable[[Net], None]) -> Case:
    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        field, y0 = parametrized() if change is parametrization_removed else Net(), initial()
        before = {n: p for n, p in field.named_parameters() if change is not frozen or n != "inner.weight"}
        loss = weighed(run(field, y0))
        change(field)
        return loss, {"y0": y0, **before}

    return case


def cached_weight(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
    """The module keeps a derived weight until it is told that its parameters have changed."""

    class Caching(Net):
        cached: Tensor | None = None

        def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            if self.cached is None:
                self.cached = torch.tanh(self.inner.weight)
            result: Tensor = self.outer(torch.tanh(y @ self.cached.t() + t * self.rate)) - 0.3 * y
            return result

    field, y0 = Caching(), initial()
    wanted = {name: p for name, p in field.named_parameters() if name != "inner.bias"}
    loss = weighed(run(field, y0))
    return loss, {"y0": y0, **wanted}


CHANGES = [
    state_assigned,
    parameter_registered_anew,
    module_replaced,
    parametrization_added,
    parametrization_removed,
    frozen,
    data_replaced,
]
CHANGED: dict[str, Case] = {
    **{change.__name__: after_the_solve(change) for change in CHANGES},
    "functional_call_with_copies": functional_call_with_copies,
    "functional_call_with_adapted_values": functional_call_with_adapted_values,
    "functional_call_of_the_field": functional_call_of_the_field,
    "cached_weight": cached_weight,
}


@pytest.mark.parametrize("case", CHANGED.values(), ids=CHANGED)
@each_way
def test_parameters_that_are_others_by_the_time_of_backward(way: str, case: Case) -> None:
    """Zeros for all of them, in silence."""
    assert_exact_or_clear(case, way)


@pytest.mark.parametrize("inside", ["solve", "solve and backward"])
@each_way
def test_parametrizations_that_are_cached(way: str, inside: str) -> None:
    """Zeros under odeint_adjoint: the first evaluation filled the cache without a graph."""

    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        field, y0 = parametrized(), initial()
        wanted = {"y0": y0, **dict(field.named_parameters())}
        outer = contextlib.ExitStack()
        outer.enter_context(parametrize.cached())
        loss = weighed(run(field, y0))
        if inside == "solve":
            outer.close()
            return loss, wanted
        with outer:
            found = gradients_of(loss, wanted)
        # Gradients as the gradients of a loss that is linear in the tensors.
        pairs = [(found[name], tensor) for name, tensor in wanted.items()]
        terms = [(gradient * tensor).sum() for gradient, tensor in pairs if gradient is not None]
        return torch.stack(terms).sum(), wanted

    assert_exact_or_clear(case, way)
