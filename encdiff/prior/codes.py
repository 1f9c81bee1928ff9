"""Codes that a prior is fitted to: a model's, of images drawn from a data set."""

import numpy as np
import torch
from torch import Tensor

from encdiff.checked import check_types
from encdiff.data import Dataset, to_float
from encdiff.errors import InputError
from encdiff.models import ConceptModel
from encdiff.models.batches import encode_images
from encdiff.prior.base import Progress, check_whole

FITTED, BATCH = 10_000, 64  # images at most, images encoded at once


def dataset_codes(
    model: ConceptModel, dataset: Dataset, count: int = FITTED, *, seed: int = 0, progress: Progress | None = None
) -> Tensor:
    """Codes of `count` different images, drawn by the seed, or of all where there are fewer.

    float32 (n, N), or (n, N, m) where a concept is a vector, on the CPU. `progress(done, n)` follows. Raises InputError
    for images of another size than the model's.
    """
    check_types(model=(model, ConceptModel, ""), dataset=(dataset, Dataset, "open_dataset"))
    check_whole(count=(count, 1, 2**31), seed=(seed, 0, 2**63))
    if dataset.image_size != model.config.image_size:
        size = model.config.image_size
        raise InputError(f"{dataset.name}: images are {dataset.image_size} pixels wide, must be the model's {size}")
    count = min(count, len(dataset))
    chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False))
    done = torch.empty(count, *model.config.code_shape)
    for start in range(0, count, BATCH):
        part = slice(start, min(start + BATCH, count))
        done[part] = encode_images(model, to_float(dataset.images(chosen[part]))).float()
        if progress:
            progress(part.stop, count)
    return done
