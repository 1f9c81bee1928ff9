"""Flatness of ground-truth traversals (Michlo's disent, github.com/nmichlo/msc-research)."""

import math

import numpy as np

from encdiff.errors import InputError
from encdiff.metrics.factor_vae import check_at_least
from encdiff.metrics.samples import check_samples, relabel, whole_numbers


def flatness(codes: np.ndarray, factors: np.ndarray, *, traversals: int = 1_024, seed: int = 0) -> dict:
    """How straight and how axis-aligned the codes' path is while one factor takes all its values and the others stay.

    codes: (n, N) floats, N >= 2; factors: (n, F) integers with every combination of their values, else there is no
    traversal; rows of the same combination are averaged. Of each factor at most `traversals` are taken, drawn by `seed`
    without repetition. A path's width is the distance of its two points furthest apart, its length the sum of the
    steps from each value to the next and from the last to the first, but for the longest, so that a factor may be
    cyclic. A factor's flatness is its mean width in L2 over its mean length in L1: 1 if its values lie in order along
    one code, 1/sqrt(k) if on a line at equal pace along k codes. A factor that moves no code counts 0.

    Returns means over factors: `flatness`; `flatness_l1` and `flatness_l2`, with both distances in that norm, of which
    L2 is 1 for any straight line; `axis_ratio`, the widest code's share of the sum of standard deviations along a path,
    and `linear_ratio`, the first principal component's share of the variance, both rescaled so that equal shares give
    0. All are in [0, 1] and depend on the codes' relative scale. `per_factor` (F,) are those of `flatness`. Raises
    InputError as `check_samples`, and where combinations are missing.
    """
    check_at_least(1, traversals=traversals)
    codes, factors = check_samples(codes, factors, least_codes=2)
    sizes = check_combinations(factors)
    grid = _means(codes, relabel(factors)[0], sizes)
    rng = np.random.RandomState(seed)
    each = []
    for axis, size in enumerate(sizes):
        paths = np.moveaxis(grid, axis, 0).reshape(size, -1, codes.shape[1])
        each.append(_of_paths(paths[:, rng.permutation(paths.shape[1])[:traversals]]))
    means = {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
    return means | {"per_factor": np.array([scores["flatness"] for scores in each])}


def check_combinations(factors: np.ndarray) -> tuple[int, ...]:
    """How many values each factor takes; InputError unless the rows (n, F) hold every combination of them."""
    labels, values = relabel(whole_numbers(factors))
    sizes = tuple(len(v) for v in values)
    if (held := len(np.unique(labels, axis=0))) < math.prod(sizes):
        raise InputError(
            f"factors: the rows hold {held} of {math.prod(sizes)} combinations of values; flatness needs all of them, "
            "a complete grid"
        )
    return sizes


def _means(codes: np.ndarray, labels: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Codes of the grid (*sizes, N)."""
    cell = np.ravel_multi_index(tuple(labels.T), sizes)
    counts = np.bincount(cell)
    return np.stack([np.bincount(cell, code) / counts for code in codes.T], axis=1).reshape(*sizes, -1)


def _of_paths(paths: np.ndarray) -> dict[str, float]:
    """The scores of one factor, of its traversals (values, traversals, N)."""
    steps = np.roll(paths, -1, axis=0) - paths
    length, width = {}, {}
    for order in (1, 2):
        each = np.linalg.norm(steps, order, axis=2)
        length[order] = float((each.sum(axis=0) - each.max(axis=0)).mean())
        furthest = np.zeros(paths.shape[1])
        for apart in range(1, len(paths)):
            far = np.linalg.norm(paths[apart:] - paths[:-apart], order, axis=2).max(axis=0)
            furthest = np.maximum(furthest, far)
        width[order] = float(furthest.mean())
    if not length[1]:
        return dict.fromkeys(("flatness", "flatness_l1", "flatness_l2", "axis_ratio", "linear_ratio"), 0.0)
    centred = (paths - paths.mean(axis=0)).transpose(1, 0, 2)
    return {
        "flatness": width[2] / length[1],
        "flatness_l1": width[1] / length[1],
        "flatness_l2": width[2] / length[2],
        "axis_ratio": _largest_share(centred.std(axis=1)),
        "linear_ratio": _largest_share(np.linalg.svd(centred, compute_uv=False) ** 2),
    }


def _largest_share(parts: np.ndarray) -> float:
    """Mean over rows (T, K) that are not all 0 of max / sum, from 1/K .. 1 rescaled to 0 .. 1."""
    parts = parts[parts.any(axis=1)]
    even = 1 / parts.shape[1]
    return float(((parts.max(axis=1) / parts.sum(axis=1)).mean() - even) / (1 - even))
