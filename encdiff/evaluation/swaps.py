"""Counterfactual accuracy: does a swapped factor arrive, do the others stay, by the true image that should come out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from encdiff.data import Dataset
from encdiff.errors import InputError
from encdiff.evaluation.encode import Encode
from encdiff.evaluation.judge import KNOWN, Draw, Judge, judge_of
from encdiff.evaluation.protocol import Report
from encdiff.metrics.counterfactual import closeness, explained_variance, swap_rates, wilson_interval
from encdiff.metrics.factor_vae import check_at_least
from encdiff.metrics.groups import concept_groups
from encdiff.models import ConceptModel

Importance = Sequence[Sequence[float]] | np.ndarray  # (N, F)


def counterfactual(
    model: ConceptModel | Encode,
    dataset: Dataset,
    *,
    draw: Draw | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    importance: Importance | None = None,
    pairs: int | Sequence[tuple[int, int]] = 128,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    progress: Report | None = None,
) -> dict:
    """Whether a swapped factor arrives and the others stay, read by the nearest of all true images.

    For every factor the concepts that carry it are put from a source image into a target. The right answer is the true
    image with the target's factors but that one, which is the source's. `docs/metrics.md` says what this can tell.

    Args:
        model: a model, or a function of images (B, 3, S, S) to codes (B, N), which needs `draw`.
        dataset: a complete grid of factors with one image each, of the model's image size.
        draw: codes (B, N) -> images (B, 3, S, S) in [-1, 1]; of a model its own sampling in `steps` by `sampler`.
        groups: the concepts of each factor, by its name. None: by `importance`, (N, F) such as DCI's; without that
            by the share of a concept's variance that a factor explains.
        pairs: how many, drawn so that source and target differ in every factor; or pairs of indices (source, target).
        progress: called with (stage, done, total) of the stages "draw" and "judge".

    Returns:
        What JSON can hold. `exact`, `arrived`, `kept`: means over the factors. `factors`: for each, these three with
        95 % intervals, `psnr` and mean `error` to the true counterfactual, and the `concepts` swapped; `undefined`
        says so where no concept carries it, so that nothing was swapped, or no pair differs in it, which the means
        leave out. `reconstruction`: the same of the targets themselves, in short `reconstructed` and `psnr`. `judge`:
        the share of the true counterfactuals that are read right after the model's first stage, or blurred.

    Raises:
        InputError: no complete grid, images of another size, a factor that is not there, pairs that differ in nothing.
    """
    judge = judge_of(model, dataset, draw, progress, sampler=sampler, steps=steps, seed=seed)
    sources, targets = _pairs(dataset, pairs, seed)
    names = [name.replace("_", " ") for name in dataset.factor_names]
    of_source, of_target = dataset.factors(sources), dataset.factors(targets)
    from_source, own = judge.encode(sources), judge.encode(targets)
    owners = _owners(judge, names, own.shape[1], groups, importance, seed)
    _check_concepts(owners, own.shape[1])

    wanted, codes = [of_target], [own]  # of the reconstructions, then of each factor's swaps
    for f, name in enumerate(names):
        differ = np.flatnonzero(of_source[:, f] != of_target[:, f])
        swapped = own[differ].clone()
        swapped[:, owners[name]] = from_source[differ][:, owners[name]]
        wanted.append(dataset.factors(dataset.swapped(sources[differ], targets[differ], f)))
        codes.append(swapped)
    right = np.concatenate(wanted)
    drawn, true = judge.draw(torch.cat(codes)), judge.images(dataset.indices(right))
    read, *limits = judge.read(torch.cat([drawn, *judge.limited(true)])).reshape(-1, *right.shape)

    counts = [len(part) for part in wanted]
    of_read = np.split(read, np.cumsum(counts)[:-1])
    close = [closeness(a, b) for a, b in zip(drawn.split(counts), true.split(counts), strict=True)]
    factors_of = {
        name: _of_factor(f, owners[name], wanted[f + 1], of_read[f + 1], close[f + 1]) for f, name in enumerate(names)
    }
    judged = [result for result in factors_of.values() if "exact" in result]
    return {
        **{name: float(np.mean([result[name] for result in judged])) for name in ("exact", "arrived", "kept")},
        "reconstructed": _share(of_read[0] == wanted[0]),
        "psnr": close[0]["psnr"],
        "reconstruction": _of_reconstruction(names, wanted[0], of_read[0]) | close[0],
        "factors": factors_of,
        "judge": {name: _share(limit == right) for name, limit in zip(judge.limits, limits, strict=True)},
        "pairs": len(targets),
        "settings": {"seed": seed} | ({} if draw else {"sampler": sampler, "steps": steps}),
    }


def _pairs(dataset: Dataset, pairs: int | Sequence[tuple[int, int]], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of sources and targets."""
    check_at_least(0, seed=seed)
    if isinstance(pairs, int | np.integer) and not isinstance(pairs, bool):
        check_at_least(1, pairs=int(pairs))
        if max(dataset.factor_sizes) < 2:
            raise InputError(f"{dataset.name}: every factor has a single value; there is nothing to swap")
        return dataset.pairs(int(pairs), seed)
    try:
        given = np.asarray(pairs)
    except ValueError:  # rows of different lengths
        given = np.empty(0)
    if given.ndim != 2 or given.shape[1] != 2 or not len(given):
        raise InputError(f"pairs are {str(pairs)[:80]}, must be a number, or indices (source, target) of each")
    sources, targets = (dataset.check_indices(column) for column in given.T)
    if (dataset.factors(sources) == dataset.factors(targets)).all():
        raise InputError("pairs: source and target of every pair are equal in all factors; there is nothing to swap")
    return sources, targets


def _owners(
    judge: Judge, names: list[str], concepts: int, groups, importance: Importance | None, seed: int
) -> dict[str, list[int]]:
    """The concepts of every factor; none of those that no concept carries."""
    if groups is not None:
        if not isinstance(groups, Mapping) or not all(isinstance(owned, Sequence) for owned in groups.values()):
            raise InputError(f"groups are {str(groups)[:80]}, must be a dict of lists of concepts")
        named = {name.replace("_", " "): list(concepts) for name, concepts in groups.items()}
        if unknown := sorted(named.keys() - set(names)):
            raise InputError(f"groups: there is no factor {unknown[0]!r}, must be of {', '.join(names)}")
    else:
        named = concept_groups(_explained(judge, seed) if importance is None else _checked(importance, concepts), names)
    return {name: named.get(name, []) for name in names}


def _check_concepts(owners: Mapping[str, Sequence[int]], concepts: int) -> None:
    for name, owned in owners.items():
        if wrong := [c for c in owned if not isinstance(c, int | np.integer) or not 0 <= c < concepts]:
            raise InputError(f"groups: concept {wrong[0]!r} of {name}, must be an integer in 0..{concepts - 1}")


def _checked(importance: Importance, concepts: int) -> np.ndarray:
    matrix = np.asarray(importance, dtype=float)
    if matrix.ndim != 2 or len(matrix) != concepts or not np.isfinite(matrix).all():
        raise InputError(f"importance is {matrix.shape}, must be {concepts} rows of finite numbers, one a concept")
    return matrix


def _explained(judge: Judge, seed: int) -> np.ndarray:
    """The share of each concept's variance that a factor explains, (N, F); of vectors the mean over their numbers."""
    rows = np.random.default_rng(seed).choice(len(judge.dataset), min(KNOWN, len(judge.dataset)), replace=False)
    codes, factors = judge.encode(rows).float().cpu().numpy(), judge.dataset.factors(rows)
    shares = explained_variance(codes.reshape(len(codes), -1), factors)
    return shares.reshape(codes.shape[1], -1, factors.shape[1]).mean(1)


def _of_factor(factor: int, concepts: list[int], wanted: np.ndarray, read: np.ndarray, close: dict) -> dict[str, Any]:
    if not len(wanted):
        return {"undefined": "no pair differs in it", "concepts": concepts}
    rates = swap_rates(read, wanted, factor) | close | {"concepts": concepts, "pairs": len(wanted)}
    return rates if concepts else rates | {"undefined": "no concept carries it"}


def _of_reconstruction(names: Sequence[str], wanted: np.ndarray, read: np.ndarray) -> dict[str, Any]:
    right = read == wanted
    interval = wilson_interval(int(right.all(1).sum()), len(right))
    each = dict(zip(names, right.mean(0).tolist(), strict=True))
    return {"exact": _share(right), "exact_interval": interval, "right": each}


def _share(right: np.ndarray) -> float:
    """Of rows (n, F) those that are right in every factor."""
    return float(right.all(1).mean())
