"""The model's parts, each usable alone, and `EncDiff`, which joins them.

`core` is what it is, `sampling` what it draws, `edits` what people do with any model of concepts, `encdiff` its files.
Import the names below from here, parts from their modules; imports diffusion, ops and what lies below them.
"""

from encdiff.models.config import PRESETS, EncDiffConfig
from encdiff.models.edits import ConceptModel
from encdiff.models.encdiff import EncDiff

__all__ = ["PRESETS", "ConceptModel", "EncDiff", "EncDiffConfig"]
