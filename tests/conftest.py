"""What a test may switch is switched back, and random numbers are the same in each run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from sampling import pytest_collection_modifyitems  # noqa: F401 (a hook)

import torchdiffeq_symplectic

# One worker a core: more threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The package is registered, no mode is the default, the default dtype is as before, random numbers are seeded."""
    torchdiffeq_symplectic.register()
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20260101)
        yield
    torch.set_default_dtype(dtype)
    torchdiffeq_symplectic.register()
    torchdiffeq_symplectic.set_default(None)
