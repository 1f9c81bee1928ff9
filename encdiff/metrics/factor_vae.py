"""FactorVAE score (Kim & Mnih 2018, arXiv 1802.05983, section 4)."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from encdiff.errors import InputError
from encdiff.metrics.codes import check_codes, settle
from encdiff.metrics.samples import check_split
from encdiff.metrics.sampling import Grid, Table


def factor_vae_score(
    codes: np.ndarray | Callable[[np.ndarray], np.ndarray],
    factor_sizes: Sequence[int],
    *,
    num_variance: int = 10_000,
    num_train: int = 10_000,
    num_eval: int = 5_000,
    batch_size: int = 64,
    threshold: float = 0.05,
    seed: int = 0,
) -> dict:
    """Accuracy of a majority vote that names the fixed factor from the code dimension that varies least.

    codes: (prod(factor_sizes), N) floats, one row per image of the complete grid, last factor fastest; or a function of
    factors int64 (m, F) that returns codes (m, N). Dimensions whose standard deviation over `num_variance` samples is
    below `threshold` take no part; without any other dimension the score is 0.

    Factors are drawn in the order of the standard library of the field, one `RandomState(seed)` for everything, so that
    a seed gives its votes. Returns `train_accuracy`, `eval_accuracy` (the score, in [0, 1]) and `num_active_dims`.
    Raises InputError for codes that are not finite or do not match the grid.
    """
    sizes = check_factor_sizes(factor_sizes)
    rows = Grid(grid_encoder(codes, sizes), sizes)
    return _score(rows, rows, num_variance, num_train, num_eval, batch_size, threshold, seed)


def factor_vae_score_rows(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    num_variance: int = 10_000,
    num_train: int = 10_000,
    num_eval: int = 5_000,
    batch_size: int = 64,
    threshold: float = 0.05,
    seed: int = 0,
) -> dict:
    """`factor_vae_score` on any rows, no grid needed: codes (n, N) floats, factors (n, F) integers, F >= 2.

    The variances and training votes come from the train rows, the evaluation votes from the test rows, which may be
    the same. A batch is drawn from the rows that share the fixed factor's value, with repetition. Result and errors as
    there; also InputError as `check_split`.
    """
    x, y, x_test, y_test = check_split(codes_train, factors_train, codes_test, factors_test, least_factors=2)
    train, test = Table(x, y), Table(x_test, y_test)
    return _score(train, test, num_variance, num_train, num_eval, batch_size, threshold, seed)


def check_factor_sizes(factor_sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes as a tuple; InputError unless there are at least two factors, each with at least two values."""
    sizes = tuple(int(size) for size in np.atleast_1d(factor_sizes))
    if len(sizes) < 2 or min(sizes) < 2:
        raise InputError(f"factor_sizes is {sizes}; it must hold at least two factors of at least two values each")
    return sizes


def check_at_least(least: int, **values: int) -> None:
    """InputError for the first of `values` that is not an integer of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"{name} is {value!r}; it must be an integer of at least {least}")


def grid_encoder(
    codes: np.ndarray | Callable[[np.ndarray], np.ndarray], sizes: tuple[int, ...]
) -> Callable[[np.ndarray], np.ndarray]:
    """Factors int64 (m, F) to checked codes float64 (m, N): a lookup in the complete grid's codes, or the function."""
    if callable(codes):
        return lambda factors: _check_grid_codes(codes(factors), len(factors))
    settled = settle(_check_grid_codes(codes, math.prod(sizes)))[0]
    return lambda factors: settled[np.ravel_multi_index(factors.T, sizes)]


def _check_grid_codes(codes: np.ndarray, rows: int) -> np.ndarray:
    codes = check_codes("codes", codes, rows)
    if abs(codes).max(initial=0) > np.finfo(np.float32).max:
        raise InputError(f"codes reach {abs(codes).max():.3g}; all must be finite in float32")
    return codes


def _score(train, test, num_variance, num_train, num_eval, batch_size, threshold, seed) -> dict:
    check_at_least(2, num_variance=num_variance, batch_size=batch_size)
    check_at_least(1, num_train=num_train, num_eval=num_eval)
    if not threshold >= 0:
        raise InputError(f"threshold is {threshold!r}; it must be at least 0")
    rng = np.random.RandomState(seed)
    z = train.sample(rng, num_variance)
    variance = z.var(axis=0, ddof=1)
    active = np.flatnonzero((np.sqrt(variance) >= threshold) & (np.ptp(z, axis=0) > 0))
    if active.size == 0:
        return {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0}
    votes = _votes(train, rng, num_train, batch_size, variance, active)
    test_votes = _votes(test, rng, num_eval, batch_size, variance, active)
    majority = votes.argmax(axis=0), np.arange(active.size)  # the factor that each dimension stands for
    return {
        "train_accuracy": float(votes[majority].sum() / num_train),
        "eval_accuracy": float(test_votes[majority].sum() / num_eval),
        "num_active_dims": int(active.size),
    }


def _votes(rows: Grid | Table, rng, num_votes, batch_size, variance, active) -> np.ndarray:
    """int64 (F, active dims): how often a dimension varied least while a factor was fixed."""
    counts = np.zeros((rows.num_factors, active.size), np.int64)
    for fixed, z in rows.batches(rng, num_votes, batch_size):
        least = (z[:, 0][..., active].var(axis=1, ddof=1) / variance[active]).argmin(axis=1)
        np.add.at(counts, (fixed, least), 1)
    return counts
