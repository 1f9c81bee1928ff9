"""Pictures for people: concepts swapped between images, traversed, and where the model attends to each.

Every picture explains itself: title, caption, labelled rows and columns. Small images are enlarged by whole factors
without smoothing, so a cell holds exactly the pixels that the model gave. Import the names below from here; imports
edit, models and what lies below them.
"""

from encdiff.metrics.groups import concept_groups, concept_labels
from encdiff.models.batches import encode_images
from encdiff.pictures.concepts import attention_picture, swap_grid, traversal
from encdiff.pictures.edited import edited_sheet
from encdiff.pictures.lines import edits, interpolation
from encdiff.pictures.paths import FactorPath, factor_paths, factor_traversal, true_swaps
from encdiff.pictures.samples import sample_sheet
from encdiff.pictures.sheet import save_png
from encdiff.pictures.words import words_picture

__all__ = [
    "FactorPath", "attention_picture", "concept_groups", "concept_labels", "edited_sheet", "edits", "encode_images",
    "factor_paths", "factor_traversal", "interpolation", "sample_sheet", "save_png", "swap_grid", "traversal",
    "true_swaps", "words_picture",
]  # fmt: skip
