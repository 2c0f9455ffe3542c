"""What the package takes for granted of PyTorch beyond its documented interface.

Each failure says what a new torch does otherwise; the comment beside each group says where it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
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


def test_products_are_constants_where_gradients_are_enabled() -> None:
    x = torch.ones(3, requires_grad=True)
    with torch.enable_grad():
        (product,) = vector_jacobian_products((x.pow(3),), (x,), (torch.ones(3),))
    assert product is not None
    assert not product.requires_grad


def test_products_within_a_backward_pass() -> None:
    class Inner(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (product,) = vector_jacobian_products((leaf**3,), (leaf,), (cotangents[0],))
            assert product is not None
            return product

    x = torch.tensor([2.0, -3.0], requires_grad=True)
    Inner.apply(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 3 * x.detach() ** 2)


def leaf_tensor() -> Tensor:
    return torch.ones(2, requires_grad=True)


def derived_tensor() -> Tensor:
    return 3 * torch.ones(2, requires_grad=True)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_foreach_functions_compute_what_they_say(dtype: torch.dtype) -> None:
    first = [torch.randn(shape, dtype=dtype) for shape in ((3, 2), (4,), ())]
    second = [torch.randn_like(tensor) for tensor in first]
    norms = torch._foreach_norm(first, torch.inf)
    assert all(torch.allclose(norm, tensor.abs().max()) for norm, tensor in zip(norms, first, strict=True))
    sums = [one + other for one, other in zip(first, second, strict=True)]
    torch._foreach_add_(first, second)
    assert all(torch.equal(one, other) for one, other in zip(first, sums, strict=True))
    torch._foreach_copy_(first, second)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_foreach_add_takes_tuples_of_other_strides_and_dtypes() -> None:
    totals = (torch.zeros(3, 2), torch.zeros(4))
    torch._foreach_add_(totals, (torch.ones(2, 3).t(), torch.ones(4, dtype=torch.float64)))
    assert torch.equal(totals[0], torch.ones(3, 2))
    assert torch.equal(totals[1], torch.ones(4))


def test_foreach_norm_keeps_what_is_not_finite() -> None:
    nan, inf = torch._foreach_norm([torch.tensor([1.0, torch.nan]), torch.tensor([-torch.inf, 2.0])], torch.inf)
    assert torch.isnan(nan), "the check of the replay would miss a state that became nan"
    assert torch.isinf(inf)


# replay.py: autocast, and what modules hold.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_state_of_autocast_is_read_by_device(dtype: torch.dtype) -> None:
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=dtype):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == dtype
        with torch.autocast("cpu", enabled=False):
            assert not torch.is_autocast_enabled("cpu")


def test_clearing_the_cache_of_autocast_brings_graphs_back() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            torch.ones(2, 2) @ weight
        torch.clear_autocast_cache()
        assert (torch.ones(2, 2) @ weight).requires_grad


def test_batch_statistics_and_flags_are_where_they_are_looked_for() -> None:
    norm = nn.BatchNorm1d(3)
    assert set(norm._buffers) == {"running_mean", "running_var", "num_batches_tracked"}
    counter: Any = norm.num_batches_tracked
    version = counter._version
    norm(torch.randn(4, 3))
    assert counter._version != version
    assert norm.training is True


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_know_their_real_counterpart(dtype: torch.dtype) -> None:
    assert dtype.to_real() == torch.empty(0, dtype=dtype).abs().dtype


# gradient.py: what one autograd function may do.


def test_saved_tensors_beyond_inputs_are_freed_by_backward_and_offloaded_by_hooks() -> None:
    packed: list[Tensor] = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, box: list[Tensor]) -> Tensor:
            ctx.save_for_backward(x, *box)
            return box[0] * 1

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor) -> tuple[Tensor, None]:
            return cotangents[0] * ctx.saved_tensors[1], None  # type: ignore[attr-defined]

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    x, extra = torch.ones(2, requires_grad=True), torch.tensor([3.0, 4.0])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = Function.apply(x, [extra])
    assert [tensor.data_ptr() for tensor in packed] == [x.data_ptr(), extra.data_ptr()]
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, extra)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_backward_knows_whether_its_own_graph_is_wanted() -> None:
    seen: list[bool] = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor) -> Tensor:
            seen.append(torch.is_grad_enabled())
            return cotangents[0]

    x = torch.ones(2, requires_grad=True)
    for create_graph in (False, True):
        torch.autograd.grad(Function.apply(x).sum(), x, create_graph=create_graph)
    assert seen == [False, True], "torch.is_grad_enabled() in backward no longer tells of create_graph"


def test_views_share_an_untyped_storage() -> None:
    x = torch.arange(6.0)
    assert x[2].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert x[2].storage_offset() == 2


def test_random_state_is_a_vector_of_bytes() -> None:
    state = torch.get_rng_state()
    assert (state.dtype, state.ndim, state.device.type) == (torch.uint8, 1, "cpu")
    first = torch.rand(2)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)


def test_data_parallel_marks_its_replicas() -> None:
    replica: Any = nn.Linear(1, 1)._replicate_for_data_parallel()
    assert replica._is_replica is True
    assert "weight" not in inspect.getattr_static(replica, "_parameters")
