"""Bias of a prior taken out by an edit: `python -m bench.debias room32 shape:0,2`, or of two factors at once.

A prior is fitted to codes of images in which the first of each factor's values is more frequent. Images drawn from it
are read by the nearest of all true images. The loop of MIST edits the model until the values, or with several factors
their combinations, are as frequent as each other; then images are drawn by another seed, before and after.
"""

import argparse
import time
from collections.abc import Callable
from itertools import product

import numpy as np
import torch

from encdiff import EncDiff, open_dataset, to_float
from encdiff.data import Dataset
from encdiff.edit import debias, factor_concepts, factor_tokens, joint_attributes
from encdiff.metrics.counterfactual import nearest
from encdiff.models.batches import encode_images
from encdiff.prior import fit_prior

Chosen = dict[int, list[int]]  # a factor's column -> the values that are there


def parse(factors: list[str], room: Dataset) -> Chosen:
    """Of texts such as shape:0,2."""
    found = {}
    for text in factors:
        name, _, values = text.partition(":")
        found[room.factor_names.index(name.replace(" ", "_"))] = [int(value) for value in values.split(",")]
    return found


def skewed_rows(room: Dataset, chosen: Chosen, skew: float, count: int) -> np.ndarray:
    """Indices of images with these values alone, drawn so that the first of each has the share `skew`."""
    factors = room.factors(np.arange(len(room)))
    weight = np.ones(len(room))
    for column, values in chosen.items():
        share = np.zeros(room.factor_sizes[column])
        share[values] = (1 - skew) / (len(values) - 1)
        share[values[0]] = skew
        weight *= share[factors[:, column]]
    return np.random.default_rng(0).choice(len(room), count, p=weight / weight.sum())


def reader(room: Dataset) -> Callable[[torch.Tensor], np.ndarray]:
    true = room.images(np.arange(len(room)))
    return lambda images: room.factors(nearest(images, [true]))


def shares_of(read: np.ndarray, chosen: Chosen) -> np.ndarray:
    """Of every combination of values, the last factor fastest."""
    columns = list(chosen)
    return np.array([(read[:, columns] == values).all(1).mean() for values in product(*chosen.values())])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.debias", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("factors", nargs="+", help="such as shape:0,2")
    parser.add_argument("--data", default="procedural:5,5,5,4,4,5")
    parser.add_argument("--method", default="mist")
    parser.add_argument("--skew", type=float, default=0.8)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--fresh", type=int, default=1000, help="images by another seed")
    given = parser.parse_args(arguments)
    model = EncDiff.from_pretrained(given.model)
    room = open_dataset(given.data, model.config.image_size)
    chosen, read = parse(given.factors, room), reader(room)
    rows = skewed_rows(room, chosen, given.skew, 2000)
    codes, factors = encode_images(model, to_float(room.images(rows))), room.factors(rows)
    prior = fit_prior(codes, seed=0)
    owned = [factor_concepts(model, room, room.factor_names[column]) for column in chosen]
    tokens = [factor_tokens(model, codes, factors[:, f], own) for f, own in zip(chosen, owned, strict=True)]
    others = [c for c in range(model.config.concepts) if not any(c in own for own in owned)]
    with torch.no_grad():
        spread = model.tokens(torch.quantile(codes, torch.linspace(0.02, 0.98, 5), dim=0))[:, others].flatten(0, 1)

    def draw(count: int, seed: int) -> np.ndarray:
        return read(model.sample_prior(count, prior, steps=given.steps, seed=seed))

    began = time.perf_counter()
    found = debias(
        model, *joint_attributes(*tokens), lambda _: shares_of(draw(given.images, 1), chosen), spread,
        method=given.method, rate=given.rate, tolerance=given.tolerance, rounds=given.rounds,
        progress=lambda i, shares: print(i, np.round(shares, 3), flush=True),
    )  # fmt: skip
    print(f"{len(found.shares) - 1} rounds, balanced {found.balanced}, {time.perf_counter() - began:.0f} s")
    before = draw(given.fresh, 2)
    found.edit.apply(model)
    after = draw(given.fresh, 2)
    for name, of in (("before", before), ("after", after)):
        print(f"another seed, {name}: shares {np.round(shares_of(of, chosen), 3)}")
    print(
        "total variation of the other factors between before and after, and images in which each is read differently:"
    )
    for column, name in enumerate(room.factor_names):
        if column not in chosen:
            size = room.factor_sizes[column]
            counts = [np.bincount(of[:, column], minlength=size) / len(of) for of in (before, after)]
            differ = (before[:, column] != after[:, column]).mean()
            print(f"  {name}: {abs(counts[0] - counts[1]).sum() / 2:.3f}, {differ:.3f}")


if __name__ == "__main__":
    main()
