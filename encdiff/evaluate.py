"""Score an encoder on a labelled data set: encode every image once, then let the metrics index the codes."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from encdiff import __version__
from encdiff.checkpoint import atomic_path
from encdiff.data import Dataset, describe, to_float
from encdiff.errors import InputError
from encdiff.metrics import dci, factor_vae_score, sample_factors
from encdiff.metrics.factor_vae import check_at_least, check_factor_sizes
from encdiff.models import EncDiff

Encode = Callable[[torch.Tensor], torch.Tensor]  # float32 (B,3,H,W) in [-1,1] -> (B,N)
Report = Callable[[str, int, int], None]  # stage, done, total

DCI_DRAW = 16  # factors are drawn this many at a time: it fixes which samples a seed means
SCORES = {  # row of the table -> path in the result
    "FactorVAE score": ("factor_vae", "eval_accuracy"),
    "DCI disentanglement": ("dci", "disentanglement"),
    "DCI completeness": ("dci", "completeness"),
    "DCI informativeness": ("dci", "informativeness_test"),
}


@dataclass(frozen=True)
class Protocol:
    """Everything besides codes and factors that a score depends on; the defaults are those of the published figures."""

    seed: int = 0
    code: str = "scalars"  # the encoder's N raw scalars, no PCA
    factor_vae_variance: int = 10_000
    factor_vae_train: int = 10_000
    factor_vae_eval: int = 5_000
    factor_vae_batch: int = 64
    factor_vae_threshold: float = 0.05  # on the standard deviation of a code
    dci_train: int = 10_000
    dci_test: int = 5_000


PROTOCOLS = {
    "paper": Protocol(),
    "quick": Protocol(
        factor_vae_variance=2_000, factor_vae_train=2_000, factor_vae_eval=1_000, dci_train=1_000, dci_test=500
    ),
}


def evaluate(
    encode: Encode,
    dataset: Dataset,
    *,
    protocol: str = "paper",
    seed: int = 0,
    batch_size: int = 256,
    n_jobs: int | None = None,
    progress: Report | None = None,
    **overrides: int | float,
) -> dict:
    """FactorVAE score and DCI of `encode` on the whole of a labelled `dataset`.

    encode: see `encode_dataset`. protocol: a name in PROTOCOLS; `overrides` replace fields of it. n_jobs: processes
    for DCI, default every core. `progress(stage, done, total)` follows the stages "encode", "factor_vae" and "dci".

    Returns a dict that JSON can hold: `factor_vae`, `dci` (with `importance`, N rows of F), `protocol` (with its name,
    "custom" once overridden), `data`, `version` and `seconds`. Raises InputError for unlabelled data, an unknown
    protocol or field, and codes that are not finite.
    """
    settings = _settings(protocol, seed, overrides)
    _need_grid(dataset)
    report = progress or (lambda stage, done, total: None)
    began = time.perf_counter()
    codes = encode_dataset(encode, dataset, batch_size, lambda done, total: report("encode", done, total))
    encoded = time.perf_counter()
    report("factor_vae", 0, 1)
    factor_vae = _factor_vae(codes, dataset, settings)
    report("factor_vae", 1, 1)
    scored = time.perf_counter()
    report("dci", 0, len(dataset.factor_sizes))
    importance = _dci(codes, dataset, settings, n_jobs, lambda done, total: report("dci", done, total))
    ended = time.perf_counter()
    return {
        "factor_vae": factor_vae,
        "dci": importance | {"importance": importance["importance"].tolist()},
        "protocol": {"name": protocol if settings == replace(PROTOCOLS[protocol], seed=seed) else "custom"}
        | asdict(settings),
        "data": describe(dataset),
        "version": __version__,
        "seconds": {"encode": encoded - began, "factor_vae": scored - encoded, "dci": ended - scored},
    }


def evaluate_model(
    model: EncDiff, dataset: Dataset, *, protocol: str = "paper", seed: int = 0, baseline: bool = True
) -> dict[str, dict]:
    """`evaluate` a trained model and, as the baseline, an untrained one of its configuration, with progress bars.

    Returns the results under "trained" and "untrained".
    """
    models = {"trained": model}
    if baseline:
        models["untrained"] = untrained(model, dataset, seed)
    results = {}
    for name, scored in models.items():
        with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
            encode = _encoder(scored)
            results[name] = evaluate(encode, dataset, protocol=protocol, seed=seed, progress=_Stages(bar, name))
    return results


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


def _encoder(model: EncDiff) -> Encode:
    device = next(model.parameters()).device
    return lambda images: model.encode(images.to(device))


class _Stages:
    """A bar for each stage of an evaluation."""

    def __init__(self, bar: Progress, name: str):
        self.bar, self.name, self.tasks = bar, name, {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bar.add_task(f"{self.name}: {stage.replace('_', ' ')}")
        self.bar.update(self.tasks[stage], completed=done, total=total)


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
    table = Table(title=" / ".join(sorted({r["data"]["name"] for r in results.values()})))
    table.add_column("score")
    for name in results:
        table.add_column(name, justify="right")
    for row, (metric, field) in SCORES.items():
        table.add_row(row, *(f"{result[metric][field]:.3f}" for result in results.values()))
    table.add_row("active dimensions", *(str(r["factor_vae"]["num_active_dims"]) for r in results.values()))
    table.add_row("protocol", *(f"{r['protocol']['name']}, seed {r['protocol']['seed']}" for r in results.values()))
    return table


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
    axes.set_title(f"DCI importance (disentanglement {result['dci']['disentanglement']:.3f})")
    figure.colorbar(image, ax=axes)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _settings(protocol: str, seed: int, overrides: Mapping) -> Protocol:
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
    known = {field.name for field in fields(Protocol)} - {"seed", "code"}
    if unknown := sorted(set(overrides) - known):
        raise InputError(f"{unknown[0]} is no field of the protocol; fields are {', '.join(sorted(known))}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must be in 0..2**32-1")
    settings = replace(PROTOCOLS[protocol], seed=seed, **overrides)
    check_at_least(1, dci_train=settings.dci_train, dci_test=settings.dci_test)
    return settings


def _need_grid(dataset: Dataset) -> None:
    if not dataset.factor_sizes:
        raise InputError(f"{dataset.name} has no factors; the scores need a labelled data set")
    sizes = check_factor_sizes(dataset.factor_sizes)
    if np.prod(sizes) != len(dataset):
        raise InputError(f"{dataset.name} has {len(dataset)} images; a complete grid of factors {sizes} is needed")


def _factor_vae(codes: np.ndarray, dataset: Dataset, settings: Protocol) -> dict:
    return factor_vae_score(
        lambda factors: codes[dataset.indices(factors)],
        dataset.factor_sizes,
        num_variance=settings.factor_vae_variance,
        num_train=settings.factor_vae_train,
        num_eval=settings.factor_vae_eval,
        batch_size=settings.factor_vae_batch,
        threshold=settings.factor_vae_threshold,
        seed=settings.seed,
    )


def _dci(codes: np.ndarray, dataset: Dataset, settings: Protocol, n_jobs: int | None, progress) -> dict:
    rng = np.random.RandomState(settings.seed)
    samples = []
    for size in (settings.dci_train, settings.dci_test):
        draws = [min(DCI_DRAW, size - start) for start in range(0, size, DCI_DRAW)]
        factors = np.concatenate([sample_factors(rng, dataset.factor_sizes, draw) for draw in draws])
        samples += [codes[dataset.indices(factors)], factors]
    return dci(*samples, seed=settings.seed, n_jobs=n_jobs, progress=progress)
