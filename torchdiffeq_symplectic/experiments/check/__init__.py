"""``check``: whether gradients are exact with what is installed, measured method by method and mode by mode."""

from torchdiffeq_symplectic.experiments.check.measure import THRESHOLDS, Finding, Variant, measure, variants
from torchdiffeq_symplectic.experiments.check.methods import HOSTS, Host
from torchdiffeq_symplectic.experiments.check.verdict import is_exact, report, to_dict

__all__ = [
    # what is measured
    "HOSTS",
    "Host",
    "Variant",
    "variants",
    # measuring
    "THRESHOLDS",
    "measure",
    # what was found
    "Finding",
    "is_exact",
    "report",
    "to_dict",
]
