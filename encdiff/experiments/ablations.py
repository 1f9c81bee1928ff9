"""The paper's ablations: each a few fields of a configuration changed, trained and scored like all the others."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from encdiff.data import Dataset
from encdiff.distributed.processes import processes
from encdiff.errors import InputError
from encdiff.evaluation import read_scores, write_metrics
from encdiff.evaluation.protocol import settings_of
from encdiff.experiments.phases import (
    continuable,
    markdown_table,
    mean_and_range,
    score_once,
    scores,
    seconds_per_step,
    steps_done,
    train_once,
)
from encdiff.files.temporaries import atomic_path
from encdiff.models import EncDiff, EncDiffConfig
from encdiff.models.config import OBJECTIVES
from encdiff.terminal import say
from encdiff.training import TrainConfig
from encdiff.training.runs import read_config

ABLATIONS: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "vectors": {"concept_width": 16},  # each concept 16 numbers, as wide as its token, instead of one
    "shared": {"bank_shared": True},
    "adagn": {"conditioning": "adagn"},
    "linear": {"schedule": "linear"},
    "sqrt": {"schedule": "sqrt"},
    "cosine": {"schedule": "cosine"},
    "tokens-10": {"concepts": 10},
    "tokens-20": {"concepts": 20},
    "tokens-40": {"concepts": 40},
    "width-4": {"token_width": 4},
    "width-64": {"token_width": 64},
    **OBJECTIVES,
}
SHOWN = ("FactorVAE score", "DCI disentanglement", "DCI completeness", "DCI informativeness")


def ablated(preset: str, ablation: str) -> EncDiffConfig:
    """A preset's configuration with the fields of a named ablation changed."""
    if ablation not in ABLATIONS:
        raise InputError(f"ablation {ablation!r} is unknown, must be one of {', '.join(ABLATIONS)}")
    return replace(EncDiffConfig.from_preset(preset), **ABLATIONS[ablation])


def ablate(
    dataset: Dataset,
    out: Path,
    *,
    preset: str = "quickstart",
    only: Sequence[str] | None = None,
    seeds: int = 1,
    protocol: str = "paper",
    device: str = "cpu",
    first_stage: Path | None = None,
    say: Callable[[str], None] = say,
    **changes: Any,
) -> list[dict]:
    """Train and score a preset under each ablation, seeds 0, 1, ...: a run each in `out/NAME-seedN`.

    Args:
        dataset: labelled, of the preset's image size.
        only: names in ABLATIONS; None: all of the paper's, that is without other objectives, that change the preset.
        first_stage: the run of `train_autoencoder`, for a preset with VQ.
        say: told what begins.
        changes: to the preset's recipe, such as steps.

    Called again, finished runs are not repeated and an interrupted one goes on. After every run `out/ablations.md` and
    `.json` are written anew, of all the finished runs in `out`. Returns the rows of the JSON, one for each run.

    Raises:
        InputError: an unknown preset, ablation or protocol, data that is no grid of factors, or a folder with a run of
            another configuration.
        Stopped: after Ctrl-C or SIGTERM, with everything kept.
    """
    if not dataset.factor_sizes:
        raise InputError(f"{dataset.name}: has no factors; ablations are compared by scores that need a labelled set")
    if not dataset.is_grid or dataset.instances > 1:
        raise InputError(f"{dataset.name}: is no complete grid of factors with one image each, which the scores need")
    settings_of(protocol)  # refuses an unknown one before anything is trained
    configs = {name: ablated(preset, name) for name in (only or [n for n in ABLATIONS if n not in OBJECTIVES])}
    if not only:  # the paper's presets have 20 tokens already, quickstart 40
        configs = {name: c for name, c in configs.items() if name == "unchanged" or c != configs["unchanged"]}
    work = [  # the whole table of one seed first
        (TrainConfig.from_preset(preset, objective=name if name in OBJECTIVES else None, **changes, seed=seed), name)
        for seed in range(seeds)
        for name in configs
    ]
    with continuable():
        for i, (recipe, name) in enumerate(work):
            run = out / f"{name}-seed{recipe.seed}"
            say(f"{i + 1}/{len(work)} {name}, seed {recipe.seed}: {run}")
            train_once(run, configs[name], recipe, dataset, device=device, first_stage=first_stage)
            score_once(run, dataset, protocol=protocol, device=device)
            processes().by_first(lambda: write_tables(out))
    return finished(out)


def finished(out: Path) -> list[dict]:
    """The scored runs in a folder of `ablate`, in the order of ABLATIONS: what each is, what it took, its scores."""
    runs = [(name, run) for name in ABLATIONS for run in sorted(out.glob(f"{name}-seed*"))]
    return [_row(name, run) for name, run in runs if (run / "metrics.json").is_file()]


def _row(name: str, run: Path) -> dict:
    config, result = read_config(run), read_scores(run / "metrics.json")["trained"]
    recipe = TrainConfig.from_dict(config["training"], f"{run}/config.json")
    with torch.device("meta"):
        model = EncDiff(EncDiffConfig.from_dict(config["model"], f"{run}/config.json"))
    return {
        "ablation": name,
        "changed": ABLATIONS[name],
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": steps_done(run),
        "batch_size": recipe.batch_size,
        "ms_per_step": 1000 * seconds_per_step(run),
        "scores": scores(result),
        "protocol": result["protocol"],
        "data": result["data"],
    }


def write_tables(out: Path) -> str:
    """Write `ablations.json` and, with the mean and range over seeds, `ablations.md`; returns the latter."""
    rows = finished(out)
    write_metrics(out / "ablations.json", {"runs": rows})
    lines = []
    for name in dict.fromkeys(row["ablation"] for row in rows):
        own = [row for row in rows if row["ablation"] == name]
        changed = ", ".join(f"{k} {v}" for k, v in ABLATIONS[name].items())
        ms = statistics.mean(row["ms_per_step"] for row in own)
        steps = " and ".join(sorted({str(row["steps"]) for row in own}))
        lines.append([name, changed, f"{own[0]['parameters']:,}", str(len(own)), steps, f"{ms:.0f}"])
        lines[-1] += [mean_and_range([row["scores"][score] for row in own]) for score in SHOWN]
    table = markdown_table(("ablation", "changed", "parameters", "seeds", "steps", "ms a step", *SHOWN), lines)
    data, protocol = rows[0]["data"], rows[0]["protocol"]
    note = f"{data['name']}, {data['images']:,} images; protocol {protocol['name']}, seed {protocol['seed']}.\n"
    with atomic_path(out / "ablations.md") as temporary:
        temporary.write_text(f"{note}\n{table}", "utf-8", "surrogateescape")
    return table
