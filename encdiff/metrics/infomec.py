"""InfoMEC: InfoM, InfoC and InfoE (Hsu et al. 2023, arXiv 2305.18378, section 4)."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import mutual_info_classif
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from encdiff.errors import InputError
from encdiff.metrics.factor_vae import check_at_least
from encdiff.metrics.information import entropy, mutual_information
from encdiff.metrics.samples import check_split, relabel

ESTIMATORS = ("neighbors", "discrete")
LEAST = 1e-9  # information, as a share of the entropy, that is more than rounding


def infomec(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    estimator: str = "neighbors",
    neighbors: int = 10,
    active_range: float = 0.05,
    seed: int = 0,
) -> dict:
    """Modularity, compactness and explicitness of codes in terms of information.

    With R = I(code; factor) / H(factor): InfoM is the mean over active codes of max / sum of R over factors, InfoC the
    mean over factors of max / sum of R over active codes, each rescaled so that a flat R gives 0. InfoE is the mean
    over factors of 1 - (log loss of a linear classifier on all codes) / (that of one without any, log of the number
    of values), at least 0.

    codes: (n, N) floats; factors: (n, F) integers, F >= 2. InfoM and InfoC are of the test rows; InfoE is fitted on the
    train rows and scored on the test rows. The paper has one set for everything: pass it twice. Its choices:
    standardised codes; information by nearest `neighbors` (Ross 2014) or, `estimator="discrete"`, by counting distinct
    codes; codes whose range is at most `active_range` times the widest are inactive, which is the one place where the
    scale of a code matters; logistic regression without penalty, balanced values, 100 iterations. Ours: a code with no
    information about any factor is inactive too, where the paper's quotient is 0/0.

    Returns `infom`, `infoc`, `infoe` in [0, 1], `num_active_dims` and `nmi` R (N, F). Without an active code, and for
    InfoC with one only or with a factor that no code tells of, a score is None and `undefined` says why. Raises
    InputError as `check_split`, and for an unknown estimator or codes that are not discrete.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator is {estimator!r}; it must be one of {', '.join(ESTIMATORS)}")
    check_at_least(1, neighbors=neighbors)
    x, y, x_test, y_test = check_split(codes_train, factors_train, codes_test, factors_test, least_factors=2)
    spread = np.ptp(x_test, axis=0)
    active = (spread > 0) & (spread > active_range * spread.max())
    labels, _ = relabel(y_test)
    nmi = np.zeros((x.shape[1], y.shape[1]))
    nmi[active] = _information(x_test[:, active], labels, estimator, neighbors, seed) / entropy(labels)
    active &= nmi.sum(axis=1) > LEAST
    infom, no_infom = _mean_share(nmi[active])
    infoc, no_infoc = _mean_share(nmi[active].T)
    scores = {"infom": infom, "infoc": infoc, "infoe": _infoe(x, y, x_test, y_test)}
    undefined = {"undefined": "; ".join(reasons)} if (reasons := sorted({no_infom, no_infoc} - {""})) else {}
    return scores | {"num_active_dims": int(active.sum()), "nmi": nmi} | undefined


def _information(codes, labels, estimator: str, neighbors: int, seed: int) -> np.ndarray:
    if not codes.shape[1]:
        return np.zeros((0, labels.shape[1]))
    if estimator == "discrete":
        values, distinct = zip(*(np.unique(code, return_inverse=True) for code in codes.T), strict=True)
        if 2 * (most := max(map(len, values))) > len(codes):
            raise InputError(f"codes_test: a code takes {most} values in {len(codes)} rows; that is not discrete")
        return mutual_information(np.stack(distinct, axis=1), labels)
    codes = (codes - codes.mean(axis=0)) / codes.std(axis=0)
    options = dict(discrete_features=False, n_neighbors=neighbors, random_state=seed)
    return np.stack([mutual_info_classif(codes, factor, **options) for factor in labels.T], axis=1)


def _mean_share(rows: np.ndarray) -> tuple[float | None, str]:
    """Mean over rows of max / sum, from 1/columns .. 1 rescaled to 0 .. 1; or None and the reason."""
    if not rows.size:
        return None, "no code is active"
    if rows.shape[1] < 2:
        return None, "InfoC needs two active codes"
    if (silent := rows.sum(axis=1) <= LEAST).any():
        return None, f"no code tells anything of factor {silent.argmax()}"
    flat = 1 / rows.shape[1]
    return float(((rows.max(axis=1) / rows.sum(axis=1)).mean() - flat) / (1 - flat)), ""


def _infoe(x, y, x_test, y_test) -> float:
    std = np.where(np.ptp(x, axis=0) > 0, x.std(axis=0), 1)
    x, x_test = ((part - x.mean(axis=0)) / std for part in (x, x_test))
    explained = []
    for factor, factor_test in zip(y.T, y_test.T, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=np.inf, class_weight="balanced").fit(x, factor)
        loss = log_loss(factor_test, model.predict_proba(x_test), labels=model.classes_)
        explained.append(1 - loss / np.log(len(model.classes_)))
    return float(max(np.mean(explained), 0))
