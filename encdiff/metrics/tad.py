"""TAD, the total AUROC difference, and attributes captured (Yeats et al. 2022, arXiv 2209.10677, section 4)."""

import numpy as np

from encdiff.errors import InputError
from encdiff.metrics.information import auroc, entropy, mutual_information
from encdiff.metrics.samples import check_samples, relabel


def tad(
    codes: np.ndarray, attributes: np.ndarray, *, least_auroc: float = 0.75, most_entropy_reduction: float = 0.2
) -> dict:
    """Sum over captured attributes of the best code's area under the ROC curve minus the second best's.

    codes: (n, N) floats, N >= 2; attributes: (n, A) of two values each, in any coding. A code may point either way, so
    its area is max(a, 1 - a). An attribute takes part if no single other one reduces its entropy by more than
    `most_entropy_reduction`, as a share, and is captured if its best area is at least `least_auroc`.

    Returns `tad` in [0, A/2], `num_captured`, `captured` and `independent` (indices of attributes) and `auroc` (N, A).
    Raises InputError as `check_samples`, and for an attribute of more than two values.
    """
    codes, attributes = check_samples(codes, attributes, least_codes=2)
    labels, values = relabel(attributes)
    if (many := [len(v) for v in values]) and max(many) > 2:
        raise InputError(f"attribute {np.argmax(many)} takes {max(many)} values; TAD is for attributes of two")
    area = auroc(codes, labels == 1)
    area = np.maximum(area, 1 - area)
    reduction = mutual_information(labels, labels) / entropy(labels)  # (other, attribute)
    np.fill_diagonal(reduction, 0)
    independent = reduction.max(axis=0) <= most_entropy_reduction
    second, best = np.sort(area, axis=0)[-2:]
    captured = independent & (best >= least_auroc)
    return {
        "tad": float((best - second)[captured].sum()),
        "num_captured": int(captured.sum()),
        "captured": np.flatnonzero(captured),
        "independent": np.flatnonzero(independent),
        "auroc": area,
    }
