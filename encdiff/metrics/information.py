"""Entropy and mutual information by counting, in nats, float64; and ranks: what several metrics are made of."""

import numpy as np
from scipy.stats import rankdata

BLOCK = 8192  # rows binned at once: their intermediate results stay in the cache


def discretize(codes: np.ndarray, bins: int = 20) -> np.ndarray:
    """Codes (n, N) as int64 bin numbers: `bins` of equal width from each dimension's minimum to its maximum.

    The field's convention (Locatello et al. 2019, arXiv 1811.12359): the edges of `np.histogram`.
    """
    edges = [np.histogram_bin_edges(ends, bins) for ends in zip(codes.min(axis=0), codes.max(axis=0), strict=True)]
    labels = np.empty(codes.shape[::-1], np.int64)
    for start in range(0, len(codes), BLOCK):
        rows = slice(start, start + BLOCK)
        for i, code in enumerate(np.ascontiguousarray(codes[rows].T)):
            labels[i, rows] = _bin_numbers(code, edges[i])
    return labels.T


def _bin_numbers(code: np.ndarray, edges: np.ndarray) -> np.ndarray:
    last = len(edges) - 2
    guess = np.minimum((code - edges[0]) * ((last + 1) / (edges[-1] - edges[0])), last).astype(np.int64)
    guess -= code < edges[guess]  # rounding can be one bin off; the edges decide
    return guess + ((code >= edges[guess + 1]) & (guess < last))


def entropy(labels: np.ndarray) -> np.ndarray:
    """Entropy of each column of non-negative integers (n, F): (F,)."""
    return np.array([_entropy_of_counts(np.bincount(column)) for column in labels.T])


def mutual_information(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """I(a_i; b_j) of the columns of non-negative integers a (n, N) and b (n, F): (N, F).

    Several columns of b are counted at once, as one with the product of their values, and then summed out.
    """
    a, b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    joint = np.empty((len(a), len(b)))
    for members, sizes in _groups(b.max(axis=1) + 1):
        cell = np.ravel_multi_index(tuple(b[members]), sizes)
        for i, code in enumerate(a):
            counts = np.bincount(code * np.prod(sizes) + cell, minlength=(code.max() + 1) * np.prod(sizes))
            counts = counts.reshape(-1, *sizes)
            for axis, j in enumerate(members, start=1):
                others = tuple(k for k in range(1, counts.ndim) if k != axis)
                joint[i, j] = _entropy_of_counts(counts.sum(axis=others))
    return np.maximum(entropy(a.T)[:, None] + entropy(b.T) - joint, 0)


def _groups(sizes: np.ndarray, cells: int = 4096) -> list[tuple[list[int], list[int]]]:
    """Neighbouring columns, with their sizes, whose product of sizes stays within `cells`; at least one each."""
    groups: list[tuple[list[int], list[int]]] = []
    for j, size in enumerate(sizes.tolist()):
        if not groups or np.prod(groups[-1][1]) * size > cells:
            groups.append(([], []))
        groups[-1][0].append(j)
        groups[-1][1].append(size)
    return groups


def auroc(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every score (n, N) for every boolean column (n, A): (N, A), ties counted half.

    By the rank sum of Mann and Whitney. Each column of `positive` must hold both values.
    """
    positive = positive.astype(np.float64)
    count = positive.sum(axis=0)
    wins = rankdata(scores, axis=0).T @ positive - count * (count + 1) / 2
    return wins / (count * (len(scores) - count))


def _entropy_of_counts(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
