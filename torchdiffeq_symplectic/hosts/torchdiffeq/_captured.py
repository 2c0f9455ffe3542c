"""What a field uses besides its arguments, found while it runs, for callers of ``odeint``, who list nothing.

Backpropagation through a solve gives a gradient to everything that any evaluation of the field used. So each is looked
at: its graph is walked to where the field's own part of it ends, and dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.graph import edge_of

__all__ = ["Captured", "with_graph"]

Function = Callable[[Tensor, Tensor], Tensor]
Node = torch.autograd.graph.Node
Edge = tuple[Node, int]


class Captured:
    """The tensors that a solve is differentiated with respect to, besides its state and times.

    They are leaves, and tensors computed beforehand as far as it is known where they are held: these are used as they
    are. Of those that are held out of sight, what they were computed from is listed, which gives the same gradients but
    has their graph walked again at every stage.

    Args:
        held: tensors that the field is known to hold.
        depends: whether the initial state, or the times, need a gradient.
    """

    def __init__(self, held: Iterable[Tensor], depends: bool) -> None:
        computed = (tensor for tensor in held if tensor.requires_grad and not tensor.is_leaf)
        self._stops: dict[Edge, Tensor] = {_edge(tensor): tensor for tensor in computed}
        self._listed: dict[Edge, Tensor] = {}
        # By identity. Leaves that an evaluation makes for itself are gone after it; holding them would pile them up.
        self._leaves: dict[int, weakref.ref[Tensor]] = {}
        self._depends = depends

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Each of them once."""
        leaves = (reference() for reference in self._leaves.values())
        return (*self._listed.values(), *(leaf for leaf in leaves if leaf is not None))

    def evaluate(self, func: Function, t: Tensor, y: Tensor) -> Tensor:
        """The slope ``func(t, y)``, computed with its graph as in ``odeint``, and returned without it."""
        # Aliases: a field may mark what it is given as requiring gradients.
        t, y = t.detach(), y.detach()
        with torch.enable_grad():
            # As it would be in a solve with a graph. A field that takes the state apart and marks the parts as leaves
            # would otherwise cut itself off.
            slope = func(t, y.requires_grad_(self._depends))
        if slope.requires_grad:
            self._depends = True
            self._look(slope, (t, y))
        return slope.detach()

    def _look(self, slope: Tensor, arguments: Sequence[Tensor]) -> None:
        roots = [_edge(slope)]
        while roots:
            met, leaves = _ends(roots, self._stops)
            new_leaves = [
                leaf for leaf in leaves if not self._lists(leaf) and not any(leaf is given for given in arguments)
            ]
            if not new_leaves and all(edge in self._listed for edge in met):
                return
            self._leaves |= {id(leaf): weakref.ref(leaf) for leaf in new_leaves}
            self._listed |= {edge: self._stops[edge] for edge in met}
            # What is computed from others in the list would count their gradients twice: walk through it instead.
            roots = [edge for edge, tensor in self._listed.items() if self._is_derived(tensor)]
            for edge in roots:
                del self._listed[edge], self._stops[edge]

    def _lists(self, leaf: Tensor) -> bool:
        reference = self._leaves.get(id(leaf))
        return reference is not None and reference() is leaf

    def _is_derived(self, tensor: Tensor) -> bool:
        assert tensor.grad_fn is not None
        met, leaves = _ends(tensor.grad_fn.next_functions, self._listed)
        return bool(met) or any(map(self._lists, leaves))


def with_graph(func: Function) -> Function:
    """``func`` evaluated as in ``odeint``, where gradients are enabled, by a replay that has them disabled.

    A field that differentiates something need not enable them itself.
    """

    def evaluate(t: Tensor, y: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return func(t, y)
        with torch.enable_grad():
            slope = func(t.detach(), y.detach().requires_grad_())
        return slope.detach()

    return evaluate


def _edge(tensor: Tensor) -> Edge:
    node, number, *_ = edge_of(tensor)
    return node, number


def _ends(roots: Iterable[tuple[Node | None, int]], stops: Mapping[Edge, Tensor]) -> tuple[list[Edge], list[Tensor]]:
    """Walk the graph from ``roots``, not looking past ``stops``: which of these are met, and which leaves besides."""
    met: list[Edge] = []
    leaves: list[Tensor] = []
    stack = list(roots)
    walked: set[Node] = set()
    while stack:
        node, number = stack.pop()
        if node is None:
            continue
        if (node, number) in stops:
            met.append((node, number))
        elif node not in walked:
            walked.add(node)
            following = node.next_functions
            stack += following
            if not following and hasattr(node, "variable"):
                leaves.append(node.variable)
    return met, leaves
