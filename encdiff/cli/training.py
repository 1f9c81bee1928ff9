"""`encdiff train` and `train-autoencoder`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.baselines import is_baseline, refuse_options, train_baseline
from encdiff.cli.options import CheckpointEvery, Device, Objective, Several
from encdiff.cli.support import (
    DATA_HELP,
    begun_size,
    changed,
    choose_device,
    given_options,
    open_data,
    rebuilt,
    resumed,
    say_next,
    spread,
    told_of_precision,
)
from encdiff.errors import InputError
from encdiff.terminal import say

NewData = Annotated[str | None, typer.Option(help=DATA_HELP + " Default: with --resume, the run's.")]
PictureEvery = Annotated[int | None, typer.Option(help="Steps between pictures. Default: the recipe's.", min=1)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run's checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in that folder.")]
Folder = Annotated[Path, typer.Option(help="The folder of the run: checkpoint, log, pictures, model.")]
Steps = Annotated[int | None, typer.Option(help="Default: the preset's.", min=1)]
BatchSize = Annotated[int | None, typer.Option(help="Of all processes together. Default: the preset's.", min=1)]
Seed = Annotated[int | None, typer.Option(help="Default: 0.", min=0)]
Accumulate = Annotated[
    int | None, typer.Option(help="Parts of a batch, one after the other: less memory. Default: 1.", min=1)
]
ShardModel = Annotated[
    bool | None,
    typer.Option("--shard", help="Of several processes each keeps a part of the U-Net. Default: the whole."),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")]


class Precision(StrEnum):
    float32 = "float32"
    tf32 = "tf32"
    bf16 = "bf16"


class WithoutTF32(StrEnum):
    float32 = "float32"
    bf16 = "bf16"


class Engine(StrEnum):
    auto = "auto"
    eager = "eager"
    compile = "compile"
    graph = "graph"


class Timesteps(StrEnum):
    uniform = "uniform"
    logit_normal = "logit-normal"
    power = "power"


HowPrecise = Annotated[Precision | None, typer.Option(help="Default: float32; on a GPU bf16 is much faster.")]
HowRun = Annotated[Engine | None, typer.Option(help="How a step runs. Default: auto, graph on a GPU, else eager.")]


def train(
    run: Folder,
    data: NewData = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="quickstart, room32, room64, shapes3d, mpi3d, cars3d, celeba; or a VAE: annealvae, beta-vae, "
            "beta-tcvae, factor-vae, dip-vae. Default: quickstart."
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Of the model's configuration, such as concepts=10; may be repeated. Default: the preset's."
        ),
    ] = None,
    objective: Objective = None,
    first_stage: Annotated[
        Path | None, typer.Option(help="The run of train-autoencoder that presets with VQ need. Default: none.")
    ] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the preset's, by the batch size.")] = None,
    timesteps: Annotated[
        Timesteps | None, typer.Option(help="How noise levels are drawn; power: more noise. Default: the preset's.")
    ] = None,
    precision: HowPrecise = None,
    engine: HowRun = None,
    accumulate: Accumulate = None,
    shard: ShardModel = None,
    checkpoint_activations: Annotated[
        bool | None, typer.Option("--checkpoint-activations", help="Less memory, more time.")
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    picture_every: PictureEvery = None,
    seed: Seed = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    tensorboard: TensorBoard = False,
    several: Several = None,
) -> None:
    """Train a model on images. Ctrl-C saves; --resume continues exactly there, with the run's own settings."""
    spread(several)
    import torch

    from encdiff.models import EncDiff, EncDiffConfig
    from encdiff.training import TrainConfig
    from encdiff.training import train as run_training
    from encdiff.training.autoencoder import load_first_stage

    if resume and (preset or objective or first_stage or changes):
        own = "--preset, --objective, --first-stage and --set"
        raise InputError(f"{own} cannot be given with --resume: the run has its own")
    given = given_options(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, timesteps=timesteps and timesteps.value,
        precision=precision and precision.value, engine=engine and engine.value,
        accumulate=accumulate, shard=shard, checkpoint_activations=checkpoint_activations,
        checkpoint_every=checkpoint_every, picture_every=picture_every, seed=seed,
    )  # fmt: skip
    if is_baseline(run if resume else None, preset):
        refuse_options(
            objective=objective, first_stage=first_stage, timesteps=timesteps, shard=shard,
            checkpoint_activations=checkpoint_activations,
        )  # fmt: skip
        return train_baseline(
            run, data, preset, changes, given, device=device, resume=resume, overwrite=overwrite,
            tensorboard=tensorboard,
        )  # fmt: skip
    if resume:
        begun, recipe = resumed(run, TrainConfig, given)
        model_config, data = EncDiffConfig.from_dict(begun["model"], f"{run}/config.json"), data or begun["data"]
    else:
        model_config = EncDiffConfig.from_preset(preset or "quickstart")
        model_config = changed(model_config.with_objective(objective) if objective else model_config, changes)
        recipe = TrainConfig.from_preset(preset or "quickstart", objective=objective, **given)
    torch.manual_seed(recipe.seed)
    model = rebuilt(run, model_config) if resume else EncDiff(model_config)
    if not resume:
        load_first_stage(model, first_stage)
    dataset = open_data(data, model_config.image_size)
    model.to(told_of_precision(choose_device(device), recipe.precision))
    run_training(model, dataset, run, recipe, resume=resume, overwrite=overwrite, tensorboard=tensorboard)
    say_next(run, dataset)


def train_autoencoder(
    run: Annotated[Path, typer.Option(help="The folder of the run.")],
    data: NewData = None,
    image_size: Annotated[int, typer.Option(help="Images are reduced to this size.", min=8)] = 64,
    steps: Annotated[int | None, typer.Option(help="Default: 50,000.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: 32.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 4.5e-6 for each image of a batch.")] = None,
    discriminator: Annotated[
        bool | None, typer.Option(help="Train against a patch discriminator. Default: so.")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="torchvision's VGG16 weights, for the LPIPS loss. Default: no such loss.")
    ] = None,
    precision: Annotated[WithoutTF32 | None, typer.Option(help="Default: float32.")] = None,
    checkpoint_every: CheckpointEvery = None,
    picture_every: PictureEvery = None,
    seed: Seed = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    several: Several = None,
) -> None:
    """Train the VQ first stage. The paper's presets need one before `train`."""
    spread(several)
    import torch

    from encdiff.models.autoencoder import VQAutoencoder
    from encdiff.training import AutoencoderTrainConfig
    from encdiff.training import train_autoencoder as run_training

    given = given_options(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, discriminator=discriminator,
        lpips_weights=lpips_weights and str(lpips_weights), precision=precision and precision.value,
        checkpoint_every=checkpoint_every, picture_every=picture_every, seed=seed,
    )  # fmt: skip
    if resume:
        begun, config = resumed(run, AutoencoderTrainConfig, given)
        data, image_size = data or begun["data"], begun_size(begun, run)
    else:
        if batch_size and not learning_rate:
            given["learning_rate"] = 4.5e-6 * batch_size
        config = AutoencoderTrainConfig(**given)
    torch.manual_seed(config.seed)
    dataset = open_data(data, image_size)
    run_training(VQAutoencoder().to(choose_device(device)), dataset, run, config, resume=resume, overwrite=overwrite)
    say(f"first stage: {run / 'model'}\nnext: encdiff train --preset shapes3d --first-stage {run} ...")
