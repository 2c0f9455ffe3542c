"""Tensors that a field reaches: each is differentiated to once, its graph is walked once, nothing is forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import (
    BACKPROPAGATION,
    DOUBLE,
    Net,
    assert_same_gradients,
    gradients_of,
    initial,
    loss_of,
    over,
    solve,
    times,
    uniform,
)
from torch import Tensor, nn
from ways import Solve, assert_exact_or_clear, each_way, in_some_ways, is_clear, solving, weighed

CONTEXT: Any = None


# What is computed outside and reached inside. The encoder's backward is not linear, so once a stage is not once.


class Clipping(torch.autograd.Function):
    """The identity, whose backward clips: it is not linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0].clamp(-0.01, 0.01)


class Encoder(nn.Module):
    """Counts its backward passes; clips what arrives, by a hook of the tensor or by a function of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight, self.how, self.passes = nn.Parameter(uniform(3, seed=8)), how, 0

    def forward(self) -> Tensor:
        found = torch.tanh(2 * self.weight)
        if self.how == "function":
            return self.counted(Clipping.apply(found))
        found.register_hook(lambda cotangent: cotangent.clamp(-0.01, 0.01))
        return self.counted(found)

    def counted(self, tensor: Tensor) -> Tensor:
        def note(cotangent: Tensor) -> None:
            self.passes += 1

        tensor.register_hook(note)
        return tensor


class ReadsContext(nn.Module):
    """Reaches what was computed outside through a global of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(t, y) + CONTEXT * torch.cos(t)
        return result


class HoldsContext(ReadsContext):
    """Has it as an attribute."""

    def __init__(self, context: Tensor) -> None:
        super().__init__()
        self.context = context

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(t, y) + self.context * torch.cos(t)
        return result


def reaching(context: Tensor, place: str) -> tuple[Any, list[Tensor]]:
    """A field that reaches ``context``, and its parameters."""
    global CONTEXT
    CONTEXT = context
    if place == "attribute":
        held = HoldsContext(context)
        return held, list(held.parameters())
    field = ReadsContext()
    if place == "global":
        return field, list(field.parameters())
    net = field.net
    return (lambda t, y, args=None: net(t, y) + context * torch.cos(t)), list(net.parameters())


@pytest.mark.parametrize("how", ["function", "hook"])
@pytest.mark.parametrize("place", ["global", "attribute", "cell"])
@each_way
def test_an_encoder_whose_backward_is_not_linear_is_walked_once(way: str, place: str, how: str) -> None:
    """9 to 17 times the gradient, and 200 passes in 50 steps: its graph was walked once a stage."""
    passes = []

    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        encoder, y0 = Encoder(how), initial()
        context = encoder()
        field, own = reaching(context, place)
        loss = weighed(run(field, y0, (*own, context)))
        loss.backward(retain_graph=True)
        passes.append(encoder.passes)
        return loss, {"y0": y0, "weight": encoder.weight, **{f"own{i}": tensor for i, tensor in enumerate(own)}}

    assert_exact_or_clear(case, way)
    assert set(passes) == {1}


class Reaching(nn.Module):
    """Reaches a tensor that is held in an object's slots, where no search looks."""

    def __init__(self, net: nn.Module, reached: Tensor) -> None:
        super().__init__()
        self.net, self.held = net, Slots()
        self.held.tensor = reached

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        result: Tensor = self.net(t, y) + self.held.tensor
        return result


class Slots:
    __slots__ = ("tensor",)

    tensor: Tensor


@pytest.mark.parametrize("place", ["slots of a module", "default argument"])
@pytest.mark.parametrize("earlier", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
@in_some_ways
def test_earlier_solves_that_a_field_closes_over_are_replayed_once(way: str, earlier: int, place: str) -> None:
    """35, 735 and 14,735 evaluations for 1, 2 and 3 such solves, where 105 are needed: each stage replayed them all."""
    nets = [Net(seed=seed) for seed in range(earlier + 1)]

    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        y0, context = initial(), torch.zeros(2, 3, dtype=DOUBLE)
        for net in nets:
            listed = (*net.parameters(), context) if context.requires_grad else tuple(net.parameters())
            field: Any = Reaching(net, context)
            if place == "default argument":
                field = lambda t, y, args=None, net=net, reached=context: net(t, y) + reached  # noqa: E731
            context = run(field, y0, listed)
        wanted = {f"{i}.{name}": p for i, net in enumerate(nets) for name, p in net.named_parameters()}
        return weighed(context), {"y0": y0, **wanted}

    assert_exact_or_clear(case, way, exact=True)
    loss, _ = case(solving(way, truth=False))
    forward = [net.evaluations for net in nets]
    loss.backward()
    # 7 steps of 4 stages at most, each evaluated twice in backward.
    assert all(net.evaluations - before <= 2 * 7 * 4 for net, before in zip(nets, forward, strict=True))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("leaf", "derived")]


@pytest.mark.parametrize("listed", ["both", "both, the other way round", "twice", *SLOW])
@over(["rk4", "dopri5", "adaptive_heun", "implicit_adams"])
def test_adjoint_params_that_are_computed_from_one_another(mode: str, method: str, listed: str) -> None:
    """torchcde's tests list a tensor and one computed from it: an error ("counted twice"), where upstream takes it."""
    leaf = uniform(3, 3, seed=2).requires_grad_()
    derived = torch.sin(2 * leaf) @ leaf.t()
    y0, t = uniform(2, 3, seed=4).requires_grad_(), times().requires_grad_()

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(y @ derived + t) @ (leaf if listed.startswith("both") else derived)

    params = {"leaf": (leaf,), "derived": (derived,), "both": (leaf, derived), "twice": (derived, derived)}
    wanted = {"y0": y0, "t": t, "leaf": leaf}
    chosen = params.get(listed, (derived, leaf))
    found = gradients_of(loss_of(solve(mode, field, y0, t, method, adjoint_params=chosen)), wanted)
    assert_same_gradients(found, gradients_of(loss_of(solve(BACKPROPAGATION, field, y0, t, method)), wanted))


class Noisy(nn.Module):
    """FFJORD's way: noise on a plain attribute, set before each solve or by its first evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self._e: Tensor | None = None

    def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        if self._e is None:
            self._e = torch.randn(y.shape, dtype=y.dtype)
        result: Tensor = self.net(t, y) + 0.5 * self._e * y
        return result


@pytest.mark.parametrize("drawn", ["before the solve", "by the first evaluation"])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3), (4, 3))], ids=["one shape", "two shapes"])
@each_way
def test_a_flow_with_noise_of_its_own_is_used_twice(way: str, shapes: tuple[tuple[int, ...], ...], drawn: str) -> None:
    """Forward and inverse KL: an error in torchdiffeq, as the first solve was replayed with the second's noise."""

    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(5)
        flow, states = Noisy(), [initial(*shape) for shape in shapes]
        total = torch.zeros((), dtype=DOUBLE)
        for i, y0 in enumerate(states):
            flow._e = None if drawn == "by the first evaluation" else torch.randn(y0.shape, dtype=DOUBLE)
            total = total + weighed(run(flow, y0), i)
        return total, {"one": states[0], "other": states[1], **dict(flow.named_parameters())}

    assert_exact_or_clear(case, way, exact=drawn == "before the solve")


# What leaves the field other than through its slope.


def in_a_list(net: Net) -> tuple[Any, list[Tensor]]:
    terms: list[Tensor] = []

    def field(t: Tensor, y: Tensor, args: Any = None) -> Tensor:
        slope: Tensor = net(t, y)
        terms.append(slope.square().sum())
        return slope

    return field, terms


def by_a_hook(net: Net) -> tuple[Any, list[Tensor]]:
    terms: list[Tensor] = []
    net.outer.register_forward_hook(lambda module, args, result: terms.append(result.square().sum()))
    return net, terms


def on_an_attribute(net: Net) -> tuple[Any, list[Tensor]]:
    class Summing(Net):
        def forward(self, t: Tensor, y: Tensor, args: Any = None) -> Tensor:
            slope = super().forward(t, y)
            terms[:] = [terms[0] + slope.square().sum()] if terms else [slope.square().sum()]
            return slope

    terms: list[Tensor] = []
    net.__class__ = Summing
    return net, terms


@pytest.mark.parametrize("collect", [in_a_list, by_a_hook, on_an_attribute], ids=lambda collect: collect.__name__)
@in_some_ways
def test_a_term_of_the_loss_that_is_collected_inside_the_field_is_reported(
    way: str, collect: Callable[[Net], tuple[Any, list[Tensor]]]
) -> None:
    """Under `use` its gradient was partial: its graph reaches the state of its own evaluation and no further."""

    def case(run: Solve) -> tuple[Tensor, dict[str, Tensor]]:
        net, y0 = Net(), initial()
        field, terms = collect(net)
        state = run(field, y0, tuple(net.parameters()))
        return weighed(state) + torch.stack(terms).sum(), {"y0": y0, **dict(net.named_parameters())}

    loss, wanted = case(solving(way, truth=True))
    truth = gradients_of(loss, wanted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loss, wanted = case(solving(way, truth=False))
            found = gradients_of(loss, wanted)
        except Exception as problem:
            if not is_clear(problem):
                raise
            return
    if not any(is_clear(warning.message) for warning in caught if isinstance(warning.message, Warning)):
        assert_same_gradients(found, truth)
