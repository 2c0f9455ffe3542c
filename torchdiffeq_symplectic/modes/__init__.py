"""The gradient modes: name -> mode. A new one is one file and one entry here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping

from torchdiffeq_symplectic.check import REPLAY_CHECKS
from torchdiffeq_symplectic.modes._mode import Mode
from torchdiffeq_symplectic.modes.aca import AdaptiveCheckpoint
from torchdiffeq_symplectic.modes.baseline import Baseline
from torchdiffeq_symplectic.modes.memory_free import MemoryFree
from torchdiffeq_symplectic.modes.symplectic import Symplectic

__all__ = ["MODES", "Mode", "configured"]


MODES: dict[str, Mode] = {mode.name: mode for mode in (Symplectic(), AdaptiveCheckpoint(), Baseline(), MemoryFree())}


def configured(
    mode: Mode, options: Mapping[str, object], hosts: Callable[[], Container[str]] = frozenset
) -> tuple[Mode, str]:
    """The mode under ``adjoint_options``, and what is done about a replay that is not the forward pass.

    Warns of unknown keys as torchdiffeq does; those in ``hosts()`` are the host's own, and have no effect.

    Raises:
        ValueError: if an option that is the mode's own has a wrong value.
    """
    known = mode.options | {"replay_check"}
    unknown = {key: value for key, value in options.items() if key not in known}
    if unknown:
        harmless = hosts()
        unknown = {key: value for key, value in unknown.items() if key not in harmless}
    if unknown:
        warnings.warn(f"{mode.name}: Unexpected arguments {unknown}", stacklevel=5)
    check = options.get("replay_check", mode.replay_check)
    if check not in list(REPLAY_CHECKS):
        raise ValueError(f'adjoint_options["replay_check"] must be one of {REPLAY_CHECKS}, but is {check!r}')
    return mode.configured(options), str(check)
