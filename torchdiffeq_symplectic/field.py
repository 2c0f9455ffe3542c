"""Evaluating a solve's field again: slopes, whole steps, and every vector-Jacobian product that the modes make."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from torchdiffeq_symplectic.engine import vector_jacobian_product
from torchdiffeq_symplectic.graph import edge_of, reachable
from torchdiffeq_symplectic.surroundings import Surroundings
from torchdiffeq_symplectic.tableau import Whole

__all__ = ["Field", "Linearisation", "MissingGradientWarning"]

# Up to this many parameters, autograd is asked for all of them at every stage; above, only for those in its graph.
_ASK_FOR_ALL = 64


class MissingGradientWarning(UserWarning):
    """A tensor that needs a gradient is used by the field but is in no list of parameters, so it gets none."""


class Field:
    """The vector field ``f(t, y)`` of one solve, evaluated as the host evaluated it.

    Args:
        func: ``func(t, y)``, with the host's own wrappers where they change values.
        params: tensors whose gradients are accumulated; they may be leaves or results of other operations.
        surroundings: what else ``func`` depends on.
        wants_time: whether products with respect to ``t`` are needed.
        ignore: tensors whose missing gradient is nobody's oversight; None if nothing can be missing.
        dtype, shape: of the state; slopes are cast and expanded to them, as the hosts do.

    Attributes:
        param_grads: the products with respect to ``params`` summed so far; zeros where a parameter is not used.
        walks: whether to look in a stage's graph for the parameters it reaches: at first, and where there are many.
        slope_dtype: a dtype that slopes are computed in, where it is not the state's, or None.
    """

    def __init__(
        self,
        func: Callable[[Tensor, Tensor], Tensor],
        params: Sequence[Tensor],
        surroundings: Surroundings,
        *,
        wants_time: bool,
        ignore: Iterable[Tensor] | None,
        dtype: torch.dtype,
        shape: torch.Size,
    ) -> None:
        self._func = func
        self._surroundings = surroundings
        self.params = tuple(params)
        self.wants_time = wants_time
        self.dtype, self.shape = dtype, shape
        self.slope_dtype = surroundings.autocast_dtype
        self.param_grads = [torch.zeros_like(param) for param in params]
        self._ignore = {id(tensor) for tensor in ignore or ()}
        self._complete = ignore is None
        self.walks = True
        self._checked = False
        self._nodes: dict[torch.autograd.graph.Node, list[int]] = {}

    def __call__(self, t: Tensor, y: Tensor, random: Tensor | None) -> Tensor:
        """The slope ``f(t, y)`` in the present gradient mode, of the state's shape and dtype."""
        slope = self._as_in_the_solve(self._func, (t, y), random)
        if slope.dtype != self.dtype:
            self.slope_dtype = slope.dtype
            slope = slope.to(self.dtype)
        return slope if slope.shape == self.shape else slope.expand(self.shape)

    def advance(self, whole: Whole, t: Tensor, h: Tensor, y: Tensor, random: Tensor | None) -> Tensor:
        """The state after a step that is done again as a whole, in the present gradient mode."""
        state = self._as_in_the_solve(whole.advance, (t, h, y), random)
        return state if state.dtype == self.dtype else state.to(self.dtype)

    def _as_in_the_solve(
        self, function: Callable[..., Tensor], arguments: tuple[Tensor, ...], random: Tensor | None
    ) -> Tensor:
        if random is not None:
            self._surroundings.random.set(random)
        if self._surroundings.autocast_dtype is None:
            return function(*arguments)
        with self._surroundings.autocast():
            return function(*arguments)

    def linearise(self, t: Tensor, y: Tensor, random: Tensor | None) -> Linearisation:
        """Evaluate the field with its graph at fresh leaves; to be called where gradients are enabled."""
        y, (t,) = self._leaves(y, t)
        return Linearisation(self, self(t, y, random), y, (t,))

    def linearise_step(self, whole: Whole, t: Tensor, h: Tensor, y: Tensor, random: Tensor | None) -> Linearisation:
        """Do a whole step with its graph at fresh leaves; to be called where gradients are enabled."""
        y, (t, h) = self._leaves(y, t, h)
        return Linearisation(self, self.advance(whole, t, h, y, random), y, (t, h))

    def _leaves(self, y: Tensor, *times: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return y.detach().requires_grad_(), tuple(time.detach().requires_grad_(self.wants_time) for time in times)

    def params_in(self, slope: Tensor, known: Iterable[Tensor]) -> Sequence[int]:
        """The parameters that the graph of ``slope`` reaches.

        At the first call also report what the graph reaches that is neither a parameter nor ``known``. To look for the
        parameters at every stage pays where there are many: a deep network asked for all of them at each of its blocks
        would be quadratic in its depth.
        """
        if not self._nodes:
            self._nodes = self._locate_params()
        if self._checked:
            return sorted(reachable([edge_of(slope).node], self._nodes)[0])
        self._checked = True
        self.walks = len(self.params) > _ASK_FOR_ALL
        stops = {edge_of(tensor).node: () for tensor in known if tensor.requires_grad}
        found, others = reachable([edge_of(slope).node], {**stops, **self._nodes})
        if not self._complete:
            report_missing([tensor for tensor in others if id(tensor) not in self._ignore])
        return sorted(found)

    def _locate_params(self) -> dict[torch.autograd.graph.Node, list[int]]:
        """Where the parameters stand in autograd's graph; ValueError if one is computed from another."""
        nodes: dict[torch.autograd.graph.Node, list[int]] = {}
        for i, param in enumerate(self.params):
            nodes.setdefault(edge_of(param).node, []).append(i)
        for param in self.params:
            if param.grad_fn is not None:
                behind, _ = reachable([following for following, _ in param.grad_fn.next_functions], nodes)
                if behind:
                    raise ValueError(
                        f"adjoint_params lists a tensor of shape {tuple(param.shape)} and also one of shape "
                        f"{tuple(self.params[min(behind)].shape)} that it is computed from, whose gradient would be "
                        "counted twice. List one of the two."
                    )
        return nodes


class Linearisation:
    """The slope at one stage, or the state after a whole step, with its graph, good for one vector-Jacobian product.

    Args:
        field: where products with respect to parameters are accumulated.
        value: the slope or state.
        y: the state it is a function of, a leaf.
        times: the times it is a function of, leaves.
    """

    __slots__ = ("_field", "times", "value", "y")

    def __init__(self, field: Field, value: Tensor, y: Tensor, times: tuple[Tensor, ...]) -> None:
        self._field, self.value, self.y, self.times = field, value, y, times

    def pull_back(self, cotangent: Tensor) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The products with the Jacobians in ``y`` and ``times``, None for zero; those in parameters are accumulated.

        ``cotangent`` has the state's shape. The graph is kept for what lies outside of the stage: a tensor that the
        field closes over may be derived from a parameter, and is then walked again at every stage.
        """
        field, value = self._field, self.value
        if not value.requires_grad:
            return None, (None,) * len(self.times)
        params, totals = field.params, field.param_grads
        if field.walks:
            chosen = field.params_in(value, (self.y, *self.times))
            params, totals = tuple(params[i] for i in chosen), [totals[i] for i in chosen]
        leading = (self.y, *self.times) if field.wants_time else (self.y,)
        grads = vector_jacobian_product(value, (*leading, *params), cotangent)
        products = [grad for grad in grads[len(leading) :] if grad is not None]
        if products:
            if len(products) < len(totals):
                used = zip(totals, grads[len(leading) :], strict=True)
                totals = [total for total, grad in used if grad is not None]
            torch._foreach_add_(totals, products)
        return grads[0], grads[1 : len(leading)] if field.wants_time else (None,) * len(self.times)


def report_missing(tensors: Sequence[Tensor]) -> None:
    """Warn of tensors that the field uses and whose gradient nobody asked for."""
    if tensors:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        warnings.warn(
            f"func uses {len(tensors)} tensor(s) that require a gradient but are not in adjoint_params (shapes: "
            f"{shapes}), so they get no gradient from this solve. List them in adjoint_params, in torchdyn make them "
            "parameters of the vector field, or detach them.",
            MissingGradientWarning,
            stacklevel=2,
        )
