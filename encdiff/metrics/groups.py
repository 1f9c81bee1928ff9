"""Which concepts carry which factor, by an evaluation."""

from collections.abc import Mapping, Sequence

import numpy as np

from encdiff.errors import InputError

Groups = Mapping[str, Sequence[int]]  # a column's label -> the concepts that it swaps together


def concept_groups(
    importance: Sequence[Sequence[float]] | np.ndarray, factor_names: Sequence[str]
) -> dict[str, list[int]]:
    """The concepts that carry each factor, by the DCI importance matrix (N, F), in the order of the factors.

    A concept belongs to the factor that it is most important for, if it has at least a fiftieth of all that factor's
    importance.
    """
    importance = np.asarray(importance, dtype=float)
    if importance.ndim != 2 or importance.shape[1] != len(factor_names):
        raise InputError(f"importance is {importance.shape}, must be (N, {len(factor_names)}), one column per factor")
    total = np.maximum(importance.sum(axis=0), 1e-12)
    groups: dict[str, list[int]] = {name.replace("_", " "): [] for name in factor_names}
    for concept, row in enumerate(importance):
        factor = int(row.argmax())
        if row[factor] >= 0.02 * total[factor]:
            groups[factor_names[factor].replace("_", " ")].append(concept)
    return {name: concepts for name, concepts in groups.items() if concepts}


def concept_labels(groups: Groups) -> dict[int, str]:
    """The factor that each concept carries, from `concept_groups`."""
    return {concept: name for name, concepts in groups.items() for concept in concepts}
