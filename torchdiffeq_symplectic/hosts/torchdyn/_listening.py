"""The field in the place where torchdyn's solver calls it, listened to while a solve runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchdiffeq_symplectic.hosts.listening import Evaluations
from torchdiffeq_symplectic.hosts.torchdyn._captured import Captured
from torchdiffeq_symplectic.hosts.torchdyn._states import Layout, detached, tensors_in
from torchdiffeq_symplectic.surroundings import RandomState

__all__ = ["Listener"]

Cost = Callable[[Tensor, Any], Tensor]


class Listener(Evaluations):
    """The field, as torchdyn's solver calls it; once `listening` is over, nothing but the field.

    Args:
        func: ``func(t, x)``.
        cost: the running cost ``cost(t, x)``, any shape, or None.
        layout: of the states.
        captured: is told what the first evaluation uses.
        random: the generators that the field may draw from.
        slopes: whether to collect the slopes.
        graph: whether the field is to find gradients enabled at all times, as under "autograd": one that differentiates
            something need not enable them itself.

    Attributes:
        listening: whether anything is to be heard.
        transparent: whether slopes keep their graph.
        times: of the evaluations of this step, as the field saw them; costs: the running cost there, 0-d.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        cost: Cost | None,
        layout: Layout,
        captured: Captured,
        random: RandomState,
        slopes: bool,
        graph: bool,
    ) -> None:
        super().__init__(random, slopes)
        self._graph = graph
        self._func, self._cost, self._layout, self._captured = func, cost, layout, captured
        self._looked = False
        self.listening = True
        self.transparent = False
        self.times: list[Tensor] = []
        self.costs: list[Tensor] = []

    def start_step(self) -> None:
        """Forget the evaluations so far."""
        super().start_step()
        self.times.clear()
        self.costs.clear()

    def __call__(self, t: Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.listening:
            return self._again(t, x, *args, **kwargs)
        self.before()
        if self.transparent:
            self._looked = True
            return self._func(t, x, *args, **kwargs)
        # Aliases: a field may mark what it is given as requiring gradients.
        t, x = t.detach(), detached(x)
        self.times.append(t)
        with torch.set_grad_enabled(self._graph or not self._looked):
            if self._graph or not self._looked:
                # A field that takes the state apart and marks the parts must not make them leaves.
                for part in tensors_in(x):
                    part.requires_grad_(part.is_floating_point() or part.is_complex())
            slope = self._func(t, x, *args, **kwargs)
            cost = None if self._cost is None else self._cost(t, x).sum()
        if not self._looked:
            self._looked = not self._captured.watches
            self._captured.look([*tensors_in(slope), *tensors_in(cost)], [t, *tensors_in(x)])
        slope = detached(slope)
        if cost is not None:
            self.costs.append(cost.detach())
        if self._wants_slopes:
            self.after(self._layout.pack(slope, detached(cost)))
        return slope

    def _again(self, t: Tensor, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._graph or torch.is_grad_enabled():
            return self._func(t, x, *args, **kwargs)
        x = detached(x)
        with torch.enable_grad():
            for part in tensors_in(x):
                part.requires_grad_(part.is_floating_point() or part.is_complex())
            return detached(self._func(t.detach(), x, *args, **kwargs))

    def conclude(self) -> None:
        """Hear no more, and keep nothing of what was heard: a replay calls the field through this."""
        self.listening = False
        self.start_step()

    def without_slopes(self) -> None:
        """Do not collect slopes, as the steps have none to be kept."""
        self._wants_slopes = False
