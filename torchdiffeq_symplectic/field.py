"""The field of a solve: listened to while the host solves, and evaluated again in backward.

In backward an evaluation is *cut* out of the graph of its step: a cut call keeps only ``(t, Y)``. When its cotangent
arrives, the field is evaluated there once more with its graph, pulled back, and dropped. So the graph of one evaluation
is alive at a time, and a step's adjoint is the symplectic partner of the step (Matsubara, Miyatake, Yaguchi, NeurIPS
2021, https://arxiv.org/abs/2102.09750): for explicit Runge-Kutta methods, autograd through the step is the partitioned
method whose coefficients satisfy ``b_i A_ij + b_j a_ji = b_i b_j``, and no weight is divided by.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.engine import vector_jacobian_products
from torchdiffeq_symplectic.errors import ReplayError
from torchdiffeq_symplectic.graph import Gate, Gated, edge_of, reached
from torchdiffeq_symplectic.products import Products
from torchdiffeq_symplectic.replay import Conditions, ReplayCheck
from torchdiffeq_symplectic.tape import Step
from torchdiffeq_symplectic.uses import Captured, Substituted, derived

__all__ = [
    "Call",
    "DifferentiatedTwice",
    "Field",
    "Linearisation",
    "Listener",
    "detached",
    "differentiable",
    "with_graph",
]


class Call(NamedTuple):
    """An evaluation of the field in the forward pass.

    Attributes:
        draw: the random state before it.
        slope: what it gave, if that is kept.
        new: captured tensors that it reached and no evaluation before it.
    """

    draw: Tensor
    slope: Any
    new: Sequence[Tensor]


class Listener:
    """The field in the place where a host's solver calls it. Once it is `closed`, nothing but the field.

    Args:
        func: ``func(t, y, ...)``.
        conditions: what else it depends on.
        captured: finds the tensors that it uses.
        keeps_slopes: whether slopes are kept.

    Attributes:
        calls: the evaluations since `start_step`.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        conditions: Conditions,
        captured: Captured,
        *,
        keeps_slopes: bool = False,
    ) -> None:
        self._func = func
        self._conditions: Conditions | None = conditions
        self._captured: Captured | None = captured
        self._is_first = True
        self._keeps_slopes = keeps_slopes
        self.calls: list[Call] = []

    def start_step(self) -> None:
        """Forget the evaluations so far."""
        self.calls = []

    @property
    def drew(self) -> bool:
        """Whether an evaluation since `start_step` drew random numbers, or one made elsewhere since.

        Asked once a step: reading the random state is quick, comparing it is not.
        """
        assert self._conditions is not None
        return bool(self.calls) and not torch.equal(self.calls[0].draw, self._conditions.random.get())

    def __call__(self, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The slope, as the host is to have it."""
        if self._conditions is None or self._captured is None:
            return self._func(t, y, *args, **kwargs)
        draw = self._conditions.random.get()
        new: Sequence[Tensor] = ()
        # A solver may differentiate the field itself: by Newton's method, say.
        linked = torch.is_grad_enabled() and any(
            isinstance(part, Tensor) and part.requires_grad for part in pytree.tree_leaves(y)
        )
        if self._captured.looks:
            with self._conditions.autocast():  # without its cache, which would serve later evaluations
                slope, new = self._captured.evaluate(self._func, t, y, *args, linked=linked, **kwargs)
            if self._is_first:
                self._conditions.evaluated()
            self._is_first = False
        elif linked:
            slope = self._func(t, y, *args, **kwargs)
        else:
            slope = self._func(t, detached(y), *args, **kwargs)
            slope = slope.detach() if isinstance(slope, Tensor) else detached(slope)
        self.calls.append(Call(draw, detached(slope) if self._keeps_slopes else None, new))
        return slope

    def replace(self, func: Callable[..., Any]) -> None:
        """Call ``func`` from now on."""
        self._func = func

    def close(self) -> None:
        """Listen no more, and keep nothing of what was heard: a replay calls the field through this."""
        self._conditions = self._captured = None
        self.calls = []


def with_graph(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` where gradients are always enabled, as under backpropagation, for callers that have them disabled.

    A field that differentiates something need not enable them itself.
    """

    def evaluate(t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return func(t, y, *args, **kwargs)
        with torch.enable_grad():
            given = pytree.tree_map(
                lambda part: (
                    part.detach().requires_grad_() if isinstance(part, Tensor) and differentiable(part) else part
                ),
                y,
            )
            slope = func(t.detach(), given, *args, **kwargs)
        return detached(slope)

    return evaluate


def differentiable(part: Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return part.is_floating_point() or part.is_complex()


def detached(value: Any) -> Any:
    """The same without graphs."""
    if isinstance(value, Tensor):
        return value.detach()
    return pytree.tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, value)


class Linearisation(NamedTuple):
    """An evaluation with its graph, good for one vector-Jacobian product.

    Attributes:
        number: of the evaluation in its step.
        value: the slope.
        leaves: what it is a function of: the parts of the state, and the time if products with it are wanted.
    """

    number: int
    value: Any
    leaves: tuple[Tensor, ...]


# Up to this many tensors, autograd is asked for all of them at every evaluation; above, only for those in its graph.
_ASK_FOR_ALL = 64


class Field:
    """The field of a recorded solve, evaluated again step by step.

    Args:
        func: as the host's solver calls it.
        targets: the tensors that it is differentiated with respect to, besides state and time.
        conditions: what else it depends on.
        check: is told whether evaluations give what they gave.
        wants_time: whether the times of the solve need a gradient.
        expected: targets, by number, that the evaluation of a step and number must reach.
        linked: whether products are to be differentiable with respect to the targets.
        retains: whether the graph of an evaluation goes on into graphs made before, which must be kept.

    Attributes:
        cuts: whether calls are cut out of the graph of their step.
        holds: whether the graphs of a step's evaluations are made, and alive, together.
        advancing: whether a step is being done: what it differentiates then is its own affair.
        retains: as given; count: the number of targets.
        gate: between the targets and what they were computed from, where ``linked``.
        products: the products with the targets, summed.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        targets: Sequence[Tensor],
        conditions: Conditions,
        check: ReplayCheck,
        *,
        wants_time: bool,
        expected: Mapping[tuple[int, int], Sequence[int]],
        linked: bool = False,
        retains: bool = False,
    ) -> None:
        self._func = func
        self._conditions = conditions
        self._check = check
        self._expected = expected
        self._present = [i for i, target in enumerate(targets) if target.requires_grad]
        self.retains = retains
        self.wants_time = wants_time
        self.cuts = True
        self.holds = False
        self.advancing = False
        self.count = len(targets)
        self.gate = Gate()
        self.products = Products(targets)
        self._standing = list(targets)
        self._substituted: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        apart = _apart(targets)
        if apart:
            aliases = {
                i: Gated.apply(targets[i], self.gate) if linked else targets[i].detach().requires_grad_() for i in apart
            }
            self._substituted = Substituted((targets[i], alias) for i, alias in aliases.items())
            self._standing = [aliases.get(i, target) for i, target in enumerate(targets)]
        self._asked = [self._standing[i] for i in self._present]
        self._edges: dict[tuple[Any, int], int] = {}
        self._step: Step | None = None
        self._number = 0

    def start_step(self, step: Step) -> None:
        """Evaluate what ``step`` evaluated from here on."""
        self._step = step
        self._number = 0

    def __call__(self, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The slope, as the next evaluation of the present step."""
        assert self._step is not None
        number, self._number = self._number, self._number + 1
        slopes = self._step.slopes
        if number >= self._step.calls:
            raise ReplayError(
                f"the replay of step {self._step.number} evaluates func more often than the forward pass did, "
                f"{self._step.calls} times: its solver remembers something of earlier steps or solves out of sight."
            )
        if not self.cuts:
            slope = self.evaluate(number, t, y, *args, **kwargs)
            key = self._step.number, number
            if key in self._expected and torch.is_grad_enabled():
                parts = [part for part in pytree.tree_leaves(slope) if isinstance(part, Tensor) and part.requires_grad]
                self._compare(key, self.reached_by(parts))
            return slope
        if not torch.is_grad_enabled():
            return self.evaluate(number, t, y, *args, **kwargs) if slopes is None else slopes[number]
        call = _CutCall(self, self._step, number, t.requires_grad, args, kwargs)
        if isinstance(y, Tensor):
            return call.unpack(_Cut.apply(call, t, y))
        parts, call.rebuild = pytree.tree_flatten(y)
        return call.unpack(_Cut.apply(call, t, *parts))

    def evaluate(self, number: int, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        """``func(t, y)`` as evaluation ``number`` of the step did it, in the present gradient mode."""
        assert self._step is not None
        return self.evaluate_as(self._step.draws[number] if self._step.draws else None, t, y, *args, **kwargs)

    def evaluate_as(self, draw: Tensor | None, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        """``func(t, y)`` with these random numbers."""
        if draw is not None:
            self._conditions.random.set(draw)
        with self._substituted, self._conditions.autocast():
            return self._func(t, y, *args, **kwargs)

    def linearise(self, number: int, t: Tensor, *y: Tensor, call: _CutCall | None = None) -> Linearisation:
        """Evaluation ``number`` of the step, with its graph, at fresh leaves: it must be what it was before."""
        leaves = [part.detach() for part in y]
        for part in leaves:
            if differentiable(part):
                part.requires_grad_()
        wants_time = call is not None and call.wants_time
        t = t.detach().requires_grad_(wants_time)
        with torch.enable_grad():
            if call is None:
                value = self.evaluate(number, t, *leaves)
            else:
                value = self.evaluate(number, t, call.pack(leaves), *call.args, **call.kwargs)
        assert self._step is not None
        if self._step.slopes is not None:
            pairs = zip(pytree.tree_leaves(value), pytree.tree_leaves(self._step.slopes[number]), strict=True)
            for part, recorded in pairs:
                self._check.slope(self._step.number, part.detach(), recorded, self._step.size)
        return Linearisation(number, value, (*leaves, t) if wants_time else tuple(leaves))

    def products_in(
        self, linearisation: Linearisation, values: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The products with the Jacobians in the leaves alone, None for zero."""
        pairs = [(a, b) for a, b in zip(values, cotangents, strict=True) if b is not None and a.requires_grad]
        able = [leaf for leaf in linearisation.leaves if leaf.requires_grad]
        if not pairs or not able:
            return [None] * len(linearisation.leaves)
        ends, given = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ends, able, given, retain_graph=self.retains, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in linearisation.leaves]

    def pull_back(
        self, linearisation: Linearisation, values: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The products with the Jacobians in the leaves, None for zero; those in the targets are summed."""
        assert self._step is not None
        pairs = [
            (value, cotangent)
            for value, cotangent in zip(values, cotangents, strict=True)
            if cotangent is not None and value.requires_grad
        ]
        key = self._step.number, linearisation.number
        leaves = linearisation.leaves
        if not pairs:
            if any(cotangent is not None for cotangent in cotangents):
                self._compare(key, ())
            return [None] * len(leaves)
        asked = self._present
        tensors: Sequence[Tensor] = self._asked
        if len(asked) > _ASK_FOR_ALL:
            asked = self.reached_by(value for value, _ in pairs)
            tensors = [self._standing[i] for i in asked]
        able = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        found = vector_jacobian_products(
            tuple(value for value, _ in pairs),
            (*(leaves[i] for i in able), *tensors),
            tuple(cotangent for _, cotangent in pairs),
            self.retains,
        )
        products = found[len(able) :]
        self.products.add(asked, products)
        if key in self._expected:
            self._compare(key, [i for i, product in zip(asked, products, strict=True) if product is not None])
        result: list[Tensor | None] = [None] * len(leaves)
        for i, product in zip(able, found, strict=False):
            result[i] = product
        return result

    def reached_by(self, values: Any) -> list[int]:
        """The targets, by number, that the graph of ``values`` reaches."""
        if not self._edges:
            self._edges = {edge_of(self._standing[i]): i for i in self._present}
        met, _ = reached(map(edge_of, values), self._edges)
        return sorted(self._edges[edge] for edge in met)

    def direct(self) -> tuple[list[int], Sequence[Tensor]]:
        """The targets that a step's own graph may reach, by number, and what stands for them in it."""
        return self._present, self._asked

    def _compare(self, key: tuple[int, int], found: Sequence[int]) -> None:
        missing = [i for i in self._expected.get(key, ()) if i not in found and i in self._present]
        if missing:
            shapes = ", ".join(str(tuple(self._standing[i].shape)) for i in missing)
            raise ReplayError(
                f"the replay of this solve does not use {len(missing)} tensor(s) that the forward pass used (shapes: "
                f"{shapes}), so their gradients would be zero. They were replaced since: a parameter assigned or "
                "registered again, a parametrization removed, a variable of a closure rebound, a cache refilled. Call "
                "backward() before that, or pass the new tensor to a solve of its own."
            )


def _apart(targets: Sequence[Tensor]) -> list[int]:
    """The targets that another tensor must stand for, by number.

    Those with hooks, which fire once, on the whole gradient; and those that others are computed from, or that are
    computed from others, which autograd would walk through.
    """
    hooked = [i for i, target in enumerate(targets) if target._backward_hooks or target.retains_grad]
    computed = [i for i, target in enumerate(targets) if not target.is_leaf]
    if computed and len(targets) > 1 and derived(targets):
        return list(dict.fromkeys([*hooked, *computed]))
    return hooked


class _CutCall:
    """A call that is cut out of the graph of its step."""

    __slots__ = ("args", "field", "kwargs", "linearisation", "number", "rebuild", "slope", "step", "wants_time")

    def __init__(self, field: Field, step: Step, number: int, wants_time: bool, args: Any, kwargs: Any) -> None:
        self.field, self.step, self.number, self.args, self.kwargs = field, step, number, args, kwargs
        self.wants_time = wants_time
        self.rebuild: Any = None
        self.slope: Any = None
        self.linearisation: Linearisation | None = None

    def pack(self, parts: Sequence[Tensor]) -> Any:
        """The state, of its parts."""
        return parts[0] if self.rebuild is None else pytree.tree_unflatten(parts, self.rebuild)

    def unpack(self, parts: Any) -> Any:
        """The slope, of its parts."""
        return parts if self.slope is None else pytree.tree_unflatten(parts, self.slope)

    def value(self, t: Tensor, *y: Tensor) -> Any:
        """The slope, without its graph, or with it if it is wanted first: that of the last call of a step."""
        if self.step.slopes is not None:
            return self.step.slopes[self.number]
        if self.field.holds or self.number == self.step.calls - 1:
            self.linearisation = self.field.linearise(self.number, t, *y, call=self)
            return self.linearisation.value
        with torch.no_grad():
            y = tuple(part.detach() for part in y)
            return self.field.evaluate(self.number, t.detach(), self.pack(y), *self.args, **self.kwargs)


class DifferentiatedTwice(Exception):  # noqa: N818 (caught: no error)
    """A step differentiates the field, and is a function of the result: such an evaluation cannot be cut out."""


class _Cut(torch.autograd.Function):
    """One evaluation whose graph lives only while it is pulled back."""

    @staticmethod
    def forward(ctx: Any, call: _CutCall, t: Tensor, *y: Tensor) -> Any:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(t, *y)
        value = call.value(t, *y)
        if isinstance(value, Tensor):
            return value.detach()
        parts, call.slope = pytree.tree_flatten(detached(value))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _CutCall = ctx.call
        if call.field.advancing and torch.is_grad_enabled():
            raise DifferentiatedTwice
        linearisation, call.linearisation = call.linearisation, None
        if linearisation is None:
            linearisation = call.field.linearise(call.number, *ctx.saved_tensors, call=call)
        values = [part for part in pytree.tree_leaves(linearisation.value) if isinstance(part, Tensor)]
        cotangents = tuple(  # a slope that broadcasts may have been recorded with another number of dimensions
            part if part is None or part.shape == value.shape else part.view_as(value)
            for value, part in zip(values, cotangents, strict=True)
        )
        products = call.field.products_in if call.field.advancing else call.field.pull_back
        found = products(linearisation, values, cotangents)
        t = found.pop() if call.wants_time else None
        return (None, t, *found)
