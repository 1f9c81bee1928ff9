"""Cells of a picture: images enlarged by whole factors, maps in colour over them, labelled strips."""

import math
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from encdiff.data import to_uint8
from encdiff.pictures.sheet import GAP, GROUP, PANEL, SOFT, Sheet, draw_label

CELL, LARGEST = 96, 192  # a cell is at least and at most so many pixels wide


def cells_of(images: Tensor) -> list[Image.Image]:
    """Pictures of images (n, 3, S, S): small ones enlarged by a whole factor, only very large ones reduced."""
    return [enlarged(Image.fromarray(array)) for array in to_uint8(images).cpu().numpy()]


def enlarged(picture: Image.Image, least: int = CELL) -> Image.Image:
    if picture.width > max(least, LARGEST):
        return picture.resize((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    side = picture.width * math.ceil(least / picture.width)
    return picture.resize((side, side), Image.Resampling.NEAREST)


def heated(cell: Image.Image, share: np.ndarray, high: float) -> Image.Image:
    """A map (S, S) in colour over the greyed image."""
    smooth = Image.fromarray(share.astype(np.float32)).resize(cell.size, Image.Resampling.BICUBIC)
    grey = np.asarray(cell.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    return _blend(grey, np.asarray(smooth, dtype=np.float64), high)


def _blend(grey: np.ndarray, share: np.ndarray, high: float) -> Image.Image:
    level = np.clip(share / max(high, 1e-12), 0, 1)
    colour = 255 * matplotlib.colormaps["inferno"](level)[..., :3]
    opacity = 0.3 + 0.6 * level[..., None]  # the image shows through where little is attended to
    return Image.fromarray(np.rint((1 - opacity) * grey + opacity * colour).astype(np.uint8))


def draw_originals(sheet: Sheet, images: dict[str, Tensor]) -> int:
    """Large, below each other; returns the x of what comes beside them."""
    y = 24
    for name, image in images.items():
        picture = enlarged(Image.fromarray(to_uint8(image).cpu().numpy()[0]), 2 * CELL)
        sheet.text(picture.width // 2, y - 8, name, 12, anchor="ms")
        sheet.image(0, y, picture)
        y = sheet.bottom + PANEL
    return sheet.right + GROUP


class Strip(NamedTuple):
    """A row of cells under way from one end to the other."""

    label: str
    note: str  # small above the label
    cells: list[Image.Image]
    place: float  # of the dot, between the first cell (0) and the last (1)
    true: list[Image.Image] = []  # noqa: RUF012 - of a tuple; cells that stand below, as they should be


def draw_strips(sheet: Sheet, left: int, strips: list[Strip], ends: tuple[str, str] = ("low", "high")) -> int:
    """Labelled strips below each other, the ends named above the first; returns the next x."""
    y, x = 24, left + 112
    for strip in strips:
        step, count = strip.cells[0].width + GAP, len(strip.cells)
        first, last = x + step // 2, x + (count - 1) * step + step // 2
        if strip is strips[0]:
            for end, place in zip(ends, (first, last), strict=True):
                sheet.text(place, 16, end, 12, SOFT, anchor="ms")
        draw_label(sheet, left + 48, y + step // 2 + 4, strip.label, strip.note, bool(strip.note), 96)
        for i, cell in enumerate(strip.cells):
            sheet.image(x + i * step, y, cell)
        if strip.true:
            y += step
            sheet.text(left + 48, y + step // 2, "true", 12, SOFT, anchor="ms")
            for i, cell in enumerate(strip.true):
                sheet.image(x + i * step, y, cell)
        sheet.line(first, last, y + step + 4, width=2)
        sheet.dot(first + strip.place * (last - first), y + step + 5)
        y += step + GROUP - GAP
    return sheet.right + PANEL


def draw_colour_bar(sheet: Sheet, high: float, width: int = 260, height: int = 14) -> None:
    top, left = sheet.bottom + GROUP, 140
    ramp = np.linspace(0, high, width)[None].repeat(height, axis=0)
    sheet.text(0, top + height // 2, "share of attention", 12, SOFT, anchor="lm")
    sheet.image(left, top, _blend(np.full((height, width, 3), 96.0), ramp, high))
    for fraction, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
        label = f"{100 * fraction * high:.{0 if high > 0.1 else 1}f} %"
        sheet.text(left + round(fraction * width), top + height + 5, label, 12, SOFT, anchor=anchor)
