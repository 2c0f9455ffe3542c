"""Every method under every gradient mode against backpropagation through the host's own solve."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from torchdiffeq_symplectic import MODES
from torchdiffeq_symplectic.experiments.check.ivp import Ivp, loss_of
from torchdiffeq_symplectic.experiments.check.methods import Host, HostMethod
from torchdiffeq_symplectic.experiments.environment import ERRORS

__all__ = ["THRESHOLDS", "Finding", "Variant", "measure", "variants"]

# The largest relative error that is rounding. Gradients of times are what is left of terms that cancel: in float32
# backpropagation's own are off by up to some 1e-4, so that only a coarse fault is found there.
THRESHOLDS = {torch.float64: 1e-11, torch.float32: 1e-3}

Outcome = Literal["exact", "inexact", "approximate", "refused", "failed"]

T = TypeVar("T")


class Variant(NamedTuple):
    """A mode and options of it.

    Attributes:
        name: what tables call it.
        mode: its name in MODES.
        options: as ``adjoint_options``.
    """

    name: str
    mode: str
    options: Mapping[str, object]


@dataclass(frozen=True)
class Finding:
    """What was found for one method under one variant of a mode.

    Attributes:
        host, method: what solved.
        variant, mode: what differentiated.
        outcome: "exact" or "inexact" by the threshold; "approximate" for a mode that is so by its nature, whose error
            is not judged; "refused" where the mode does not take the method; "failed" if something raised, or if the
            forward values are not the host's.
        errors: ‖g - g*‖ / ‖g*‖ for each tensor, by name, "y0" and "t" among them; empty where nothing was measured.
        reason: why it was refused, failed or inexact, else None.
    """

    host: str
    method: str
    variant: str
    mode: str
    outcome: Outcome
    errors: Mapping[str, float]
    reason: str | None = None

    @property
    def error(self) -> float | None:
        """The largest of ``errors``, NaN if one is, None if there are none."""
        if any(error != error for error in self.errors.values()):
            return float("nan")
        return max(self.errors.values(), default=None)


def variants(modes: Sequence[str] | None = None) -> list[Variant]:
    """``modes``, by default all of them; `symplectic` once more with its stages kept."""
    found = []
    for name in MODES if modes is None else dict.fromkeys(modes):
        found.append(Variant(name, name, {}))
        if name == "symplectic":
            found.append(Variant("symplectic, stages", name, {"checkpoint": "stages"}))
    return found


def measure(hosts: Sequence[Host], variants: Sequence[Variant], dtype: torch.dtype) -> Iterator[Finding]:
    """Measure all methods of ``hosts``, in their order; a row comes when it is there.

    An error of a host is a row that failed.

    Args:
        hosts: each is imported when its turn comes.
        variants: each method is measured under all of them.
        dtype: of states, parameters and times; one of THRESHOLDS.
    """
    for host in hosts:
        try:
            methods = _attempt(host.methods)
        except _FailedError as failure:
            for variant in variants:
                yield Finding(host.name, "all methods", variant.name, variant.mode, "failed", {}, str(failure))
            continue
        for method in methods:
            truth = functools.cache(functools.partial(_truth, method, dtype))
            for variant in variants:
                yield _row(host, method, variant, dtype, truth)


class _Truth(NamedTuple):
    solution: Tensor
    gradients: Mapping[str, Tensor]


def _row(host: Host, method: HostMethod, variant: Variant, dtype: torch.dtype, truth: Callable[[], _Truth]) -> Finding:
    def row(outcome: Outcome, errors: Mapping[str, float], reason: str | None = None) -> Finding:
        return Finding(host.name, method.name, variant.name, variant.mode, outcome, errors, reason)

    problem = Ivp.make(dtype, method.halves)
    try:
        solution = _attempt(lambda: method.solve(*problem, variant.mode, variant.options), variant.mode)
        expected = truth()
        _assert_equal(solution.detach(), expected.solution)
        errors = _errors(_attempt(lambda: _gradients(solution, problem)), expected.gradients)
    except _RefusedError as refusal:
        return row("refused", {}, str(refusal))
    except _FailedError as failure:
        return row("failed", {}, str(failure))
    if not MODES[variant.mode].exact:
        return row("approximate", errors)
    wrong = {name: error for name, error in errors.items() if not error <= THRESHOLDS[dtype]}
    if not wrong:
        return row("exact", errors)
    figures = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
    return row("inexact", errors, f"gradients that are off, relatively: {figures}")


def _truth(method: HostMethod, dtype: torch.dtype) -> _Truth:
    problem = Ivp.make(dtype, method.halves)
    try:
        solution = _attempt(lambda: method.solve(*problem, None, {}))
        return _Truth(solution.detach(), _attempt(lambda: _gradients(solution, problem)))
    except _FailedError as failure:
        raise _FailedError(f"the host's own solve gives no gradient to compare with: {failure}") from failure


def _gradients(solution: Tensor, problem: Ivp) -> dict[str, Tensor]:
    wanted = problem.wanted
    return dict(zip(wanted, torch.autograd.grad(loss_of(solution), list(wanted.values())), strict=True))


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise _FailedError(
            f"the solution is not the host's own: of shape {tuple(found.shape)} and {found.dtype} instead of "
            f"{tuple(expected.shape)} and {expected.dtype}"
        )
    if not torch.equal(found, expected):
        difference = float((found - expected).abs().max())
        raise _FailedError(f"the solution is not the host's own: values differ by up to {difference:.1e}")


def _errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: _relative(found[name], truth) for name, truth in expected.items()}


def _relative(found: Tensor, truth: Tensor) -> float:
    """‖found - truth‖ / ‖truth‖; zero where both are."""
    difference, size = (float(torch.linalg.vector_norm(tensor)) for tensor in (found - truth, truth))
    if not difference:
        return 0.0
    return difference / size if size else float("inf")


class _RefusedError(Exception):
    """A mode does not take a method, and says so."""


class _FailedError(Exception):
    """Something went wrong in a solve or its gradient."""


def _attempt(run: Callable[[], T], mode: str | None = None) -> T:
    """``run()``, silently; whatever goes wrong is a finding about what is installed.

    Raises:
        _RefusedError: for an error of a kind that says that something is not supported, if it names ``mode``.
        _FailedError: for all others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a host's advice to its users
        try:
            return run()
        except ERRORS as error:
            if mode is not None and isinstance(error, NotImplementedError | ValueError) and f'"{mode}"' in str(error):
                raise _RefusedError(str(error)) from error
            raise _FailedError(f"{type(error).__name__}: {error}") from error
