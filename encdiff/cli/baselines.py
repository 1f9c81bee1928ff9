"""`encdiff train` of a VAE: what it takes of that command's options."""

from collections.abc import Sequence
from pathlib import Path

from encdiff.cli.support import changed, choose_device, open_data, rebuilt, resumed, say_next, told_of_precision
from encdiff.errors import InputError

PRESETS = ("annealvae", "beta-vae", "beta-tcvae", "factor-vae", "dip-vae")  # known without torch


def is_baseline(run: Path | None, preset: str | None) -> bool:
    """Whether a VAE is asked for: by a preset, or by the run that is to be resumed."""
    if run is None:
        return preset in PRESETS
    from encdiff.baselines.loading import is_vae
    from encdiff.training.runs import read_config

    return is_vae(read_config(run).get("model"))


def refuse_options(**given: object) -> None:
    """InputError for the first option that was given: a VAE has nothing of the kind."""
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"--{name.replace('_', '-')} is given, must be left out: it is of an EncDiff, this is a VAE"
            )


def train_baseline(
    run: Path, data: str | None, preset: str | None, changes: Sequence[str] | None, given: dict, *,
    device: str, resume: bool, overwrite: bool, tensorboard: bool,
) -> None:  # fmt: skip
    """Begin or continue the training of a VAE."""
    import torch

    from encdiff.baselines import VAE, VAEConfig, VAETrainConfig, train_vae, vae_config, vae_recipe

    if resume:
        begun, recipe = resumed(run, VAETrainConfig, given)
        config, data = VAEConfig.read(begun["model"], f"{run}/config.json"), data or begun["data"]
    else:
        assert preset is not None, "or it is no VAE"
        config, recipe = changed(vae_config(preset), changes), vae_recipe(preset, **given)
    torch.manual_seed(recipe.seed)
    model = rebuilt(run, config, VAE) if resume else VAE(config)
    dataset = open_data(data, config.image_size)
    model.to(told_of_precision(choose_device(device), recipe.precision))
    train_vae(model, dataset, run, recipe, resume=resume, overwrite=overwrite, tensorboard=tensorboard)
    say_next(run, dataset)
