"""A page for pictures: cells in labelled columns under a title and a caption."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from encdiff.files.temporaries import atomic_path

MARGIN, INK, SOFT, FAINT, ACCENT = 26, "#1f2430", "#6b7280", "#d3d7de", "#d9480f"
GAP, GROUP, PANEL = 4, 22, 34  # between cells, between groups of cells, between panels
LINE = 15  # from one line of a label to the next
WRAP = 10  # so many columns or strips in a panel at most


class Column(NamedTuple):
    """Cells below each other under a label; `note` stands small above the label."""

    cells: list[Image.Image]
    label: str
    note: str = ""
    bold: bool = False


class Sheet:
    """A white page that grows with what is put on it, under a title and a caption; pixels from the top left."""

    def __init__(self, title: str, caption: str):
        self.title, self.caption = title, caption
        self.right = self.bottom = 0
        self.todo: list[Callable[[Image.Image, ImageDraw.ImageDraw], None]] = []

    def image(self, x: int, y: int, picture: Image.Image) -> None:
        self._grow(x + picture.width, y + picture.height)
        self.todo.append(lambda page, draw: page.paste(picture, (x, y)))

    def text(
        self, x: int, y: int, text: str, size: int = 13, colour: str = INK, *, bold=False, anchor="la", width=0
    ) -> None:
        """A text wider than `width` is cut off with an ellipsis."""
        font = _font(size, bold)
        while width and font.getlength(text) > width:
            text = text.removesuffix("…")[:-1].rstrip() + "…"
        _, _, right, bottom = font.getbbox(text, anchor=anchor)
        self._grow(math.ceil(x + right), math.ceil(y + bottom))
        self.todo.append(lambda page, draw: draw.text((x, y), text, fill=colour, font=font, anchor=anchor))

    def line(self, x0: float, x1: float, y: int, colour: str = FAINT, width: int = 1) -> None:
        self._grow(math.ceil(x1), y + width)
        self.todo.append(lambda page, draw: draw.line([(x0, y), (x1, y)], fill=colour, width=width))

    def dot(self, x: float, y: int, radius: float = 4) -> None:
        self._grow(math.ceil(x + radius) + 1, math.ceil(y + radius) + 1)
        self.todo.append(lambda page, draw: draw.circle((x, y), radius, fill=ACCENT))

    def render(self) -> Image.Image:
        width = max(self.right, 460)
        lines = list(_wrap_text(self.caption, _font(13), min(width, 900)))
        top = MARGIN + 34 + 19 * len(lines) + 18
        page = Image.new("RGB", (width + 2 * MARGIN, top + self.bottom + MARGIN), "white")
        draw = ImageDraw.Draw(page)
        draw.text((MARGIN, MARGIN), self.title, fill=INK, font=_font(21, True))
        for i, line in enumerate(lines):
            draw.text((MARGIN, MARGIN + 34 + 19 * i), line, fill=SOFT, font=_font(13))
        body = Image.new("RGB", (width, self.bottom), "white")
        for step in self.todo:
            step(body, ImageDraw.Draw(body))
        page.paste(body, (MARGIN, top))
        page.info = {"Title": self.title, "Description": self.caption, "Software": "encdiff"}
        return page

    def _grow(self, right: int, bottom: int) -> None:
        self.right, self.bottom = max(self.right, right), max(self.bottom, bottom)


def draw_panels(sheet: Sheet, rows: list[str], fixed: list[Column], columns: list[Column], heading: str) -> None:
    """Rows of cells: the fixed columns, then the others; many of these wrap into panels that repeat the fixed ones."""
    side, indent = fixed[0].cells[0].width, 64
    for part in panels(columns):
        top = sheet.bottom + (PANEL if sheet.bottom else 0)
        first = top + 32 + max(_label_height(column.label, column.note, side) for column in fixed + part)
        for i, name in enumerate(rows):
            sheet.text(0, first + i * (side + GAP) + side // 2, name, colour=SOFT, anchor="lm", width=indent - 8)
        x = indent
        for column in fixed:
            x = draw_column(sheet, x, first, column)
        x += GROUP - GAP
        sheet.text(x, top, heading, colour=SOFT)
        sheet.line(x, x + len(part) * (side + GAP) - GAP, top + 21)
        for column in part:
            x = draw_column(sheet, x, first, column)


def draw_column(sheet: Sheet, x: int, y: int, column: Column) -> int:
    """Labels above y, cells below it; returns the x of the next column."""
    side = column.cells[0].width
    draw_label(sheet, x + side // 2, y - 8, column.label, column.note, column.bold, side)
    for i, cell in enumerate(column.cells):
        sheet.image(x, y + i * (side + GAP), cell)
    return x + side + GAP


def draw_label(sheet: Sheet, x: int, y: int, label: str, note: str, bold: bool, width: int) -> None:
    """Centred on x, wrapped to the width, the last baseline at y, the note above the label."""
    lines = list(_wrap_text(label, _font(12, bold), width))
    for i, line in enumerate(reversed(lines)):
        sheet.text(x, y - LINE * i, line, 12, bold=bold, anchor="ms", width=width)
    if note:
        sheet.text(x, y - LINE * len(lines), note, 11, SOFT, anchor="ms", width=width)


def _label_height(label: str, note: str, width: int) -> int:
    return LINE * (len(list(_wrap_text(label, _font(12, True), width))) + bool(note))


def panels(items: Iterable, most: int = WRAP) -> Iterator[list]:
    """Parts of nearly equal length, none longer than `most`."""
    items = list(items)
    length = math.ceil(len(items) / math.ceil(len(items) / most))
    return (items[i : i + length] for i in range(0, len(items), length))


def _wrap_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same letters everywhere, and most scripts."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all, with its title and caption as metadata."""
    about = PngInfo()
    for key, text in picture.info.items():
        about.add_itxt(str(key), str(text))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=about)
