"""How good reconstructed fields are: error, CRPS, coverage, and spread against error.

Members are float (n, E, C, H, W), E reconstructions of each of n fields; truth (n, C, H, W). `where`, a mask that
broadcasts to (n, C, H, W), takes a part of the pixels; where it leaves none, scores are NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from encdiff.errors import InputError

LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))  # of the calibration curve
DRAWS = 2000  # of the bootstrap


class Scores(NamedTuple):
    """Per field and channel, each float64 (n, C); in the field's units, but for nrmse and coverage, which have none."""

    nrmse: np.ndarray  # of the members' mean
    nrmse_unobserved: np.ndarray  # at the pixels without a sensor alone
    crps: np.ndarray
    coverage: np.ndarray  # of the central 90 %
    spread: np.ndarray
    error: np.ndarray  # RMSE of the members' mean


def score(members: np.ndarray, truth: np.ndarray, observed: np.ndarray | None = None, *, drawn: bool = True) -> Scores:
    """Every score; `observed`, a mask that broadcasts to (n, C, H, W), has the pixels with a sensor. As `coverage`."""
    members, truth = _checked(members, truth)
    mean = members.mean(1)
    return Scores(
        nrmse(mean, truth),
        nrmse(mean, truth, True if observed is None else ~np.asarray(observed, bool)),
        crps(members, truth),
        coverage(members, truth, drawn=drawn),
        spread(members),
        rmse(mean, truth),
    )


def rmse(mean: np.ndarray | float, truth: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
    """Root mean square error over pixels, float64 (n, C), of mean (n, C, H, W)."""
    truth = np.asarray(truth, np.float64)
    return np.sqrt(_average((mean - truth) ** 2, where))


def nrmse(mean: np.ndarray, truth: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
    """RMSE / RMS(truth), the relative L2 error, float64 (n, C); both over the pixels of `where`.

    Not finite where the truth is zero throughout.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return rmse(mean, truth, where) / rmse(0.0, truth, where)


def crps(members: np.ndarray, truth: np.ndarray, where: np.ndarray | bool = True, *, fair: bool = False) -> np.ndarray:
    """Continuous ranked probability score, its mean over pixels, float64 (n, C); 0 is perfect.

    mean_e |x_e - y| - sum_{e,f} |x_e - x_f| / (2 E^2): the score of the members' empirical distribution (Gneiting and
    Raftery 2007, eq. 21), the mean absolute error for E = 1. It asks more of fewer members: of E drawn from the truth's
    own distribution, 1 + 1 / E times that of the distribution is expected. `fair` divides by 2 E (E - 1) instead (Ferro
    2014): unbiased for drawn members, wrong for members that are quantiles; needs E >= 2.
    """
    members, truth = _checked(members, truth)
    count = members.shape[1]
    if fair and count < 2:
        raise InputError("members is an ensemble of 1, must be of at least 2 for the fair CRPS")
    x = np.sort(members - truth[:, None], axis=1)  # the score does not change, and rounding is that of the errors
    # of the sorted ones, sum_{e,f} |x_e - x_f| / 2 = sum_e (2 e + 1 - E) x_e, e from 0
    weights = (2 * np.arange(count) + 1 - count) / (count * (count - fair))
    return _average(np.abs(x).mean(1) - np.einsum("e,nechw->nchw", weights, x), where)


def coverage(
    members: np.ndarray, truth: np.ndarray, level: float = 0.9, where: np.ndarray | bool = True, *, drawn: bool = True
) -> np.ndarray:
    """Share of pixels inside the members' central band of that level, float64 (n, C); calibrated: `nominal(level, E)`.

    The band has its ends at the order statistics k and E + 1 - k, of tails (1 - level) / 2 = k / (E + 1) where members
    are `drawn`, as the truth is, from one distribution; (k - 1/2) / E where they are its quantiles at (e + 1/2) / E.
    Between two whole k the shares of both bands are mixed in proportion, so the expected share is exact whatever the
    distribution: for 25 members and 90 %, k = 1.3. No band is wider than all members, so k >= 1. The ends belong to the
    band: with ties, as in a field of two values, more than the nominal share is covered. One member has no band: NaN.
    """
    return coverage_curve(members, truth, (level,), where, drawn=drawn)[0]


def coverage_curve(
    members: np.ndarray,
    truth: np.ndarray,
    levels: Sequence[float] = LEVELS,
    where: np.ndarray | bool = True,
    *,
    drawn: bool = True,
) -> np.ndarray:
    """`coverage` at several levels, float64 (levels, n, C): the reliability curve, calibrated on the diagonal."""
    members, truth = _checked(members, truth)
    count = members.shape[1]
    if count < 2:
        return np.full((len(levels), *truth.shape[:2]), np.nan)
    below, ties = _ranks(members, truth)
    depth = np.minimum(below + ties, count - below)  # in the band of k where at least k
    bands = np.append(np.arange(1, count // 2 + 1), (count + 1) / 2)  # the last one is the median alone
    shares = np.stack([_average(depth >= k, where) for k in bands])
    orders = [_order(level, count, drawn) for level in levels]
    return np.apply_along_axis(lambda share: np.interp(orders, bands, share), 0, shares)


def nominal(level: float, count: int, *, drawn: bool = True) -> float:
    """What `coverage` is expected to be for `count` >= 2 calibrated members: the level, or what all of them cover.

    That is (E - 1) / (E + 1) of drawn members, 1 - 1 / E of quantiles.
    """
    k = _order(level, count, drawn)
    return 1 - 2 * k / (count + 1) if drawn else 1 - (2 * k - 1) / count


def _order(level: float, count: int, drawn: bool) -> float:
    """The order statistic, 1 or more and seldom a whole number, that the band of a level begins with."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}, must lie between 0 and 1")
    tail = (1 - level) / 2
    return max(1.0, tail * (count + 1) if drawn else tail * count + 0.5)


def rank_histogram(members: np.ndarray, truth: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
    """Shares of the truth's rank among the members, float64 (C, E + 1), over fields and pixels.

    Calibrated drawn members: 1 / (E + 1) each. A truth that ties with members counts in equal parts for the ranks that
    it may have.
    """
    members, truth = _checked(members, truth)
    below, ties = (r.swapaxes(0, 1) for r in _ranks(members, truth))
    weights = (np.broadcast_to(where, truth.shape).swapaxes(0, 1)) / (ties + 1)
    steps = np.zeros((truth.shape[1], members.shape[1] + 2))
    for c, step in enumerate(steps):
        part = weights[c].ravel()
        step += np.bincount(below[c].ravel(), part, len(step))
        step -= np.bincount((below + ties + 1)[c].ravel(), part, len(step))
    shares = steps.cumsum(1)[:, :-1]
    with np.errstate(invalid="ignore"):
        return shares / shares.sum(1, keepdims=True)


def spread(members: np.ndarray, where: np.ndarray | bool = True) -> np.ndarray:
    """Root of the members' variance (with E - 1), averaged over pixels, float64 (n, C); NaN for one member."""
    members = np.asarray(members, np.float64)
    if members.shape[1] < 2:
        return np.full((members.shape[0], members.shape[2]), np.nan)
    return np.sqrt(_average(members.var(1, ddof=1), where))


def spread_to_error(spread: np.ndarray, error: np.ndarray, count: int, *, drawn: bool = True) -> np.ndarray:
    """The ratio of spread to error (n, C) each, over all n fields, float64 (C,); 1: calibrated, less: overconfident.

    The mean of `count` drawn members is itself uncertain, so that its error is sqrt((E + 1) / E) times the spread of
    calibrated ones (Fortin et al. 2014): the ratio is corrected by that factor, but for quantiles.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((spread**2).mean(0) / (error**2).mean(0) * (1 + drawn / count))


def interval(values: np.ndarray, level: float = 0.95, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis of values (n, ...), and the ends of its bootstrap interval over the n fields.

    Percentiles of DRAWS resampled means. Of differences between two methods' scores of the same fields it is paired.
    """
    values = np.asarray(values, np.float64)
    count = len(values)
    if not count:
        raise InputError("values holds no fields, must hold at least one")
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS) / count
    low, high = np.quantile(np.tensordot(drawn, values, 1), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return values.mean(0), low, high


def _ranks(members: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many members are below the truth and how many equal it, int64 (n, C, H, W) each."""
    below, ties = np.zeros((2, *truth.shape), np.int64)
    for e in range(members.shape[1]):
        below += members[:, e] < truth
        ties += members[:, e] == truth
    return below, ties


def _checked(members: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    members, truth = np.asarray(members, np.float64), np.asarray(truth, np.float64)
    fits = truth.ndim == 4 and members.ndim == 5 and (*members.shape[:1], *members.shape[2:]) == truth.shape
    if not fits or not members.shape[1]:
        raise InputError(f"members {members.shape} and truth {truth.shape} must be (n, E, C, H, W) and (n, C, H, W)")
    return members, truth


def _average(x: np.ndarray, where: np.ndarray | bool) -> np.ndarray:
    """Mean over the pixels of `where` of x (n, C, H, W), (n, C); NaN without any."""
    where = np.broadcast_to(where, x.shape)
    with np.errstate(invalid="ignore"):
        return np.sum(x, axis=(2, 3), where=where) / where.sum(axis=(2, 3))
