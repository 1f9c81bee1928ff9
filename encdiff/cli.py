"""The command line: `encdiff --help`."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from encdiff import __version__
from encdiff.errors import InputError

# Modules that load torch are imported inside the commands, so that --help answers at once.

app = typer.Typer(
    help="Disentangled concepts from images: train, score, swap, traverse, and see where the model attends.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Make data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console()

DATA_HELP = "A 3dshapes .h5 file, an .npz, a folder of images, or procedural:5,5,5,4,4,5 (values per factor)."
Data = Annotated[str, typer.Option(help=DATA_HELP)]
RunData = Annotated[str | None, typer.Option(help=DATA_HELP + " Default: what the run was trained on.")]
Run = Annotated[Path, typer.Argument(help="A run folder, or a folder that save_pretrained wrote.", show_default=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of all that is random.", min=0)]
Out = Annotated[Path | None, typer.Option(help="The PNG to write. Default: in the run's pictures/.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the run's checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in that folder.")]


class Precision(StrEnum):
    float32 = "float32"
    bf16 = "bf16"


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
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    preset: Annotated[str, typer.Option(help="quickstart, shapes3d, mpi3d, cars3d or celeba.")] = "quickstart",
    first_stage: Annotated[Path | None, typer.Option(help="The run of train-autoencoder, for presets with VQ.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default: the preset's.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: the preset's.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the preset's.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Default: the preset's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: 0.", min=0)] = None,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
) -> None:
    """Train a model on images. Ctrl-C saves; --resume continues exactly there, with the run's own settings."""
    import torch

    from encdiff.models import EncDiff, EncDiffConfig
    from encdiff.runs import read_config
    from encdiff.train import TrainConfig
    from encdiff.train import train as run_training

    given = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    given = {k: v for k, v in given.items() if v is not None} | ({"precision": precision.value} if precision else {})
    if resume:
        config = read_config(run)
        model_config = EncDiffConfig.from_dict(config["model"], f"{run}/config.json")
        recipe, data = TrainConfig(**(config["training"] | given)), data or config["data"]
    else:
        model_config = EncDiffConfig.from_preset(preset)
        recipe = TrainConfig.from_preset(preset, **given)
    if data is None:
        raise InputError("--data is missing: " + DATA_HELP)
    torch.manual_seed(recipe.seed)
    model = EncDiff(model_config)
    if model_config.first_stage == "vq" and not resume:
        _load_first_stage(model, first_stage)
    run_training(
        model.to(_device(device)), _dataset(data, model_config.image_size), run, recipe,
        resume=resume, overwrite=overwrite, tensorboard=tensorboard,
    )  # fmt: skip
    console.print(f"model: {run / 'model'}\nnext:  encdiff evaluate {run}")


@app.command()
def train_autoencoder(
    run: Annotated[Path, typer.Option(help="The folder of the run.")],
    data: Data,
    image_size: Annotated[int, typer.Option(help="Images are reduced to this size.", min=8)] = 64,
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Is multiplied by the batch size.")] = None,
    discriminator: Annotated[bool, typer.Option(help="Train against a patch discriminator.")] = True,
    lpips_weights: Annotated[Path | None, typer.Option(help="torchvision's VGG16 weights, for the LPIPS loss.")] = None,
    precision: Precision = Precision.float32,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train the VQ first stage, which the paper's presets need before `train`."""
    import torch

    from encdiff.models.autoencoder import VQAutoencoder
    from encdiff.train_autoencoder import AutoencoderTrainConfig
    from encdiff.train_autoencoder import train_autoencoder as run_training

    given = dict(steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    config = AutoencoderTrainConfig(
        discriminator=discriminator, lpips_weights=lpips_weights and str(lpips_weights), precision=precision.value,
        seed=seed, **{k: v for k, v in given.items() if v is not None},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = VQAutoencoder().to(_device(device))
    run_training(model, _dataset(data, image_size), run, config, resume=resume, overwrite=overwrite)
    console.print(f"first stage: {run / 'model'}\nnext:        encdiff train --first-stage {run} --preset shapes3d ...")


@app.command()
def evaluate(
    run: Run,
    data: RunData = None,
    protocol: Annotated[str, typer.Option(help="paper, or quick (fewer samples, not comparable).")] = "paper",
    baseline: Annotated[bool, typer.Option(help="Also score an untrained encoder.")] = True,
    out: Annotated[Path | None, typer.Option(help="The JSON to write. Default: metrics.json in the run.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """FactorVAE score and DCI by the paper's protocol, beside those of an untrained encoder."""
    from encdiff.evaluate import evaluate_model, format_table, plot_importance, write_metrics

    model, dataset = _open(run, data, device)
    results = evaluate_model(model, dataset, protocol=protocol, seed=seed, baseline=baseline)
    out = out or run / "metrics.json"
    write_metrics(out, results)
    plot_importance(results["trained"], out.with_name("importance.png"))
    console.print(format_table(results))
    console.print(f"scores: {out}\nplot:   {out.with_name('importance.png')}")


@app.command()
def swap(
    run: Run,
    data: RunData = None,
    pairs: Annotated[int, typer.Option(help="How many pairs of images, drawn from the data.", min=1)] = 4,
    by_factor: Annotated[bool, typer.Option(help="Swap together what carries one factor, once evaluated.")] = True,
    steps: Steps = 50,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: each concept of one image put into another.

    After `evaluate`, all concepts that carry one factor are swapped together; --no-by-factor swaps each alone.
    """
    from encdiff import visualize
    from encdiff.runs import progress_bar

    model, dataset = _open(run, data, device)
    images = _draw(dataset, 2 * pairs, seed).to(_device(device))
    groups = _groups(run) if by_factor else None
    with progress_bar("sampling") as report:
        picture = visualize.swap_grid(
            model, images[:pairs], images[pairs:], groups=groups, steps=steps, seed=seed, progress=report
        )
    _save(picture, out or run / "pictures" / "swap.png")


@app.command()
def traverse(
    run: Run,
    data: RunData = None,
    index: Annotated[int | None, typer.Option(help="The image's index in the data. Default: a random one.")] = None,
    values: Annotated[int, typer.Option(help="How many values per concept.", min=2)] = 7,
    steps: Steps = 50,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: one image with each concept's scalar moved from low to high."""
    from encdiff import visualize
    from encdiff.data import to_float
    from encdiff.runs import progress_bar

    model, dataset = _open(run, data, device)
    image = _draw(dataset, 1, seed) if index is None else to_float(dataset.images([index]))
    codes = visualize.encode_images(model, _draw(dataset, min(len(dataset), 1000), seed).to(_device(device)))
    with progress_bar("sampling") as report:
        picture = visualize.traversal(
            model, image[0].to(_device(device)), codes, columns=values, steps=steps, seed=seed, progress=report,
            labels=visualize.concept_labels(_groups(run)),
        )  # fmt: skip
    _save(picture, out or run / "pictures" / "traverse.png")


@app.command()
def attend(
    run: Run,
    data: RunData = None,
    images: Annotated[int, typer.Option(help="How many images, drawn from the data.", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="Noise levels to average over.", min=1)] = 10,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: where the U-Net attends to each concept."""
    from encdiff import visualize

    model, dataset = _open(run, data, device)
    drawn = _draw(dataset, images, seed).to(_device(device))
    labels = visualize.concept_labels(_groups(run))
    picture = visualize.attention_picture(model, drawn, labels=labels, steps=steps, seed=seed)
    _save(picture, out or run / "pictures" / "attend.png")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to; an earlier demo in it is replaced.")] = Path(
        "runs/demo"
    ),
    seed: Seed = 0,
) -> None:
    """From nothing to disentangled concepts on this machine: render, train, evaluate, draw."""
    from encdiff.demo import demo as run_demo

    run_demo(out, seed, console)


@data_app.command()
def render(
    out: Annotated[Path, typer.Argument(help="The .h5 file to write.", show_default=False)],
    image_size: Annotated[int, typer.Option(min=4)] = 64,
    grid: Annotated[str, typer.Option(help="Values per factor.")] = "10,10,10,8,4,15",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Render a room with floor, wall and object: the factors and the file format of 3dshapes.h5."""
    from encdiff.data.shapes3d import write_shapes3d
    from encdiff.runs import progress_bar

    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; use --overwrite to replace it")
    dataset = _dataset(f"procedural:{grid}", image_size)
    with progress_bar("rendering") as report:
        write_shapes3d(out, dataset, progress=report)
    console.print(f"{len(dataset):,} images: {out}")


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2, a bug with a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are removed
    try:
        app()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if type(error).__name__ != "Stopped":  # its module loads torch
            raise
        console.print(str(error))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no GPU that PyTorch {torch.__version__} can use; take --device cpu")
    return name


def _dataset(data: str, image_size: int):
    from encdiff.data import open_dataset

    return open_dataset(data, image_size)


def _open(run: Path, data: str | None, device: str):
    """The trained model of a run or model folder, and the data to show it on."""
    from encdiff.models import EncDiff
    from encdiff.runs import read_config

    model = EncDiff.from_pretrained(run / "model" if (run / "model").is_dir() else run, device=_device(device))
    if data is None and not (run / "checkpoint.safetensors").is_file():
        raise InputError("--data is missing: " + DATA_HELP)
    return model, _dataset(data or read_config(run)["data"], model.config.image_size)


def _draw(dataset, count: int, seed: int):
    import numpy as np

    from encdiff.data import to_float

    if count > len(dataset):
        raise InputError(f"{dataset.name}: {len(dataset)} images, {count} are needed")
    return to_float(dataset.images(np.random.default_rng(seed).choice(len(dataset), count, replace=False)))


def _groups(run: Path) -> dict[str, list[int]]:
    """The concepts that carry each factor, where the run has been evaluated."""
    import json

    from encdiff.visualize import concept_groups

    path = run / "metrics.json"
    if not path.is_file():
        return {}
    trained = json.loads(path.read_text())["trained"]
    return concept_groups(trained["dci"]["importance"], trained["data"]["factor_names"])


def _load_first_stage(model, first_stage: Path | None) -> None:
    from encdiff.models.autoencoder import VQAutoencoder

    if first_stage is None:
        raise InputError("--first-stage is missing: this preset needs one; make it with encdiff train-autoencoder")
    folder = first_stage / "model" if (first_stage / "model").is_dir() else first_stage
    model.first_stage.load_state_dict(VQAutoencoder.from_pretrained(folder).state_dict())


def _save(picture, path: Path) -> None:
    from encdiff.visualize import save_png

    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(picture, path)
    console.print(f"picture: {path}")


if __name__ == "__main__":
    main()
