"""The field of a solve, evaluated again in backward.

In backward an evaluation is *cut* out of the graph of its step: a cut call keeps only ``(t, Y)``. When its cotangent
arrives, the field is evaluated there once more with its graph, pulled back, and dropped. So the graph of one evaluation
is alive at a time, and a step's adjoint is the symplectic partner of the step (Matsubara, Miyatake, Yaguchi, NeurIPS
2021, https://arxiv.org/abs/2102.09750): for explicit Runge-Kutta methods, autograd through the step is the partitioned
method whose coefficients satisfy ``b_i A_ij + b_j a_ji = b_i b_j``, and no weight is divided by.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.cut import Cut, CutCall
from torchdiffeq_symplectic.engine import vector_jacobian_products
from torchdiffeq_symplectic.errors import ReplayError
from torchdiffeq_symplectic.graph import Gate, Gated, edge_of, reached
from torchdiffeq_symplectic.listener import differentiable
from torchdiffeq_symplectic.products import Products
from torchdiffeq_symplectic.random_state import Draw, undisturbed
from torchdiffeq_symplectic.replay import Conditions, ReplayCheck
from torchdiffeq_symplectic.tape import Step
from torchdiffeq_symplectic.uses import Substituted, derived

__all__ = ["Field", "Linearisation"]


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
        batched: whether cotangents are batches in disguise.

    Attributes:
        cuts: whether calls are cut out of the graph of their step.
        holds: whether the graphs of a step's evaluations are made, and alive, together.
        advancing: whether a step is being done: what it differentiates then is its own affair.
        retains, batched: as given; count: the number of targets.
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
        batched: bool = False,
    ) -> None:
        self._func = func
        self._conditions = conditions
        self._check = check
        self._expected = expected
        self._present = [i for i, target in enumerate(targets) if target.requires_grad]
        self.retains, self.batched = retains, batched
        self.wants_time = wants_time
        self.cuts = True
        self.holds = False
        self.advancing = False
        self.count = len(targets)
        self.gate = Gate()
        self.products = Products(targets, batched)
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
        self._draws = False  # whether it was seen to draw random numbers

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
        call = CutCall(self, self._step, number, t.requires_grad, args, kwargs)
        if isinstance(y, Tensor):
            return call.unpack(Cut.apply(call, t, y))
        parts, call.rebuild = pytree.tree_flatten(y)
        return call.unpack(Cut.apply(call, t, *parts))

    def evaluate(self, number: int, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        """``func(t, y)`` as evaluation ``number`` of the step did it, in the present gradient mode."""
        assert self._step is not None
        return self.evaluate_as(self._step.draws[number] if self._step.draws else None, t, y, *args, **kwargs)

    def evaluate_as(self, draw: Draw | None, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        """``func(t, y)`` with these random numbers; the generators stay as they are."""
        if draw is None:
            return self._evaluated(t, y, *args, **kwargs)
        random = self._conditions.random
        with undisturbed():
            # Where another thread drew while the field was evaluated, its numbers are not to be given out twice.
            self._draws = self._draws or threading.active_count() == 1
            if not self._draws and not random.is_drawn_from(lambda: self._evaluated(t, y, *args, **kwargs)):
                return self._evaluated(t, y, *args, **kwargs)
            self._draws = True
            before = random.get()
            random.set(draw.state)
            try:
                slope = self._evaluated(t, y, *args, **kwargs)
                after = random.get()
            finally:
                random.set(before)
        # What was drawn once and is kept by the field, noise or weights of a lazy module, is not drawn again.
        drew = draw.after is not None and not torch.equal(after, draw.state)
        if drew and random.fingerprint(after) != draw.after:
            assert self._step is not None
            self._check.disturbed(self._step.number)
        return slope

    def _evaluated(self, t: Tensor, y: Any, *args: Any, **kwargs: Any) -> Any:
        with self._substituted, self._conditions.autocast():
            return self._func(t, y, *args, **kwargs)

    def linearise(self, number: int, t: Tensor, *y: Tensor, call: CutCall | None = None) -> Linearisation:
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
