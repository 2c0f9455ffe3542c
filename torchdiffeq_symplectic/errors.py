"""What the package raises and warns of."""

from __future__ import annotations

__all__ = [
    "EscapedGraphWarning",
    "MissingGradientWarning",
    "ReplayError",
    "ReplayWarning",
    "UnsupportedFieldError",
    "UnsupportedSolverError",
]


class ReplayError(RuntimeError):
    """The replay in backward is not the forward pass again, so its gradient would be that of something else."""


class ReplayWarning(UserWarning):
    """The same, where the caller asked for a warning only; or an approximate mode that is not to be trusted."""


class MissingGradientWarning(UserWarning):
    """The field uses a tensor that requires a gradient but is in no list of parameters, so it gets none."""


class EscapedGraphWarning(UserWarning):
    """The field hands out tensors other than its slope, whose gradients stop at the field's inputs."""


class UnsupportedFieldError(NotImplementedError):
    """The field does what a replay cannot follow."""


class UnsupportedSolverError(NotImplementedError):
    """The steps of a solver cannot be differentiated by the gradient mode."""
