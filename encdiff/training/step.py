"""Training EncDiff: noise, predict, compare; AdamW, warm-up, EMA of the U-Net."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from encdiff import ops
from encdiff.checked import check_types
from encdiff.data import Dataset, to_float
from encdiff.data.loader import READ, Batches
from encdiff.distributed.processes import processes
from encdiff.distributed.rows import shared_rows
from encdiff.engine import float32_precision
from encdiff.errors import InputError
from encdiff.files.checkpoint import positive_number
from encdiff.models import EncDiff
from encdiff.pictures import save_png, swap_grid
from encdiff.training.descent import Descent
from encdiff.training.loop import fit
from encdiff.training.recipes import TrainConfig


class Training(Descent):
    """`Descent` of an EncDiff's loss on images; see that for `masters` and `aside`."""

    model: EncDiff
    config: TrainConfig

    def __init__(self, model: EncDiff, config: TrainConfig, masters: bool | None = None, aside: bool = True):
        _check_whole(model, config)
        model.unet.checkpoint_activations = config.checkpoint_activations
        super().__init__(model, "unet", config, [model.first_stage], masters, aside)
        self.latents: Tensor | None = None  # of the whole data set, if that pays

    def begin(self, samples: Tensor) -> None:
        """Divide latents by their standard deviation over the first batch, as the published code does."""
        if self.model.config.first_stage == "vq":
            with torch.no_grad(), float32_precision(self.config.precision != "float32"):
                deviation = _deviation(self.model.first_stage.encode(to_float(samples)))
            if not (math.isfinite(deviation) and deviation > 0):
                raise InputError(f"first stage: its latents have standard deviation {deviation}; is it trained?")
            self.model.config = replace(self.model.config, scaling_factor=1 / deviation)

    def prepare(self, batches: Batches) -> None:
        """Encode the whole data set once, if the run will see each image more often and the latents can be kept."""
        visits = self.config.steps * self.config.batch_size
        if self.model.config.first_stage == "vq" and batches.resident and visits > len(batches.dataset):
            shape = (len(batches.dataset), *self.model.latent_shape)

            def fill(part: np.ndarray, start: int) -> None:
                encoded = (self.model.to_latents(to_float(x)) for x in batches.everything(start, start + len(part)))
                np.concatenate([latents.cpu().numpy() for latents in encoded], out=part)

            with float32_precision(self.config.precision != "float32"):
                latents = shared_rows(shape, np.float32, fill, processes(), READ)
            self.latents = torch.from_numpy(latents).to(self.device)

    def advance(self, images: Tensor, indices: Tensor) -> dict[str, Tensor | float]:
        """One step on images uint8 (B, S, S, 3) and their indices int64 (B,), on the model's device; returns TERMS."""
        x0 = {} if self.latents is None else {"x0": self.latents[indices]}
        return self.descend(images=images, **x0)

    def _loss(  # type: ignore[override]  # what `advance` gives
        self, images: Tensor, sample_ids: Tensor, draw: Tensor, x0: Tensor | None = None
    ) -> Tensor:
        c, model = self.config, self.computing
        t = ops.timesteps(model.config.num_timesteps, c.seed, sample_ids, draw, kind=c.timesteps)
        images = to_float(images).contiguous(memory_format=torch.channels_last)
        x0 = self.model.to_latents(images) if x0 is None else x0  # in float32, whatever the rest computes in
        with self._autocast():
            return model.loss(images, t=t, x0=x0, seed=c.seed, sample_ids=sample_ids, draw=draw)

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, str], source: Path) -> None:
        """Continue from `tensors`; InputError, naming `source`, if they are of another configuration."""
        super().load(tensors, metadata, source)
        scale = positive_number(metadata.get("scaling_factor"), "scaling_factor", source)
        self.model.config = replace(self.model.config, scaling_factor=scale)

    def picture(self, images: Tensor, samples: Path) -> Path | None:
        """A swap grid of images uint8 (n, S, S, 3), the first half with the second; none of a single image."""
        if not (half := len(images) // 2):
            return None
        images = to_float(images)
        path = samples / f"swap-{self.step:07d}.png"
        save_png(swap_grid(self.averaged_model(), images[:half], images[half : 2 * half], steps=20), path)
        return path


def _check_whole(model: EncDiff, config: TrainConfig) -> None:
    """InputError where the batch comes in parts, but the objective is no mean over its rows."""
    names = [n for n in ("anchors", "mutual_information", "orthogonality") if getattr(model.config, n)]
    parts = {"accumulate": config.accumulate, "processes": processes().size}
    if names and (cut := [part for part, count in parts.items() if count > 1]):
        raise InputError(f"{cut[0]} is {parts[cut[0]]}, must be 1: {names[0]} is of a whole batch")
    if names and config.batch_size < 2:
        raise InputError(f"batch_size is {config.batch_size}, must be at least 2 for {names[0]}")


def _deviation(latents: Tensor) -> float:
    """The standard deviation over the latents of all processes, which hold equally many."""
    if processes().size == 1:
        return latents.std().item()
    mean = latents.double().mean()
    processes().mean_(mean)
    variance = (latents.double() - mean).square().mean()
    processes().mean_(variance)
    total = latents.numel() * processes().size
    return math.sqrt(variance.item() * total / (total - 1))


def train(
    model: EncDiff,
    dataset: Dataset,
    run_dir: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    on_step: Callable[[Training], None] | None = None,
) -> EncDiff:
    """Train `model` in place on a data set and return its averaged copy; every checkpoint saves it in `run_dir/model`.

    Args:
        model: on the device to train on.
        dataset: of the model's image size.
        run_dir: see `RunFolder`; refused when it holds something, unless `resume` or `overwrite`.
        resume: continue from the folder's checkpoint; on a CPU to the same weights as an unbroken run, to the bit.
        tensorboard: also write TensorBoard events, if that package is there.
        on_step: called after every step.

    Ctrl-C and SIGTERM end after the current step, with a checkpoint; `Stopped` is then raised.

    Raises:
        InputError: a data set of another image size, a folder or checkpoint that does not fit, or a loss that is no
            longer finite.
    """
    check_types(
        model=(model, EncDiff, ""), dataset=(dataset, Dataset, "open_dataset"),
        config=(config, TrainConfig, "TrainConfig.from_preset"),
    )  # fmt: skip
    if dataset.image_size != model.config.image_size:
        raise InputError(f"{dataset.name}: images of {dataset.image_size}, the model takes {model.config.image_size}")
    if config.batch_size < 2 and model.config.normalize_scalars:
        raise InputError(f"batch_size is {config.batch_size}, must be at least 2 for a model with normalize_scalars")
    training = Training(model, config)
    fit(training, dataset, run_dir, resume=resume, overwrite=overwrite, tensorboard=tensorboard, on_step=on_step)
    return EncDiff.from_pretrained(Path(run_dir) / "model") if training.sharded else training.averaged_model()
