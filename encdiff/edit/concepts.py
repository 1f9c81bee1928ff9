"""What to edit in an EncDiff: tokens of a concept, or of the concepts that carry a factor, and tokens to keep."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from encdiff.checked import check_types
from encdiff.data import Dataset, to_float
from encdiff.errors import InputError
from encdiff.metrics.counterfactual import explained_variance
from encdiff.metrics.groups import concept_groups
from encdiff.models import EncDiff
from encdiff.models.batches import encode_images
from encdiff.models.mode import evaluating

KNOWN, BATCH = 2000, 64  # images that tell the range of every concept, and those read at once
QUANTILES = 5  # tokens of a concept over its range
ENDS = 0.02, 0.98  # of a scalar's range, of the data


class Targets(NamedTuple):
    """What `mist` and `uce` take: `uce(model, *targets)`. Tokens, float32."""

    edited: Tensor  # (n, D)
    wanted: Tensor  # (n, D)
    keep: Tensor | None  # (m, D)


def concept_tokens(model: EncDiff, concept: int, values: float | Sequence[float] | Tensor) -> Tensor:
    """Tokens (V, D) of one concept at these values of its scalar."""
    _check_scalars(model)
    concept = _check_concept(model, concept)
    column = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
    if not column.isfinite().all():
        raise InputError(f"values are {column.tolist()}, must be finite numbers")
    scalars = torch.zeros(len(column), model.config.concepts)
    scalars[:, concept] = column
    return _tokens(model, scalars)[:, concept]


def concept_targets(
    model: EncDiff,
    dataset: Dataset,
    concept: int,
    value: float,
    *,
    keep: Sequence[int] | None = None,
    images: int = KNOWN,
    seed: int = 0,
) -> Targets:
    """Targets after which the concept shows `value` of its scalar, whatever its scalar is.

    Edited are its tokens at QUANTILES values over the data's range, wanted the token at `value`; kept are the tokens
    over the range of the concepts in `keep`, or of all others. The range is `concept_range`, of the same images.
    """
    concept = _check_concept(model, concept)
    spread = _over_range(model, known_codes(model, dataset, images, seed)[0])
    edited = spread[:, concept]
    wanted = concept_tokens(model, concept, value).expand(len(edited), -1)
    return Targets(edited, wanted, _kept(model, spread, [concept], keep))


def concept_range(
    model: EncDiff, dataset: Dataset, concept: int, *, images: int = KNOWN, seed: int = 0
) -> tuple[float, float]:
    """From where to where a concept's scalar goes in the data: the 2nd and 98th percentile in so many images."""
    concept = _check_concept(model, concept)
    column = known_codes(model, dataset, images, seed)[0][:, concept].float()
    low, high = torch.quantile(column, torch.tensor(ENDS)).tolist()
    return low, high


def factor_targets(
    model: EncDiff,
    dataset: Dataset,
    factor: str,
    value: int,
    *,
    concepts: Sequence[int] | None = None,
    keep: Sequence[int] | None = None,
    images: int = KNOWN,
    seed: int = 0,
) -> Targets:
    """Targets after which every image shows one value, of 0..size-1, of a factor of the data.

    Edited are the tokens of the concepts that carry the factor at the mean codes of each of its values, wanted those
    at this value, kept as for `concept_targets`. Without `concepts` they are found by the share of a concept's
    variance that a factor explains: `factor_concepts`.
    """
    column = check_value(dataset, factor, value)
    given = None if concepts is None else _check_concepts(model, concepts, "concepts")
    codes, factors = known_codes(model, dataset, images, seed)
    owned = _carriers(dataset, codes, factors, column) if given is None else given
    tokens = factor_tokens(model, codes, factors[:, column], owned)
    if value not in factors[:, column]:
        raise InputError(f"value {value} of {factor!r} is in none of {len(codes)} images; take more")
    at = sorted(set(factors[:, column].tolist())).index(int(value))
    wanted = tokens[at].expand_as(tokens)
    spread = _over_range(model, codes)
    return Targets(tokens.flatten(0, 1), wanted.flatten(0, 1), _kept(model, spread, owned, keep))


def factor_tokens(model: EncDiff, codes: Tensor, labels: np.ndarray | Tensor, concepts: Sequence[int]) -> Tensor:
    """Tokens (K, n, D) of n concepts at the mean codes of each of the K different labels, in increasing order.

    codes (m, N), labels (m,) integers.
    """
    _check_scalars(model)
    owned, labels = _check_concepts(model, concepts, "concepts"), torch.as_tensor(labels)
    if codes.ndim != 2 or labels.shape != codes.shape[:1] or not owned:
        raise InputError(
            f"codes are {tuple(codes.shape)}, labels {tuple(labels.shape)} and concepts {owned}, must be (m, N), (m,) "
            "and at least one concept"
        )
    means = torch.stack([codes[labels == value].float().mean(0) for value in labels.unique()])
    return _tokens(model, means)[:, owned]


def factor_concepts(model: EncDiff, dataset: Dataset, factor: str, *, images: int = KNOWN, seed: int = 0) -> list[int]:
    """The concepts that carry a factor, by the share of a concept's variance that it explains in so many images."""
    column = factor_column(dataset, factor)
    return _carriers(dataset, *known_codes(model, dataset, images, seed), column)


def factor_column(dataset: Dataset, factor: str) -> int:
    """Which of the data's factors is called so, with spaces or underscores."""
    check_types(dataset=(dataset, Dataset, "open_dataset"))
    names = [name.replace("_", " ") for name in dataset.factor_names]
    if not names:
        raise InputError(f"{dataset.name} has no factors; must be a labelled data set")
    if not isinstance(factor, str) or factor.replace("_", " ") not in names:
        raise InputError(f"factor is {factor!r:.80}, must be one of {', '.join(names)}")
    return names.index(factor.replace("_", " "))


def check_value(dataset: Dataset, factor: str, value: int) -> int:
    """As `factor_column`, of a factor that has this value."""
    column = factor_column(dataset, factor)
    most = dataset.factor_sizes[column] - 1
    if not isinstance(value, int | np.integer) or not 0 <= value <= most:
        raise InputError(f"value of {factor!r} is {value!r:.80}, must be a whole number in 0..{most}")
    return column


def known_codes(model: EncDiff, dataset: Dataset, images: int = KNOWN, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Codes (n, N) and factors (n, F) of so many images at most, drawn by the seed."""
    check_types(model=(model, EncDiff, ""), dataset=(dataset, Dataset, "open_dataset"))
    _check_scalars(model)
    if dataset.image_size != model.config.image_size:
        raise InputError(f"{dataset.name}: images of {dataset.image_size}, the model takes {model.config.image_size}")
    if images < 1 or seed < 0:
        raise InputError(f"images and seed are {images} and {seed}, must be at least 1 and 0")
    rows = np.random.default_rng(seed).choice(len(dataset), min(images, len(dataset)), replace=False)
    parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    codes = torch.cat([encode_images(model, to_float(dataset.images(part))) for part in parts])
    return codes, dataset.factors(rows) if dataset.factor_names else np.empty((len(rows), 0), np.int64)


def _carriers(dataset: Dataset, codes: Tensor, factors: np.ndarray, column: int) -> list[int]:
    names = [name.replace("_", " ") for name in dataset.factor_names]
    owned = concept_groups(explained_variance(codes.numpy(), factors), names).get(names[column], [])
    if not owned:
        raise InputError(f"factor {names[column]!r}: no concept carries it; give concepts")
    return owned


def _over_range(model: EncDiff, codes: Tensor) -> Tensor:
    """Tokens (QUANTILES, N, D) of every concept over the range of its scalar."""
    return _tokens(model, torch.quantile(codes.float(), torch.linspace(*ENDS, QUANTILES), dim=0))


def _kept(model: EncDiff, spread: Tensor, edited: Sequence[int], keep: Sequence[int] | None) -> Tensor | None:
    given = range(model.config.concepts) if keep is None else _check_concepts(model, keep, "keep")
    if keep is not None and (both := sorted({*given} & {*edited})):
        raise InputError(f"keep: concept {both[0]} is edited, must be another")
    kept = [c for c in given if c not in edited]
    return spread[:, kept].flatten(0, 1) if kept else None


def _tokens(model: EncDiff, scalars: Tensor) -> Tensor:
    with evaluating(model):
        return model.tokens(scalars.to(next(model.bank.parameters()))).float().cpu()


def _check_scalars(model: EncDiff) -> None:
    check_types(model=(model, EncDiff, ""))
    if model.config.concept_width > 1:
        raise InputError("model: its concepts are vectors; tokens to edit are found for scalars alone")


def _check_concept(model: EncDiff, concept: int) -> int:
    check_types(model=(model, EncDiff, ""))
    return model._check_concept(concept)


def _check_concepts(model: EncDiff, concepts: Sequence[int], name: str) -> list[int]:
    if isinstance(concepts, str) or not isinstance(concepts, Iterable):
        raise InputError(f"{name} is {concepts!r:.80}, must be a list of concepts such as [0, 3]")
    return [_check_concept(model, concept) for concept in concepts]
