"""What this machine has and whether every kernel is right on it: `encdiff doctor`. Imports ops; only the command line
imports it.
"""

from encdiff.health.report import Report, doctor

__all__ = ["Report", "doctor"]
