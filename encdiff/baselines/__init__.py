"""The VAEs that disentanglement is compared with, on EncDiff's image encoder, data, loop and protocol.

    model = VAE(PRESETS["annealvae"])
    train_vae(model, open_dataset("procedural", 32), "runs/anneal", vae_recipe("annealvae"))
    evaluate(model, data)

Import the names below from here; the room stands on models, pictures and training.
"""

from encdiff.baselines.config import VAEConfig
from encdiff.baselines.loading import load_concepts
from encdiff.baselines.model import VAE
from encdiff.baselines.recipes import PRESETS, RECIPES, vae_config, vae_recipe
from encdiff.baselines.training import VAETrainConfig, VAETraining, train_vae

__all__ = [
    "PRESETS", "RECIPES", "VAE", "VAEConfig", "VAETrainConfig", "VAETraining", "load_concepts", "train_vae",
    "vae_config", "vae_recipe",
]  # fmt: skip
