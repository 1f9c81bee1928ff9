"""Trainings and evaluations as phases of longer work: done once, continued where interrupted, never repeated."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from encdiff import __version__
from encdiff.baselines import load_concepts
from encdiff.data import Dataset, describe, to_float, to_uint8
from encdiff.distributed.processes import processes
from encdiff.errors import InputError, Stopped
from encdiff.evaluation import encode_dataset, evaluate_model, plot_importance, read_scores, write_metrics
from encdiff.evaluation.protocol import DEFAULT
from encdiff.evaluation.scoring import encoder_of
from encdiff.evaluation.tables import score_fields
from encdiff.files.checkpoint import step_of, tensor_shapes
from encdiff.metrics.fid import frechet_distance, inception_features
from encdiff.metrics.registry import METRICS
from encdiff.models import ConceptModel, EncDiff, EncDiffConfig
from encdiff.terminal import progress_bar
from encdiff.training import TrainConfig, train
from encdiff.training.autoencoder import load_first_stage
from encdiff.training.runs import RunFolder, last_row

FID_IMAGES, BATCH = 10_000, 256


def once(run: Path, model: dict, config: Any, dataset: Dataset, start: Callable[..., object]) -> None:
    """Call `start(resume=, overwrite=)` unless the training run in that folder has reached its last step.

    `model` and `config` are what its `config.json` is to hold; InputError if the folder holds another run.
    """

    def look() -> tuple[bool, bool]:
        begun = (run / "checkpoint.safetensors").is_file()
        if begun:
            described = {"model": model, "training": asdict(config), "fingerprint": describe(dataset)}
            RunFolder(run, resume=True).check_same_run(described)
        return begun, begun and steps_done(run) >= config.steps

    begun, done = processes().by_first(look)
    if not done:
        start(resume=begun, overwrite=not begun)


def steps_done(run: Path) -> int:
    """The step of a run's checkpoint."""
    path = run / "checkpoint.safetensors"
    return step_of(tensor_shapes(path)[1], path)


def seconds_per_step(run: Path) -> float:
    """Of the whole training, by its log."""
    step, seconds = last_row(run / "log.csv")
    return seconds / step


def train_once(
    run: Path,
    config: EncDiffConfig,
    recipe: TrainConfig,
    dataset: Dataset,
    *,
    device: str = "cpu",
    first_stage: Path | None = None,
) -> None:
    """Train a model of this configuration in the folder `run`, as far as that is not done; see `once`.

    first_stage: the run of `train_autoencoder`, where the configuration has a VQ first stage.
    """

    def start(resume: bool, overwrite: bool) -> None:
        torch.manual_seed(recipe.seed)
        model = EncDiff(config)
        if not resume:
            load_first_stage(model, first_stage)
        train(model.to(device), dataset, run, recipe, resume=resume, overwrite=overwrite)

    once(run, asdict(config), recipe, dataset, start)


def score_once(run: Path, dataset: Dataset, *, protocol: str = "paper", device: str = "cpu") -> dict:
    """The scores of the run's model: those in its `metrics.json` if they are of this protocol and data, or anew.

    Of a grid of factors as `evaluate` gives them, of other images as `score_attributes`. Concepts that are vectors are
    scored by their first principal components, and the result's protocol says so.
    """
    path, everyone = run / "metrics.json", processes()
    if kept := everyone.by_first(lambda: _read_scores(path, protocol, dataset) if path.is_file() else None):
        return kept
    model = load_concepts(run / "model", device=device)
    if dataset.factor_sizes and dataset.is_grid:
        result = evaluate_model(model, dataset, protocol=protocol, baseline=False)["trained"]
        everyone.by_first(lambda: plot_importance(result, run / "importance.png"))
    else:
        result = score_attributes(model, dataset, protocol)
    everyone.by_first(lambda: write_metrics(path, {"trained": result}))
    return result


def score_attributes(model: ConceptModel, dataset: Dataset, protocol: str = "paper") -> dict:
    """TAD of images with attributes of two values (CelebA), and FID; an entry `undefined` says why there is no score.

    FID is of FID_IMAGES images, evenly spaced in the data, against what the model samples from their codes by DDIM,
    200 steps, eta 1; protocol "quick" takes 16 images and 2 steps. It needs the weights of an Inception network on
    disk: `metrics.fid.inception_features` says which.
    """
    if dataset.factor_sizes:
        with progress_bar("encoding") as report:
            codes = encode_dataset(encoder_of(model, dataset), dataset, progress=report, among=processes())
        found = METRICS["tad"](codes, dataset.factors(np.arange(len(dataset))))
        found |= {"captured": [dataset.factor_names[i] for i in cast(list[int], found["captured"])]}
    else:
        found = {"tad": None, "undefined": f"{dataset.name} has no attributes"}
    return {
        "tad": found,
        "fid": _fid(model, dataset, *((16, 2) if protocol == "quick" else (FID_IMAGES, 200))),
        "protocol": {"name": protocol, "seed": 0, "code": "scalars"},
        "data": describe(dataset),
        "version": __version__,
    }


def _fid(model: ConceptModel, dataset: Dataset, count: int, steps: int) -> dict:
    device = next(model.parameters()).device
    try:
        features = processes().together(lambda: inception_features(device=device))
    except InputError as error:
        return {"fid": None, "undefined": str(error)}
    chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), count)).astype(np.int64)
    sampler, eta = (model.inverts_by, 1.0 if model.inverts_by == "ddim" else 0.0)  # a flow has no DDIM
    first, last = processes().part(len(chosen), BATCH)
    parts = [chosen[i : min(i + BATCH, last)] for i in range(first, last, BATCH)]  # of this process

    def own() -> tuple[np.ndarray, np.ndarray]:
        drawn, real = [], []
        with progress_bar("sampling for FID") as report:
            for i, part in enumerate(parts):
                images = dataset.images(part)
                ids = torch.from_numpy(part).to(device)
                sampled = model.reconstruct(
                    to_float(images).to(device), sample_ids=ids, sampler=sampler, steps=steps, eta=eta
                )
                drawn.append(features(to_uint8(sampled).cpu().numpy()))
                real.append(features(images))
                report(i + 1, len(parts))
        return np.concatenate(drawn or [none]), np.concatenate(real or [none])

    none = np.empty((0, 0))
    distance = frechet_distance(*map(processes().concatenated, processes().together(own)))
    return {"fid": distance, "images": len(chosen), "sampler": sampler, "steps": steps, "eta": eta}


def _read_scores(path: Path, protocol: str, dataset: Dataset) -> dict | None:
    wanted = DEFAULT if dataset.factor_sizes and dataset.is_grid else ("tad", "fid")
    result = read_scores(path, "remove it to have them made")["trained"]
    said = result["protocol"]["name"], result["protocol"]["seed"], dict(result["data"], name=dataset.name)
    return result if said == (protocol, 0, describe(dataset)) and all(name in result for name in wanted) else None


def scores(result: dict) -> dict[str, float | str]:
    """The scores in a result of `score_once` by name; in place of one that is undefined, why."""
    rows = score_fields([result]) + [("fid", "fid", "FID")] * ("fid" in result)
    found = {title: (result[metric], field) for metric, field, title in rows}
    return {
        title: entry["undefined"] if entry[field] is None else entry[field] for title, (entry, field) in found.items()
    }


@contextmanager
def continuable() -> Iterator[None]:
    """What stops the work inside ends it with the word that the same command continues."""
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        raise Stopped("stopped; what is done is kept, the same command continues") from None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mean_and_range(values: Sequence[float | str]) -> str:
    """`0.954 (0.853 to 0.997)`, or the one number alone, or `undefined` where a value is words."""
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        return "undefined"
    mean = f"{sum(numbers) / len(numbers):.3f}"
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):.3f} to {max(numbers):.3f})"
