"""Training a VAE: the loop, data and optimiser of every training, its objective, what its log says."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from encdiff.baselines.model import VAE
from encdiff.baselines.objectives import capacity
from encdiff.checked import Batch, Count, Fraction, Natural, NotNegative, Positive, check_types
from encdiff.data import Dataset, to_float
from encdiff.distributed.processes import processes
from encdiff.errors import InputError
from encdiff.pictures import save_png, swap_grid
from encdiff.training.descent import Descent
from encdiff.training.loop import fit
from encdiff.training.recipes import DescentConfig

TOLD = {
    "tc": ("total_correlation",),
    "factor": ("total_correlation", "discriminator"),
    "dip-i": ("dip",),
    "dip-ii": ("dip",),
}


@dataclass(frozen=True)
class VAETrainConfig(DescentConfig):
    """How to train a VAE; the defaults are those of Locatello et al. 2019."""

    steps: Count = 300_000
    batch_size: Batch = 64
    learning_rate: Positive = 1e-4
    warmup: Natural = 0
    weight_decay: NotNegative = 0.0
    ema: Fraction = 0.0  # no average: the decoder as it stands

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shard", "checkpoint_activations"):
            if getattr(self, name):
                raise InputError(f"{name} is True, must be False: a VAE has no U-Net")


class VAETraining(Descent):
    """`Descent` of a VAE's objective on images."""

    model: VAE
    config: VAETrainConfig

    def __init__(self, model: VAE, config: VAETrainConfig, masters: bool | None = None):
        _check_whole(model.config.objective, config)
        super().__init__(model, "decoder", config, masters=masters)
        self.told = ("reconstruction", *TOLD.get(model.config.objective, ()))
        latents = tuple(f"kl_{i}" for i in range(model.config.concepts))
        c = ("capacity",) if model.config.objective == "anneal" else ()
        self.TERMS = (*type(self).TERMS, *self.told, "kl", *c, *latents)
        # of the last step, in place: a captured step and a compiled one write here
        self._told = torch.zeros(len(self.told) + len(latents), device=self.device)

    def capacity(self) -> float | None:
        """AnnealVAE's C, in nats, in the next step."""
        c = self.model.config
        if c.capacity is None or c.capacity_rise is None:
            return None
        return capacity(self.step, self.config.steps, c.capacity, c.capacity_rise)

    def advance(self, images: Tensor, indices: Tensor) -> dict[str, Tensor | float]:
        """One step on images uint8 (B, S, S, 3), on the model's device; returns TERMS, every `log_every` steps all."""
        c = self.capacity()
        self._told.zero_()
        given = {} if c is None else {"capacity": torch.full((), c, device=self.device)}
        terms = self.descend(images=images, **given)
        if self.step % self.config.log_every and self.step != self.config.steps:
            return terms
        told = self._told.clone()
        processes().mean_(told)
        latents = told[len(self.told) :]
        terms |= {"kl": latents.sum()} | ({} if c is None else {"capacity": c})
        return terms | dict(zip(self.told, told, strict=False)) | {f"kl_{i}": of for i, of in enumerate(latents)}

    def _loss(  # type: ignore[override]  # what `advance` gives
        self, images: Tensor, sample_ids: Tensor, draw: Tensor, capacity: Tensor | None = None
    ) -> Tensor:
        images = to_float(images).contiguous(memory_format=torch.channels_last)
        with self._autocast():
            terms = self.computing.terms(
                images, seed=self.config.seed, sample_ids=sample_ids, draw=draw, capacity=capacity
            )
        with torch.no_grad():
            self._told.add_(torch.cat([*(terms[k][None] for k in self.told), terms["kl"]]) / self.config.accumulate)
        return terms["loss"]

    def model_config(self) -> dict:
        return self.model.config.described()

    def picture(self, images: Tensor, samples: Path) -> Path | None:
        """A swap grid of images uint8 (n, S, S, 3), the first half with the second; none of a single image."""
        if not (half := len(images) // 2):
            return None
        images = to_float(images)
        path = samples / f"swap-{self.step:07d}.png"
        save_png(swap_grid(self.averaged_model(), images[:half], images[half : 2 * half]), path)
        return path


def _check_whole(objective: str, config: VAETrainConfig) -> None:
    """InputError where the batch comes in parts, but the objective is no mean over its rows."""
    if objective == "beta":
        return
    for said, parts in (("accumulate", config.accumulate), ("processes", processes().size)):
        if parts > 1:
            raise InputError(f"{said} is {parts}, must be 1 for objective {objective!r}, which is of a whole batch")
    if config.batch_size < 2 and objective != "anneal":
        raise InputError(f"batch_size is {config.batch_size}, must be at least 2 for objective {objective!r}")


def train_vae(
    model: VAE,
    dataset: Dataset,
    run_dir: str | Path,
    config: VAETrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    on_step: Callable[[VAETraining], None] | None = None,
) -> VAE:
    """Train `model` in place on a data set and return a copy; every checkpoint saves it in `run_dir/model`.

    Args, the run's folder, stops and errors as in `encdiff.train`.
    """
    check_types(
        model=(model, VAE, ""), dataset=(dataset, Dataset, "open_dataset"),
        config=(config, VAETrainConfig, "vae_recipe"),
    )  # fmt: skip
    if dataset.image_size != model.config.image_size:
        raise InputError(f"{dataset.name}: images of {dataset.image_size}, the model takes {model.config.image_size}")
    training = VAETraining(model, config)
    fit(training, dataset, run_dir, resume=resume, overwrite=overwrite, tensorboard=tensorboard, on_step=on_step)
    return training.averaged_model()
