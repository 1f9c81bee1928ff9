"""Scores of what a model draws, by name, beside those of codes in `encdiff.metrics.METRICS`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from encdiff.data import Dataset
from encdiff.errors import InputError
from encdiff.evaluation.effects import traversal_effects
from encdiff.evaluation.judge import check_complete
from encdiff.evaluation.protocol import Report
from encdiff.evaluation.swaps import counterfactual
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import ConceptModel


class Drawn(NamedTuple):
    """A score of images that are drawn from codes; the fields are those of `Metric`."""

    title: str
    headline: str
    function: Callable[..., dict]
    further: Mapping[str, str]


DRAWN: dict[str, Drawn] = {
    "counterfactual": Drawn(
        "swaps exact",
        "exact",
        counterfactual,
        {
            "arrived": "swaps arrived", "kept": "swaps, others kept",
            "reconstructed": "reconstructions exact", "psnr": "PSNR of reconstructions",
        },
    ),
    "traversal": Drawn("traversal purity", "purity", traversal_effects, {"reach": "traversal reach"}),
}  # fmt: skip


def check_drawn(names: list[str], model: Any, dataset: Dataset, pairs: int) -> None:
    """InputError, before anything is computed, for what these scores cannot be of."""
    if not names:
        return
    if not isinstance(model, ConceptModel):
        raise InputError(
            f"metrics: {names[0]} is of what a model draws, encode must be a ConceptModel, such as an EncDiff"
        )
    check_complete(dataset)
    check_at_least(1, pairs=pairs)


def score_drawn(
    names: list[str], model: Any, dataset: Dataset, results: Mapping[str, dict], seed: int, pairs: int, report: Report
) -> dict[str, dict]:
    """The named scores of a model; the concepts of a factor are told by DCI's importance where `results` has it."""
    given: dict[str, dict] = {
        "counterfactual": {"pairs": pairs, "importance": results.get("dci", {}).get("importance")}
    }
    return {
        name: DRAWN[name].function(
            model, dataset, seed=seed, **given.get(name, {}),
            progress=lambda stage, done, total, name=name: report(f"{name} {stage}", done, total),
        )
        for name in names
    }  # fmt: skip
