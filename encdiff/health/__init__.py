"""What this machine has and whether every kernel is right on it: `encdiff doctor`. Imports ops and what lies below."""

from encdiff.health.report import Report, doctor

__all__ = ["Report", "doctor"]
