"""Pictures: concepts swapped, concepts traversed, and where the model attends to each."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from encdiff.checkpoint import atomic_path
from encdiff.data import to_uint8
from encdiff.errors import InputError
from encdiff.models import EncDiff

CELL = 96  # least width of a cell in pixels; small images are enlarged by a whole factor, without smoothing
GAP, INK, PAPER, MUTED = 6, (20, 20, 25), (255, 255, 255), (110, 110, 120)
CAPTION, LABEL = ImageFont.load_default(15), ImageFont.load_default(13)
SAMPLES_AT_ONCE = 64

Progress = Callable[[int, int], None]  # (done, total)
Groups = Mapping[str, Sequence[int]]  # a column's label -> the concepts that it swaps together


def swap_grid(
    model: EncDiff,
    sources: Tensor,
    targets: Tensor,
    *,
    groups: Groups | None = None,
    steps: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """Pairs of images, a row each: source, target, the target reconstructed, then concepts put from source to target.

    Args:
        sources, targets: (K, 3, S, S) in [-1, 1].
        groups: columns, by label, and the concepts each one swaps; None: every concept alone. `concept_groups` makes
            groups from an evaluation: all concepts that carry one factor.
        progress: called with (images done, images in all).
    """
    if sources.shape != targets.shape:
        raise InputError(f"sources {tuple(sources.shape)} and targets {tuple(targets.shape)} must have one shape")
    groups = groups or {f"concept {i}": [i] for i in range(model.config.concepts)}
    from_source, codes = encode_images(model, sources), encode_images(model, targets)
    columns = [codes]
    for concepts in groups.values():
        _check_concepts(model, concepts)
        swapped = codes.clone()
        swapped[:, list(concepts)] = from_source[:, list(concepts)]
        columns.append(swapped)
    sampled = _sample(model, torch.cat(columns), steps, seed, progress).unflatten(0, (len(columns), -1))
    pictures = torch.stack([sources.cpu(), targets.cpu(), *sampled], dim=1)  # (K, columns, 3, S, S)
    return compose(
        [list(row) for row in pictures],
        ["source", "target", "target\nreconstructed", *groups],
        [f"pair {i + 1}" for i in range(len(sources))],
        "Each column to the right: the target image, with that concept taken from the source image",
    )


def traversal(
    model: EncDiff,
    image: Tensor,
    codes: Tensor,
    *,
    columns: int = 7,
    labels: Mapping[int, str] | None = None,
    steps: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """One image (3, S, S), one row per concept: its scalar moved from the 2nd to the 98th percentile of `codes` (n, N).

    `labels` names concepts after the factors that they carry; those come first.
    """
    if columns < 2:
        raise InputError(f"columns is {columns}, must be at least 2")
    labels = labels or {}
    concepts = sorted(range(model.config.concepts), key=lambda c: (c not in labels, labels.get(c, ""), c))
    low, high = torch.quantile(codes.float().cpu(), torch.tensor([0.02, 0.98]), dim=0)
    own = encode_images(model, image[None]).repeat(columns, 1)
    rows = []
    for c in concepts:
        row = own.clone()
        row[:, c] = torch.linspace(low[c].item(), high[c].item(), columns)
        rows.append(row)
    sampled = _sample(model, torch.cat(rows), steps, seed, progress).unflatten(0, (len(concepts), columns))
    cells = [[image.cpu() if i == 0 else None, *row] for i, row in enumerate(sampled)]
    arrows = ["low"] + [""] * (columns - 2) + ["high"]
    return compose(
        cells,
        ["image", *arrows],
        [f"concept {c}" + (f"\n{labels[c]}" if c in labels else "") for c in concepts],
        "Each row: the image with one concept's scalar moved from low to high",
    )


def attention_picture(
    model: EncDiff,
    images: Tensor,
    *,
    labels: Mapping[int, str] | None = None,
    steps: int = 10,
    seed: int = 0,
) -> Image.Image:
    """Where the U-Net attends to each concept: one row per image (B, 3, S, S), one column per concept, over the image.

    The colours of a map run from its least to its greatest value; the share of all attention that a concept takes is
    written in its column's label. `labels` names concepts after the factors that they carry; those come first.
    """
    labels = labels or {}
    maps = model.attention_maps(images, steps=steps, seed=seed).cpu()
    concepts = sorted(range(model.config.concepts), key=lambda c: (c not in labels, labels.get(c, ""), c))
    share = maps.mean((0, 2, 3))
    cells = [[image, *(_overlay(image, m[c]) for c in concepts)] for image, m in zip(images.cpu(), maps, strict=True)]
    names = [f"concept {c}\n{labels.get(c, '')}\n{100 * share[c]:.0f} %" for c in concepts]
    return compose(
        cells,
        ["image", *names],
        [""] * len(cells),
        "Where the model attends to each concept: bright is most; below each concept its share of all attention",
    )


def concept_groups(
    importance: Sequence[Sequence[float]] | np.ndarray, factor_names: Sequence[str]
) -> dict[str, list[int]]:
    """The concepts that carry each factor, by the DCI importance matrix (N, F), in the order of the factors.

    A concept belongs to the factor that it is most important for, if that is more than half of its importance and at
    least a tenth of what the factor has in all.
    """
    importance = np.asarray(importance, dtype=float)
    if importance.ndim != 2 or importance.shape[1] != len(factor_names):
        raise InputError(f"importance is {importance.shape}, must be (N, {len(factor_names)}), one column per factor")
    total = np.maximum(importance.sum(axis=0), 1e-12)
    groups: dict[str, list[int]] = {name.replace("_", " "): [] for name in factor_names}
    for concept, row in enumerate(importance):
        factor = int(row.argmax())
        if row[factor] > 0.5 * row.sum() and row[factor] >= 0.1 * total[factor]:
            groups[factor_names[factor].replace("_", " ")].append(concept)
    return {name: concepts for name, concepts in groups.items() if concepts}


def concept_labels(groups: Groups) -> dict[int, str]:
    """The factor that each concept carries, from `concept_groups`."""
    return {concept: name for name, concepts in groups.items() for concept in concepts}


def encode_images(model: EncDiff, images: Tensor) -> Tensor:
    """Scalars (n, N) of images (n, 3, S, S), in eval mode, without gradients."""
    was_training = model.training
    with torch.no_grad():
        codes = torch.cat([model.eval().encode(batch) for batch in images.split(256)])
    model.train(was_training)
    return codes


def compose(
    cells: Sequence[Sequence[Tensor | None]], columns: Sequence[str], rows: Sequence[str], title: str
) -> Image.Image:
    """Images float (3, S, S) in [-1, 1] in a labelled grid; None leaves a cell empty. Labels may have several lines."""
    size = next(cell for row in cells for cell in row if cell is not None).shape[-1]
    width = size * max(1, -(-CELL // size))
    left = max([_extent(label, LABEL)[0] for label in rows]) + 2 * GAP
    lines = [_wrap(label, width) for label in columns]
    top = 4 * GAP + _extent(title, CAPTION)[1] + max(_extent(text, LABEL)[1] for text in lines)
    step = width + GAP
    extent = (max(left + step * len(columns), _extent(title, CAPTION)[0] + 2 * GAP), top + step * len(rows))
    sheet = Image.new("RGB", extent, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, CAPTION)
    for i, text in enumerate(lines):
        draw.multiline_text((left + i * step + width / 2, top - GAP), text, MUTED, LABEL, anchor="md", align="center")
    for j, (label, row) in enumerate(zip(rows, cells, strict=True)):
        draw.multiline_text((left - GAP, top + j * step + width / 2), label, MUTED, LABEL, anchor="rm", align="right")
        for i, cell in enumerate(row):
            if cell is not None:
                picture = Image.fromarray(to_uint8(cell[None])[0].numpy())
                sheet.paste(picture.resize((width, width), Image.Resampling.NEAREST), (left + i * step, top + j * step))
    return sheet


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _sample(model: EncDiff, codes: Tensor, steps: int, seed: int, progress: Progress | None) -> Tensor:
    done = []
    for batch in codes.split(SAMPLES_AT_ONCE):
        done.append(model.sample(batch, steps=steps, seed=seed).cpu())
        if progress:
            progress(sum(map(len, done)), len(codes))
    return torch.cat(done)


def _overlay(image: Tensor, attention: Tensor) -> Tensor:
    """A map (S, S) in colours over its image (3, S, S), greyed."""
    low, high = attention.aminmax()
    heat = colormaps["inferno"](((attention - low) / (high - low).clamp(min=1e-12)).numpy())[..., :3]
    grey = (image.mean(0, keepdim=True).expand(3, -1, -1) + 1) / 2
    return 2 * (0.3 * grey + 0.7 * torch.from_numpy(heat).permute(2, 0, 1).float()) - 1


def _check_concepts(model: EncDiff, concepts: Sequence[int]) -> None:
    for concept in concepts:
        if not isinstance(concept, int) or not 0 <= concept < model.config.concepts:
            raise InputError(f"concept is {concept!r}, must be an integer in 0..{model.config.concepts - 1}")


def _extent(text: str, font) -> tuple[int, int]:
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font)
    return int(box[2]) + 1, int(box[3]) + 1


def _wrap(label: str, width: int) -> str:
    """Break a label at spaces where a line would be wider than its column."""
    lines = []
    for line in label.split("\n"):
        words, current = line.split(" "), ""
        for word in words:
            longer = f"{current} {word}".strip()
            if current and _extent(longer, LABEL)[0] > width:
                lines.append(current)
                longer = word
            current = longer
        lines.append(current)
    return "\n".join(lines)
