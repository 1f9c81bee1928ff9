"""From a data file to the paper's table: first stage, training, evaluation over seeds, beside the published figures."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from encdiff.data import Dataset, describe, open_dataset
from encdiff.distributed.processes import processes
from encdiff.errors import InputError
from encdiff.evaluation import read_scores, write_metrics
from encdiff.experiments.phases import (
    continuable,
    markdown_table,
    mean_and_range,
    once,
    score_once,
    scores,
    seconds_per_step,
    steps_done,
    train_once,
)
from encdiff.files.temporaries import atomic_path
from encdiff.models import EncDiffConfig
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.terminal import say
from encdiff.training import AutoencoderTrainConfig, TrainConfig, train_autoencoder
from encdiff.training.runs import read_config

Figures = dict[str, dict[str, float]]  # source -> score -> value


def _grid(factor_vae: float, dci: float) -> dict[str, float]:
    return {"FactorVAE score": factor_vae, "DCI disentanglement": dci}


PUBLISHED: dict[str, Figures] = {
    "shapes3d": {
        "EncDiff, its paper (2402.09712)": _grid(0.999, 0.969),
        "EncDiff, a public reproduction, about 37,500 steps of 128": _grid(1.000, 0.967),
        "EncDiff, a second public reproduction, 15 epochs": _grid(1.000, 0.9965),
        "DisDiff, its paper": _grid(0.902, 0.723),
    },
    "mpi3d": {  # MPI3D toy
        "EncDiff, its paper (2402.09712)": _grid(0.872, 0.685),
        "EncDiff, a public reproduction, 81,000 steps": _grid(0.917, 0.689),
        "DisDiff, its paper": _grid(0.617, 0.337),
    },
    "cars3d": {
        "EncDiff, its paper (2402.09712); its code pairs labels with wrong images": _grid(0.773, 0.279),
        "DisDiff, its paper": _grid(0.976, 0.232),
    },
    "celeba": {
        "EncDiff, its paper (2402.09712)": {"TAD": 0.638, "FID": 14.8},
        "DisDiff, its paper": {"TAD": 0.305, "FID": 18.2},
    },
}
QUICK_MODEL: dict[str, Any] = dict(
    encoder_width=16, vq_depth=1, vq_codes=64, width=32, multipliers=(1, 2), depth=1, heads=4
)
QUICK_MODEL |= dict(attention_levels=(1,), feedforward=1)
QUICK_RECIPE = dict(steps=4, batch_size=4, warmup=1)
QUICK_FIRST_STAGE = dict(steps=2, batch_size=2)
STAND_IN, QUICK_STAND_IN = "procedural", "procedural:2,2,2,2,2,2"


def reproduce(
    name: str,
    out: Path,
    *,
    data: str | None = None,
    objective: str | None = None,
    first_stage: Path | None = None,
    first_stage_steps: int | None = None,
    seeds: int = 3,
    quick: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = say,
    **changes: Any,
) -> dict:
    """Train and score what the paper reports for a data set; returns what `out/results.json` holds.

    Args:
        name: of PUBLISHED, which are also the presets.
        out: `first-stage` and `seed0`, `seed1`, ... become runs in it; `results.md` is the table.
        data: see `open_dataset`; None: the procedural room in its place, which the table says.
        objective: another than the paper's, a name in `models.config.OBJECTIVES`.
        first_stage: an existing run of `train_autoencoder`; None: one is trained.
        seeds: how many trainings, of seeds 0, 1, ...
        quick: a narrow network for a few steps, to see every phase work; the scores mean nothing.
        say: told what begins.
        changes: to the preset's recipe: steps, batch_size, precision, ...

    Each phase is done once: called again with the same arguments, finished ones are kept and an interrupted one goes
    on. The table is written after every seed.

    Raises:
        InputError: an unknown name, data that cannot be read, or a folder with a run of another configuration.
        Stopped: after Ctrl-C or SIGTERM, with everything kept.
    """
    if name not in PUBLISHED:
        raise InputError(f"{name!r} has no published figures, must be one of {', '.join(PUBLISHED)}")
    if seeds < 1:
        raise InputError(f"seeds is {seeds}, must be at least 1")
    config = replace(EncDiffConfig.from_preset(name), **(QUICK_MODEL if quick else {}))
    config = config.with_objective(objective) if objective else config
    recipes = [
        TrainConfig.from_preset(name, objective=objective, **(QUICK_RECIPE if quick else {}) | changes, seed=seed)
        for seed in range(seeds)
    ]
    dataset = open_dataset(data or (QUICK_STAND_IN if quick else STAND_IN), config.image_size)
    about = {"name": name, "data": describe(dataset), "stand_in": data is None, "quick": quick}
    about |= {"objective": objective} if objective else {}
    say(_notes(about))
    with continuable():
        if first_stage is None:
            first_stage = out / "first-stage"
            say(f"first stage: {first_stage}")
            options: dict[str, Any] = (QUICK_FIRST_STAGE if quick else {}) | (
                {"steps": first_stage_steps} if first_stage_steps else {}
            )
            train_first_stage_once(first_stage, config, AutoencoderTrainConfig(**options), dataset, device)
        for recipe in recipes:
            run = out / f"seed{recipe.seed}"
            say(f"seed {recipe.seed} of 0 to {seeds - 1}: {recipe.steps:,} steps of {recipe.batch_size} in {run}")
            train_once(run, config, recipe, dataset, device=device, first_stage=first_stage)
            score_once(run, dataset, protocol="quick" if quick else "paper", device=device)
            results = processes().by_first(partial(write_results, out, about, range(recipe.seed + 1)))
    return results


def train_first_stage_once(
    run: Path, config: EncDiffConfig, recipe: AutoencoderTrainConfig, dataset: Dataset, device: str
) -> None:
    """Train the VQ first stage of a configuration in the folder `run`, as far as that is not done; see `once`."""
    torch.manual_seed(recipe.seed)
    model = VQAutoencoder(config.vq_width, config.vq_multipliers, config.vq_depth, codebook_size=config.vq_codes)
    model.to(device)
    once(run, model.config, recipe, dataset, lambda **mode: train_autoencoder(model, dataset, run, recipe, **mode))


def write_results(out: Path, about: dict, seeds: range) -> dict:
    """Write `results.json` and `results.md` of the scored runs of these seeds; returns what the former holds."""
    results = about | {
        "runs": [_run(out / f"seed{seed}", seed) for seed in seeds],
        "published": PUBLISHED[about["name"]],
    }
    write_metrics(out / "results.json", results)
    with atomic_path(out / "results.md") as temporary:
        temporary.write_text(format_results(results), "utf-8", "surrogateescape")
    return results


def _run(run: Path, seed: int) -> dict:
    result = read_scores(run / "metrics.json")["trained"]
    return {
        "seed": seed,
        "steps": steps_done(run),
        "batch_size": TrainConfig.from_dict(read_config(run)["training"], f"{run}/config.json").batch_size,
        "seconds_per_step": seconds_per_step(run),
        "scores": scores(result),
        "protocol": result["protocol"],
    }


def format_results(results: dict) -> str:
    """The table in Markdown: the seeds, their mean and range, and the published figures, each with its source."""
    runs, published = results["runs"], results["published"]
    made = {s for r in runs for s in r["scores"]}
    shown = [*next(iter(published.values())), *(s for s in _grid(0, 0) if s in made)]  # of a stand-in, others too
    shown = list(dict.fromkeys(shown))
    own = [{s: r["scores"].get(s, f"needs data like {results['name']}'s") for s in shown} for r in runs]
    rows = [
        [f"seed {r['seed']}, {r['steps']:,} steps of {r['batch_size']}", *(mean_and_range([o[s]]) for s in shown)]
        for r, o in zip(runs, own, strict=True)
    ]
    if len(runs) > 1:
        rows.append([f"**mean of {len(runs)} seeds (range)**", *(mean_and_range([o[s] for o in own]) for s in shown)])
    for source, figures in published.items():
        rows.append([f"published: {source}", *(f"{figures[s]:g}" if s in figures else "" for s in shown)])
    undefined = sorted({f"{s} is undefined: {v}." for o in own for s, v in o.items() if isinstance(v, str)})
    notes = "\n\n".join([_notes(results), *undefined])
    return f"# {results['name']}\n\n{notes}\n\n{markdown_table(('', *shown), rows)}"


def _notes(about: dict) -> str:
    """What the scores are of, and what they are not."""
    data, name = about["data"], about["name"]
    notes = [f"Data: {data['name']}, {data['images']:,} images of {data['image_size']}x{data['image_size']}."]
    if about["stand_in"]:
        notes.append(
            f"No data file was given: this procedural room stands in for {name}, whose figures are for itself."
        )
    if "objective" in about:
        notes.append(f"The objective is {about['objective']}; the published figures are of EncDiff's own.")
    if about["quick"]:
        notes.append("Quick: a narrow network, trained for a few steps; these scores say nothing.")
    return " ".join(notes)
