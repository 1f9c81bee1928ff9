"""`encdiff fields train`."""

from enum import StrEnum
from typing import Annotated

import typer

from encdiff.cli.fields_data import FIELDS_HELP
from encdiff.cli.options import CheckpointEvery, Device, Several
from encdiff.cli.support import choose_device, given_options, rebuilt, resumed, spread, told_of_precision
from encdiff.cli.training import (
    Accumulate,
    BatchSize,
    Folder,
    HowPrecise,
    HowRun,
    Overwrite,
    PictureEvery,
    Resume,
    Seed,
    ShardModel,
    Steps,
    TensorBoard,
)
from encdiff.errors import InputError
from encdiff.terminal import say


class Preset(StrEnum):
    small = "small"
    paper = "paper"


class Method(StrEnum):
    cross_attention = "cross-attention"
    voronoi = "voronoi"
    unconditional = "unconditional"


KINDS = {  # objective and condition of a configuration
    Method.cross_attention: ("diffusion", "tokens"),
    Method.voronoi: ("regression", "input"),
    Method.unconditional: ("diffusion", "none"),
}


def train(
    run: Folder,
    data: Annotated[str | None, typer.Option(help=FIELDS_HELP + " Default: with --resume, the run's.")] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            help="cross-attention: a diffusion that attends to the sensors. voronoi: a regression from their Voronoi "
            "fields. unconditional: a diffusion that is guided to the sensors. Default: cross-attention."
        ),
    ] = None,
    preset: Annotated[Preset | None, typer.Option(help="How large, how long. Default: small.")] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the preset's.")] = None,
    observed: Annotated[
        str | None, typer.Option(help="Least and greatest share of the pixels with a sensor. Default: 0.002,0.12.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Greatest noise of a sensor, in standard deviations. Default: 0.25.", min=0)
    ] = None,
    exact: Annotated[
        float | None, typer.Option(help="Share of the samples whose sensors have no noise. Default: 0.5.")
    ] = None,
    accumulate: Accumulate = None,
    shard: ShardModel = None,
    precision: HowPrecise = None,
    engine: HowRun = None,
    checkpoint_every: CheckpointEvery = None,
    picture_every: PictureEvery = None,
    seed: Seed = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    tensorboard: TensorBoard = False,
    several: Several = None,
) -> None:
    """Train a model on fields. Ctrl-C saves; --resume continues exactly there, with the run's own settings."""
    spread(several)
    import torch

    from encdiff.fields import FieldConfig, FieldModel, FieldTrainConfig, field_recipe, fitted_config, open_fields
    from encdiff.fields import train_fields as run_training
    from encdiff.fields.recipes import FIELD_PRESETS

    given = given_options(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, observed=_shares(observed), noise=noise,
        exact=exact, precision=precision and precision.value, engine=engine and engine.value,
        accumulate=accumulate, shard=shard, checkpoint_every=checkpoint_every, picture_every=picture_every, seed=seed,
    )  # fmt: skip
    if resume:
        if method or preset:
            raise InputError("--method and --preset cannot be given with --resume: the run has its own")
        begun, recipe = resumed(run, FieldTrainConfig, given)
        config, data = FieldConfig.from_dict(begun["model"], f"{run}/config.json"), data or begun["data"]
        fields = open_fields(data)
    else:
        if data is None:
            raise InputError("--data is missing: " + FIELDS_HELP)
        name = (preset or Preset.small).value
        recipe, fields = field_recipe(name, **given), open_fields(data)
        objective, condition = KINDS[method or Method.cross_attention]
        config = fitted_config(FIELD_PRESETS[name], fields, recipe.held_out, objective=objective, condition=condition)
    torch.manual_seed(recipe.seed)
    model = rebuilt(run, config, FieldModel) if resume else FieldModel(config)
    model.to(told_of_precision(choose_device(device), recipe.precision))
    run_training(model, fields, run, recipe, resume=resume, overwrite=overwrite, tensorboard=tensorboard)
    say(f"model: {run / 'model'}\nnext:  encdiff fields evaluate {run}")


def _shares(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--observed {text!r} must be two shares such as 0.002,0.12") from None
    return low, high
