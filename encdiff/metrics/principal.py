"""The first principal component of each concept: a concept that is a vector, as one number that the scores can read."""

import numpy as np

from encdiff.errors import InputError

LARGEST = 2.0**500


def first_components(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each concept's vectors vary most.

    Args:
        codes: (n, N, m), m numbers for each of N concepts, of n images.

    Returns:
        mean and axis, float64 (N, m): `((codes - mean) * axis).sum(-1)` are the scores (n, N). An axis has length 1
        and its greatest entry is positive, so that the same codes give the same signs.

    Raises:
        InputError: another shape, fewer than two images, or numbers that are not finite.
    """
    codes = np.asarray(codes)
    if codes.ndim != 3 or len(codes) < 2 or not np.isfinite(codes).all():
        raise InputError(f"codes are {codes.shape}, must be (n, N, m), n at least 2, all of them finite")
    if (most := float(abs(codes).max(initial=0))) > LARGEST:
        raise InputError(f"codes reach {most:.3g}; they must lie within {LARGEST:.3g}, to be squared")
    mean = codes.mean(axis=0, dtype=np.float64)
    centred = (codes - mean).transpose(1, 0, 2)
    axis = np.linalg.eigh(centred.transpose(0, 2, 1) @ centred)[1][..., -1]
    greatest = np.take_along_axis(axis, np.abs(axis).argmax(axis=1, keepdims=True), axis=1)
    return mean, axis * np.sign(greatest)
