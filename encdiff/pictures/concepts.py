"""Pictures for people: concepts swapped between images, traversed, and where the model attends to each.

Every picture explains itself: title, caption, labelled rows and columns. Small images are enlarged by whole factors
without smoothing, so a cell holds exactly the pixels that the model gave.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from encdiff.errors import InputError
from encdiff.metrics.groups import Groups
from encdiff.models import ConceptModel
from encdiff.models.batches import encode_images
from encdiff.pictures.cells import Strip, cells_of, draw_colour_bar, draw_originals, draw_strips, heated
from encdiff.pictures.sheet import Column, Sheet, draw_panels, panels

BATCH = 64  # images sampled at once
Progress = Callable[[int, int], None]  # (done, total)


def swap_grid(
    model: ConceptModel,
    sources: Tensor,
    targets: Tensor,
    *,
    groups: Groups | None = None,
    truth: Mapping[str, Tensor] | None = None,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """Pairs of images, a row each: source, target, the target reconstructed, then concepts put from source to target.

    Args:
        sources, targets: (K, 3, S, S) in [-1, 1].
        groups: columns, by label, and the concepts each one swaps; None: every concept alone. `concept_groups` makes
            groups from an evaluation: all concepts that carry one factor.
        truth: by label, the true images (K, 3, S, S) that these swaps should give, drawn beside them.
        progress: called with (images done, images in all).
    """
    if sources.shape != targets.shape:
        raise InputError(f"sources {tuple(sources.shape)} and targets {tuple(targets.shape)} must have one shape")
    swaps = list(groups.items()) if groups else [(f"concept {i}", [i]) for i in range(model.config.concepts)]
    from_source, codes = encode_images(model, sources), encode_images(model, targets)
    scalars = [codes]
    for _, concepts in swaps:
        check_concepts(model, concepts)
        swapped = codes.clone()
        swapped[:, list(concepts)] = from_source[:, list(concepts)]
        scalars.append(swapped)
    rebuilt, *swapped = sample_batches(model, torch.cat(scalars), None, sampler, steps, seed, progress, guidance).split(
        len(codes)
    )

    fixed = zip(("source", "target", "reconstructed"), (sources, targets, rebuilt), strict=True)
    columns = []
    for s, (name, concepts) in zip(swapped, swaps, strict=True):
        columns.append(Column(cells_of(s), name, _count_off(concepts) if groups else "", bool(groups)))
        if truth and name in truth:
            columns.append(Column(cells_of(truth[name]), "true"))
        if truth and name in truth and truth[name].shape != targets.shape:
            raise InputError(f"truth of {name} is {tuple(truth[name].shape)}, must be {tuple(targets.shape)}")
    told = " Beside a swap stands the true image that should come out." if truth else ""
    sheet = Sheet(
        "Swapping concepts",
        "The target is rebuilt from its concepts (reconstructed), then again with some of them taken from the source: "
        "what changes in a column, against the reconstruction, is what its concepts hold." + told,
    )
    draw_panels(
        sheet,
        [f"pair {i + 1}" for i in range(len(sources))],
        [Column(cells_of(images), name) for name, images in fixed],
        columns,
        "target, with these concepts taken from the source"
        if groups
        else "target, with one concept taken from the source",
    )
    return sheet.render()


def traversal(
    model: ConceptModel,
    image: Tensor,
    codes: Tensor,
    *,
    columns: int = 7,
    concepts: Sequence[int] | None = None,
    labels: Mapping[int, str] | None = None,
    invert: bool = False,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """One image (3, S, S), a strip per concept: its scalar from the 2nd to the 98th percentile of `codes` (n, N).

    `concepts` chooses some; `labels` names those that carry a factor, and only these are shown. Unless chosen they are
    in the order of their effect. With `invert`, sampling starts from the noise that leads back to the image, which
    keeps its details, but also traces of its shapes where they change (50 steps or more, then, by the model's
    `inverts_by`); else from noise of `seed`. `progress` as for `swap_grid`.
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
    sampler = model.inverts_by if invert else sampler
    together = torch.cat([own, scalars.flatten(0, 1)])
    sampled = sample_batches(model, together, x_T, sampler, steps, seed, progress, guidance)

    strips = sampled[1:].unflatten(0, (len(concepts), columns))
    order = list(range(len(concepts)))
    if chosen is None:  # those first that change most
        order.sort(key=lambda row: -float((strips[row] - sampled[:1]).abs().mean()))
    place = ((own[0].cpu() - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)  # of the image's own value
    told = (
        "A label names the factor that the concept tells most of, over the whole data; where several carry it, one "
        f"alone may move little.{_left_out(model, chosen, concepts)} "
    )
    sheet = Sheet(
        "Traversing concepts",
        f"One scalar moves from low to high while the others stay as they are. {told if labels else ''}"
        f"{'' if chosen else 'Those come first that change the image most. '}The dot marks the image's own value.",
    )
    left = draw_originals(sheet, {"original": image[None], "reconstructed": sampled[:1]})
    shown = [
        Strip(*_concept_label(concepts[row], labels), cells_of(strips[row]), float(place[concepts[row]]))
        for row in order
    ]
    for part in panels(shown):
        left = draw_strips(sheet, left, part)
    return sheet.render()


def attention_picture(
    model: ConceptModel,
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
    labels, cells, high = labels or {}, cells_of(images), float(maps.max())
    columns = []
    shown = _order(model, concepts, labels)
    for c in shown:
        label, note = _concept_label(c, labels)
        mapped = [heated(cell, m[c], high) for cell, m in zip(cells, maps, strict=True)]
        columns.append(Column(mapped, label, note, c in labels))
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
    draw_colour_bar(sheet, high)
    return sheet.render()


def sample_batches(
    model: ConceptModel,
    scalars: Tensor,
    x_T: Tensor | None,
    sampler: str,
    steps: int,
    seed: int,
    progress: Progress | None,
    guidance: float = 1.0,
) -> Tensor:
    """Images (n, 3, S, S) from scalars (n, N), a batch at a time; x_T (1, c, h, w) is the start of all."""
    done = []
    for batch in scalars.split(BATCH):
        start = None if x_T is None else x_T.expand(len(batch), -1, -1, -1)
        sampled = model.sample(batch, x_T=start, sampler=sampler, steps=steps, guidance=guidance, seed=seed)
        done.append(sampled.cpu())
        if progress:
            progress(sum(map(len, done)), len(scalars))
    return torch.cat(done)


def check_concepts(model: ConceptModel, concepts: Sequence[int]) -> None:
    if not concepts:
        raise InputError("concepts are none, must be at least one")
    for concept in concepts:
        if not isinstance(concept, int) or not 0 <= concept < model.config.concepts:
            raise InputError(f"concept is {concept!r}, must be an integer in 0..{model.config.concepts - 1}")


def _order(model: ConceptModel, concepts: Sequence[int] | None, labels: Mapping[int, str]) -> list[int]:
    """The chosen concepts as they are, else the labelled ones, else all."""
    if concepts is not None:
        check_concepts(model, concepts)
        return list(concepts)
    if labels:
        check_concepts(model, list(labels))
    return list(labels) or list(range(model.config.concepts))


def _left_out(model: ConceptModel, concepts: Sequence[int] | None, shown: Sequence[int]) -> str:
    rest = model.config.concepts - len(shown)
    return f" Not shown: {rest} that tell{'s' * (rest == 1)} little of any factor." if rest and concepts is None else ""


def _concept_label(concept: int, labels: Mapping[int, str]) -> tuple[str, str]:
    """Label and note: `wall hue` under `concept 3`, or `concept 3` alone."""
    name = f"concept {concept}"
    return (labels[concept], name) if concept in labels else (name, "")


def _count_off(concepts: Sequence[int]) -> str:
    return f"concept {concepts[0]}" if len(concepts) == 1 else ", ".join(map(str, concepts))
