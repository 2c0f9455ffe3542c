"""The counts of bytes are exact: known allocations, in known order, forward and inside autograd's backward."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchdiffeq_symplectic.experiments.memory import live_bytes, peak_bytes

KIB = 1024  # bytes; a multiple of CUDA's 512-byte blocks, so that the same numbers hold there
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]


def block(kib: int, device: str) -> Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8, device=device)


def nothing(device: str) -> None:
    """Allocates no tensor."""


def one_kept(device: str) -> Tensor:
    return block(3, device)


def one_dropped(device: str) -> None:
    block(3, device)


def one_after_the_other(device: str) -> None:
    block(3, device)
    block(5, device)
    block(4, device)


def overlapping(device: str) -> Tensor:
    first = block(3, device)
    second = block(5, device)  # 8 alive
    del first
    third = block(2, device)  # 7 alive
    del second
    return third


def reference_cycle(device: str) -> None:
    cycle: list[object] = [block(3, device)]
    cycle.append(cycle)


class AllocatesInBackward(torch.autograd.Function):
    """The identity; its backward has 7 KiB alive for a moment beside the gradient."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        block(7, str(gradients[0].device))
        return gradients[0]


def in_backward(device: str) -> tuple[Tensor, ...]:
    x = torch.zeros(KIB // 4, device=device, requires_grad=True)  # 1 KiB
    y = AllocatesInBackward.apply(x)
    return torch.autograd.grad(y, x, torch.ones_like(x))  # 1 KiB of gradient, then 7


CASES = [  # what runs, KiB at the peak, KiB left alive
    (nothing, 0, 0),
    (one_kept, 3, 3),
    (one_dropped, 3, 0),
    (one_after_the_other, 5, 0),
    (overlapping, 8, 2),
    (reference_cycle, 3, 3),
    (in_backward, 9, 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("run", "peak", "live"), CASES, ids=[run.__name__ for run, _, _ in CASES])
def test_bytes_are_those_allocated(run: Callable[[str], object], peak: int, live: int, device: str) -> None:
    gc.collect()
    assert peak_bytes(lambda: run(device), device) == peak * KIB
    assert live_bytes(lambda: run(device), device) == live * KIB


def test_memory_from_an_earlier_measurement_does_not_count_when_it_is_freed() -> None:
    # The profiler knows this block from the first measurement and reports its end in the second.
    kept: list[Tensor] = []
    peak_bytes(lambda: kept.append(block(4, "cpu")), "cpu")

    def run() -> Tensor:
        kept.clear()
        return block(3, "cpu")

    assert live_bytes(run, "cpu") == 3 * KIB


def test_a_kept_address_that_is_used_again_counts_at_its_new_size() -> None:
    # The allocator hands out the same address again and again; blocks of two measurements must not be mixed up.
    for kib in (3, 5, 2, 5):
        assert live_bytes(lambda kib=kib: block(kib, "cpu"), "cpu") == kib * KIB  # type: ignore[misc]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collector_is_off_inside_and_restored(enabled: bool) -> None:
    seen = []
    try:
        (gc.enable if enabled else gc.disable)()
        peak_bytes(lambda: seen.append(gc.isenabled()), "cpu")
        assert seen == [False]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_a_device_without_a_count_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device='meta'.*cpu, cuda"):
        peak_bytes(lambda: None, "meta")
