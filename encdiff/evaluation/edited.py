"""What a concept edit does to images: does its factor become the wanted value, do the others stay as they are."""

from typing import Any

import numpy as np
import torch

from encdiff.checked import check_types
from encdiff.data import Dataset
from encdiff.edit import Edit
from encdiff.edit.concepts import check_value
from encdiff.errors import InputError
from encdiff.evaluation.judge import judge_of
from encdiff.evaluation.protocol import Report
from encdiff.metrics.counterfactual import wilson_interval
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import EncDiff


def edit_effect(
    model: EncDiff,
    edit: Edit,
    dataset: Dataset,
    factor: str,
    value: int,
    *,
    strength: float = 1.0,
    images: int = 64,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    progress: Report | None = None,
) -> dict:
    """Wanted and unwanted change by an edit, read by the nearest of all true images (`docs/metrics.md`).

    Images of the data, of other values of the factor than the wanted one, are drawn by the seed, encoded, and drawn
    again by the model as it is and by the edited model, from the same codes and noise. The model is restored.

    Args:
        model: without the edit.
        edit: made of this model.
        dataset: a complete grid of factors with one image each.
        factor, value: what the edit should do: the value, of 0..size-1, of this factor.
        strength: of the edit.
        images: how many at most.
        progress: called with (stage, done, total) of the stages "draw" and "judge".

    Returns:
        What JSON can hold: `before` and `after`, each with `wanted`, the share of images read with the factor's wanted
        value, `unwanted`, the share of those in which another factor is not the image's own, both with 95 % intervals,
        and `changed`, that share for each of the other factors; `images`; `settings`.

    Raises:
        InputError: no complete grid, images of another size, a factor or value that is not there, and what
            `Edit.apply` refuses.
    """
    check_types(model=(model, EncDiff, ""), edit=(edit, Edit, "encdiff.edit.uce"))
    judge = judge_of(model, dataset, None, progress, sampler=sampler, steps=steps, seed=seed)
    column = check_value(dataset, factor, value)
    check_at_least(1, images=images)
    check_at_least(0, seed=seed)
    others = np.flatnonzero(dataset.factors(np.arange(len(dataset)))[:, column] != value)
    if not len(others):
        raise InputError(f"{dataset.name}: every image has value {value} of {factor!r}; there is nothing to change")
    rows = np.random.default_rng(seed).choice(others, min(images, len(others)), replace=False)
    codes, drawn = judge.encode(rows), []
    drawn.append(judge.draw(codes))
    edit.apply(model, strength)
    try:
        drawn.append(judge.draw(codes))
    finally:
        edit.undo(model)
    before, after = judge.read(torch.cat(drawn)).reshape(2, len(rows), -1)
    names, true = [name.replace("_", " ") for name in dataset.factor_names], dataset.factors(rows)
    return {
        "before": _rates(before, true, column, int(value), names),
        "after": _rates(after, true, column, int(value), names),
        "images": len(rows),
        "settings": {"strength": strength, "sampler": sampler, "steps": steps, "seed": seed},
    }


def _rates(read: np.ndarray, true: np.ndarray, column: int, value: int, names: list[str]) -> dict[str, Any]:
    arrived = read[:, column] == value
    changed = np.delete(read != true, column, axis=1)
    rates: dict[str, Any] = {}
    for name, hits in {"wanted": arrived, "unwanted": changed.any(1)}.items():
        rates[name] = float(hits.mean())
        rates[f"{name}_interval"] = wilson_interval(int(hits.sum()), len(hits))
    others = [name for i, name in enumerate(names) if i != column]
    return rates | {"changed": dict(zip(others, changed.mean(0).tolist(), strict=True))}
