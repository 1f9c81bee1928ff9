"""Score an encoder on a labelled data set: encode every image once, then let the metrics index the codes."""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import nn

from encdiff import __version__
from encdiff.checkpoint import atomic_path
from encdiff.data import Dataset, describe, to_float
from encdiff.data.npz import open_zip, read_array
from encdiff.errors import InputError
from encdiff.files import refuse_special
from encdiff.metrics import METRICS
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import EncDiff
from encdiff.models.vectors import as_scalars
from encdiff.protocol import (
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
from encdiff.terminal import Tasks, plain

Encode = Callable[[torch.Tensor], torch.Tensor]  # float32 (B,3,H,W) in [-1,1] -> (B,N)


def evaluate(
    encode: Encode,
    dataset: Dataset,
    *,
    metrics: Sequence[str] = DEFAULT,
    protocol: str = "paper",
    seed: int = 0,
    seeds: int = 1,
    batch_size: int = 256,
    n_jobs: int | None = None,
    progress: Report | None = None,
    **overrides: int | float,
) -> dict:
    """Scores of any encoder on the whole of a labelled `dataset`.

    encode: see `encode_dataset`. metrics: names in `encdiff.metrics.METRICS`. protocol: a name in `PROTOCOLS`;
    `overrides` replace fields of it. seeds: how many, from `seed` up; the codes are the same. n_jobs: processes for the
    slow metrics, default every core. `progress(stage, done, total)` follows the stages "encode" and the metrics.

    Returns a dict that JSON can hold: each metric's result at `seed` (DCI's with `importance`, N rows of F), `protocol`
    (with its name, "custom" once overridden), `data`, `version`, `seconds` and, for several seeds, `summary`: see
    `protocol.summarize`. Raises InputError for unlabelled data, an unknown metric, protocol or field, and codes that
    are not finite.
    """
    settings = settings_of(protocol, seed, **overrides)
    if not dataset.factor_sizes:
        raise InputError(f"{dataset.name} has no factors, which scores need; swap, traverse and attend need none")
    one_per_cell = dataset.is_grid and dataset.instances == 1
    if one_per_cell:
        check_grid(len(dataset), dataset.factor_sizes)
    elif settings.subset == "all":
        raise InputError(f"{dataset.name} is no complete grid of factors with one image each: use protocol 'heldout'")
    report = progress or (lambda stage, done, total: None)
    began = time.perf_counter()
    codes = encode_dataset(encode, dataset, batch_size, lambda done, total: report("encode", done, total))
    encoded = time.perf_counter()

    def score(settings: Protocol) -> dict[str, dict]:
        if one_per_cell:
            return score_grid(codes, dataset.factor_sizes, settings, metrics, n_jobs=n_jobs, report=report)
        factors = dataset.factors(np.arange(len(dataset)))
        return score_rows(codes, factors, settings, metrics, n_jobs=n_jobs, report=report)

    return _over_seeds(score, protocol, settings, seeds, metrics) | {
        "data": describe(dataset),
        "version": __version__,
        "seconds": {"encode": encoded - began, "score": time.perf_counter() - encoded},
    }


def evaluate_codes(
    path: str | os.PathLike,
    *,
    metrics: Sequence[str] = DEFAULT,
    seed: int = 0,
    seeds: int = 1,
    n_jobs: int | None = None,
    progress: Report | None = None,
    **overrides: int | float,
) -> dict:
    """Scores of the codes of any model, by the protocol "heldout": as `evaluate`, from a file.

    path: an `.npz` with `codes` (n, N) floats, `factors` (n, F) integers and, if you like, `factor_names` (F,). Raises
    InputError, naming the file, for what is not so.
    """
    codes, factors, names = read_codes(path)
    settings = settings_of("heldout", seed, **overrides)
    began = time.perf_counter()

    def score(settings: Protocol) -> dict[str, dict]:
        return score_rows(codes, factors, settings, metrics, factor_names=names, n_jobs=n_jobs, report=progress)

    digest = hashlib.sha256(codes.tobytes() + factors.tobytes()).hexdigest()
    return _over_seeds(score, "heldout", settings, seeds, metrics) | {
        "data": {"name": Path(path).name, "rows": len(codes), "factor_names": names, "sha256": digest},
        "version": __version__,
        "seconds": {"score": time.perf_counter() - began},
    }


def read_codes(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """`codes`, `factors` and `factor_names` of an `.npz`; nothing in it is unpickled."""
    path = Path(path)
    refuse_special(path)
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not an .npz of arrays (no zip file)")
    with open_zip(path) as archive:
        keys = [k for k in ("codes", "factors", "factor_names") if f"{k}.npy" in archive.namelist()]
        held = {key: read_array(path, archive, key) for key in keys}
    for name in ("codes", "factors"):
        if name not in held:
            raise InputError(f"{path}: has no array {name!r}; it must hold codes (n, N) and factors (n, F)")
    codes, factors = held["codes"], held["factors"]
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors):
        raise InputError(f"{path}: codes are {codes.shape} and factors {factors.shape}; must be (n, N) and (n, F)")
    names = held.get("factor_names", np.array([f"factor {i}" for i in range(factors.shape[1])], str))
    if names.dtype.kind != "U" or names.shape != factors.shape[1:]:
        said = f"{names.size} factor_names for {factors.shape[1]} factors"
        raise InputError(f"{path}: {said}, of type {names.dtype}; must be one text for each")
    return codes, factors, names.tolist()


def _over_seeds(score, protocol: str, settings: Protocol, seeds: int, metrics: Sequence[str]) -> dict:
    """The first seed's results, plain enough for JSON, its protocol, and what all seeds say together."""
    check_at_least(1, seeds=seeds)
    results = [score(replace(settings, seed=settings.seed + i)) for i in range(seeds)]
    first = {name: _plain(result) for name, result in results[0].items()}
    together = {"summary": {"seeds": seeds, **summarize(results, metrics)}} if seeds > 1 else {}
    return first | together | {"protocol": named(protocol, settings)}


def _plain(result: Mapping) -> dict:
    return {k: v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v for k, v in result.items()}


def evaluate_model(
    model: EncDiff, dataset: Dataset, *, protocol: str = "paper", seed: int = 0, baseline: bool = True, **options
) -> dict[str, dict]:
    """`evaluate` a trained model and, as the baseline, an untrained one of its configuration, with progress bars.

    Concepts that are vectors are scored by their first principal components, and the result's protocol says so.
    `options` are those of `evaluate`. Returns the results under "trained" and "untrained".
    """
    models = {"trained": model}
    if baseline:
        models["untrained"] = untrained(model, dataset, seed)
    results = {}
    for name, scored in models.items():
        with stages(name) as report:
            encode = _encoder(as_scalars(scored, dataset))
            results[name] = evaluate(encode, dataset, protocol=protocol, seed=seed, progress=report, **options)
        if (width := model.config.concept_width) > 1:
            results[name]["protocol"]["code"] = f"first principal component of each concept's {width} numbers"
    return results


@contextmanager
def stages(name: str) -> Iterator[Report]:
    """A progress bar for each stage of an evaluation."""
    with Tasks() as tasks:
        yield lambda stage, done, total: tasks(f"{name}: {stage.replace('_', ' ')}", done, total)


@torch.no_grad()
def untrained(model: EncDiff, dataset: Dataset, seed: int = 0, batches: int = 50, batch_size: int = 64) -> EncDiff:
    """A model of the same configuration with random weights, and the statistics of its BatchNorms taken from the data.

    Without these an untrained encoder's codes would hardly vary, and any other would look good beside it.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = EncDiff(model.config).to(device).train()
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        fresh.encode(to_float(dataset.images(rng.integers(len(dataset), size=batch_size))).to(device))
    return fresh.eval()


def _encoder(model: nn.Module) -> Encode:
    device = next(model.parameters()).device
    return lambda images: model.encode(images.to(device))


@torch.inference_mode()
def encode_dataset(
    encode: Encode, dataset: Dataset, batch_size: int = 256, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Codes float32 (n, N) of all images in file order.

    encode: images float32 (B,3,H,W) in [-1,1], on the CPU, to codes (B,N) on any device; put its model in eval mode,
    else batch norm makes a code depend on its batch. `progress(done, n)` follows each batch. Raises InputError for an
    empty data set, a batch size below 1, codes of another shape and codes that are not finite.
    """
    n = len(dataset)
    if n < 1 or batch_size < 1:
        raise InputError(f"{dataset.name} has {n} images and batch_size is {batch_size}; both must be at least 1")
    codes = None
    for start in range(0, n, batch_size):
        indices = np.arange(start, min(start + batch_size, n))
        batch = torch.as_tensor(encode(to_float(dataset.images(indices)))).float().cpu().numpy()
        if codes is None:
            codes = np.empty((n, batch.shape[-1] if batch.ndim else 0), np.float32)
        if batch.shape != (len(indices), codes.shape[1]) or not np.isfinite(batch).all():
            raise InputError(f"encode returned {batch.shape} codes; they must be ({len(indices)}, N) and finite")
        codes[indices] = batch
        if progress:
            progress(int(indices[-1]) + 1, n)
    return codes


def format_table(results: Mapping[str, dict]) -> Table:
    """A table with one column for each named result of `evaluate` and one row for each score."""
    table = Table(title=plain(" / ".join(sorted({r["data"]["name"] for r in results.values()}))))
    table.add_column("score", overflow="fold")
    for name in results:
        table.add_column(plain(name), justify="right", overflow="fold")
    for metric, field, row in score_fields(results.values()):
        table.add_row(row, *(_cell(result, metric, field) for result in results.values()))
    if all("factor_vae" in result for result in results.values()):
        table.add_row("active dimensions", *map(_active, results.values()))
    table.add_row("protocol", *(_protocol(result) for result in results.values()))
    return table


def score_fields(results: Iterable[Mapping]) -> list[tuple[str, str, str]]:
    """(metric, field, title) of every score that some result has."""
    held = [name for name in METRICS if any(name in result for result in results)]
    rows = []
    for name in held:
        rows.append((name, METRICS[name].headline, METRICS[name].title))
        rows += [(name, field, title) for field, title in METRICS[name].further.items()]
    return rows


def _cell(result: Mapping, metric: str, field: str) -> str:
    if (value := result.get(metric, {}).get(field)) is None:
        return "undefined" if metric in result else "-"
    return _over_summary(result, metric, field) or f"{value:.3f}"


def _over_summary(result: Mapping, metric: str, field: str) -> str:
    """Mean and deviation over the seeds, where there are several."""
    summary = result.get("summary", {}).get(metric)
    if summary and field != METRICS[metric].headline:
        summary = summary.get("further", {}).get(field)
    return f"{summary['mean']:.3f} +- {summary['std']:.3f}" if summary and summary["std"] is not None else ""


def _active(result: Mapping) -> str:
    return _over_summary(result, "factor_vae", "num_active_dims") or str(result["factor_vae"]["num_active_dims"])


def _protocol(result: Mapping) -> str:
    seed, count = result["protocol"]["seed"], result.get("summary", {}).get("seeds", 1)
    return f"{result['protocol']['name']}, " + (f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}")


def write_metrics(path: str | os.PathLike, results: Mapping) -> None:
    """Write `results` as JSON, whole or not at all; InputError, and no file, if a number is not finite."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise InputError(f"results for {path} hold a NaN or infinite number; JSON needs finite ones") from None
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def plot_importance(result: Mapping, path: str | os.PathLike) -> None:
    """Save a PNG heat map of `result`'s DCI importance matrix: factors down, code dimensions across."""
    importance = np.asarray(result["dci"]["importance"]).T
    factors, codes = importance.shape
    figure = Figure(figsize=(2 + 0.4 * codes, 1.5 + 0.4 * factors), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(importance, vmin=0, vmax=max(1.0, importance.max()), cmap="viridis", aspect="auto")
    axes.set_xticks(range(codes))
    axes.set_yticks(range(factors), labels=[name.replace("_", " ") for name in result["data"]["factor_names"]])
    axes.set_xlabel("code dimension")
    seed = f", seed {result['protocol']['seed']} alone" if "summary" in result else ""  # of several
    axes.set_title(f"DCI importance (disentanglement {result['dci']['disentanglement']:.3f}{seed})")
    figure.colorbar(image, ax=axes)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
