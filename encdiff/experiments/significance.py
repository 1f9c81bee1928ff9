"""How sure a difference of few runs is: intervals by the bootstrap, tests of pairs, corrected for their number."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

RESAMPLES = 10_000


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the means of samples drawn from the values with replacement; of one value itself, twice.

    Of three seeds it lies within these; it says how far they differ, and little of other seeds.
    """
    given = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).choice(given, (RESAMPLES, len(given))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def pairwise(values: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Welch's t-test of every two names, two-sided, with Holm's correction over all of them.

    Each with `a`, `b`, `difference` of their means, `p` and `corrected`, ordered by p. Names with fewer than two values
    are left out; of two that never vary nothing can be told, and p is 1.
    """
    found: list[dict[str, Any]] = []
    for a, b in combinations([name for name, v in values.items() if len(v) > 1], 2):
        first, second = np.asarray(values[a], float), np.asarray(values[b], float)
        difference = float(first.mean() - second.mean())
        found.append({"a": a, "b": b, "difference": difference, "p": _welch(first, second)})
    found.sort(key=lambda test: test["p"])
    greatest = 0.0
    for i, test in enumerate(found):
        greatest = max(greatest, min(1.0, test["p"] * (len(found) - i)))
        test["corrected"] = greatest
    return found


def _welch(a: np.ndarray, b: np.ndarray) -> float:
    """The two-sided p of Welch's t-test; 1 of values that never vary, which say nothing of how far seeds differ."""
    if np.ptp(a) == np.ptp(b) == 0:
        return 1.0
    errors = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    freedom = errors.sum() ** 2 / (errors**2 / [len(a) - 1, len(b) - 1]).sum()
    return float(2 * stats.t.sf(abs(a.mean() - b.mean()) / errors.sum() ** 0.5, freedom))
