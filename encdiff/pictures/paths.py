"""Traversals along the data's own path: all concepts that carry a factor move as they do between true images."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encdiff.data import Dataset, to_float
from encdiff.data.dataset import Indices
from encdiff.errors import InputError
from encdiff.metrics.groups import Groups
from encdiff.models import ConceptModel
from encdiff.models.batches import encode_images
from encdiff.pictures.cells import Strip, cells_of, draw_originals, draw_strips
from encdiff.pictures.concepts import Progress, check_concepts, sample_batches
from encdiff.pictures.sheet import Sheet, panels

FACTORS = 3  # in a panel: each takes two strips


class FactorPath(NamedTuple):
    """The images of a data set that differ from one of its images in one factor alone."""

    concepts: list[int]  # that carry the factor
    images: Tensor  # (V, 3, S, S)
    place: float  # of the image's own value between the first (0) and the last (1)


def true_swaps(dataset: Dataset, sources: Indices, targets: Indices, groups: Groups) -> dict[str, Tensor]:
    """For `swap_grid`: by group that is a factor of the data, the images (K, 3, S, S) that its swaps should give.

    Empty where the data set is no complete grid with one image each.
    """
    if not dataset.is_complete:
        return {}
    factors = {name.replace("_", " "): f for f, name in enumerate(dataset.factor_names)}
    shared = [name for name in groups if name in factors]
    return {name: to_float(dataset.images(dataset.swapped(sources, targets, factors[name]))) for name in shared}


def factor_paths(dataset: Dataset, index: int, groups: Groups, columns: int = 7) -> dict[str, FactorPath]:
    """Of each of the groups that is a factor of the data, at most `columns` images from its first value to its last.

    Raises InputError unless the data set is a complete grid with one image each, or none of the groups is a factor.
    """
    if columns < 2:
        raise InputError(f"columns is {columns}, must be at least 2")
    if not dataset.is_complete:
        raise InputError(f"{dataset.name} is no complete grid of factors with one image each, which paths lead through")
    owners = {name.replace("_", " "): list(concepts) for name, concepts in groups.items()}
    own, paths = dataset.factors([index])[0], {}
    for f, name in enumerate(dataset.factor_names):
        label, size = name.replace("_", " "), dataset.factor_sizes[f]
        if label not in owners or size < 2:
            continue
        values = np.unique(np.rint(np.linspace(0, size - 1, min(columns, size))).astype(np.int64))
        factors = np.repeat(own[None], len(values), axis=0)
        factors[:, f] = values
        images = to_float(dataset.images(dataset.indices(factors)))
        place = np.interp(own[f], values, np.linspace(0, 1, len(values)))  # also of a value that is left out
        paths[label] = FactorPath(owners[label], images, float(place))
    if not paths:
        raise InputError(f"groups are {', '.join(groups) or 'none'}; none is a factor of {dataset.name}")
    return paths


def factor_traversal(
    model: ConceptModel,
    image: Tensor,
    paths: Mapping[str, FactorPath],
    *,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    guidance: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Image.Image:
    """One image (3, S, S), two strips per factor: what the model draws along its path, and the true images.

    The factor's concepts take the values that they have in the path's images, all others stay as they are. `paths` are
    of this image, from `factor_paths`; `progress` is called with (images done, images in all).
    """
    own = encode_images(model, image[None])
    if not paths:
        raise InputError("paths are none, must be at least one; factor_paths makes them")
    scalars = [own]
    for path in paths.values():
        check_concepts(model, path.concepts)
        moved = own.repeat(len(path.images), *[1] * (own.ndim - 1))
        moved[:, path.concepts] = encode_images(model, path.images.to(image.device))[:, path.concepts]
        scalars.append(moved)
    rebuilt, *drawn = sample_batches(model, torch.cat(scalars), None, sampler, steps, seed, progress, guidance).split(
        [len(part) for part in scalars]
    )
    sheet = Sheet(
        "Traversing factors",
        "All concepts that carry a factor move together, through the values that they have in the data's images which "
        "differ from the original in that factor alone; the others stay as they are. Below each strip stand these true "
        "images; the dot marks the original's own value.",
    )
    left = draw_originals(sheet, {"original": image[None], "reconstructed": rebuilt})
    strips = []
    for images, (name, path) in zip(drawn, paths.items(), strict=True):
        note = ", ".join(map(str, path.concepts))
        strips.append(Strip(name, note, cells_of(images), path.place, cells_of(path.images)))
    for part in panels(strips, FACTORS):
        left = draw_strips(sheet, left, part, ("first", "last"))
    return sheet.render()
