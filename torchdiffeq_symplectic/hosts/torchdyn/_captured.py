"""What a field of torchdyn uses besides its parameters: autograd gives it a gradient, so it must be known beforehand.

torchdyn has no list of tensors to differentiate with respect to. A plain function closes over networks and tensors, a
module holds a context that an encoder computed. They are found where they are held, and in the graph of the first
evaluation; in those of all evaluations, where something that may need a gradient is held at a distance (in a list, in a
function that the field calls): it is differentiated with respect to if it is used, and left alone if not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from torchdiffeq_symplectic.graph import edge_of, reachable

__all__ = ["Captured"]


class Captured:
    """The tensors that a solve is differentiated with respect to, besides its state and times.

    Args:
        declared: the parameters of field and solver.
        modules: whatever is evaluated; tensors may be attributes of theirs.
        held: tensors that functions close over.
        hidden: tensors that are held at a distance; those of the above may be among them.

    Attributes:
        watches: whether to `look` at every evaluation.
    """

    def __init__(
        self,
        declared: Iterable[Tensor],
        modules: Iterable[nn.Module],
        held: Iterable[Tensor],
        hidden: Iterable[Tensor] = (),
    ) -> None:
        self._listed = _by_identity(declared)
        # Used at some times only, perhaps: so those that are closed over are listed even if the first slope has no
        # need of them. What is computed from others is used as it is, not traced back at every stage.
        held = list(held)
        self._listed |= _by_identity(tensor for tensor in held if tensor.is_leaf)
        attributes = (value for module in modules for value in vars(module).values() if isinstance(value, Tensor))
        self._computed = _by_identity(tensor for tensor in [*held, *attributes] if not tensor.is_leaf)
        at_a_distance = _by_identity(hidden)
        self.watches = not at_a_distance.keys() <= self._listed.keys() | self._computed.keys()
        self._computed |= {key: tensor for key, tensor in at_a_distance.items() if not tensor.is_leaf}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Each of them once."""
        return tuple(self._listed.values())

    def look(self, results: Iterable[Tensor], known: Sequence[Tensor]) -> None:
        """Add what the graph of ``results`` reaches, ``known`` leaves aside."""
        roots = [result.grad_fn for result in results if result.grad_fn is not None]
        stops = dict(self._computed)
        while True:
            nodes = _nodes(stops)
            used, leaves = reachable(roots, nodes)
            leaves = [leaf for leaf in leaves if not any(leaf is tensor for tensor in known)]
            kept = {key: tensor for key, tensor in stops.items() if key in used}
            listed = self._listed | _by_identity(leaves) | kept
            # What is computed from another one in the list would count that one's gradient twice.
            derived = [key for key, tensor in kept.items() if _behind(tensor, listed)]
            if not derived:
                self._listed = listed
                return
            for key in derived:
                del stops[key]


def _by_identity(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in tensors if tensor.requires_grad}


def _nodes(tensors: Mapping[int, Tensor]) -> dict[torch.autograd.graph.Node, Sequence[int]]:
    nodes: dict[torch.autograd.graph.Node, list[int]] = {}
    for key, tensor in tensors.items():
        nodes.setdefault(edge_of(tensor).node, []).append(key)
    return dict(nodes)


def _behind(tensor: Tensor, listed: Mapping[int, Tensor]) -> bool:
    """Whether ``tensor`` is computed from one of ``listed``."""
    assert tensor.grad_fn is not None
    found, _ = reachable([node for node, _ in tensor.grad_fn.next_functions], _nodes(listed))
    return bool(found)
