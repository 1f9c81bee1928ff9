"""DCI: disentanglement, completeness and informativeness (Eastwood & Williams 2018), with boosted trees."""

from collections.abc import Callable

import numpy as np
from joblib import Parallel, cpu_count, delayed
from sklearn.base import clone
from sklearn.ensemble import GradientBoostingClassifier

from encdiff.errors import InputError
from encdiff.metrics.codes import check_codes, for_trees, settle
from encdiff.metrics.factor_vae import check_at_least
from encdiff.metrics.samples import Split, whole_numbers

EPSILON = 1e-11  # added to every importance before its entropy, as in the field's standard library


def dci(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """Predict every factor from the codes with scikit-learn's default gradient boosting and read its importances.

    codes: (n, N) floats, N >= 2; factors: (n, F) integers, F >= 2. One process per factor, `n_jobs` at a time
    (default: every core), the factor with most values first; `progress(done, F)` is called after each.

    Returns `disentanglement`, `completeness`, `informativeness_train`, `informativeness_test` (mean accuracies), all in
    [0, 1], and `importance` float64 (N, F), whose columns sum to 1 unless no code tells anything. The trees break ties
    by `seed`. Raises InputError for arrays that do not fit together, codes that are not finite, and a constant factor.
    """
    rows = _check_all(codes_train, factors_train, codes_test, factors_test, n_jobs)
    return _scores(*rows, GradientBoostingClassifier(random_state=seed), n_jobs, progress)


def dci_quick(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    rounds: int = 8,
    rows: int = 2_000,
    seed: int = 0,
    n_jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict:
    """An estimate of `dci` to follow a training with, not to be reported or compared with it.

    Boosting stops after `rounds` of its 100 and sees the first `rows` of the train rows. Arguments and errors as
    there; every name in the result begins with `quick_`.
    """
    check_at_least(1, rounds=rounds, rows=rows)
    given = _check_all(codes_train[:rows], factors_train[:rows], codes_test, factors_test, n_jobs)
    scores = _scores(*given, GradientBoostingClassifier(n_estimators=rounds, random_state=seed), n_jobs, progress)
    return {f"quick_{name}": value for name, value in scores.items()}


def disentanglement(importance: np.ndarray) -> float:
    """Mean over codes of 1 - entropy over factors (base F), weighted by each code's share of `importance` (N, F)."""
    return _concentration(importance.T)


def completeness(importance: np.ndarray) -> float:
    """Mean over factors of 1 - entropy over codes (base N), weighted by each factor's share of `importance` (N, F)."""
    return _concentration(importance)


def _concentration(importance: np.ndarray) -> float:
    """Weighted mean over columns of 1 - normalised entropy; 0 when nothing matters."""
    p = importance + EPSILON
    p = p / p.sum(axis=0)
    concentrated = 1 + (p * np.log(p)).sum(axis=0) / np.log(len(p))
    share = importance.sum(axis=0) if importance.any() else np.ones(importance.shape[1])
    return float(np.clip((concentrated * share).sum() / share.sum(), 0, 1))


def _scores(x, y, x_test, y_test, model: GradientBoostingClassifier, n_jobs: int | None, progress) -> dict:
    values = [len(np.unique(column)) for column in y.T]
    longest_first = sorted(range(len(values)), key=lambda k: -values[k])
    jobs = (delayed(_fit_factor)(k, clone(model), x, y[:, k], x_test, y_test[:, k]) for k in longest_first)
    importance, accuracy = np.zeros((x.shape[1], len(values))), np.zeros((len(values), 2))
    results = Parallel(n_jobs=min(n_jobs or cpu_count(), len(values)), return_as="generator_unordered")(jobs)
    for done, (k, weights, scores) in enumerate(results, start=1):
        importance[:, k], accuracy[k] = weights, scores
        if progress:
            progress(done, len(values))
    return {
        "disentanglement": disentanglement(importance),
        "completeness": completeness(importance),
        "informativeness_train": float(accuracy[:, 0].mean()),
        "informativeness_test": float(accuracy[:, 1].mean()),
        "importance": importance,
    }


def _fit_factor(k, model, x, y, x_test, y_test) -> tuple[int, np.ndarray, tuple[float, float]]:
    model.fit(x, y)  # repeated rows stay: weights would move ties
    return k, model.feature_importances_, (model.score(x, y), model.score(x_test, y_test))


def _check_all(codes_train, factors_train, codes_test, factors_test, n_jobs: int | None) -> Split:
    x, y = _check("train", codes_train, factors_train)
    x_test, y_test = _check("test", codes_test, factors_test)
    if x.shape[1] != x_test.shape[1] or y.shape[1] != y_test.shape[1]:
        raise InputError(f"test holds {x_test.shape[1]} codes and {y_test.shape[1]} factors; it must match train's")
    values = [len(np.unique(column)) for column in y.T]
    if min(values) < 2:
        raise InputError(f"factors_train: factor {values.index(1)} is constant; each must take at least two values")
    if 2 * max(values) > len(y):
        raise InputError(
            f"factors_train: factor {values.index(max(values))} has {max(values)} values in {len(y)} samples; "
            f"{2 * max(values)} samples or more are needed"
        )
    if n_jobs is not None:
        check_at_least(1, n_jobs=n_jobs)
    x, x_test = for_trees(*settle(x, x_test))
    return x, y, x_test, y_test


def _check(name: str, codes: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factors = whole_numbers(factors)
    if factors.ndim != 2 or factors.shape[1] < 2 or len(factors) == 0 or factors.dtype != np.int64:
        raise InputError(
            f"factors_{name} is {factors.dtype} {factors.shape}; it must be integers (n, F) with n >= 1, F >= 2"
        )
    codes = check_codes(f"codes_{name}", codes, len(factors))
    if codes.shape[1] < 2:
        raise InputError(f"codes_{name} has 1 dimension; DCI needs at least 2")
    return codes, factors
