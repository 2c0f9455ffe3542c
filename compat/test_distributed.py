"""DistributedDataParallel over two gloo processes gives the gradient of one process, in every host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_same_gradients

SCRIPT = Path(__file__).with_name("distributed_gradient.py")
HOSTS = {"torchdiffeq": "adjoint_method", "torchdyn": "sensitivity"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]


def in_processes(count: int, host: str, mode: str, folder: Path) -> dict[str, Any]:
    """What rank 0 of ``count`` processes writes: the gradient of each parameter."""
    out, store = folder / f"{count}.pt", folder / "store"
    store.unlink(missing_ok=True)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    processes = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), str(store), str(out), host, mode], env=environment)
        for rank in range(count)
    ]
    try:
        assert [process.wait(timeout=240) for process in processes] == [0] * count
    finally:
        for process in processes:
            process.kill()
    return {str(i): gradient for i, gradient in enumerate(torch.load(out, weights_only=True))}


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(name)
    return name


@pytest.fixture(scope="module")
def single_process(host: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_processes(1, host, "single", tmp_path_factory.mktemp("single"))


def test_two_processes_have_the_gradient_of_one(
    host: str, mode: Mapping[str, Any], tmp_path: Path, single_process: dict[str, Any]
) -> None:
    """A parameter unused; each process has half of the batch."""
    settings = {HOSTS[host] if name == "adjoint_method" else name: value for name, value in mode.items()}
    found = in_processes(2, host, json.dumps(settings), tmp_path)
    assert all(gradient is not None for gradient in found.values())
    assert_same_gradients(found, single_process, torch.float64)
