"""Linear directions of edits, from codes and labels (docs/guide/pictures.md has what was measured)."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from encdiff.checked import check_types
from encdiff.data import Dataset
from encdiff.data.dataset import Indices
from encdiff.errors import InputError
from encdiff.evaluation.encode import encode_dataset
from encdiff.metrics.codes import check_codes
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import ConceptModel
from encdiff.models.directions import Direction
from encdiff.models.mode import evaluating

SCORES = {"logistic": "area under the ROC curve", "ridge": "R^2"}
LEAST = 5  # rows of a class; twice as many in all
LARGEST = 1e30  # codes and labels are refused beyond it: their squares must be finite
SHOWN = 12  # values of a factor that an error lists


def fit_direction(
    codes: np.ndarray | Tensor,
    labels: np.ndarray | Tensor | Sequence[float],
    kind: Literal["auto", "logistic", "ridge"] = "auto",
    *,
    along: Literal["pattern", "weights"] = "pattern",
    seed: int = 0,
) -> Direction:
    """The direction in which codes change with a label, for `EncDiff.edit`.

    A linear model w predicts the label from standardised codes, on four fifths of the rows, drawn by `seed`: logistic
    regression of two classes, ridge regression of numbers (its penalty by leave-one-out). The direction is the pattern
    that belongs to w (Haufe et al. 2014), C w with C the codes' covariance: the codes' regression on the prediction.
    The weights themselves are what tells the label best, not what changes with it; `along="weights"` takes them.

    Strength 1 raises the prediction w.z (of classes, the log-odds) by one standard deviation of what it is over these
    codes z: the vector is C w / s, or in standardised codes w s / |w|^2, with s^2 = w C w.

    Args:
        codes: (n, N) numbers, or (n, N, m) where a concept is a vector; n >= 10.
        labels: (n,) numbers; of two classes the greater is where the direction points, with 5 rows or more of each.
        kind: "auto" takes "logistic" for two different values and "ridge" for more.

    Returns the direction, with its score on the last fifth, and the score of the same done with shuffled labels.

    Raises InputError for codes or labels that are not finite or do not fit together, and for labels of one value.
    """
    if along not in ("pattern", "weights"):
        raise InputError(f"along is {along!r}, must be pattern or weights")
    check_at_least(0, seed=seed)
    x, shape = _check_codes(codes)
    y, kind = _check_labels(labels, len(x), kind)
    scaler = StandardScaler().fit(x)
    z = scaler.transform(x)
    weights, score = _fit(z, y, kind, seed)
    baseline = _fit(z, np.random.default_rng(seed).permutation(y), kind, seed)[1]
    predicted = z @ weights
    spread = predicted.std()
    if not spread > 0:
        raise InputError("codes do not vary over the rows that are fitted; a direction needs some that do")
    moved = z.T @ (predicted - predicted.mean()) / len(z) / spread
    if along == "weights":
        moved = weights * spread / (weights @ weights)
    vector, deviations = (
        torch.from_numpy(array.astype(np.float32)).reshape(shape) for array in (moved * scaler.scale_, x.std(0))
    )
    return Direction(vector, deviations, kind, score, SCORES[kind], baseline)


def factor_direction(
    model: ConceptModel,
    dataset: Dataset,
    factor: str,
    value: int | None = None,
    *,
    images: int = 10_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Direction:
    """`fit_direction` to the labels that `factor_labels` gives, on as many images at most, drawn by `seed`.

    `progress(done, total)` follows the encoding.
    """
    check_types(model=(model, ConceptModel, ""), dataset=(dataset, Dataset, "open_dataset"))
    check_at_least(0, seed=seed)
    check_at_least(1, images=images)
    rows = np.sort(np.random.default_rng(seed).choice(len(dataset), min(images, len(dataset)), replace=False))
    labels = factor_labels(dataset, rows, factor, value)
    device, shape = next(model.parameters()).device, model.config.code_shape

    def encode(images: Tensor) -> Tensor:
        with evaluating(model):
            return model.encode(images.to(device)).flatten(1)

    codes = encode_dataset(encode, dataset, progress=progress, rows=rows)
    return replace(fit_direction(codes.reshape(-1, *shape), labels.values, seed=seed), name=labels.name)


class Labels(NamedTuple):
    """Numbers (n,) or two classes, bool (n,), and what they are called."""

    values: np.ndarray
    name: str


def factor_labels(dataset: Dataset, rows: Indices, factor: str, value: int | None = None) -> Labels:
    """Labels of a data set's images by indices (n,), for `fit_direction`.

    Without `value` a factor that has an order gives what its values stand for, and one of two values whether it is the
    second. With it the classes are this value, of 0..size-1, and the rest; a factor of more values without an order
    needs it. InputError for an unlabelled data set, a factor or value that is not there, and a factor of one value.
    """
    names = [name.replace("_", " ") for name in dataset.factor_names]
    if not names:
        raise InputError(f"{dataset.name} has no factors, which a direction is fitted to; must be a labelled data set")
    name = factor.replace("_", " ")
    if name not in names:
        raise InputError(f"factor is {factor!r}, must be one of {', '.join(names)}")
    column = names.index(name)
    size, key = dataset.factor_sizes[column], dataset.factor_names[column]
    if size < 2:
        raise InputError(f"factor {name!r} has one value in {dataset.name}; a direction needs two")
    attribute = not dataset.is_grid and size == 2
    if value is None and not attribute and key not in (*dataset.cyclic, *dataset.categories):
        return Labels(dataset.labels(rows)[:, column], name)
    if (value is None and size > 2) or (value is not None and not 0 <= value < size):
        said = "missing, but the factor has no order" if value is None else value
        raise InputError(f"value of {name!r} is {said}; must be one of {_listed(dataset.label_values[column])}")
    chosen = 1 if value is None else value
    called = name if attribute and value is None else f"{name} {chosen}"
    return Labels(dataset.factors(rows)[:, column] == chosen, called)


def _listed(values: np.ndarray) -> str:
    told = [f"{i} ({value:.4g})" for i, value in enumerate(values[:SHOWN])]
    return ", ".join(told) + (f", ... {len(values) - 1}" if len(values) > SHOWN else "")


def _fit(z: np.ndarray, y: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, float]:
    """Weights (N,) of standardised codes (n, N), from four fifths of the rows, and their score on the rest."""
    strata = y if kind == "logistic" else None
    z, z_test, y, y_test = train_test_split(z, y, test_size=0.2, random_state=seed % 2**32, stratify=strata)
    if kind == "ridge":
        ridge = RidgeCV(np.logspace(-2, 4, 13)).fit(z, y)
        return ridge.coef_, float(r2_score(y_test, ridge.predict(z_test)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        logistic = LogisticRegression(max_iter=1000).fit(z, y)
    return logistic.coef_[0], float(roc_auc_score(y_test, logistic.decision_function(z_test)))


def _array(values) -> np.ndarray:
    if isinstance(values, Tensor):
        values = (values.double() if values.is_floating_point() else values).detach().cpu().numpy()
    return np.asarray(values)


def _check_codes(codes) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes as float64 (n, N), of vectors their numbers one after the other, and the shape of one image's."""
    array = _array(codes)
    if array.ndim not in (2, 3) or len(array) < 2 * LEAST:
        raise InputError(f"codes are {array.shape}; must be (n, N), or (n, N, m), with n >= {2 * LEAST}")
    flat = check_codes("codes", array.reshape(len(array), -1), len(array))
    if abs(flat).max() > LARGEST:
        raise InputError(f"codes reach {abs(flat).max():.3g}, must lie within {LARGEST:g}")
    return flat, array.shape[1:]


def _check_labels(labels, rows: int, kind: str) -> tuple[np.ndarray, Literal["logistic", "ridge"]]:
    if kind not in ("auto", *SCORES):
        raise InputError(f"kind is {kind!r}, must be auto, {' or '.join(SCORES)}")
    y = _array(labels)
    if y.shape != (rows,) or y.dtype.kind not in "biuf":
        raise InputError(f"labels are {y.dtype} {y.shape}; must be numbers ({rows},), one for each row of codes")
    y = y.astype(np.float64)
    if not (abs(y) <= LARGEST).all():  # false for NaN
        raise InputError(f"labels hold NaN or numbers beyond {LARGEST:g}; all must be finite")
    values, counts = np.unique(y, return_counts=True)
    if len(values) < 2:
        raise InputError(f"labels are all {values[0]:g}; must hold two different values or more")
    if kind == "ridge" or (kind == "auto" and len(values) > 2):
        return y, "ridge"
    if len(values) > 2:
        raise InputError(f"labels hold {len(values)} values; kind 'logistic' is of two")
    if counts.min() < LEAST:
        rarer = values[counts.argmin()]
        raise InputError(f"labels are {rarer:g} in {counts.min()} rows of {rows}; must be so in {LEAST} or more")
    return (y == values[1]).astype(np.float64), "logistic"
