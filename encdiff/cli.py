"""The command line: `encdiff --help`."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff import __version__
from encdiff.cli_data import data_app
from encdiff.cli_doctor import doctor
from encdiff.cli_profile import profile
from encdiff.cli_reproduce import ablate, reproduce
from encdiff.cli_support import (
    DATA_HELP,
    Commands,
    begun_size,
    choose_device,
    draw_images,
    factor_groups,
    given_options,
    importance_plot,
    load_first_stage,
    metric_names,
    open_data,
    open_model,
    parse_concepts,
    rebuilt,
    results,
    resumed,
    save_picture,
    told_of_precision,
    writable,
)
from encdiff.errors import InputError, Stopped
from encdiff.terminal import console, plain, progress_bar, say

# Modules that load torch are imported inside the commands, so that --help answers at once.

app = typer.Typer(
    cls=Commands,
    help="Disentangled concepts from images: train, score, swap, traverse, and see where the model attends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: whole names at 80 columns, and on a terminal without box characters
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
DEMO = Path("runs/demo")


class SamplerName(StrEnum):
    dpm_solver_pp = "dpm-solver++"
    unipc = "unipc"
    ddim = "ddim"
    ddpm = "ddpm"
    euler = "euler"
    heun = "heun"


RunData = Annotated[str | None, typer.Option(help=DATA_HELP + " Default: what the run was trained on.")]
NewData = Annotated[str | None, typer.Option(help=DATA_HELP + " Default: with --resume, the run's.")]
RUN_HELP = "A run, a folder that save_pretrained wrote, room64 or quickstart"
Run = Annotated[Path, typer.Argument(help=RUN_HELP + ".", show_default=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of all that is random.", min=0)]
Out = Annotated[Path | None, typer.Option(help="The PNG to write. Default: in the run's pictures/.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
Sampler = Annotated[SamplerName, typer.Option(help="The paper's pictures: ddim with 200 steps.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 1,000.", min=1)]
PictureEvery = Annotated[int | None, typer.Option(help="Steps between pictures. Default: the recipe's.", min=1)]
Concepts = Annotated[
    str | None, typer.Option(help="Such as 0,3. Default: those that carry a factor, if known, or all.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run's checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in that folder.")]


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


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def train(
    run: Annotated[Path, typer.Option(help="The folder of the run: checkpoint, log, pictures, model.")],
    data: NewData = None,
    preset: Annotated[
        str | None,
        typer.Option(help="quickstart, room32, room64, shapes3d, mpi3d, cars3d or celeba. Default: quickstart."),
    ] = None,
    first_stage: Annotated[
        Path | None, typer.Option(help="The run of train-autoencoder that presets with VQ need. Default: none.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Default: the preset's.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: the preset's.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the preset's, by the batch size.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Default: float32; on a GPU bf16 is much faster.")] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="How a step runs. Default: auto, graph on a GPU, else eager.")
    ] = None,
    checkpoint_activations: Annotated[
        bool | None, typer.Option("--checkpoint-activations", help="Less memory, more time.")
    ] = None,
    checkpoint_every: CheckpointEvery = None,
    picture_every: PictureEvery = None,
    seed: Annotated[int | None, typer.Option(help="Default: 0.", min=0)] = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
) -> None:
    """Train a model on images. Ctrl-C saves; --resume continues exactly there, with the run's own settings."""
    import torch

    from encdiff.models import EncDiff, EncDiffConfig
    from encdiff.train import TrainConfig
    from encdiff.train import train as run_training

    given = given_options(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, precision=precision and precision.value,
        engine=engine and engine.value, checkpoint_activations=checkpoint_activations,
        checkpoint_every=checkpoint_every, picture_every=picture_every, seed=seed,
    )  # fmt: skip
    if resume:
        if preset or first_stage:
            raise InputError("--preset and --first-stage cannot be given with --resume: the run has its own")
        begun, recipe = resumed(run, TrainConfig, given)
        model_config, data = EncDiffConfig.from_dict(begun["model"], f"{run}/config.json"), data or begun["data"]
    else:
        model_config = EncDiffConfig.from_preset(preset or "quickstart")
        recipe = TrainConfig.from_preset(preset or "quickstart", **given)
    torch.manual_seed(recipe.seed)
    model = rebuilt(run, model_config) if resume else EncDiff(model_config)
    if not resume:
        load_first_stage(model, first_stage)
    dataset = open_data(data, model_config.image_size)
    model.to(told_of_precision(choose_device(device), recipe.precision))
    run_training(model, dataset, run, recipe, resume=resume, overwrite=overwrite, tensorboard=tensorboard)
    say(f"model: {run / 'model'}\nnext:  encdiff {'evaluate' if dataset.factor_names else 'swap'} {run}")


@app.command()
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
    seed: Annotated[int | None, typer.Option(help="Default: 0.", min=0)] = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the VQ first stage. The paper's presets need one before `train`."""
    import torch

    from encdiff.models.autoencoder import VQAutoencoder
    from encdiff.train_autoencoder import AutoencoderTrainConfig
    from encdiff.train_autoencoder import train_autoencoder as run_training

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


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help=RUN_HELP + "; or an .npz of codes and factors.", show_default=False)],
    data: RunData = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="paper, heldout, quick, published-cars3d: docs/metrics.md. Default: paper; of an .npz heldout."
        ),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Their names, such as factor_vae,dci,mig; or all (but tad and dci_quick).")
    ] = "factor_vae,dci",
    seeds: Annotated[int, typer.Option(help="Score with so many, from --seed up.", min=1)] = 1,
    baseline: Annotated[bool, typer.Option(help="Also score an untrained encoder.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="The JSON to write. Default: metrics.json in the run, or X-metrics.json.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Score a model's encoder, or the codes of any other. An untrained one is scored beside it.

    An .npz holds codes (n, N), factors (n, F) and, if you like, factor_names: four fifths of the rows teach the
    metrics, the others are scored.
    """
    from encdiff.evaluate import evaluate_codes, evaluate_model, format_table, plot_importance, stages, write_metrics

    options = {"metrics": metric_names(metrics), "seed": seed, "seeds": seeds}
    if run.suffix.lower() == ".npz" and not run.is_dir():
        if data or protocol not in (None, "heldout"):
            raise InputError(f"{run}: codes have no --data, and their --protocol is heldout")
        out = writable(out or run.with_name(f"{run.stem}-metrics.json"))
        with stages(run.stem) as report:
            scores = {run.stem: evaluate_codes(run, progress=report, **options)}
    else:
        if protocol == "published-cars3d":  # the paper's, on images read as the published evaluation misreads them
            protocol, data = "paper", f"{protocol}:{data}" if data else protocol
        model, dataset = open_model(run, data, device)
        out = writable(out or results(run) / "metrics.json")
        scores = evaluate_model(model, dataset, protocol=protocol or "paper", baseline=baseline, **options)
    console.print(format_table(scores))
    write_metrics(out, scores)
    say(f"scores: {out}")
    first = next(iter(scores.values()))
    if "dci" in first:
        plot = importance_plot(out)
        plot_importance(first, plot)
        say(f"plot:   {plot}")


@app.command()
def swap(
    run: Run,
    data: RunData = None,
    source: Annotated[
        list[int] | None, typer.Option(help="Index of a source image; may be repeated. Default: drawn.")
    ] = None,
    target: Annotated[
        list[int] | None, typer.Option(help="Index of a target image, one per source. Default: drawn.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="How many pairs to draw, where no indices are given.", min=1)] = 4,
    concepts: Concepts = None,
    by_factor: Annotated[bool, typer.Option(help="Swap together what carries one factor, once evaluated.")] = True,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: each concept of one image put into another.

    After `evaluate`, all concepts that carry one factor are swapped together; --no-by-factor swaps each alone.
    """
    from encdiff.visualize import swap_grid

    model, dataset = open_model(run, data, device)
    if (source is None) != (target is None) or (source and len(source) != len(target)):
        raise InputError(f"--source {source} and --target {target} must be given together, as many of each")
    count = len(source) if source else min(pairs, max(1, len(dataset) // 2))
    images = draw_images(dataset, source + target if source else None, 2 * count, seed, model)
    path = writable(out or results(run) / "pictures" / "swap.png")
    groups = factor_groups(run, model) if by_factor and not concepts else None
    if concepts:
        groups = {f"concept {i}": [i] for i in parse_concepts(concepts)}
    with progress_bar("sampling") as report:
        picture = swap_grid(
            model, images[:count], images[count:], groups=groups, sampler=sampler.value, steps=steps, seed=seed,
            progress=report,
        )  # fmt: skip
    save_picture(picture, path)


@app.command()
def traverse(
    run: Run,
    data: RunData = None,
    index: Annotated[int | None, typer.Option(help="The image's index in the data. Default: a random one.")] = None,
    concepts: Concepts = None,
    values: Annotated[int, typer.Option(help="How many values per concept.", min=2)] = 7,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: each concept moved from low to high. It shows one image with that concept's scalar changed."""
    from encdiff.visualize import concept_labels, encode_images, traversal

    model, dataset = open_model(run, data, device)
    image = draw_images(dataset, None if index is None else [index], 1, seed, model)[0]
    path = writable(out or results(run) / "pictures" / "traverse.png")
    labels = concept_labels(factor_groups(run, model))
    codes = encode_images(model, draw_images(dataset, None, min(len(dataset), 1000), seed, model))
    with progress_bar("sampling") as report:
        picture = traversal(
            model, image, codes, concepts=concepts and parse_concepts(concepts), labels=labels, columns=values,
            sampler=sampler.value, steps=steps, seed=seed, progress=report,
        )  # fmt: skip
    save_picture(picture, path)


@app.command()
def attend(
    run: Run,
    data: RunData = None,
    index: Annotated[list[int] | None, typer.Option(help="Index of an image; may be repeated. Default: drawn.")] = None,
    images: Annotated[int, typer.Option(help="How many images to draw, where no index is given.", min=1)] = 4,
    concepts: Concepts = None,
    steps: Annotated[int, typer.Option(help="Noise levels to average over.", min=1)] = 10,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: where the U-Net attends to each concept."""
    from encdiff.visualize import attention_picture, concept_labels

    model, dataset = open_model(run, data, device)
    chosen = draw_images(dataset, index, min(images, len(dataset)), seed, model)
    path = writable(out or results(run) / "pictures" / "attend.png")
    labels = concept_labels(factor_groups(run, model))
    picture = attention_picture(
        model, chosen, concepts=concepts and parse_concepts(concepts), labels=labels, steps=steps, seed=seed
    )
    save_picture(picture, path)


@app.command()
def demo(
    run: Annotated[Path, typer.Option(help="The folder of the run; an earlier run in it is replaced.")] = DEMO,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """From nothing to disentangled concepts. On this machine: render, train, evaluate, draw."""
    from encdiff.demo import demo as run_demo

    run_demo(run, seed, choose_device(device))


app.command()(reproduce)
app.command()(ablate)
app.command()(profile)
app.command()(doctor)


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2, a bug with a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are removed
    try:
        app()
    except Stopped as stopped:
        say(str(stopped))
    except (InputError, OSError) as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
