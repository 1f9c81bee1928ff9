"""Models ranked without factors, by how well their codes agree."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from encdiff import __version__
from encdiff.data import Dataset, describe
from encdiff.errors import InputError
from encdiff.evaluation.encode import encode_dataset
from encdiff.evaluation.judge import silent
from encdiff.evaluation.protocol import Report
from encdiff.evaluation.scoring import encoder_of
from encdiff.metrics import udr
from encdiff.metrics.factor_vae import check_at_least
from encdiff.models import ConceptModel

Encoded = np.ndarray | tuple[ConceptModel, Dataset]  # codes (n, N) of n images, or what gives them


def rank_models(
    given: Mapping[str, Encoded],
    *,
    images: int = 10_000,
    kind: str = "spearman",
    seed: int = 0,
    progress: Report = silent,
) -> dict:
    """`metrics.udr` of two models or more, in order, on the same images, of which at most `images` are drawn by `seed`.

    given: by name, codes (n, N) floats of all images, or a model and the data it encodes; data must be the same but for
    the size of its images. `progress(name, done, total)` follows the encoding. Returns what `udr` does, `models`, and
    what it depends on, as JSON can hold it. Raises InputError as `udr`, and for models of other images.
    """
    check_at_least(2, images=images)
    data = {name: describe(each[1]) for name, each in given.items() if isinstance(each, tuple)}
    count = _check_same(given, data)
    rows = np.sort(np.random.RandomState(seed).permutation(count)[:images])
    codes = [_codes(each, rows, lambda *at, name=name: progress(name, *at)) for name, each in given.items()]
    found = {key: value.tolist() for key, value in udr(codes, kind=kind).items()}
    about = {"kind": kind, "images": len(rows), "seed": seed, "data": next(iter(data.values()), None)}
    return {"models": list(given), **found, **about, "version": __version__}


def _check_same(given: Mapping[str, Encoded], data: Mapping[str, dict]) -> int:
    """The number of images; InputError unless it is one, and one data set."""
    counts = {name: len(each[1]) if isinstance(each, tuple) else len(each) for name, each in given.items()}
    for name, count in counts.items():
        if count != (most := max(counts.values())):
            raise InputError(
                f"{name}: has codes of {count} images and others of {most}; all must be of the same images"
            )
    seen: dict[int, tuple[str, str]] = {}
    for name, about in data.items():
        first, content = seen.setdefault(about["image_size"], (name, about["sha256"]))
        if about["sha256"] != content:
            raise InputError(f"{name}: encodes other images than {first}; all must encode the same data")
    return max(counts.values(), default=0)


def _codes(each: Encoded, rows: np.ndarray, progress: Any) -> np.ndarray:
    if not isinstance(each, tuple):
        return each[rows]
    return encode_dataset(encoder_of(*each), each[1], rows=rows, progress=progress)
