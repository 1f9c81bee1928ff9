"""Concept edits: the projections of cross-attention changed in closed form, so that tokens give other keys and values.

Import the names below from here; imports models, data, metrics and what lies below. A U-Net of diffusers is edited by
the names of its modules: diffusers itself is not imported.
"""

from encdiff.edit.closed_form import solve
from encdiff.edit.concepts import (
    Targets,
    concept_range,
    concept_targets,
    concept_tokens,
    factor_concepts,
    factor_targets,
    factor_tokens,
    known_codes,
)
from encdiff.edit.debias import Debiased, debias, joint_attributes
from encdiff.edit.edit import Edit
from encdiff.edit.layers import end_of_text
from encdiff.edit.methods import METHODS, mist, uce

__all__ = [
    "METHODS", "Debiased", "Edit", "Targets", "concept_range", "concept_targets", "concept_tokens", "debias",
    "end_of_text", "factor_concepts", "factor_targets", "factor_tokens", "joint_attributes", "known_codes", "mist",
    "solve", "uce",
]  # fmt: skip
