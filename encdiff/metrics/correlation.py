"""Correlations of columns, float64: what MCC, UDR and the unsupervised scores are made of."""

import numpy as np
from scipy.stats import rankdata

from encdiff.errors import InputError

KINDS = ("pearson", "spearman")


def correlation(a: np.ndarray, b: np.ndarray, kind: str = "pearson") -> np.ndarray:
    """Of every column of a (n, N) with every column of b (n, M): (N, M), 0 where either is constant.

    kind: "pearson" or "spearman". Raises InputError for another.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    return inner(*(standardized(x, ranks=kind == "spearman") for x in (a, b)))


def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The correlations of columns that are standardised, (n, N) and (n, M): (N, M)."""
    return np.clip(a.T @ b / len(a), -1, 1)


def standardized(columns: np.ndarray, ranks: bool = False) -> np.ndarray:
    """Columns (n, N), or their ranks, ties sharing the mean, at mean 0 and standard deviation 1; constant ones 0."""
    columns = rankdata(columns, axis=0) if ranks else columns
    varies = np.ptp(columns, axis=0) > 0
    std = np.where(varies, columns.std(axis=0), 1)
    return np.where(varies, (columns - columns.mean(axis=0)) / std, 0)
