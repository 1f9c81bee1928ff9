"""BetaVAE score (Higgins et al. 2017, "beta-VAE", appendix A.4)."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from encdiff.errors import InputError
from encdiff.metrics.factor_vae import check_at_least, check_factor_sizes, grid_encoder
from encdiff.metrics.samples import check_split
from encdiff.metrics.sampling import Grid, Table


def beta_vae_score(
    codes: np.ndarray | Callable[[np.ndarray], np.ndarray],
    factor_sizes: Sequence[int],
    *,
    num_train: int = 10_000,
    num_eval: int = 5_000,
    batch_size: int = 64,
    seed: int = 0,
) -> dict:
    """Accuracy of a linear classifier that names the factor shared in pairs from the mean |difference| of their codes.

    codes: (prod(factor_sizes), N) floats, one row per image of the complete grid, last factor fastest; or a function of
    factors int64 (m, F) that returns codes (m, N). A point is the mean over `batch_size` pairs; scikit-learn's default
    `LogisticRegression` on `num_train` points, scored on `num_eval`, as in Locatello et al. 2019 (arXiv 1811.12359).
    Factors are drawn in their order, one `RandomState(seed)` for everything.

    Returns `train_accuracy` and `eval_accuracy` (the score, in [0, 1]; chance 1/F). The regression's penalty makes it
    depend on the codes' scale. Raises InputError for codes that are not finite or do not match the grid.
    """
    sizes = check_factor_sizes(factor_sizes)
    rows = Grid(grid_encoder(codes, sizes), sizes)
    return _score(rows, rows, num_train, num_eval, batch_size, seed)


def beta_vae_score_rows(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    num_train: int = 10_000,
    num_eval: int = 5_000,
    batch_size: int = 64,
    seed: int = 0,
) -> dict:
    """`beta_vae_score` on any rows, no grid needed: codes (n, N) floats, factors (n, F) integers, F >= 2.

    Training points come from the train rows, evaluation points from the test rows, which may be the same; a pair's
    second row is drawn from those that share the factor's value. Also raises InputError as `check_split`.
    """
    x, y, x_test, y_test = check_split(codes_train, factors_train, codes_test, factors_test, least_factors=2)
    return _score(Table(x, y), Table(x_test, y_test), num_train, num_eval, batch_size, seed)


def _score(train: Grid | Table, test: Grid | Table, num_train: int, num_eval: int, batch_size: int, seed: int) -> dict:
    check_at_least(1, num_train=num_train, num_eval=num_eval, batch_size=batch_size)
    rng = np.random.RandomState(seed)
    points, shared = _points(train, rng, num_train, batch_size)
    if len(np.unique(shared)) < 2:
        raise InputError(f"num_train is {num_train}; so few points share one factor only, nothing can be learnt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the convention is its default of 100 iterations
        model = LogisticRegression().fit(points, shared)
    return {
        "train_accuracy": float(model.score(points, shared)),
        "eval_accuracy": float(model.score(*_points(test, rng, num_eval, batch_size))),
    }


def _points(rows: Grid | Table, rng, count: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean |difference| of the two sides (count, N) and the factor they share (count,)."""
    parts = [(np.abs(z[:, 0] - z[:, 1]).mean(axis=1), fixed) for fixed, z in rows.batches(rng, count, batch_size, 2)]
    return np.concatenate([point for point, _ in parts]), np.concatenate([fixed for _, fixed in parts])
