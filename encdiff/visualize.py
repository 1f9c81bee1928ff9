"""Pictures for people: concepts swapped between images, traversed, and where the model attends to each.

Every picture explains itself: title, caption, labelled rows and columns. Small images are enlarged by whole factors
without smoothing, so a cell holds exactly the pixels that the model gave.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from encdiff.checkpoint import atomic_path
from encdiff.data import to_uint8
from encdiff.errors import InputError
from encdiff.models import EncDiff
from encdiff.sheet import GAP, GROUP, PANEL, SOFT, Column, Sheet, draw_label, draw_panels, panels

BATCH = 64  # images encoded or sampled at once
CELL, LARGEST = 96, 192  # a cell is at least and at most so many pixels wide

Progress = Callable[[int, int], None]  # (done, total)
Groups = Mapping[str, Sequence[int]]  # a column's label -> the concepts that it swaps together


# ---- the pictures


def swap_grid(
    model: EncDiff,
    sources: Tensor,
    targets: Tensor,
    *,
    groups: Groups | None = None,
    sampler: str = "dpm-solver++",
    steps: int = 20,
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
    swaps = list(groups.items()) if groups else [(f"concept {i}", [i]) for i in range(model.config.concepts)]
    from_source, codes = encode_images(model, sources), encode_images(model, targets)
    scalars = [codes]
    for _, concepts in swaps:
        _check_concepts(model, concepts)
        swapped = codes.clone()
        swapped[:, list(concepts)] = from_source[:, list(concepts)]
        scalars.append(swapped)
    rebuilt, *swapped = _sample(model, torch.cat(scalars), None, sampler, steps, seed, progress).split(len(codes))

    fixed = zip(("source", "target", "reconstructed"), (sources, targets, rebuilt), strict=True)
    notes = [_count_off(concepts) if groups else "" for _, concepts in swaps]
    sheet = Sheet(
        "Swapping concepts",
        "The target is rebuilt from its concepts (reconstructed), then again with some of them taken from the source: "
        "what changes in a column, against the reconstruction, is what its concepts hold.",
    )
    draw_panels(
        sheet,
        [f"pair {i + 1}" for i in range(len(sources))],
        [Column(_cells(images), name) for name, images in fixed],
        [Column(_cells(s), name, note, bool(groups)) for s, (name, _), note in zip(swapped, swaps, notes, strict=True)],
        "target, with these concepts taken from the source"
        if groups
        else "target, with one concept taken from the source",
    )
    return sheet.render()


def traversal(
    model: EncDiff,
    image: Tensor,
    codes: Tensor,
    *,
    columns: int = 7,
    concepts: Sequence[int] | None = None,
    labels: Mapping[int, str] | None = None,
    invert: bool = False,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """One image (3, S, S), a strip per concept: its scalar from the 2nd to the 98th percentile of `codes` (n, N).

    `concepts` chooses some; `labels` names those that carry a factor, and only these are shown. With `invert`,
    sampling starts from the noise that leads back to the image, which keeps its details, but also traces of its shapes
    where they change (50 steps or more, then, by DDIM); else from noise of `seed`. `progress` as for `swap_grid`.
    """
    if columns < 2:
        raise InputError(f"columns is {columns}, must be at least 2")
    if codes.ndim != 2 or codes.shape[1] != model.config.concepts or len(codes) == 0 or not codes.isfinite().all():
        raise InputError(f"codes are {tuple(codes.shape)}, must be finite numbers (n, {model.config.concepts})")
    labels, chosen = labels or {}, concepts
    concepts = _order(model, concepts, labels)
    low, high = torch.quantile(codes.float().cpu(), torch.tensor([0.02, 0.98]), dim=0)
    own = encode_images(model, image[None])
    scalars = own.repeat(len(concepts), columns, 1)  # (concepts, columns, N)
    for row, c in enumerate(concepts):
        scalars[row, :, c] = torch.linspace(low[c].item(), high[c].item(), columns)
    x_T = model.invert(image[None], steps) if invert else None
    sampler = "ddim" if invert else sampler  # the one that comes back
    sampled = _sample(model, torch.cat([own, scalars.flatten(0, 1)]), x_T, sampler, steps, seed, progress)

    strips = sampled[1:].unflatten(0, (len(concepts), columns))
    place = ((own[0].cpu() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)  # of the image's own value
    told = (
        "A label names the factor that the concept tells most of, over the whole data; where several carry it, one "
        f"alone may move little.{_left_out(model, chosen, concepts)} "
    )
    sheet = Sheet(
        "Traversing concepts",
        f"One scalar moves from low to high while the others stay as they are. {told if labels else ''}The dot marks "
        "the image's own value.",
    )
    left = _draw_originals(sheet, {"original": image[None], "reconstructed": sampled[:1]})
    for part in panels(range(len(concepts))):
        shown = [(_concept_label(concepts[i], labels), _cells(strips[i]), float(place[concepts[i]])) for i in part]
        left = _draw_strips(sheet, left, shown)
    return sheet.render()


def attention_picture(
    model: EncDiff,
    images: Tensor,
    *,
    concepts: Sequence[int] | None = None,
    labels: Mapping[int, str] | None = None,
    steps: int = 10,
    seed: int = 0,
) -> Image.Image:
    """Where the U-Net attends to each concept: one row per image (B, 3, S, S), one column per concept, over the image.

    One colour scale serves all maps, so that a concept that nobody attends to is dark. `concepts` chooses some;
    `labels` names those that carry a factor, and only these are shown then.
    """
    maps = model.attention_maps(images, steps=steps, seed=seed).cpu().numpy()
    labels, cells, high = labels or {}, _cells(images), float(maps.max())
    columns = []
    shown = _order(model, concepts, labels)
    for c in shown:
        label, note = _concept_label(c, labels)
        heated = [_heat(cell, m[c], high) for cell, m in zip(cells, maps, strict=True)]
        columns.append(Column(heated, label, note, c in labels))
    sheet = Sheet(
        "Attention to concepts",
        "How much of its attention the U-Net gives to each concept at every place of the image, averaged over layers, "
        f"heads and {steps} noise levels. Everywhere all {model.config.concepts} concepts' shares add up to 100 %."
        + _left_out(model, concepts, shown),
    )
    draw_panels(
        sheet,
        [f"image {i + 1}" for i in range(len(cells))],
        [Column(cells, "image")],
        columns,
        "attention to each concept",
    )
    _draw_colour_bar(sheet, high)
    return sheet.render()


def concept_groups(
    importance: Sequence[Sequence[float]] | np.ndarray, factor_names: Sequence[str]
) -> dict[str, list[int]]:
    """The concepts that carry each factor, by the DCI importance matrix (N, F), in the order of the factors.

    A concept belongs to the factor that it is most important for, if it has at least a fiftieth of all that factor's
    importance.
    """
    importance = np.asarray(importance, dtype=float)
    if importance.ndim != 2 or importance.shape[1] != len(factor_names):
        raise InputError(f"importance is {importance.shape}, must be (N, {len(factor_names)}), one column per factor")
    total = np.maximum(importance.sum(axis=0), 1e-12)
    groups: dict[str, list[int]] = {name.replace("_", " "): [] for name in factor_names}
    for concept, row in enumerate(importance):
        factor = int(row.argmax())
        if row[factor] >= 0.02 * total[factor]:
            groups[factor_names[factor].replace("_", " ")].append(concept)
    return {name: concepts for name, concepts in groups.items() if concepts}


def concept_labels(groups: Groups) -> dict[int, str]:
    """The factor that each concept carries, from `concept_groups`."""
    return {concept: name for name, concepts in groups.items() for concept in concepts}


def encode_images(model: EncDiff, images: Tensor) -> Tensor:
    """Scalars (n, N) of images (n, 3, S, S), in eval mode, without gradients."""
    was_training = model.training
    with torch.no_grad():
        codes = torch.cat([model.eval().encode(batch) for batch in images.split(BATCH)])
    model.train(was_training)
    return codes


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all, with its title and caption as metadata."""
    about = PngInfo()
    for key, text in picture.info.items():
        about.add_itxt(key, str(text))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=about)


# ---- numbers and cells


def _sample(
    model: EncDiff, scalars: Tensor, x_T: Tensor | None, sampler: str, steps: int, seed: int, progress: Progress | None
) -> Tensor:
    """Images (n, 3, S, S) from scalars (n, N), a batch at a time; x_T (1, c, h, w) is the start of all."""
    done = []
    for batch in scalars.split(BATCH):
        start = None if x_T is None else x_T.expand(len(batch), -1, -1, -1)
        done.append(model.sample(batch, x_T=start, sampler=sampler, steps=steps, seed=seed).cpu())
        if progress:
            progress(sum(map(len, done)), len(scalars))
    return torch.cat(done)


def _check_concepts(model: EncDiff, concepts: Sequence[int]) -> None:
    if not concepts:
        raise InputError("concepts are none, must be at least one")
    for concept in concepts:
        if not isinstance(concept, int) or not 0 <= concept < model.config.concepts:
            raise InputError(f"concept is {concept!r}, must be an integer in 0..{model.config.concepts - 1}")


def _order(model: EncDiff, concepts: Sequence[int] | None, labels: Mapping[int, str]) -> list[int]:
    """The chosen concepts as they are, else the labelled ones, else all."""
    if concepts is not None:
        _check_concepts(model, concepts)
        return list(concepts)
    if labels:
        _check_concepts(model, list(labels))
    return list(labels) or list(range(model.config.concepts))


def _left_out(model: EncDiff, concepts: Sequence[int] | None, shown: Sequence[int]) -> str:
    rest = model.config.concepts - len(shown)
    return f" Not shown: {rest} that tell{'s' * (rest == 1)} little of any factor." if rest and concepts is None else ""


def _concept_label(concept: int, labels: Mapping[int, str]) -> tuple[str, str]:
    """Label and note: `wall hue` under `concept 3`, or `concept 3` alone."""
    name = f"concept {concept}"
    return (labels[concept], name) if concept in labels else (name, "")


def _count_off(concepts: Sequence[int]) -> str:
    return f"concept {concepts[0]}" if len(concepts) == 1 else ", ".join(map(str, concepts))


def _cells(images: Tensor) -> list[Image.Image]:
    """Pictures of images (n, 3, S, S): small ones enlarged by a whole factor, only very large ones reduced."""
    return [_resize(Image.fromarray(array)) for array in to_uint8(images).cpu().numpy()]


def _resize(picture: Image.Image, least: int = CELL) -> Image.Image:
    if picture.width > max(least, LARGEST):
        return picture.resize((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    side = picture.width * math.ceil(least / picture.width)
    return picture.resize((side, side), Image.Resampling.NEAREST)


def _heat(cell: Image.Image, share: np.ndarray, high: float) -> Image.Image:
    """A map (S, S) in colour over the greyed image."""
    smooth = Image.fromarray(share.astype(np.float32)).resize(cell.size, Image.Resampling.BICUBIC)
    grey = np.asarray(cell.convert("L"), dtype=np.float64)[..., None].repeat(3, axis=2)
    return _blend(grey, np.asarray(smooth, dtype=np.float64), high)


def _blend(grey: np.ndarray, share: np.ndarray, high: float) -> Image.Image:
    level = np.clip(share / max(high, 1e-12), 0, 1)
    colour = 255 * matplotlib.colormaps["inferno"](level)[..., :3]
    opacity = 0.3 + 0.6 * level[..., None]  # the image shows through where little is attended to
    return Image.fromarray(np.rint((1 - opacity) * grey + opacity * colour).astype(np.uint8))


def _draw_originals(sheet: Sheet, images: dict[str, Tensor]) -> int:
    """Large, below each other; returns the x of what comes beside them."""
    y = 24
    for name, image in images.items():
        picture = _resize(Image.fromarray(to_uint8(image).cpu().numpy()[0]), 2 * CELL)
        sheet.text(picture.width // 2, y - 8, name, 12, anchor="ms")
        sheet.image(0, y, picture)
        y = sheet.bottom + PANEL
    return sheet.right + GROUP


def _draw_strips(sheet: Sheet, left: int, strips: list[tuple[tuple[str, str], list[Image.Image], float]]) -> int:
    """Labelled strips below each other, each with a dot between its first (0) and last cell (1); returns the next x."""
    y, x = 24, left + 112
    for (label, note), cells, place in strips:
        step = cells[0].width + GAP
        first, last = x + step // 2, x + (len(cells) - 1) * step + step // 2
        draw_label(sheet, left + 48, y + step // 2 + 4, label, note, bool(note), 96)
        for i, cell in enumerate(cells):
            sheet.image(x + i * step, y, cell)
        sheet.line(first, last, y + step + 4, width=2)
        sheet.dot(first + place * (last - first), y + step + 5)
        y += step + GROUP - GAP
    sheet.text(first, 16, "low", 12, SOFT, anchor="ms")
    sheet.text(last, 16, "high", 12, SOFT, anchor="ms")
    return sheet.right + PANEL


def _draw_colour_bar(sheet: Sheet, high: float, width: int = 260, height: int = 14) -> None:
    top, left = sheet.bottom + GROUP, 140
    ramp = np.linspace(0, high, width)[None].repeat(height, axis=0)
    sheet.text(0, top + height // 2, "share of attention", 12, SOFT, anchor="lm")
    sheet.image(left, top, _blend(np.full((height, width, 3), 96.0), ramp, high))
    for fraction, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
        label = f"{100 * fraction * high:.{0 if high > 0.1 else 1}f} %"
        sheet.text(left + round(fraction * width), top + height + 5, label, 12, SOFT, anchor=anchor)
