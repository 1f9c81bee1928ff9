"""Concepts of your own images: train on a folder of pictures, then put concepts of one picture into another.

    python examples/own_images.py                             # seconds; makes a folder of pictures first
    python examples/own_images.py photos --steps 3000         # your png, jpg or webp files, in any subfolders

Look at `swap.png`: a row is a pair of pictures, a column the target with one concept taken from the source; where a
column differs from `reconstructed`, you see what its concept holds. The few steps of the default give blurred pictures,
in which some concepts hold the colour of a surface, or of half of one, and others nothing yet. The loss, in
`runs/own_images/log.csv`, should fall all the while. `docs/recipes.md` says what more steps give.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from encdiff import PRESETS, EncDiff, TrainConfig, open_dataset, to_float, train
from encdiff.pictures import save_png, swap_grid


def make_folder(folder: Path, images: int = 500) -> None:
    """Pictures of a room in six factors, where you have none at hand."""
    room = open_dataset("procedural:5,5,5,4,4,5", image_size=32)
    folder.mkdir()
    rows = np.random.default_rng(0).choice(len(room), images, replace=False)
    for i, pixels in enumerate(room.images(rows)):
        Image.fromarray(pixels).save(folder / f"{i}.png")


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("folder", type=Path, nargs="?", default=Path("images"))
parser.add_argument("--steps", type=int, default=150)
options = parser.parse_args()
if options.folder == Path("images") and not options.folder.exists():
    make_folder(options.folder)

data = open_dataset(options.folder, image_size=32)  # resized by the shorter side and cropped at the centre
model = EncDiff(replace(PRESETS["quickstart"], concepts=10))  # as many concepts as you expect factors, and some more
recipe = TrainConfig.from_preset("quickstart", steps=options.steps)
model = train(model, data, "runs/own_images", recipe, overwrite=True)  # the averaged one, which the run keeps in model/

pictures = to_float(data.images([0, len(data) // 3, len(data) // 2, len(data) - 1]))  # (4, 3, 32, 32) in [-1, 1]
save_png(swap_grid(model, sources=pictures[:2], targets=pictures[2:]), "swap.png")
print(f"{len(data)} pictures, {options.steps} steps of {recipe.batch_size}: look at swap.png")
