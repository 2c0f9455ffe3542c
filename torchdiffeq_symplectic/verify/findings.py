"""What `measure` found, and the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchdiffeq_symplectic.modes import MODES
from torchdiffeq_symplectic.verify.measure import THRESHOLDS, Row

__all__ = ["Findings"]


@dataclass(frozen=True)
class Findings:
    """Rows, and what they hold for.

    Attributes:
        versions: name -> version.
        dtype: that was measured in.
        rows: one for each method and variant of a mode.
    """

    versions: Mapping[str, str]
    dtype: torch.dtype
    rows: Sequence[Row]

    @property
    def threshold(self) -> float:
        """The largest error that counts as exact."""
        return THRESHOLDS[self.dtype]

    @property
    def wrong(self) -> list[Row]:
        """What should have been exact and is not, or failed."""
        return [row for row in self.rows if row.outcome in ("inexact", "failed")]

    @property
    def unmeasured(self) -> list[tuple[str, str]]:
        """Host and variant, for the variants that should be exact and refuse every method of the host."""
        judged = dict.fromkeys((row.host, row.variant) for row in self.rows if MODES[row.mode].exact)
        return [
            pair
            for pair in judged
            if all(row.outcome == "refused" for row in self.rows if (row.host, row.variant) == pair)
        ]

    @property
    def exact(self) -> bool:
        """Whether all that should be exact is, and was measured for one method at least."""
        return bool(self.rows) and not self.wrong and not self.unmeasured

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; an error that is not finite is a text, as JSON has no such number."""
        return {
            "versions": dict(self.versions),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threshold": self.threshold,
            "exact": self.exact,
            "rows": [
                {
                    "host": row.host,
                    "method": row.method,
                    "mode": row.variant,
                    "outcome": row.outcome,
                    "error": _number(row.error),
                    "errors": {name: _number(error) for name, error in row.errors.items()},
                    "reason": row.reason,
                }
                for row in self.rows
            ],
        }


def _number(error: float | None) -> float | str | None:
    return error if error is None or math.isfinite(error) else str(error)
