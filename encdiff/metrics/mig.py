"""MIG, the mutual information gap (Chen et al. 2018, arXiv 1802.04942, section 4.1)."""

import numpy as np

from encdiff.metrics.information import discretize, entropy, mutual_information
from encdiff.metrics.samples import check_samples, relabel


def mig(codes: np.ndarray, factors: np.ndarray, *, bins: int = 20) -> dict:
    """Mean over factors of (I(best code; factor) - I(second best; factor)) / H(factor).

    codes: (n, N) floats, N >= 2; factors: (n, F) integers. As in Locatello et al. 2019 (arXiv 1811.12359) each code is
    cut into `bins` of equal width and information is counted, not modelled; 10,000 samples there.

    Returns `mig` in [0, 1], `gaps` (F,) and `mutual_information` (N, F) in nats. Raises InputError as `check_samples`.
    """
    codes, factors = check_samples(codes, factors, least_codes=2)
    labels, _ = relabel(factors)
    information = mutual_information(discretize(codes, bins), labels)
    second, best = np.sort(information, axis=0)[-2:]
    gaps = (best - second) / entropy(labels)
    return {"mig": float(gaps.mean()), "gaps": gaps, "mutual_information": information}
