"""Score an encoder on a labelled data set: encode every image once, then let the metrics index the codes."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from encdiff import __version__
from encdiff.checked import check_types
from encdiff.data import Dataset, describe
from encdiff.distributed.processes import Processes, processes
from encdiff.errors import InputError
from encdiff.evaluation.drawn import DRAWN, check_drawn, score_drawn
from encdiff.evaluation.encode import Encode, encode_dataset, untrained
from encdiff.evaluation.judge import silent
from encdiff.evaluation.protocol import (
    DEFAULT,
    Protocol,
    Report,
    check_grid,
    check_traversals,
    named,
    score_grid,
    score_rows,
    settings_of,
    summarize,
)
from encdiff.evaluation.vectors import as_scalars
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import ConceptModel
from encdiff.models.mode import evaluating
from encdiff.terminal import Tasks


def evaluate(
    encode: Encode | ConceptModel,
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
    options: dict[str, Any] = {"metrics": metrics, "protocol": protocol, "seed": seed, "seeds": seeds, "pairs": pairs}
    options |= {"batch_size": batch_size, "n_jobs": n_jobs, **overrides}
    return _evaluate_all([_Evaluation(encode, dataset, progress or silent, **options)])[0]


class _Evaluation:
    """What `evaluate` does, in stages: encode, then a score for each seed, then all of them together."""

    def __init__(
        self, encode: Encode | ConceptModel, dataset: Dataset, report: Report, *, metrics: Sequence[str] = DEFAULT,
        protocol: str = "paper", seed: int = 0, seeds: int = 1, pairs: int = 128, batch_size: int = 256,
        n_jobs: int | None = None, **overrides: Any,
    ):  # fmt: skip
        if not callable(encode):
            raise InputError(f"encode is a {type(encode).__name__}, must be a model or a function of images")
        check_types(dataset=(dataset, Dataset, "open_dataset"))
        self.settings = settings_of(protocol, seed, **overrides)
        if not dataset.factor_sizes:
            raise InputError(f"{dataset.name} has no factors, which scores need; swap, traverse and attend need none")
        if dataset.is_complete:
            check_grid(len(dataset), dataset.factor_sizes)
        elif self.settings.subset == "all":
            raise InputError(
                f"{dataset.name} is no complete grid of factors with one image each: use protocol 'heldout'"
            )
        if isinstance(metrics, str):
            raise InputError(f"metrics is the text {metrics!r}, must be a list of names")
        if not dataset.is_complete:
            check_traversals(metrics, dataset.factors(np.arange(len(dataset))))
        check_at_least(1, seeds=seeds)
        self.drawn, self.of_codes = [m for m in metrics if m in DRAWN], [m for m in metrics if m not in DRAWN]
        check_drawn(self.drawn, encode, dataset, pairs)
        self.model, self.dataset, self.report, self.protocol, self.pairs = encode, dataset, report, protocol, pairs
        self.seeds, self.batch_size, self.n_jobs = [self.settings.seed + i for i in range(seeds)], batch_size, n_jobs
        self.seconds = {"encode": 0.0, "score": 0.0}

    def encode(self, among: Processes) -> None:
        with self._timed("encode"):
            function = encoder_of(self.model, self.dataset) if isinstance(self.model, ConceptModel) else self.model
            told = partial(self.report, "encode")
            self.codes = encode_dataset(function, self.dataset, self.batch_size, told, among=among)

    def score(self, seed: int) -> dict[str, dict]:
        settings = replace(self.settings, seed=seed)
        with self._timed("score"):
            if self.dataset.is_complete:
                return score_grid(
                    self.codes,
                    self.dataset.factor_sizes,
                    settings,
                    self.of_codes,
                    n_jobs=self.n_jobs,
                    report=self.report,
                )
            factors = self.dataset.factors(np.arange(len(self.dataset)))
            return score_rows(self.codes, factors, settings, self.of_codes, n_jobs=self.n_jobs, report=self.report)

    def result(self, scores: list[dict], among: Processes) -> dict:
        found = over_seeds(scores, self.protocol, self.settings, self.of_codes)
        if self.drawn:
            given = self.drawn, self.model, self.dataset, found, self.settings.seed, self.pairs, self.report
            with self._timed("score"):
                found = among.by_first(lambda: score_drawn(*given)) | found
        if isinstance(self.model, ConceptModel) and (width := self.model.config.code_shape[1:]):
            found["protocol"]["code"] = f"first principal component of each concept's {width[0]} numbers"
        return found | {"data": describe(self.dataset), "version": __version__, "seconds": self.seconds}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


def _evaluate_all(evaluations: list[_Evaluation]) -> list[dict]:
    """The result of each: of several processes every one encodes its part of the data, and scores some of the seeds."""
    among = processes()
    for evaluation in evaluations:
        evaluation.encode(among)
        if among.size > 1 and evaluation.n_jobs is None:
            evaluation.n_jobs = max(1, (os.cpu_count() or 1) // among.local_size)
    work = [(i, seed) for i, evaluation in enumerate(evaluations) for seed in evaluation.seeds]
    mine = work[among.rank :: among.size]
    own = among.together(lambda: {(i, seed): evaluations[i].score(seed) for i, seed in mine})
    scores = {place: found for part in among.gather(own) for place, found in part.items()}
    return [e.result([scores[i, seed] for seed in e.seeds], among) for i, e in enumerate(evaluations)]


def over_seeds(results: list[dict], protocol: str, settings: Protocol, metrics: Sequence[str]) -> dict:
    """The first seed's results, plain enough for JSON, its protocol, and what all seeds say together."""
    first = {name: _plain(result) for name, result in results[0].items()}
    seeds = len(results)
    together = {"summary": {"seeds": seeds, **summarize(results, metrics)}} if seeds > 1 else {}
    return first | together | {"protocol": named(protocol, settings)}


def _plain(result: Mapping) -> dict:
    return {k: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v for k, v in result.items()}


def evaluate_model(
    model: ConceptModel,
    dataset: Dataset,
    *,
    protocol: str = "paper",
    seed: int = 0,
    baseline: bool = True,
    **options: Any,
) -> dict[str, dict]:
    """`evaluate` a trained model and, as the baseline, an untrained one of its configuration, with progress bars.

    `options` are those of `evaluate`. Returns the results under "trained" and "untrained".
    """
    check_types(model=(model, ConceptModel, ""), dataset=(dataset, Dataset, "open_dataset"))
    models = {"trained": model}
    if baseline:
        models["untrained"] = untrained(model, dataset, seed)
    options |= {"protocol": protocol, "seed": seed}
    with Tasks() as tasks:
        evaluations = [_Evaluation(m, dataset, _report(tasks, name), **options) for name, m in models.items()]
        return dict(zip(models, _evaluate_all(evaluations), strict=True))


@contextmanager
def stages(name: str) -> Iterator[Report]:
    """A progress bar for each stage of an evaluation."""
    with Tasks() as tasks:
        yield _report(tasks, name)


def _report(tasks: Tasks, name: str) -> Report:
    return lambda stage, done, total: tasks(f"{name}: {stage.replace('_', ' ')}", done, total)


def encoder_of(model: ConceptModel, dataset: Dataset) -> Encode:
    """The model's codes as scores need them: in eval mode, of vectors the first principal components."""
    device = next(model.parameters()).device
    with evaluating(model):
        scored = as_scalars(model, dataset)

    def encode(images: Tensor) -> Tensor:
        with evaluating(model):
            return scored.encode(images.to(device))

    return encode
