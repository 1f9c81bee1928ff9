"""Samples without a source image, numbered, on a sheet."""

from PIL import Image
from torch import Tensor

from encdiff.errors import InputError
from encdiff.pictures.cells import cells_of
from encdiff.pictures.sheet import GAP, SOFT, Sheet

ROW, WIDE = 8, 16  # images in a row, where there are many
LABEL = 18  # pixels above an image


def sample_sheet(images: Tensor, prior: str, fitted: int) -> Image.Image:
    """Images (n, 3, S, S) in rows, each under its number; the caption says the prior and what it was fitted to."""
    if len(images) == 0:
        raise InputError("images are none, must be at least one")
    sheet = Sheet(
        "Sampled without a source image",
        f"Every image is drawn from a code of its own, and every code from {prior}, which was fitted to the codes of "
        f"{fitted:,} images of the data; no source image was used. The number is the sample's.",
    )
    row = ROW if len(images) <= ROW**2 else WIDE
    for i, cell in enumerate(cells_of(images)):
        x, y = i % row * (cell.width + GAP), i // row * (cell.height + LABEL + GAP)
        sheet.text(x + cell.width // 2, y + LABEL - 5, str(i), 11, SOFT, anchor="ms")
        sheet.image(x, y + LABEL, cell)
    return sheet.render()
