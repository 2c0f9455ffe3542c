"""Where users keep what a field uses, tensors and modules: `use` and torchdyn find it, odeint_adjoint is told."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DOUBLE, Mixing, Net, gradients_of, initial, uniform
from torch import Tensor, nn
from ways import WAYS, Case, Solve, assert_exact_or_clear, each_way, weighed


class Slots:
    __slots__ = ("tensor",)

    tensor: Tensor


def field_of(kind: str, leaf: Tensor, computed: Tensor, net: nn.Module) -> Callable[..., Any]:
    controls, slots = [computed, leaf], Slots()
    slots.tensor = computed

    def closure(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        return torch.sin(leaf * y) + computed * torch.cos(t)

    fields: dict[str, Callable[..., Any]] = {
        "closure": closure,
        "lambda that calls a closure": lambda t, y, args=None: closure(t, y) * 2,
        "network in a lambda": lambda t, y, args=None: net(t, y),
        "list by time": lambda t, y, args=None: torch.sin(controls[int(t > 0.5)] * y),
        "both, one computed from the other": lambda t, y, args=None: computed * y + leaf * (t > 0.5),
        "slots beside the rest": lambda t, y, args=None: torch.sin(slots.tensor * y) + computed + net(t, y),
        "a parameter returned": lambda t, y, args=None: leaf,
        "used late alone": lambda t, y, args=None: torch.sin(y) + (slots.tensor if t > 0.7 else 0.0),
    }
    return fields[kind]


KINDS = [
    "closure",
    "lambda that calls a closure",
    "network in a lambda",
    "list by time",
    "both, one computed from the other",
    "slots beside the rest",
    "a parameter returned",
    "used late alone",
]


def held(kind: str, *, y0_grad: bool = True) -> Case:
    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        encoder, net = nn.Linear(2, 3, dtype=DOUBLE), Mixing(3)
        with torch.no_grad():
            encoder.weight.copy_(uniform(3, 2, seed=1))
            encoder.bias.copy_(uniform(3, seed=2))
        leaf = uniform(3, seed=9).requires_grad_()
        computed = encoder(uniform(2, seed=8)) * leaf
        y0 = uniform(3, seed=7).requires_grad_(y0_grad)
        wanted = {"leaf": leaf, **dict(encoder.named_parameters()), **dict(net.named_parameters())}
        wanted = {"y0": y0, **wanted} if y0_grad else wanted
        listed = (leaf, *encoder.parameters(), *net.parameters())
        return weighed(run(field_of(kind, leaf, computed, net), y0, listed)), wanted

    return case


@pytest.mark.parametrize("kind", KINDS)
@each_way
def test_what_a_field_uses_has_its_gradient_wherever_it_is_held(way: str, kind: str) -> None:
    """What a field of torchdyn's reaches late alone may be reported instead."""
    exact = not (way == "torchdyn" and kind in ("slots beside the rest", "used late alone", "list by time"))
    assert_exact_or_clear(held(kind), way, exact=exact)


@pytest.mark.parametrize("kind", ["closure", "list by time", "slots beside the rest", "used late alone"])
@pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("use")])
def test_what_a_field_uses_where_the_state_needs_no_gradient(way: str, kind: str) -> None:
    assert_exact_or_clear(held(kind, y0_grad=False), way, exact=True)


# Modules that a field holds: their statistics move once, their flags are those of the solve.


def holding(norm: nn.Module, net: nn.Module, kind: str) -> Any:
    """A field that uses a batch norm and a network, held in a way."""
    parts = {"norm": norm, "layers": [net]}

    def closure(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = net(t, norm(y))
        return result

    class Plain:
        def __init__(self) -> None:
            self.norm, self.net = norm, net

        def slope(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            result: Tensor = self.net(t, self.norm(y))
            return result

    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.net = norm, net

        def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            result: Tensor = self.net(t, self.norm(y))
            return result

    return {
        "module": Owner(),
        "closure": closure,
        "partial": functools.partial(lambda norm, t, y, args=None: net(t, norm(y)), norm),
        "container": lambda t, y, args=None: parts["layers"][0](t, parts["norm"](y)),  # type: ignore[index,operator]
        "plain object": Plain().slope,
        "default argument": lambda t, y, args=None, norm=norm: net(t, norm(y)),
    }[kind]


@pytest.mark.parametrize("flipped", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["eval() before", ""])
@pytest.mark.parametrize("kind", ["module", "closure", "partial", "container", "plain object", "default argument"])
@each_way
def test_batch_norm_moves_its_statistics_once_wherever_it_is_held(way: str, kind: str, flipped: bool) -> None:
    """In odeint_adjoint they moved twice where no module held them, and `eval()` before backward was an error."""
    statistics = []

    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        norm, net, y0 = nn.BatchNorm1d(3, dtype=DOUBLE), Net(), initial(6, 3)
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, 1.5, -0.7]))
        wanted = {"y0": y0, **dict(norm.named_parameters()), **dict(net.named_parameters())}
        loss = weighed(run(holding(norm, net, kind), y0, (*norm.parameters(), *net.parameters())))
        if flipped:
            norm.eval()
        moved = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        gradients_of(loss, wanted)
        assert all(torch.equal(moved[name], buffer) for name, buffer in norm.named_buffers())
        assert norm.training != flipped
        statistics.append(moved)
        return loss, wanted

    assert_exact_or_clear(case, way, exact=True)
    truth, found = statistics
    assert all(torch.equal(found[name], truth[name]) for name in truth)
