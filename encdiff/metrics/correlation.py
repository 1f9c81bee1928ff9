"""Correlations of columns, float64: what MCC, UDR and the unsupervised scores are made of."""

import numpy as np
from scipy.stats import rankdata

from encdiff.errors import InputError

KINDS = ("pearson", "spearman")


def correlation(a: np.ndarray, b: np.ndarray, kind: str = "pearson") -> np.ndarray:
    """Of every column of a (n, N) with every column of b (n, M): (N, M), 0 where either is constant.

    kind: "pearson", or "spearman", which is Pearson's of the ranks, ties sharing their mean rank. Raises InputError for
    another kind.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    a, b = (standardized(rankdata(x, axis=0) if kind == "spearman" else x) for x in (a, b))
    return np.clip(a.T @ b / len(a), -1, 1)


def standardized(columns: np.ndarray) -> np.ndarray:
    """Columns (n, N) at mean 0 and standard deviation 1 (divided by n); constant ones 0."""
    varies = np.ptp(columns, axis=0) > 0
    std = np.where(varies, columns.std(axis=0), 1)
    return np.where(varies, (columns - columns.mean(axis=0)) / std, 0)
