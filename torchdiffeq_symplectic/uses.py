"""What a field uses besides its arguments, found in the graphs of its evaluations."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from torchdiffeq_symplectic.graph import Edge, edge_of, is_behind, now, reached
from torchdiffeq_symplectic.random_state import RandomState

__all__ = ["Captured", "Substituted", "derived"]


class _Mark(torch.autograd.Function):
    """The state, as an evaluation is given it. What keeps the evaluation's graph alive keeps this node alive."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, marks: list[weakref.ref[Any]]) -> Tensor:
        marks.append(weakref.ref(ctx))
        return y.detach()  # no view: a field that overwrites it gets our error

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return cotangents[0], None


class Captured:
    """The tensors made outside of a field that its evaluations reach: leaves, and results of other operations.

    Each is differentiated with respect to once, where the graph of an evaluation ends; what it was computed from gets
    its gradient from the caller's own graph.

    Args:
        held: tensors that the field is known to hold.
        random: the generators that it may draw from.
        watched: tensors that a later evaluation may reach, if the first do not.
        looks: how many evaluations are looked at in any case; the first may fill caches that the second uses.

    Attributes:
        walked_through: whether one was met whose holder is not known, so that what it was computed from is reached.
    """

    def __init__(
        self,
        held: Iterable[Tensor],
        random: RandomState | None = None,
        watched: Iterable[Tensor] = (),
        looks: int = 2,
    ) -> None:
        self._random = random
        self._missing = {id(tensor): tensor for tensor in watched if tensor.requires_grad}
        self._looks = looks
        self.walked_through = False
        self._known: dict[Edge, Tensor] = {}
        self.know(tensor for tensor in held if not tensor.is_leaf)
        self._found: dict[Edge, Tensor] = {}
        # Leaves that an evaluation makes for itself are gone after it: holding them would pile them up.
        self._leaves: dict[int, weakref.ref[Tensor]] = {}
        self._marks: list[list[weakref.ref[Any]]] = []  # of each call of a field
        self._escaped = False

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors that the field is known to hold."""
        self._known |= {edge_of(tensor): tensor for tensor in tensors if tensor.requires_grad}

    @property
    def looks(self) -> bool:
        """Whether the next evaluation is to be looked at: some in any case, others until all watched was reached."""
        return self._looks > 0 or bool(self._missing)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What was reached so far, each tensor once."""
        leaves = (reference() for reference in self._leaves.values())
        return (*self._found.values(), *(leaf for leaf in leaves if leaf is not None))

    @property
    def escaped(self) -> bool:
        """Whether the graph of an evaluation but the last outlived its slope."""
        if not self._escaped and self._outlived():
            gc.collect()  # it may only be part of a cycle, as hooks on saved tensors make them
            self._escaped = self._outlived()
        return self._escaped

    def _outlived(self) -> bool:
        return any(mark() is not None for call in self._marks[:-1] for mark in call)

    def evaluate(
        self, func: Callable[..., Any], t: Tensor, y: Any, *args: Any, linked: bool = False, **kwargs: Any
    ) -> tuple[Any, list[weakref.ref[Tensor]]]:
        """``func(t, y)`` as under backpropagation, and the captured tensors that are new.

        The result has no graph, unless it is ``linked`` to that of ``y``.
        """
        self._looks -= 1
        t = t.detach()
        with torch.enable_grad(), _saved_as_they_are():
            # A tensor apart: pytree's functions leave reference cycles.
            parts, structure = ([y], None) if isinstance(y, Tensor) else pytree.tree_flatten(y)

            def packed(parts: list[Any]) -> Any:
                return parts[0] if structure is None else pytree.tree_unflatten(parts, structure)

            given = parts if linked else [_leaf(part) for part in parts]
            stops = {edge_of(part) for part in given if _needs_grad(part)} if linked else set()
            since = now()
            result = func(t, packed(self._marked(given, linked)), *args, **kwargs)
            roots = [edge_of(part) for part in pytree.tree_leaves(result) if _needs_grad(part)]
            new = self._look(roots, since, given, stops=stops)
            if new is None:  # a tensor that is held out of sight: watch the operations that it goes into
                draw = None if self._random is None else self._random.get()
                with _Witness(self._known, since):
                    func(t, packed(self._marked(given, linked)), *args, **kwargs)
                if self._random is not None and draw is not None:
                    self._random.set(draw)
                new = self._look(roots, since, given, final=True, stops=stops) or []
        # Weakly, as a leaf may be the evaluation's own: keeping it would make it look captured.
        references = [weakref.ref(tensor) for tensor in new]
        del new
        if linked:
            return result, references
        if isinstance(result, Tensor):
            result = result.detach()
        else:
            result = pytree.tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, result)
        del roots
        if not self.escaped:  # now: a sum that is continued where gradients are off loses its graph
            del self._marks[:-1]
        return result, references

    def _marked(self, parts: Sequence[Any], linked: bool) -> list[Any]:
        if linked:
            return list(parts)
        marks: list[weakref.ref[Any]] = []
        self._marks.append(marks)
        return [_Mark.apply(part, marks) if _needs_grad(part) else part for part in parts]

    def look(self, slope: Tensor) -> None:
        """Note what the graph of ``slope`` reaches, however long ago it was made."""
        self._look([edge_of(slope)], -1, [], final=True)

    def look_at_step(self, ends: Iterable[Tensor], starts: Sequence[Tensor]) -> bool:
        """Note what a step's own graph reaches besides its ``starts``; whether it reaches one of these."""
        roots = [edge_of(end) for end in ends if end.requires_grad]
        _, leaves = reached(roots, self._known)
        self._look(roots, -1, list(starts), final=True)
        return any(leaf is start for leaf in leaves for start in starts)

    def _look(
        self,
        roots: Iterable[Edge],
        since: int,
        given: list[Tensor],
        final: bool = False,
        stops: Set[Edge] = frozenset(),
    ) -> list[Tensor] | None:
        """The captured tensors that are new; None if one is met whose holder is not known."""
        met, leaves = reached(roots, self._known.keys() | stops if stops else self._known, since)
        met = [edge for edge in met if edge not in stops]
        unknown = [edge for edge in met if edge not in self._known]
        if unknown and not final:
            return None
        if unknown:
            self.walked_through = True
            # Through it, to what is known or a leaf.
            behind, more = reached([edge for node, _ in unknown for edge in node.next_functions], self._known)
            met, leaves = [edge for edge in (*met, *behind) if edge in self._known], [*leaves, *more]
        new = [self._known[edge] for edge in met if edge not in self._found]
        self._found |= {edge: self._known[edge] for edge in met}
        for leaf in leaves:
            reference = self._leaves.get(id(leaf))
            if not (reference is not None and reference() is leaf) and not any(leaf is part for part in given):
                self._leaves[id(leaf)] = weakref.ref(leaf)
                new.append(leaf)
        for tensor in new:
            self._missing.pop(id(tensor), None)
        return new


def _saved_as_they_are() -> contextlib.AbstractContextManager[object]:
    """No hooks of the caller on what an evaluation saves that is only looked at.

    A hook that hands an output back with its graph keeps that alive for good, and would look like an escape.
    """
    active = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if active is None or active(False) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept)


def _needs_grad(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad


def _leaf(part: Any) -> Any:
    """An alias that may be marked as requiring a gradient without the caller's tensor becoming so."""
    if not isinstance(part, Tensor):
        return part
    part = part.detach()
    return part.requires_grad_() if part.is_floating_point() or part.is_complex() else part


class _Witness(TorchFunctionMode):
    """Notes the tensors that go into operations, unless they were made after ``since``, see `now`."""

    def __init__(self, known: dict[Edge, Tensor], since: int) -> None:
        super().__init__()
        self._known, self._since = known, since

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for part in pytree.tree_leaves((args, kwargs)):
            if _needs_grad(part) and not part.is_leaf:
                node, number = edge_of(part)
                if node._sequence_nr() <= self._since:
                    self._known.setdefault((node, number), part)
        return func(*args, **kwargs)


class Substituted(TorchFunctionMode):
    """Operations of this thread get other tensors in the place of some: nothing that threads share is touched.

    Args:
        aliases: pairs of a tensor and what stands in its place.
    """

    def __init__(self, aliases: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._aliases = {id(tensor): (tensor, alias) for tensor, alias in aliases}

    def _of(self, part: Any) -> Any:
        known = self._aliases.get(id(part))
        return part if known is None else known[1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(self._of, (args, kwargs or {}))
        return func(*args, **kwargs)


def derived(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of ``tensors`` that are computed from others of them."""
    tensors = list(tensors)
    edges = {edge_of(tensor) for tensor in tensors}
    return [tensor for tensor in tensors if is_behind(tensor, edges)]
