"""Score an encoder on a labelled data set: encode every image once, then let the metrics index the codes."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from encdiff import __version__
from encdiff.checked import check_types
from encdiff.data import Dataset, describe
from encdiff.errors import InputError
from encdiff.evaluation.drawn import DRAWN, check_drawn, score_drawn
from encdiff.evaluation.encode import Encode, encode_dataset, untrained
from encdiff.evaluation.judge import silent
from encdiff.evaluation.protocol import (
    DEFAULT,
    Protocol,
    Report,
    check_grid,
    named,
    score_grid,
    score_rows,
    settings_of,
    summarize,
)
from encdiff.evaluation.vectors import as_scalars
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import EncDiff
from encdiff.models.mode import evaluating
from encdiff.terminal import Tasks


def evaluate(
    encode: Encode | EncDiff,
    dataset: Dataset,
    *,
    metrics: Sequence[str] = DEFAULT,
    protocol: str = "paper",
    seed: int = 0,
    seeds: int = 1,
    pairs: int = 128,
    batch_size: int = 256,
    n_jobs: int | None = None,
    progress: Report | None = None,
    **overrides: int | float,
) -> dict:
    """Scores of any encoder on the whole of a labelled data set.

    Args:
        encode: a model, which is asked in eval mode, or a function as `encode_dataset` takes it. Of a model whose
            concepts are vectors, their first principal components are scored, and the result's protocol says so.
        metrics: names in `encdiff.metrics.METRICS`; of a model also "counterfactual" and "traversal", which are of what
            it draws (`evaluation.counterfactual`, `evaluation.traversal_effects`), at the first seed.
        protocol: a name in `PROTOCOLS`; `overrides` replace fields of it.
        seeds: how many, from `seed` up; the codes are the same.
        pairs: how many swaps of each factor "counterfactual" judges.
        n_jobs: processes for the slow metrics; None: every core.
        progress: `progress(stage, done, total)` follows the stages "encode" and the metrics.

    Returns:
        A dict that JSON can hold: each metric's result at `seed` (DCI's with `importance`, N rows of F), `protocol`
        (with its name, "custom" once overridden), `data`, `version`, `seconds` and, for several seeds, `summary`: see
        `protocol.summarize`.

    Raises:
        InputError: unlabelled data, an unknown metric, protocol or field, or codes that are not finite.
    """
    if not callable(encode):
        raise InputError(f"encode is a {type(encode).__name__}, must be a model or a function of images")
    check_types(dataset=(dataset, Dataset, "open_dataset"))
    settings = settings_of(protocol, seed, **overrides)
    if not dataset.factor_sizes:
        raise InputError(f"{dataset.name} has no factors, which scores need; swap, traverse and attend need none")
    one_per_cell = dataset.is_complete
    if one_per_cell:
        check_grid(len(dataset), dataset.factor_sizes)
    elif settings.subset == "all":
        raise InputError(f"{dataset.name} is no complete grid of factors with one image each: use protocol 'heldout'")
    report = progress or silent
    if isinstance(metrics, str):
        raise InputError(f"metrics is the text {metrics!r}, must be a list of names")
    drawn, of_codes = [m for m in metrics if m in DRAWN], [m for m in metrics if m not in DRAWN]
    check_drawn(drawn, encode, dataset, pairs)
    began = time.perf_counter()
    function = encoder_of(encode, dataset) if isinstance(encode, EncDiff) else encode
    codes = encode_dataset(function, dataset, batch_size, lambda done, total: report("encode", done, total))
    encoded = time.perf_counter()

    def score(settings: Protocol) -> dict[str, dict]:
        if one_per_cell:
            return score_grid(codes, dataset.factor_sizes, settings, of_codes, n_jobs=n_jobs, report=report)
        factors = dataset.factors(np.arange(len(dataset)))
        return score_rows(codes, factors, settings, of_codes, n_jobs=n_jobs, report=report)

    results = over_seeds(score, protocol, settings, seeds, of_codes)
    results = score_drawn(drawn, encode, dataset, results, seed, pairs, report) | results
    if isinstance(encode, EncDiff) and (width := encode.config.concept_width) > 1:
        results["protocol"]["code"] = f"first principal component of each concept's {width} numbers"
    return results | {
        "data": describe(dataset),
        "version": __version__,
        "seconds": {"encode": encoded - began, "score": time.perf_counter() - encoded},
    }


def over_seeds(score, protocol: str, settings: Protocol, seeds: int, metrics: Sequence[str]) -> dict:
    """The first seed's results, plain enough for JSON, its protocol, and what all seeds say together."""
    check_at_least(1, seeds=seeds)
    results = [score(replace(settings, seed=settings.seed + i)) for i in range(seeds)]
    first = {name: _plain(result) for name, result in results[0].items()}
    together = {"summary": {"seeds": seeds, **summarize(results, metrics)}} if seeds > 1 else {}
    return first | together | {"protocol": named(protocol, settings)}


def _plain(result: Mapping) -> dict:
    return {k: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v for k, v in result.items()}


def evaluate_model(
    model: EncDiff, dataset: Dataset, *, protocol: str = "paper", seed: int = 0, baseline: bool = True, **options: Any
) -> dict[str, dict]:
    """`evaluate` a trained model and, as the baseline, an untrained one of its configuration, with progress bars.

    `options` are those of `evaluate`. Returns the results under "trained" and "untrained".
    """
    check_types(model=(model, EncDiff, ""), dataset=(dataset, Dataset, "open_dataset"))
    models = {"trained": model}
    if baseline:
        models["untrained"] = untrained(model, dataset, seed)
    results = {}
    for name, scored in models.items():
        with stages(name) as report:
            results[name] = evaluate(scored, dataset, protocol=protocol, seed=seed, progress=report, **options)
    return results


@contextmanager
def stages(name: str) -> Iterator[Report]:
    """A progress bar for each stage of an evaluation."""
    with Tasks() as tasks:
        yield lambda stage, done, total: tasks(f"{name}: {stage.replace('_', ' ')}", done, total)


def encoder_of(model: EncDiff, dataset: Dataset) -> Encode:
    """The model's codes as scores need them: in eval mode, of vectors the first principal components."""
    device = next(model.parameters()).device
    with evaluating(model):
        scored = as_scalars(model, dataset)

    def encode(images: Tensor) -> Tensor:
        with evaluating(model):
            return scored.encode(images.to(device))

    return encode
