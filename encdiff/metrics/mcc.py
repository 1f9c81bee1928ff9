"""MCC, the mean correlation coefficient of nonlinear ICA (Hyvärinen & Morioka 2016, arXiv 1605.06336, section 5)."""

import numpy as np
from scipy.optimize import linear_sum_assignment

from encdiff.metrics.correlation import correlation
from encdiff.metrics.samples import check_samples


def mcc(codes: np.ndarray, factors: np.ndarray, *, kind: str = "pearson") -> dict:
    """Mean over factors of |correlation| with their codes, under the best assignment of one code to each factor.

    codes: (n, N) floats; factors: (n, F) integers, taken as numbers, so the order of their values counts: a factor of
    unordered classes is judged by the numbers that they happen to have. kind: "pearson", which asks for a linear code,
    or "spearman", for a monotonic one; as iVAE (Khemakhem et al. 2020, arXiv 1907.04809) has them. The assignment is
    the optimal one, and made on the rows that are scored. A constant code correlates with nothing. With fewer codes
    than factors, F - N factors stay without a code and count 0.

    Returns `mcc` in [0, 1], `assignment` (F,), the code of each factor or -1, and `correlation` (N, F), signed. Raises
    InputError as `check_samples`, and for another kind.
    """
    codes, factors = check_samples(codes, factors)
    found = correlation(codes, factors - factors.min(axis=0), kind)
    code, factor = linear_sum_assignment(abs(found), maximize=True)
    assignment = np.full(factors.shape[1], -1)
    assignment[factor] = code
    score = abs(found[code, factor]).sum() / factors.shape[1]
    return {"mcc": float(score), "assignment": assignment, "correlation": found}
