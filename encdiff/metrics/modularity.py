"""Modularity and explicitness (Ridgeway & Mozer 2018, arXiv 1802.05312, section 3)."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from encdiff.errors import InputError
from encdiff.metrics.information import auroc, discretize, mutual_information
from encdiff.metrics.samples import check_samples, check_split, relabel


def modularity(codes: np.ndarray, factors: np.ndarray, *, bins: int = 20) -> dict:
    """Mean over codes of 1 - sum of the squared informations about other factors / ((F - 1) best squared information).

    codes: (n, N) floats; factors: (n, F) integers, F >= 2. A code without information about any factor counts 0, and
    codes are cut into `bins` of equal width, both as in Locatello et al. 2019 (arXiv 1811.12359).

    Returns `modularity` in [0, 1] and `per_code` (N,). Raises InputError as `check_samples`.
    """
    codes, factors = check_samples(codes, factors, least_factors=2)
    square = mutual_information(discretize(codes, bins), relabel(factors)[0]) ** 2
    best = square.max(axis=1)
    others = (square.sum(axis=1) - best) / np.where(best > 0, best, 1) / (square.shape[1] - 1)
    per_code = np.where(best > 0, 1 - others, 0)
    return {"modularity": float(per_code.mean()), "per_code": per_code}


def explicitness(
    codes_train: np.ndarray, factors_train: np.ndarray, codes_test: np.ndarray, factors_test: np.ndarray
) -> dict:
    """Mean over factors and their values of the area under the ROC curve of a logistic regression on all codes.

    codes: (n, N) floats; factors: (n, F) integers. scikit-learn's default `LogisticRegression`, all values at once, on
    the raw codes, and the plain area, chance 0.5, as in Locatello et al. 2019; the paper rescales it to [0, 1]. Its
    penalty makes the score depend on the codes' scale.

    Returns `explicitness_train`, `explicitness_test` and `per_factor` (F,), of the test rows. Raises InputError as
    `check_split`, and for a value that the test rows lack.
    """
    x, y, x_test, y_test = check_split(codes_train, factors_train, codes_test, factors_test)
    scores = np.empty((y.shape[1], 2))
    for k in range(y.shape[1]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the convention is its default of 100 iterations
            model = LogisticRegression().fit(x, y[:, k])
        if len(missing := np.setdiff1d(model.classes_, y_test[:, k])):
            raise InputError(f"factors_test: factor {k} never takes the value {missing[0]}; its area is undefined")
        scores[k] = [_mean_area(model, *part) for part in ((x, y[:, k]), (x_test, y_test[:, k]))]
    train, test = scores.mean(axis=0)
    return {"explicitness_train": float(train), "explicitness_test": float(test), "per_factor": scores[:, 1]}


def _mean_area(model: LogisticRegression, codes: np.ndarray, factor: np.ndarray) -> float:
    areas = auroc(model.predict_proba(codes), factor[:, None] == model.classes_)
    return float(np.diag(areas).mean())
