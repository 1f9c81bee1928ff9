"""Which direction moves a factor and keeps the others: the pattern or the weights; `python -m bench.directions room64`.

Images of the room are moved along the direction fitted to one factor. What comes out is read by the nearest of all true
images, and compared with how the image itself is read once it is rebuilt.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from encdiff import EncDiff, open_dataset, to_float
from encdiff.data import Dataset
from encdiff.evaluation import encode_dataset, factor_labels, fit_direction
from encdiff.metrics.counterfactual import nearest

LABELS = [("scale", None), ("orientation", None), ("shape", 2), ("floor_hue", 2), ("wall_hue", 2), ("object_hue", 2)]
STRENGTHS = (-3, -2, -1, 1, 2, 3)


def reader(room: Dataset) -> Callable[[Tensor], np.ndarray]:
    """A function of images (n, 3, S, S) to the factors int64 (n, F) of the nearest true image of each."""
    true = room.images(np.arange(len(room)))
    return lambda images: room.factors(nearest(images, [true]))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Rates over images and over all strengths of 1, 2 or 3 toward which the factor can still move."""
    parser = argparse.ArgumentParser(prog="python -m bench.directions", description=__doc__)
    parser.add_argument("model", nargs="?", default="room64")
    parser.add_argument("--data", default="procedural:5,5,5,4,4,5")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args(arguments)
    model = EncDiff.from_pretrained(given.model).eval()
    room = open_dataset(given.data, model.config.image_size)
    every, read = np.arange(len(room)), reader(room)
    codes = encode_dataset(model.encode, room)
    chosen = np.random.default_rng(0).choice(len(room), given.images, replace=False)
    images = to_float(room.images(chosen))
    before = read(model.reconstruct(images, steps=given.steps))
    print("label          along     score  " + "  ".join(f"moved, kept at {s:+d}" for s in STRENGTHS))
    for factor, value in LABELS:
        labels, column = factor_labels(room, every, factor, value), room.factor_names.index(factor)
        for along in ("pattern", "weights"):
            found = fit_direction(codes, labels.values, along=along)
            rates = []
            for strength in STRENGTHS:
                after = read(model.edit(images, found, strength, steps=given.steps))
                moved = moves(before[:, column], after[:, column], value, strength, room.factor_sizes[column])
                kept = (np.delete(after == before, column, axis=1)).all(1).mean()
                rates.append(f"{moved:12.2f}  {kept:.2f}")
            print(f"{labels.name:14} {along:9} {found.score:.3f}  " + "  ".join(rates), flush=True)


def moves(before: np.ndarray, after: np.ndarray, value: int | None, strength: int, size: int) -> float:
    """The share of images that moved as they should, among those that could.

    A factor with an order should rise or fall with the strength; one without should come to its value, or leave it.
    """
    if value is None:
        could = before < size - 1 if strength > 0 else before > 0
        did = (after > before) if strength > 0 else (after < before)
    else:
        could = (before != value) == (strength > 0)
        did = (after == value) == (strength > 0)
    return float(did[could].mean()) if could.any() else float("nan")


if __name__ == "__main__":
    main()
