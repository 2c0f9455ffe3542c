"""What the package takes for granted of PyTorch beyond its documented interface.

Each failure says what a new torch does otherwise; the comment beside each group says where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchdiffeq_symplectic import engine
from torchdiffeq_symplectic.engine import vector_jacobian_products

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return all(
        (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(found, expected, strict=True)
    )


# engine.py: the function behind torch.autograd.grad.


def test_the_engine_is_where_it_is_looked_for() -> None:
    found: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
    assert found is not None, "torch.autograd.Variable has no _execution_engine; torch.autograd.grad is called instead"
    assert engine._engine is found


@pytest.mark.parametrize("behind", [True, False], ids=["engine", "torch.autograd.grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_autograd_grad(dtype: torch.dtype, behind: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not behind:
        monkeypatch.setattr(engine, "_engine", None)
    leaf = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    derived = (leaf * 2).sin()
    unused = torch.randn(2, dtype=dtype, requires_grad=True)
    time = torch.tensor(0.3, dtype=dtype.to_real(), requires_grad=True)
    output = (derived @ derived.t()).tanh() * time
    cotangent = torch.randn_like(output)
    inputs = (leaf, derived, unused, time)
    expected = torch.autograd.grad(output, inputs, cotangent, retain_graph=True, allow_unused=True)
    assert same(expected[2:3], [None])
    for _ in range(2):  # the graph is kept
        found = vector_jacobian_products((output,), inputs, (cotangent,), True)
        assert same(found, expected), "the engine is no longer called as torch.autograd.grad calls it"
    assert leaf.grad is None, "the engine accumulates into .grad"


# field.py: walking the graph.


def nodes_below(root: Tensor) -> list[Any]:
    """All nodes of the graph of ``root``, each once by what Python takes for the same object."""
    found = {get_gradient_edge(root).node: None}
    waiting = list(found)
    while waiting:
        following = [node for node, _ in waiting.pop().next_functions if node is not None and node not in found]
        found.update(dict.fromkeys(following))
        waiting += following
    return list(found)


def test_gradient_edges_are_the_nodes_of_the_graph() -> None:
    weight, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    hidden = weight.exp()
    nodes = nodes_below(torch.tanh(hidden * y) + y)
    assert len(nodes) == 6, "a node is another object each time that it is met"
    for tensor in (weight, y, hidden):
        assert get_gradient_edge(tensor).node in nodes, "get_gradient_edge gives no node of the graph"
    leaves = [node.variable for node in nodes if hasattr(node, "variable")]
    assert {id(leaf) for leaf in leaves} == {id(weight), id(y)}, "AccumulateGrad.variable is no longer the leaf"


# check.py, field.py, modes/_adjoint.py: functions on lists of tensors.


def test_foreach_norm_keeps_what_is_not_finite() -> None:
    nan, inf = torch._foreach_norm([torch.tensor([1.0, torch.nan]), torch.tensor([-torch.inf, 2.0])], torch.inf)
    assert torch.isnan(nan), "the check of the replay would miss a state that became nan"
    assert torch.isinf(inf)
