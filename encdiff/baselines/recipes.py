"""Named VAEs, and how to train them: small enough to learn within minutes on a CPU (docs/howto/baselines.md)."""

from dataclasses import replace
from typing import Any

from encdiff.baselines.config import VAEConfig
from encdiff.baselines.training import VAETrainConfig
from encdiff.errors import InputError

# as EncDiff's `quickstart`: 32x32 images, an encoder of 32 channels
SMALL = VAEConfig(image_size=32, encoder_width=32)
PRESETS: dict[str, VAEConfig] = {
    # a constraint less stiff than the published one, whose capacity rises slowly to little more than the data needs
    "annealvae": replace(SMALL, objective="anneal", beta=None, gamma=30.0, capacity=12.0, capacity_rise=0.9),
    "beta-vae": SMALL,
    "beta-tcvae": replace(SMALL, objective="tc", beta=6.0),
    "factor-vae": replace(SMALL, objective="factor", beta=None, discriminator_width=256),
    "dip-vae": replace(SMALL, objective="dip-ii", beta=None),
}
RECIPE = VAETrainConfig(steps=3000, learning_rate=2e-3, warmup=100, decay=0.3, picture_every=1000)
RECIPES: dict[str, VAETrainConfig] = dict.fromkeys(PRESETS, RECIPE)


def vae_config(name: str, **changes: Any) -> VAEConfig:
    """A named configuration with some fields changed."""
    return PRESETS[_known(name)].changed(**changes)


def vae_recipe(name: str, **changes: Any) -> VAETrainConfig:
    """A named recipe with some fields changed; the learning rate follows a changed batch size unless given."""
    recipe = RECIPES[_known(name)]
    if "batch_size" in changes and "learning_rate" not in changes:
        changes["learning_rate"] = recipe.learning_rate * changes["batch_size"] / recipe.batch_size
    return replace(recipe, **changes)


def _known(name: str) -> str:
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown, must be one of {', '.join(PRESETS)}")
    return name
