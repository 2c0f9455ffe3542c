"""What the compatibility tests share: the versions in pytest's header, the modes, and how gradients are compared."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torchdiffeq
from harness import MODES, arguments_of
from sampling import pytest_collection_modifyitems  # noqa: F401 (a hook)
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

import torchdiffeq_symplectic

# pytest loads this file first in a run of all tests. One worker a core: more threads would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def pytest_report_header() -> str:
    """The versions under test, as "does it hold on mine?" is what these tests answer."""
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        # Two different releases call themselves 0.2.5, so the methods are told as well.
        "torchdiffeq": f"{torchdiffeq.__version__} with {len(SOLVERS)} methods",
        "torchdyn": _version_of("torchdyn"),
        "torchdiffeq_symplectic": torchdiffeq_symplectic.__version__,
    }
    return "compat: " + ", ".join(f"{name} {version}" for name, version in versions.items())


@pytest.fixture(params=list(MODES))
def mode(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments that choose a gradient mode; a new dictionary each time."""
    return arguments_of(request.param)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Whatever a test unregisters is registered again, and random numbers are the same in each run."""
    torchdiffeq_symplectic.register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20260101)
        yield
    torchdiffeq_symplectic.register()


@pytest.fixture
def upstream() -> Callable[..., Any]:
    """``odeint_adjoint`` as code has it that imported the name before this package was imported."""
    torchdiffeq_symplectic.unregister()
    from torchdiffeq import odeint_adjoint

    torchdiffeq_symplectic.register()
    assert odeint_adjoint is not torchdiffeq.odeint_adjoint
    function: Callable[..., Any] = odeint_adjoint
    return function


@pytest.fixture
def double_precision() -> Iterator[None]:
    """float64 is PyTorch's default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def assert_agree() -> Callable[..., None]:
    """Compares gradients, ``assert_agree(found, expected, tolerance=1e-11)``: norm of the difference over the norm."""

    def compare(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float = 1e-11) -> None:
        __tracebackhide__ = True
        assert len(found) == len(expected)
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert one is not None, f"no gradient for input {i}"
            truth = torch.zeros_like(one) if other is None else other
            assert one.shape == truth.shape
            error, size = float((one - truth).norm()), float(truth.norm())
            assert error <= tolerance * size, f"input {i}: the gradient is off by {error:.1e}, its norm is {size:.1e}"

    return compare


@pytest.fixture
def needs_callbacks() -> None:
    """Skips where torchdiffeq has no callbacks (before 0.2.4)."""
    from torchdiffeq._impl import misc

    if not hasattr(misc, "_all_callback_names"):
        pytest.skip("this torchdiffeq has no callbacks")


@pytest.fixture
def needs_complex() -> None:
    """Skips where torchdiffeq refuses complex states (before 0.2.4)."""
    from torchdiffeq._impl import misc

    if "is_complex" not in inspect.getsource(misc._PerturbFunc):
        pytest.skip("this torchdiffeq refuses complex states")


@pytest.fixture
def replica_of() -> Callable[[nn.Module, dict[nn.Parameter, Tensor]], nn.Module]:
    """As nn.DataParallel's replicate makes it, on one device: parameters are attributes, the copies given."""

    def replicate(module: nn.Module, copies: dict[nn.Parameter, Tensor]) -> nn.Module:
        replica: nn.Module = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(replica, name, replicate(child, copies))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(replica, name, copies[parameter])
        return replica

    return replicate
