"""UDR, the unsupervised disentanglement ranking (Duan et al. 2020, arXiv 1905.12614, section 4)."""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import Lasso

from encdiff.errors import InputError
from encdiff.metrics.codes import check_codes, settle
from encdiff.metrics.correlation import inner, standardized

KINDS = ("spearman", "lasso")
ALPHA = 0.1  # Lasso's penalty in the authors' code


def udr(
    codes: Sequence[np.ndarray],
    *,
    kind: str = "spearman",
    kl: Sequence[np.ndarray] | None = None,
    least_kl: float = 0.01,
    least_spread: float = 0.05,
) -> dict:
    """How well each of M models agrees with the others, code by code: a score without factors.

    codes: one array (n, N_m) of floats for each model, all of the same n images in the same order; M >= 2. The paper
    trains M seeds of one configuration; models that agree for another reason than disentanglement score high too.

    R_ij (N_i, N_j) holds |Spearman's correlation| of the codes of models i and j, or with kind="lasso" |weights| of the
    Lasso that predicts j's codes from i's. The pair's score is the mean over rows and columns of R_ij of
    max(R)^2 / sum(R), rows and columns weighing half each, and a model's score the median of those of its pairs.

    Informative codes alone take part. With `kl`, of a VAE, one array (N_m,) of mean KL divergences in nats for each
    model, these have more than `least_kl`. An encoder without a posterior has none: then those whose standard deviation
    is at least `least_spread` of that of the model's widest code, which is ours. Constant codes never are. A pair in
    which a model has no informative code agrees in nothing: 0.

    Returns `udr` (M,) in [0, 1], `pairwise` (M, M), whose entry i, j is of R_ij and whose diagonal is 0, and
    `num_active_dims` (M,). Copies get 1 by "spearman" if their codes are uncorrelated, 0.9 by "lasso", which shrinks.
    Raises InputError for fewer than two models, arrays that do not match, and codes that are not finite.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if isinstance(codes, np.ndarray) or len(codes) < 2:
        raise InputError(f"codes is {type(codes).__name__} of {len(codes)}; it must be a list of two arrays or more")
    rows = max(2, len(np.atleast_1d(codes[0])))
    checked = [settle(check_codes(f"codes[{m}]", each, rows))[0] for m, each in enumerate(codes)]
    masks = [_informative(each, least_spread) for each in checked]
    if kl is not None:
        masks = [mask & (known > least_kl) for mask, known in zip(masks, _check_kl(kl, masks), strict=True)]
    kept = [standardized(each[:, mask], ranks=kind == "spearman") for each, mask in zip(checked, masks, strict=True)]
    pairwise = np.zeros((len(kept), len(kept)))
    for i, j in zip(*np.nonzero(~np.eye(len(kept), dtype=bool)), strict=True):
        if kept[i].size and kept[j].size:
            fitted = inner(kept[i], kept[j]) if kind == "spearman" else _lasso(kept[i], kept[j])
            pairwise[i, j] = _relative_strength(abs(fitted))
    others = [np.delete(column, j) for j, column in enumerate(pairwise.T)]
    return {
        "udr": np.median(others, axis=1),
        "pairwise": pairwise,
        "num_active_dims": np.array([mask.sum() for mask in masks]),
    }


def _informative(codes: np.ndarray, least_spread: float) -> np.ndarray:
    std = np.where(np.ptp(codes, axis=0) > 0, codes.std(axis=0), 0)
    return (std > 0) & (std >= least_spread * std.max())


def _check_kl(kl: Sequence[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    known = [np.asarray(each) for each in kl]
    shapes = [mask.shape for mask in masks]
    if [each.shape for each in known] != shapes or not all(np.isfinite(each).all() for each in known):
        raise InputError(f"kl has shapes {[each.shape for each in known]}; they must be {shapes}, of finite numbers")
    return known


def _lasso(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Weights (N, M) that predict the columns of b (n, M) from those of a (n, N)."""
    return np.atleast_2d(Lasso(alpha=ALPHA).fit(a, b).coef_).T


def _relative_strength(r: np.ndarray) -> float:
    sides = []
    for strengths in (r, r.T):
        total = strengths.sum(axis=0)
        sides.append(np.mean(strengths.max(axis=0) ** 2 / np.where(total > 0, total, 1)))
    return float(np.mean(sides))
