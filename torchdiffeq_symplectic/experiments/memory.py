"""How many bytes of tensors a piece of code allocates: the most that are alive at once, and what is left at its end.

Both counts are read off the allocator, not sampled, and are the same in every run. On the CPU the profiler reports each
block as it is allocated and freed; on CUDA the caching allocator keeps the counts itself.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["MIB", "live_bytes", "peak_bytes"]

MIB = 2**20


def peak_bytes(run: Callable[[], object], device: torch.device | str) -> int:
    """The most bytes that ``run`` has allocated and not yet freed at any one time.

    Memory that was alive before ``run`` does not count, nor does it lower the count when ``run`` frees it. The garbage
    collector is off in the meantime, so that tensors caught in reference cycles show.

    Args:
        run: what to measure. Call it once beforehand if its first call differs, as cuBLAS's workspace does.
        device: the device whose memory counts, a CPU or a CUDA device.

    Returns:
        Bytes: on the CPU those asked for, on CUDA those of the caching allocator's blocks (multiples of 512).

    Raises:
        ValueError: if ``device`` is neither a CPU nor a CUDA device.
    """
    return _measure(run, torch.device(device))[0]


def live_bytes(run: Callable[[], object], device: torch.device | str) -> int:
    """Bytes that ``run`` has allocated and that are alive when it returns, the value that it returns included.

    Arguments, units and errors are those of :func:`peak_bytes`. Here too the garbage collector is off: a tensor that
    only a reference cycle holds is alive.
    """
    return _measure(run, torch.device(device))[1]


def _measure(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Peak and final number of bytes that ``run`` allocates on ``device``."""
    measures = {"cpu": _measure_cpu, "cuda": _measure_cuda}
    if device.type not in measures:
        raise ValueError(f"device={str(device)!r} has no exact count of its memory; use one of {', '.join(measures)}")
    with _garbage_collector_off():
        return measures[device.type](run, device)


def _measure_cpu(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    del device  # all of the CPU's memory is one
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _standard_error_off():
        profiler.start()
    try:
        result = run()  # alive until the profiler has stopped
    finally:
        with _standard_error_off():
            profiler.stop()
    del result
    live = peak = 0
    blocks: dict[int, int] = {}  # address -> bytes, of the blocks that run allocated
    for address, size in _allocations(profiler):
        if size > 0:
            blocks[address] = size
            live += size
        else:
            # Not the event's own size: the profiler also reports blocks that it saw allocated in an earlier profile.
            live -= blocks.pop(address, 0)
        peak = max(peak, live)
    return peak, live


def _measure_cuda(run: Callable[[], object], device: torch.device) -> tuple[int, int]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    peak = torch.cuda.max_memory_allocated(device) - before
    live = torch.cuda.memory_allocated(device) - before
    del result
    return peak, live


def _allocations(profiler: profile) -> Iterator[tuple[int, int]]:
    """Each event of the CPU's allocator in order of time: address, and bytes (negative if they were freed).

    The exported trace is the one public place that has the addresses.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    # Stable: the trace is written in order of nanoseconds, but older releases print whole microseconds.
    for event in sorted(memory, key=lambda event: float(event["ts"])):
        if event["args"]["Device Type"] == 0:  # c10::DeviceType::CPU
            yield int(event["args"]["Addr"]), int(event["args"]["Bytes"])


@contextmanager
def _garbage_collector_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _standard_error_off() -> Iterator[None]:
    """Drop what the process writes to its standard error.

    In torch 2.13 the profiler writes a line at each start and stop, at every KINETO_LOG_LEVEL
    (https://github.com/pytorch/kineto/pull/1325). It comes from C++, so ``contextlib.redirect_stderr`` does not see it.
    """
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
