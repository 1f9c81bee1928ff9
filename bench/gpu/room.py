"""The procedural room with every image in the device's memory."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.gpu.lab import Lab
from encdiff.data.procedural import FACTOR_SIZES, SHAPES, ProceduralShapes3D, factor_labels, render, view
from encdiff.files.temporaries import atomic_path

SMALL = (2, 2, 2, 2, 4, 3)  # the grid without a GPU


class Room(ProceduralShapes3D):
    """The procedural room with every image in memory: `pixels` uint8 (n, S, S, 3) on the device."""

    def __init__(self, lab: Lab):
        super().__init__(lab.config.image_size, SMALL if lab.cpu else FACTOR_SIZES)
        if lab.cpu:
            self.pixels = torch.from_numpy(super().images(np.arange(len(self))))
        else:
            self.pixels = coloured(lab.device, self.image_size, lab.caches / "views.npy")
            some = np.random.default_rng(0).integers(len(self), size=256)
            if not np.array_equal(self.images(some), render(self.factors(some), self.image_size)):
                raise AssertionError("images coloured on the device differ from the renderer's")

    def images(self, indices) -> np.ndarray:
        return self.pixels[torch.as_tensor(np.asarray(indices))].cpu().numpy()


def traced(size: int, kept: Path) -> np.ndarray:
    """Every view of the room, uint8 (480, S*S, 4); traced by all cores, or as `kept` has it."""
    if not kept.exists():
        labels = factor_labels()
        asked = [(s, SHAPES[int(k)], o, size) for s in labels[3] for k in labels[4] for o in labels[5]]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            views = np.stack(list(pool.map(view, *zip(*asked, strict=True), chunksize=8)))
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as temporary:
            np.save(temporary, views)
    return np.load(kept)


def coloured(device: torch.device, size: int, kept: Path) -> Tensor:
    """Every image of the full grid, uint8 (480000, S, S, 3), in the data set's order."""
    labels = factor_labels()
    views = torch.from_numpy(traced(size, kept).astype(np.float32)).to(device)
    hues = _palette(labels[0]).to(device)
    white = torch.full((1, 3), 255.0, device=device)
    out = torch.empty(1000, len(views), size * size, 3, dtype=torch.uint8, device=device)
    for n in range(1000):  # whole numbers below 2**24: exact in any order of summation
        colours = torch.cat([hues[[n // 100, n // 10 % 10, n % 10]], white])
        total = (views[..., None] * colours).sum(2)
        out[n] = (total / 255 + 0.5).clamp(max=255).to(torch.uint8)
    return out.view(-1, size, size, 3)


def _palette(hues: np.ndarray) -> Tensor:
    import colorsys

    from encdiff.data.procedural import SATURATION, VALUE

    return torch.tensor([[round(255 * v) for v in colorsys.hsv_to_rgb(h, SATURATION, VALUE)] for h in hues]).float()
