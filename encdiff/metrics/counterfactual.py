"""Swaps judged by pictures: on a grid of images the right answer of a swap is an image that exists.

Outputs are read by the nearest of all true images, in squared distance of their pixels.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError

SURE = 1.959963984540054  # of a normal distribution 95 % lie within so many deviations


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


def explained_variance(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Of each code's variance the share that lies between a factor's values: float64 (N, F), each in 0 .. 1.

    codes (n, N) floats, factors (n, F) integers. A quick stand-in for DCI's importance, which looks at main effects
    alone; of a code that does not vary it is 0.
    """
    codes = np.asarray(codes, dtype=np.float64)
    total = codes.var(0)
    shares = np.empty((codes.shape[1], factors.shape[1]))
    for f, column in enumerate(factors.T):
        values, counts = np.unique(column, return_counts=True)
        means = np.stack([codes[column == value].mean(0) for value in values])
        between = (counts[:, None] * (means - codes.mean(0)) ** 2).sum(0) / len(codes)
        shares[:, f] = between / np.maximum(total, 1e-12)
    return shares


def swap_rates(read: np.ndarray, wanted: np.ndarray, factor: int) -> dict[str, float | list[float]]:
    """Of swaps of one factor the shares in which it arrived, all others were kept, and both; with 95 % intervals.

    read, wanted: (n, F) factor values of the outputs and of the right answers.
    """
    right = read == wanted
    others = np.delete(right, factor, axis=1).all(1)
    rates: dict[str, float | list[float]] = {}
    for name, hits in {"arrived": right[:, factor], "kept": others, "exact": right.all(1)}.items():
        rates[name] = float(hits.mean())
        rates[f"{name}_interval"] = wilson_interval(int(hits.sum()), len(hits))
    return rates


def wilson_interval(hits: int, trials: int) -> list[float]:
    """The 95 % interval of a rate (Wilson 1927): also of 0 and of all hits it has a width."""
    rate, z = hits / trials, SURE
    middle = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def closeness(images: Tensor, true: Tensor) -> dict[str, float]:
    """`psnr` in dB, of the mean squared error of all, and `error`, the mean absolute one; images in [-1, 1]."""
    difference = images.float() - true.float()
    square = difference.square().mean().item() / 4  # as if they lay in 0 .. 1
    return {"psnr": -10 * math.log10(max(square, 1e-10)), "error": difference.abs().mean().item()}


def blurred(images: Tensor, factor: int) -> Tensor:
    """Images (n, 3, S, S) as they look where one value stands for factor x factor pixels, drawn smoothly."""
    small = F.avg_pool2d(images, factor)
    return F.interpolate(small, size=images.shape[-1], mode="bilinear", align_corners=False)


def traversal_effect(read: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """How far each factor moves along each scalar: float64 (N, F), each in 0 .. 1, mean over images.

    read: int (N, images, V, F), the factor values of outputs along a scalar's V values. 0: the factor stays as it is;
    1: as many of its values are met as there are, or as V can meet.
    """
    concepts, images = read.shape[:2]
    effect = np.zeros((concepts, len(sizes)))
    for f, size in enumerate(sizes):
        reachable = min(size, read.shape[2]) - 1
        met = [[len(np.unique(read[n, i, :, f])) - 1 for i in range(images)] for n in range(concepts)]
        effect[:, f] = np.mean(met, axis=1) / max(1, reachable)
    return effect
