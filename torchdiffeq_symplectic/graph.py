"""Walking autograd's graph: which tensors made outside of an evaluation does the evaluation reach?"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Edge", "Gate", "Gated", "Node", "edge_of", "is_behind", "now", "reached"]

Node = torch.autograd.graph.Node
Edge = tuple[Node, int]


def edge_of(tensor: Tensor) -> Edge:
    """Where ``tensor``, which requires a gradient, stands in the graph; also where gradients are not enabled."""
    with torch.enable_grad():  # before torch 2.5, a leaf is found by way of a view of it
        if tensor.layout is not torch.strided and tensor.is_leaf:  # which PyTorch finds by a view; these have none
            leaf: Any = tensor.clone().grad_fn
            node, number = leaf.next_functions[0]
        else:
            node, number, *_ = torch.autograd.graph.get_gradient_edge(tensor)
    return node, number


def now() -> int:
    """A number that every node made from here on in this thread exceeds, and every earlier one does not."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).clone().grad_fn
    assert node is not None
    number: int = node._sequence_nr()
    return number


def reached(
    roots: Iterable[tuple[Node | None, int]], stops: Container[Edge] = (), since: int = -1
) -> tuple[list[Edge], list[Tensor]]:
    """Walk the graph from ``roots`` to where it was made before.

    Args:
        roots: edges to start from.
        stops: edges not to look past.
        since: nodes with a smaller sequence number (see `now`) are not looked past, either.

    Returns:
        The edges where the walk stopped, and the leaves it met.
    """
    met: dict[Edge, None] = {}
    leaves: list[Tensor] = []
    stack = list(roots)
    walked: set[Node] = set()
    while stack:
        node, number = stack.pop()
        if node is None:
            continue
        if (node, number) in stops:
            met[node, number] = None
            continue
        if node in walked:
            continue
        following = node.next_functions
        if not following and hasattr(node, "variable"):
            walked.add(node)
            leaves.append(node.variable)
        elif node._sequence_nr() <= since:
            met[node, number] = None
        else:
            walked.add(node)
            stack += following
    return list(met), leaves


def is_behind(tensor: Tensor, others: Container[Edge]) -> bool:
    """Whether ``tensor`` is computed from one of ``others``."""
    if tensor.grad_fn is None:
        return False
    met, _ = reached(tensor.grad_fn.next_functions, others)
    return bool(met)


class Gate:
    """Whether products pass `Gated` tensors: not while gradients with respect to these are taken.

    What they were computed from may be among the tensors used, too; that part is the caller's own graph's.
    """

    closed = False


class Gated(torch.autograd.Function):
    """The same tensor, with a gate between it and its history."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gate: Gate) -> Tensor:
        """The tensor itself."""
        ctx.gate = gate
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *products: Tensor) -> tuple[Tensor | None, None]:
        """The products, where the gate is open."""
        return None if ctx.gate.closed else products[0], None
