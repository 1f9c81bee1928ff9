"""How far the factors move along each scalar, judged by true images."""

import numpy as np
import torch

from encdiff.data import Dataset
from encdiff.evaluation.encode import Encode
from encdiff.evaluation.judge import KNOWN, Draw, judge_of
from encdiff.evaluation.protocol import Report
from encdiff.metrics.counterfactual import traversal_effect
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import ConceptModel


def traversal_effects(
    model: ConceptModel | Encode,
    dataset: Dataset,
    *,
    draw: Draw | None = None,
    images: int = 8,
    values: int = 7,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    progress: Report | None = None,
) -> dict:
    """How far each factor moves while one scalar goes through the data's range, read by the nearest true image.

    Arguments and errors as for `counterfactual`; in each of `images` random images each scalar takes `values` values
    from its 2nd to its 98th percentile; of a concept that is a vector all numbers go together.

    Returns:
        What JSON can hold. `effect`: N rows of F, how many values of a factor are met along a scalar beside the first,
        as a share of all its others, or of `values` - 1 where these are fewer. `purity`: of all movement the share
        that is of the factor which each scalar moves most; None where nothing moves. `reach`: how far the best single
        scalar moves a factor, mean over the factors of more than one value.
    """
    check_at_least(0, seed=seed)
    check_at_least(1, images=images)
    check_at_least(2, values=values)
    judge = judge_of(model, dataset, draw, progress, sampler=sampler, steps=steps, seed=seed)
    rng = np.random.default_rng(seed)
    known = judge.encode(rng.choice(len(dataset), min(KNOWN, len(dataset)), replace=False))
    base = judge.encode(rng.choice(len(dataset), min(images, len(dataset)), replace=False))
    low, high = torch.quantile(known.float(), torch.tensor([0.02, 0.98], device=known.device), dim=0)
    strip = torch.stack([torch.lerp(low, high, i / (values - 1)) for i in range(values)]).to(base.dtype)  # (V, N)
    codes = base[None, :, None].repeat(base.shape[1], 1, values, *[1] * (base.ndim - 1))  # (N, images, V, N)
    for n in range(base.shape[1]):
        codes[n, :, :, n] = strip[:, n]
    read = judge.read(judge.draw(codes.flatten(0, 2)))
    effect = traversal_effect(read.reshape(*codes.shape[:3], -1), dataset.factor_sizes)
    moved = float(effect.sum())
    return {
        "purity": float(effect.max(1).sum()) / moved if moved else None,
        **({} if moved else {"undefined": "no scalar moves any factor"}),
        "reach": float(effect.max(0)[np.array(dataset.factor_sizes) > 1].mean()),
        "effect": effect.tolist(),
        "images": len(base),
        "values": values,
        "settings": {"seed": seed} | ({} if draw else {"sampler": sampler, "steps": steps}),
    }
