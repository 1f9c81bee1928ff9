"""What swaps and traversals are judged by: the true images of a complete grid, of which the nearest reads an output."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from encdiff.checked import check_types
from encdiff.data import Dataset, to_float
from encdiff.engine import SamplingEngine
from encdiff.errors import InputError
from encdiff.evaluation.encode import Encode
from encdiff.evaluation.protocol import Report
from encdiff.metrics.counterfactual import blurred, nearest
from encdiff.models import ConceptModel, EncDiff
from encdiff.models.mode import evaluating

Draw = Callable[[Tensor], Tensor]  # codes (B, N) -> images (B, 3, S, S) in [-1, 1]
BATCH, CHUNK = 64, 2048  # images encoded, drawn or blurred at once; true images in memory at once
KNOWN = 2000  # images that tell what a concept carries, and its range
BLURS: dict[str, Draw] = {f"blurred {n}x{n}": partial(blurred, factor=n) for n in (2, 4)}


def silent(stage: str, done: int, total: int) -> None:
    """A report to nobody."""


class Judge(NamedTuple):
    """A model and the grid that knows the right answers."""

    encoder: Encode
    drawer: Draw
    dataset: Dataset
    device: torch.device
    limits: dict[str, Draw]  # by name, what a true image may lose before it is judged
    report: Report

    @torch.no_grad()
    def encode(self, rows: np.ndarray) -> Tensor:
        """Codes (n, N) of the images at these indices."""
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        codes = torch.cat([torch.as_tensor(self.encoder(self.images(part))) for part in parts])
        if codes.ndim < 2 or len(codes) != len(rows) or not codes.isfinite().all():
            raise InputError(f"encode gave codes {tuple(codes.shape)}, must give ({len(rows)}, N), finite")
        return codes

    @torch.no_grad()
    def draw(self, codes: Tensor) -> Tensor:
        """Images (n, 3, S, S) of codes (n, N)."""
        done: list[Tensor] = []
        for part in codes.split(BATCH):
            done.append(self._checked(self.drawer(part), len(part)))
            self.report("draw", sum(map(len, done)), len(codes))
        return torch.cat(done)

    def limited(self, images: Tensor) -> list[Tensor]:
        """Images (n, 3, S, S) as each of the limits leaves them."""
        return [torch.cat([lose(part) for part in images.split(BATCH)]) for lose in self.limits.values()]

    def _checked(self, images: Any, count: int) -> Tensor:
        size = self.dataset.image_size
        if not isinstance(images, Tensor) or images.shape != (count, 3, size, size):
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"draw gave {found}, must give a torch.Tensor ({count}, 3, {size}, {size})")
        if not images.is_floating_point() or not images.abs().max() <= 1.5:  # false for NaN; a decoder may overshoot
            raise InputError(
                f"draw gave {images.dtype} up to {images.abs().max():.4g}, must be floating point in [-1, 1]"
            )
        return images.to(self.device, torch.float32)

    def images(self, rows: np.ndarray) -> Tensor:
        """True images (n, 3, S, S) at these indices."""
        return to_float(self.dataset.images(rows)).to(self.device)

    def read(self, images: Tensor) -> np.ndarray:
        """Factors int64 (n, F) of the true images that are nearest."""
        return self.dataset.factors(nearest(images, self.dataset.batches(CHUNK, partial(self.report, "judge"))))


def check_complete(dataset: Dataset) -> None:
    """InputError unless the data set holds the right answers."""
    check_types(dataset=(dataset, Dataset, "open_dataset"))
    if not dataset.is_complete:
        raise InputError(f"{dataset.name} is no complete grid of factors with one image each, which judges outputs")


def judge_of(
    model: ConceptModel | Encode, dataset: Dataset, draw: Draw | None, report: Report | None, **sampling
) -> Judge:
    """The judge of a model, drawn with the options of `EncDiff.sample`, or of a function of images and `draw`."""
    check_complete(dataset)
    for name, given in (("model", model), ("draw", draw)):
        if given is not None and not callable(given):
            raise InputError(f"{name} is a {type(given).__name__}, must be a function (model: or an EncDiff)")
    if not isinstance(model, ConceptModel):
        if draw is None:
            raise InputError("draw is None, must be a function of codes to images where the encoder is a function")
        return Judge(model, draw, dataset, torch.device("cpu"), BLURS, report or silent)
    size = model.config.image_size
    if dataset.image_size != size:
        raise InputError(f"{dataset.name}: images of {dataset.image_size}, the model takes {size}")

    def encode(images: Tensor) -> Tensor:
        with evaluating(model):
            return model.encode(images)

    device = next(model.parameters()).device
    if not isinstance(model, EncDiff):
        return Judge(encode, draw or partial(model.sample, **sampling), dataset, device, BLURS, report or silent)

    def first_stage(images: Tensor) -> Tensor:
        dtype = next(model.unet.parameters()).dtype
        return model.to_images(model.to_latents(images.to(dtype))).float()

    limits = {"first stage": first_stage} | BLURS
    return Judge(encode, draw or SamplingEngine(model, **sampling), dataset, device, limits, report or silent)
