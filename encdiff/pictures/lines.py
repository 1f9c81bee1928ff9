"""Pictures of codes that move in a straight line: from one image to another, and along a direction."""

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from encdiff.errors import InputError
from encdiff.models import ConceptModel
from encdiff.models.directions import Direction
from encdiff.pictures.cells import cells_of
from encdiff.pictures.sheet import GAP, GROUP, LINE, SOFT, Column, Sheet, draw_column, draw_label, draw_panels

INDENT = 112  # of the first cell, beside the rows' labels
Progress = Callable[[int, int], None]  # (rows done, rows)


def interpolation(
    model: ConceptModel,
    source: Tensor,
    target: Tensor,
    *,
    groups: Mapping[str, Sequence[int]] | None = None,
    columns: int = 7,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """From one image (3, S, S) to another: a row in which all concepts move, then one for each of `groups`.

    `groups` are concepts by label, which move alone in their row, such as those that carry one factor.
    """
    rows: dict[str, Sequence[int] | None] = {"all concepts": None, **(groups or {})}
    frames = []
    for row, concepts in enumerate(rows.values(), start=1):
        made = model.interpolate(source, target, columns, concepts=concepts, sampler=sampler, steps=steps, seed=seed)
        frames.append(made.cpu())
        if progress:
            progress(row, len(rows))
    below = (
        " Below, only the concepts that a row names move, and the others stay the source's: where both images share a "
        "factor nothing should change."
        if groups
        else ""
    )
    sheet = Sheet(
        "Interpolating between two images",
        "The scalars move in a straight line, in equal steps: 0 % is the source rebuilt from its concepts, 100 % the "
        f"target rebuilt from its own.{below}",
    )
    labels = [(name, ", ".join(map(str, concepts)) if concepts else "") for name, concepts in rows.items()]
    moved = enumerate(torch.stack(frames, dim=1))
    shown = [Column(cells_of(cells), f"{100 * i / (columns - 1):.0f} %") for i, cells in moved]
    ends = [Column(cells_of(image[None]) * len(rows), name) for name, image in (("source", source), ("target", target))]
    _draw_rows(sheet, labels, ends[0], shown, ends[1])
    return sheet.render()


def edits(
    model: ConceptModel,
    images: Tensor,
    direction: Direction | Tensor,
    *,
    strengths: Sequence[float] = (-3, -2, -1, 0, 1, 2, 3),
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """Images (B, 3, S, S) moved along a direction (`EncDiff.edit`): a row for each image, a column for each strength.

    The direction's name, score and baseline are in the caption.
    """
    if len(images) == 0 or len(strengths) == 0:
        raise InputError(f"images are {len(images)} and strengths {len(strengths)}; both must be at least 1")
    rows = []
    for i, image in enumerate(images, start=1):
        copies = image.expand(len(strengths), -1, -1, -1)
        rows.append(model.edit(copies, direction, strengths, sampler=sampler, steps=steps, seed=seed).cpu())
        if progress:
            progress(i, len(images))
    sheet = Sheet(*_said_of(direction))
    moved = zip(strengths, torch.stack(rows, dim=1), strict=True)
    columns = [Column(cells_of(made), f"{strength:+.3g}" if strength else "0") for strength, made in moved]
    names = [f"image {i + 1}" for i in range(len(images))]
    draw_panels(sheet, names, [Column(cells_of(images), "image")], columns, "strength")
    return sheet.render()


def _said_of(direction: Direction | Tensor) -> tuple[str, str]:
    """Title and caption."""
    told = "Each image rebuilt from its concepts (0), then with so many times the direction added to them."
    if not isinstance(direction, Direction):
        return "Along a direction", told
    name = direction.name or "the labels"
    task = f"telling {name} from the rest" if direction.kind == "logistic" else f"predicting {name}"
    return f"Along the direction of {name}", (
        f"{told} The direction comes from {task} by {direction.kind} regression of codes: {direction.score_name} "
        f"{direction.score:.3f} on images held out, {direction.baseline:.3f} with shuffled labels. Strength 1 raises "
        "the prediction by one of its standard deviations over the data."
    )


def _draw_rows(sheet: Sheet, labels: list[tuple[str, str]], before: Column, frames: list[Column], after: Column):
    """Labelled rows of cells: a column, the frames under one heading, a column."""
    side = before.cells[0].width
    top = 32 + LINE
    for i, (label, note) in enumerate(labels):
        draw_label(sheet, 48, top + i * (side + GAP) + side // 2 + 4, label, note, bool(note), 96)
    x = draw_column(sheet, INDENT, top, before) + GROUP - GAP
    sheet.text(x, 0, "rebuilt from concepts, so far from source to target", colour=SOFT)
    sheet.line(x, x + len(frames) * (side + GAP) - GAP, 21)
    for column in frames:
        x = draw_column(sheet, x, top, column)
    draw_column(sheet, x + GROUP - GAP, top, after)
