"""Scores of codes alone, without factors: how far they are from independent (Locatello et al. 2019, 1811.12359)."""

import math

import numpy as np

from encdiff.metrics.codes import check_codes, settle
from encdiff.metrics.correlation import standardized
from encdiff.metrics.information import discretize, mutual_information
from encdiff.metrics.samples import check_samples


def unsupervised(codes: np.ndarray, factors: np.ndarray, *, bins: int = 20) -> dict:
    """Dependence among the codes; 0 is independence, and lower is better only among codes that say as much.

    codes: (n, N) floats; factors: (n, F) integers, which are checked and not used. Constant codes are left out, and
    `num_active_dims` counts the others: a constant code depends on nothing, and would make dead codes look good.

    Returns `total_correlation` and `wasserstein_correlation`, of the Gaussian with the codes' covariance, see the
    functions of these names; `wasserstein_correlation_norm`, that divided by the sum of variances; and
    `mutual_info_score`, the mean over pairs of codes of their information about each other in nats, each cut into
    `bins` of equal width. Of fewer than two codes that vary all are None; where a code is a linear function of the
    others, or n <= N, total correlation is infinite, which is None too; `undefined` says why. Raises InputError as
    `check_samples`.
    """
    codes, _ = check_samples(codes, factors)
    codes = _varying(codes)
    found = {
        "total_correlation": None, "wasserstein_correlation": None, "wasserstein_correlation_norm": None,
        "mutual_info_score": None, "num_active_dims": codes.shape[1],
    }  # fmt: skip
    if codes.shape[1] < 2:
        return found | {"undefined": f"{codes.shape[1]} of the codes vary; dependence needs two"}
    information = mutual_information(*[discretize(codes, bins)] * 2)
    distance = _wasserstein(codes)
    found["wasserstein_correlation"] = distance
    found["wasserstein_correlation_norm"] = distance / float(codes.var(axis=0, ddof=1).sum())
    found["mutual_info_score"] = float(information[~np.eye(len(information), dtype=bool)].mean())
    if math.isinf(total := _total_correlation(codes)):
        return found | {"undefined": "total correlation is infinite: the codes' covariance is singular"}
    return found | {"total_correlation": total}


def gaussian_total_correlation(codes: np.ndarray) -> float:
    """KL divergence in nats of the Gaussian with the codes' covariance from the product of its marginals.

    -1/2 log det R with the correlation matrix R of the codes (n, N) floats that vary, so units do not count. Infinite
    where R is singular but for rounding; 0 of a single code. Raises InputError as `check_codes`.
    """
    return _total_correlation(_varying(_checked(codes)))


def gaussian_wasserstein_correlation(codes: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of the same two Gaussians, in the codes' squared units.

    2 tr S - 2 tr (D^1/2 S D^1/2)^1/2 with the covariance S of the codes (n, N) floats, divided by n - 1, and its
    diagonal D. Finite for a singular S too. Raises InputError as `check_codes`.
    """
    return _wasserstein(_checked(codes))


def _checked(codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    return settle(check_codes("codes", codes, max(2, len(codes) if codes.ndim else 0)))[0]


def _varying(codes: np.ndarray) -> np.ndarray:
    return codes[:, np.ptp(codes, axis=0) > 0]


def _total_correlation(codes: np.ndarray) -> float:
    if not codes.shape[1]:
        return 0.0
    n, dims = codes.shape
    s = np.linalg.svd(standardized(codes), compute_uv=False)  # R = V s^2 V' / n; s keeps digits that R would lose
    if n <= dims or s[-1] <= s[0] * n * np.finfo(float).eps:
        return math.inf
    return max(0.0, float(-np.log(s / math.sqrt(n)).sum()))


def _wasserstein(codes: np.ndarray) -> float:
    covariance = np.atleast_2d(np.cov(codes, rowvar=False))
    std = np.sqrt(np.diag(covariance))
    values = np.linalg.eigvalsh(covariance * np.outer(std, std))
    trace = np.trace(covariance)
    return max(0.0, float(2 * trace - 2 * np.sqrt(np.maximum(values, 0)).sum()))
