"""What is compared: EncDiff, its variants and other objectives, and the VAEs, each on the same encoder and data."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encdiff.baselines import VAE, VAETraining, train_vae, vae_config, vae_recipe
from encdiff.data import Dataset
from encdiff.errors import InputError
from encdiff.experiments.ablations import ablated
from encdiff.experiments.phases import once, train_once
from encdiff.models import ConceptModel, EncDiff
from encdiff.models.config import OBJECTIVES
from encdiff.training import TrainConfig
from encdiff.training.step import Training

PRESET, REFERENCE, UNTRAINED = "quickstart", "encdiff", "untrained"
ABLATED = {  # method: ablation
    REFERENCE: "unchanged", "adagn": "adagn", "vectors": "vectors", "shared": "shared", "flow": "flow",
    "flow-orthogonal": "flow-orthogonal", "dyga": "dyga", "mutual-information": "mutual-information",
}  # fmt: skip
VAES = ("annealvae", "beta-vae", "beta-tcvae", "factor-vae", "dip-vae")

Advance = Callable[[Tensor, Tensor], Any]  # images uint8 (B, S, S, 3) and their indices (B,): a step


@dataclass(frozen=True)
class Method(ABC):
    """A way to learn concepts, by name."""

    name: str

    @abstractmethod
    def model(self) -> ConceptModel:
        """A new, untrained one."""

    @abstractmethod
    def steps(self, batch_size: int, device: str) -> Advance:
        """What makes steps on a new model, to be timed."""

    @abstractmethod
    def train(self, run: Path, dataset: Dataset, *, steps: int, batch_size: int, seed: int, device: str) -> None:
        """Train in the folder `run`, as far as that is not done."""


class Diffusion(Method):
    """EncDiff with an ablation or another objective."""

    def model(self) -> EncDiff:
        return EncDiff(ablated(PRESET, ABLATED.get(self.name, "unchanged")))

    def recipe(self, **changes: Any) -> TrainConfig:
        return TrainConfig.from_preset(PRESET, objective=self.name if self.name in OBJECTIVES else None, **changes)

    def steps(self, batch_size: int, device: str) -> Advance:
        return Training(self.model().to(device), self.recipe(batch_size=batch_size)).advance

    def train(self, run: Path, dataset: Dataset, *, steps: int, batch_size: int, seed: int, device: str) -> None:
        recipe = self.recipe(steps=steps, batch_size=batch_size, seed=seed)
        train_once(run, self.model().config, recipe, dataset, device=device)


class Autoencoder(Method):
    """A VAE."""

    def model(self) -> VAE:
        return VAE(vae_config(self.name))

    def steps(self, batch_size: int, device: str) -> Advance:
        return VAETraining(self.model().to(device), vae_recipe(self.name, batch_size=batch_size)).advance

    def train(self, run: Path, dataset: Dataset, *, steps: int, batch_size: int, seed: int, device: str) -> None:
        config, recipe = vae_config(self.name), vae_recipe(self.name, steps=steps, batch_size=batch_size, seed=seed)

        def start(resume: bool, overwrite: bool) -> None:
            torch.manual_seed(recipe.seed)
            train_vae(VAE(config).to(device), dataset, run, recipe, resume=resume, overwrite=overwrite)

        once(run, config.described(), recipe, dataset, start)


METHODS: dict[str, Method] = {name: Diffusion(name) for name in ABLATED} | {name: Autoencoder(name) for name in VAES}
METHODS[UNTRAINED] = Diffusion(UNTRAINED)


def method(name: str) -> Method:
    """By its name in METHODS."""
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown, must be one of {', '.join(METHODS)}")
    return METHODS[name]
