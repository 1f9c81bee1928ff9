"""IRS, the interventional robustness score (Suter et al. 2019, arXiv 1811.00007, section 4)."""

import numpy as np

from encdiff.metrics.samples import check_samples


def irs(codes: np.ndarray, factors: np.ndarray, *, quantile: float = 0.99) -> dict:
    """How little a code moves while its best factor is held and the others change: 1 is not at all.

    codes: (n, N) floats; factors: (n, F) integers. For each code and factor: the `quantile` of |code - mean| among the
    rows that share the factor's value, averaged over values, relative to the code's largest |code - mean| of all. A
    code scores 1 - that of its best factor; codes are weighted by their largest deviation and constant ones left out.
    The quantile instead of the maximum, and these weights, are those of Locatello et al. 2019 (arXiv 1811.12359); so
    rescaling one code alone changes its weight.

    Returns `irs` in [0, 1], `per_code` (active,), `num_active_dims`. When every code is constant nothing can be
    robust: `irs` is None and `undefined` says why. Raises InputError as `check_samples`.
    """
    codes, factors = check_samples(codes, factors)
    codes = np.ascontiguousarray(codes.T[np.ptp(codes, axis=0) > 0])
    if not len(codes):
        return {"irs": None, "per_code": [], "num_active_dims": 0, "undefined": "every code is constant"}
    largest = np.abs(codes - codes.mean(axis=1, keepdims=True)).max(axis=1)
    moved = np.stack([_deviation(codes, factor, quantile) for factor in factors.T], axis=1) / largest[:, None]
    per_code = 1 - moved.min(axis=1)
    score = float(np.average(per_code, weights=largest))
    return {"irs": score, "per_code": per_code, "num_active_dims": len(codes)}


def _deviation(codes: np.ndarray, factor: np.ndarray, quantile: float) -> np.ndarray:
    """Codes (N, n): mean over the factor's values of the quantile of |code - its mean there|: (N,)."""
    order = np.argsort(factor, kind="stable")
    groups = np.split(codes[:, order], np.flatnonzero(np.diff(factor[order])) + 1, axis=1)
    return np.mean([np.quantile(np.abs(z - z.mean(axis=1, keepdims=True)), quantile, axis=1) for z in groups], axis=0)
