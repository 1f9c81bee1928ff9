"""Pictures read by the nearest of all true images, in squared distance of their pixels."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from encdiff.errors import InputError


@torch.no_grad()
def nearest(images: Tensor, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Which of all true images is nearest to each of `images`: int64 (m,), places in the order of the batches.

    images: (m, 3, S, S) in [-1, 1], on the device that computes; batches: uint8 (b, S, S, 3), of which one at a time is
    in memory. Of equally near ones it is the first.
    Raises InputError for other images, and where there is none.
    """
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images are {images.dtype} {tuple(images.shape)}, must be floating point (m, 3, S, S)")
    flat = images.permute(0, 2, 3, 1).flatten(1).float()
    best = torch.full((len(flat),), torch.inf, device=flat.device)
    found = torch.full((len(flat),), -1, dtype=torch.int64, device=flat.device)
    start = 0
    for batch in batches:
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch[0].size != flat.shape[1]:
            raise InputError(
                f"true images are {batch.dtype} {batch.shape}, must be uint8 (b, S, S, 3), S {images.shape[-1]}"
            )
        true = torch.from_numpy(np.ascontiguousarray(batch)).to(flat.device).flatten(1).float() / 127.5 - 1
        distances = torch.addmm(true.square().sum(1), flat, true.T, alpha=-2)  # but for |image|^2, the same for all
        value, place = distances.min(1)
        closer = value < best
        best, found = torch.where(closer, value, best), torch.where(closer, place + start, found)
        start += len(batch)
    if start == 0 or (found < 0).any():
        raise InputError("there is no true image, or the images are not finite: nothing is nearest to them")
    return found.cpu().numpy()
