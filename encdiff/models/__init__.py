"""The model's parts, each usable alone, and `EncDiff`, which joins them.

`core` is what it is, `edits` what people do with it, `encdiff` its files. Import the names below from here, parts from
their modules; imports diffusion, ops and what lies below them.
"""

from encdiff.models.config import PRESETS, EncDiffConfig
from encdiff.models.encdiff import EncDiff

__all__ = ["PRESETS", "EncDiff", "EncDiffConfig"]
