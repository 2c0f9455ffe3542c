"""Walking autograd's graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["edge_of", "reachable"]


def edge_of(tensor: Tensor) -> torch.autograd.graph.GradientEdge:
    """Where ``tensor``, which requires a gradient, stands in autograd's graph; also where gradients are not enabled."""
    with torch.enable_grad():  # before torch 2.5, a leaf is found by way of a view of it
        return torch.autograd.graph.get_gradient_edge(tensor)


def reachable(
    roots: Iterable[torch.autograd.graph.Node | None], nodes: Mapping[torch.autograd.graph.Node, Sequence[int]]
) -> tuple[set[int], list[Tensor]]:
    """Walk autograd's graph from ``roots``, not looking past ``nodes``.

    Returns:
        The numbers of the nodes met, and the leaves met besides.
    """
    found: set[int] = set()
    leaves: list[Tensor] = []
    stack = [root for root in roots if root is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node in nodes:
            found.update(nodes[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found, leaves
