"""The model's parts, each usable alone, and `EncDiff`, which joins them."""

from encdiff.models.config import PRESETS, EncDiffConfig
from encdiff.models.encdiff import EncDiff

__all__ = ["PRESETS", "EncDiff", "EncDiffConfig"]
