"""Whether gradients are exact with what is installed: measured, as ``torchdiffeq-symplectic check`` prints it."""

from torchdiffeq_symplectic.verify.findings import Findings
from torchdiffeq_symplectic.verify.hosts import HOSTS, Host, versions
from torchdiffeq_symplectic.verify.measure import THRESHOLDS, Row, Variant, measure, variants

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
    "Findings",
    "Row",
    "versions",
]
