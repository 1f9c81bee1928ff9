"""What every metric demands of its rows: codes and factors that fit together, and enough of them to say something."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from encdiff.errors import InputError
from encdiff.metrics.codes import check_codes, settle

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def check_samples(
    codes: np.ndarray,
    factors: np.ndarray,
    *,
    rows: str = "",
    least_codes: int = 1,
    least_factors: int = 1,
    factor_names: Sequence[str] = (),
    settled: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """`codes` as float64 (n, N), and `factors` as int64 (n, F), which may come as integers or booleans.

    `rows` ("train", "test") ends the arguments' names in messages. `settled`: not so for one part of several, which are
    to be settled together. Raises InputError for other shapes or dtypes, codes that are not finite, a constant factor,
    and a factor with more than n/2 values: then most values occur once, and information, accuracies and gaps say how
    few samples there are, not what the codes hold.
    """
    names = [f"{word}_{rows}" if rows else word for word in ("codes", "factors")]
    factors = whole_numbers(factors)
    if factors.ndim != 2 or len(factors) < 2 or factors.shape[1] < least_factors or factors.dtype != np.int64:
        raise InputError(
            f"{names[1]} is {factors.dtype} {factors.shape}; it must be integers (n, F), n >= 2, F >= {least_factors}"
        )
    for k, column in enumerate(factors.T):
        values, label = len(_distinct(column)), factor_names[k] if len(factor_names) > k else k
        label = str(label).removeprefix("factor ")  # the name that a file of codes without names gives
        if values < 2:
            raise InputError(f"{names[1]}: factor {label} is constant; each must take at least two values")
        if 2 * values > len(factors):
            raise InputError(f"{names[1]}: factor {label} has {values} values; {2 * values} samples or more are needed")
    codes = check_codes(names[0], codes, len(factors), least_codes)
    return settle(codes)[0] if settled else codes, factors


def whole_numbers(factors: np.ndarray) -> np.ndarray:
    """Integers and booleans as int64; anything else as it is."""
    factors = np.asarray(factors)
    fits = factors.dtype.kind in "ib" or (factors.dtype.kind == "u" and factors.max(initial=0) < 2**63)
    return factors.astype(np.int64, copy=False) if fits else factors


def check_split(codes_train, factors_train, codes_test, factors_test, **least: Any) -> Split:
    """Both sets by `check_samples`; InputError unless they have the same dimensions and the test set no new value."""
    x, y = check_samples(codes_train, factors_train, rows="train", settled=False, **least)
    x_test, y_test = check_samples(codes_test, factors_test, rows="test", settled=False, **least)
    if x.shape[1] != x_test.shape[1] or y.shape[1] != y_test.shape[1]:
        raise InputError(f"test holds {x_test.shape[1]} codes and {y_test.shape[1]} factors; it must match train's")
    for k in range(y.shape[1]):
        if len(new := np.setdiff1d(y_test[:, k], y[:, k])):
            raise InputError(f"factors_test: factor {k} takes the value {new[0]}, which factors_train lacks")
    x, x_test = settle(x, x_test)
    return x, y, x_test, y_test


def split_rows(codes: np.ndarray, factors: np.ndarray, seed: int, fraction: float = 0.8) -> Split:
    """Rows shuffled by `RandomState(seed)`: the first `fraction` to fit on, the rest to score on."""
    if len(codes) != len(factors):
        raise InputError(f"codes holds {len(codes)} rows and factors {len(factors)}; they must be as many")
    order = np.random.RandomState(seed).permutation(len(codes))
    train, test = np.split(order, [round(fraction * len(order))])
    return codes[train], factors[train], codes[test], factors[test]


def relabel(factors: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Each column's values as 0 .. K-1, int64 (n, F), and its sorted distinct values."""
    values = [_distinct(column) for column in factors.T]
    labels = [np.searchsorted(v, column) for v, column in zip(values, factors.T, strict=True)]
    return np.stack(labels).T, values


def _distinct(column: np.ndarray) -> np.ndarray:
    """`np.unique`, by counting where the values lie close together."""
    low, high = int(column.min()), int(column.max())
    if high - low > 1_000_000:
        return np.unique(column)
    return np.flatnonzero(np.bincount(column.astype(np.int64) - low)) + low
