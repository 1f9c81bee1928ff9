"""How samples without a source image compare with the data, and with codes whose dependence is ignored."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from encdiff.checked import check_types
from encdiff.data import Dataset, to_float
from encdiff.errors import InputError
from encdiff.metrics.counterfactual import nearest
from encdiff.metrics.fid import frechet_distance
from encdiff.models import ConceptModel
from encdiff.models.batches import encode_images
from encdiff.models.edits import CodePrior
from encdiff.terminal import plain

CHUNK, DRAWS = 1024, 10  # true images in memory at once; sets of the data's codes that show what is chance
Report = Callable[[str, int, int], None]  # (stage, done, total)
MEASURES = {
    "frechet": "Frechet distance", "frechet_codes": "Frechet distance of the codes drawn from",
    "distance": "distance to the nearest true image",
}  # fmt: skip


class Given:
    """Codes in the place of a prior."""

    def __init__(self, codes: Tensor):
        self.codes = codes

    def sample(self, count: int, seed: int = 0) -> Tensor:
        return self.codes[:count]


def judge(
    images: Tensor,
    model: ConceptModel,
    prior: CodePrior,
    codes: Tensor,
    dataset: Dataset,
    *,
    sampler: str = "dpm-solver++",
    steps: int = 20,
    seed: int = 0,
    progress: Report | None = None,
) -> dict:
    """Samples beside two other sets of m images, drawn by the same model from codes of other origins.

    Args:
        images: (m, 3, S, S), what `model.sample_prior(m, prior, seed=seed, ...)` gave.
        codes: (n, N) or (n, N, m), the data's, as `dataset_codes` gives them; n at least 2 m.
        dataset: of which the codes are.
        sampler, steps, seed: with which the other images are drawn.
        progress: `progress(stage, done, total)` follows.

    Returns:
        A dict that JSON can hold: `sets`, with for each of "prior", "floor" (m of the data's codes, compared with the
        others) and "independent" (m codes whose every number is drawn from the data's by itself)

        - `frechet`: the Frechet distance of the images' codes, encoded again, from the data's;
        - `frechet_codes`: of the codes from which they were drawn;
        - where the data are a complete grid with one image of each combination, by the nearest of all its images:
          `distance`, root mean square over pixels in 0..1, the mean over images, and `factors`, for each factor the
          total variation distance of its histogram from the data's, 0 to 1;

        and `chance`, `mean` and deviation `std` over so many `draws` of m of the data's codes, of their Frechet
        distance from the others, which says what a difference means; `images` m and `codes` n.

    Raises InputError for fewer than 2 images and fewer than 2 m codes.
    """
    check_types(images=(images, Tensor, "sample_prior"), dataset=(dataset, Dataset, "open_dataset"))
    count, report = len(images), progress or (lambda stage, done, total: None)
    if seed < 0:
        raise InputError(f"seed is {seed}, must be at least 0")
    if not isinstance(codes, Tensor):
        raise InputError(f"codes are a {type(codes).__name__}, must be a torch.Tensor: dataset_codes gives one")
    if count < 2 or len(codes) < 2 * count:
        raise InputError(f"images are {count} and codes {len(codes)}; must be at least 2, and twice as many codes")
    rng = np.random.default_rng(seed)
    order = torch.from_numpy(rng.permutation(len(codes)))
    shuffled = shuffle_columns(codes, rng)[:count]
    own = {"prior": prior.sample(count, seed=seed), "floor": codes[order[:count]], "independent": shuffled}
    reference = {name: codes[order[count:]] if name == "floor" else codes for name in own}
    drawn = {"prior": images}
    for name in ("floor", "independent"):
        told = partial(report, f"sampling, {name}")
        drawn[name] = model.sample_prior(
            count, Given(own[name]), sampler=sampler, steps=steps, seed=seed, progress=told
        ).to(images.device)
    sets: dict[str, dict] = {
        name: {
            "frechet": _distance(encode_images(model, drawn[name]), reference[name]),
            "frechet_codes": _distance(own[name], reference[name]),
        }
        for name in own
    }
    if dataset.is_complete:
        everything = dataset.batches(CHUNK, partial(report, "nearest images"))
        found = nearest(torch.cat([drawn[name] for name in own]), everything).reshape(len(own), count)
        for name, indices in zip(own, found, strict=True):
            sets[name] |= _as_pictures(drawn[name], indices, dataset)
    return {"sets": sets, "chance": _chance(codes, count, rng), "images": count, "codes": len(codes)}


def _chance(codes: Tensor, count: int, rng: np.random.Generator) -> dict:
    orders = [torch.from_numpy(rng.permutation(len(codes))) for _ in range(DRAWS)]
    distances = [_distance(codes[order[:count]], codes[order[count:]]) for order in orders]
    return {"mean": float(np.mean(distances)), "std": float(np.std(distances)), "draws": DRAWS}


def shuffle_columns(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Codes (n, ...) with each number's values in an order of their own: what is left are the marginals."""
    flat = codes.flatten(1).numpy(force=True)
    return torch.from_numpy(rng.permuted(flat, axis=0)).reshape(codes.shape)


def format_judgement(judgement: dict) -> Table:
    """What `judge` says as a table: a column for each origin of the codes."""
    sets = judgement["sets"]
    table = Table(title=f"{judgement['images']} images, {judgement['codes']:,} codes of the data")
    table.add_column("codes from", overflow="fold")
    for name in sets:
        table.add_column(name, justify="right")
    rows = [(title, [of.get(key) for of in sets.values()]) for key, title in MEASURES.items()]
    for name in sets["prior"].get("factors", ()):
        rows.append(
            (f"{plain(name.replace('_', ' '))}, total variation", [of["factors"][name] for of in sets.values()])
        )
    for title, numbers in rows:
        if None not in numbers:
            table.add_row(title, *(f"{number:.3f}" for number in numbers))
    return table


def _distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(a.flatten(1).numpy(force=True), b.flatten(1).numpy(force=True))


def _as_pictures(images: Tensor, indices: np.ndarray, dataset: Dataset) -> dict:
    """Read by the true images of these indices: how far off the images are, and how the factors are distributed."""
    difference = (images.cpu() - to_float(dataset.images(indices))) / 2
    factors = {}
    for name, size, values in zip(dataset.factor_names, dataset.factor_sizes, dataset.factors(indices).T, strict=True):
        share = np.bincount(values, minlength=size) / len(values)
        factors[name] = float(abs(share - 1 / size).sum() / 2)  # each value is as frequent in a grid
    return {"distance": float(difference.square().flatten(1).mean(1).sqrt().mean()), "factors": factors}
