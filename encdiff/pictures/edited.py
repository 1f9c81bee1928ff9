"""Pictures of a concept edit: the same images drawn with weights more and more edited."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from encdiff.edit import Edit
from encdiff.errors import InputError
from encdiff.models import EncDiff
from encdiff.models.batches import encode_images
from encdiff.pictures.cells import cells_of
from encdiff.pictures.concepts import Progress, sample_batches
from encdiff.pictures.sheet import Column, Sheet, draw_panels


def edited_sheet(
    model: EncDiff,
    edit: Edit,
    images: Tensor,
    *,
    strengths: Sequence[float] = (0, 0.5, 1),
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    note: str = "",
    progress: Progress | None = None,
) -> Image.Image:
    """Images (n, 3, S, S), a row each, rebuilt from their own concepts by the model at each strength of the edit.

    0 is the model as it is, which it is again afterwards. `note` ends the caption. `progress` is called with
    (strengths done, strengths).
    """
    if len(images) == 0 or len(strengths) == 0:
        raise InputError(f"images are {len(images)} and strengths {len(strengths)}; both must be at least 1")
    codes, columns = encode_images(model, images), []
    for i, strength in enumerate(strengths, start=1):
        edit.apply(model, strength)
        try:
            made = sample_batches(model, codes, None, sampler, steps, seed, None)
        finally:
            edit.undo(model)
        columns.append(Column(cells_of(made), f"{strength:.3g}"))
        if progress:
            progress(i, len(strengths))
    sheet = Sheet(
        f"Edited: {edit.name or edit.method}",
        "Each image rebuilt from its own, unchanged concepts, by the model as it is (0) and with its cross-attention "
        f"edited ({edit.method.upper()}) at greater strengths; 1 is the whole edit." + (f" {note}" if note else ""),
    )
    rows = [f"image {i + 1}" for i in range(len(images))]
    draw_panels(sheet, rows, [Column(cells_of(images), "image")], columns, "strength")
    return sheet.render()
