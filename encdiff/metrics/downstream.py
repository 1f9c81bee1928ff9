"""Downstream accuracy and sample efficiency (Locatello et al. 2019, arXiv 1811.12359, section 5.4)."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from joblib import Parallel, cpu_count, delayed
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from encdiff.errors import InputError
from encdiff.metrics.codes import for_trees
from encdiff.metrics.factor_vae import check_at_least
from encdiff.metrics.samples import check_split

PREDICTORS = {
    "logistic": lambda seed: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    "boosted_trees": lambda seed: GradientBoostingClassifier(random_state=seed),
}


def downstream(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    predictor: str = "logistic",
    sizes: Sequence[int] = (100, 1_000, 10_000),
    seed: int = 0,
    n_jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Test accuracy of predicting the factors from the codes, for several numbers of training rows.

    codes: (n, N) floats; factors: (n, F) integers. `predictor`: `logistic`, scikit-learn's `LogisticRegression` on
    standardised codes with its default penalty (Locatello et al. choose it by cross-validation), or `boosted_trees`,
    its default `GradientBoostingClassifier`. Of `sizes` those up to n count, and n itself if it lies below the largest;
    each takes the first rows of one permutation by `seed`. A set that shows one value of a factor only predicts that.
    One process per fit, `n_jobs` at a time (default: every core); `progress(done, total)` follows.

    Returns `sizes` (S,), `accuracy` (S,), means over factors, `per_factor` (S, F), `accuracy_full`, that of the
    largest, and `sample_efficiency`, accuracy at the smallest size over that at the largest; None, and `undefined`
    why, if there is one size only. Raises InputError as `check_split`, for an unknown predictor and sizes below 2.
    """
    if predictor not in PREDICTORS:
        raise InputError(f"predictor is {predictor!r}; it must be one of {', '.join(PREDICTORS)}")
    for size in sizes:
        check_at_least(2, sizes=size)
    if n_jobs is not None:
        check_at_least(1, n_jobs=n_jobs)
    x, y, x_test, y_test = check_split(codes_train, factors_train, codes_test, factors_test)
    if predictor == "boosted_trees":
        x, x_test = for_trees(x, x_test)
    taken = sorted({min(size, len(x)) for size in sizes})
    rows = np.random.RandomState(seed).permutation(len(x))
    tasks = [(s, k) for s in reversed(range(len(taken))) for k in range(y.shape[1])]
    jobs = (
        delayed(_accuracy)(s, k, predictor, seed, x[rows[: taken[s]]], y[rows[: taken[s]], k], x_test, y_test[:, k])
        for s, k in tasks
    )
    accuracy = np.zeros((len(taken), y.shape[1]))
    workers = min(n_jobs or cpu_count(), len(tasks))
    for done, (s, k, value) in enumerate(Parallel(n_jobs=workers, return_as="generator_unordered")(jobs), start=1):
        accuracy[s, k] = value
        if progress:
            progress(done, len(tasks))
    mean = accuracy.mean(axis=1)
    result = {"sizes": np.array(taken), "accuracy": mean, "per_factor": accuracy, "accuracy_full": float(mean[-1])}
    if len(taken) < 2:
        return result | {"sample_efficiency": None, "undefined": f"one size of training set only, {taken[0]}"}
    return result | {"sample_efficiency": float(mean[0] / mean[-1])}


def _accuracy(s, k, predictor: str, seed: int, x, y, x_test, y_test) -> tuple[int, int, float]:
    if (y == y[0]).all():
        return s, k, float((y_test == y[0]).mean())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return s, k, float(PREDICTORS[predictor](seed).fit(x, y).score(x_test, y_test))
