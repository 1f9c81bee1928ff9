"""What the commands share: options, devices, data, models, files."""

import json
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import typer
from typer.core import TyperGroup

from encdiff import pretrained
from encdiff.checked import Range
from encdiff.distributed.launch import launched
from encdiff.errors import InputError
from encdiff.terminal import say

# Modules that load torch are imported inside the functions, so that --help answers at once.

DATA_HELP = "A file, folder or name (docs/data.md): 3dshapes.h5, mpi3d_toy, photos/, procedural:5,5,5,4,4,5, ..."


class Commands(TyperGroup):
    """The command line, for which an input that ends early is bad input, not the user's Ctrl-D."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise InputError(f"a file ends too early ({error}); copy it again") from None


def spread(count: int | None) -> None:
    """Where a command is to run in so many processes, run it again in each of them, and end with what they end with."""
    if count is not None and count > 1 and not launched():
        from encdiff.distributed.launcher import launch

        sys.exit(launch(count, ["-m", "encdiff", *sys.argv[1:]]))


def check_alone(context: typer.Context, shared: Collection[str]) -> None:
    """InputError where several processes were started for a command that they do not share."""
    if launched() and context.invoked_subcommand not in shared:
        raise InputError(f"{context.invoked_subcommand}: is for one process; start it without torchrun")


def given_options(**options) -> dict:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def changed(config, changes: Sequence[str] | None):
    """The configuration with changes such as "concepts=10", whose values are JSON, or text."""
    known = [field.name for field in fields(config)]
    given = {}
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals or name not in known:
            raise InputError(f"--set {change!r}: must be NAME=VALUE, NAME one of {', '.join(known)}")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    try:
        return config.changed(**given) if hasattr(config, "changed") else replace(config, **given)
    except InputError as error:
        raise InputError(f"--set: {error}") from None


def say_next(run: Path, dataset) -> None:
    """Where the trained model is, and what to do with it."""
    say(f"model: {run / 'model'}\nnext:  encdiff {'evaluate' if dataset.factor_names else 'swap'} {run}")


def resumed(run: Path, config_class, given: dict):
    """What a run was begun with, and its training configuration with the options given now."""
    from encdiff.distributed.processes import processes
    from encdiff.training.runs import RunFolder, read_config

    begun = read_config(run)
    processes().by_first(lambda: RunFolder(run, resume=True) and None)  # refused: in use, or without a checkpoint
    return begun, config_class.from_dict(begun["training"] | given, f"{run}/config.json")


def rebuilt(run: Path, config, maker=None):
    """The model of a run that is resumed, by `maker` or an EncDiff, made once its checkpoint has shown that it fits."""
    from encdiff.files.checkpoint import build_fitting, tensor_shapes
    from encdiff.models import EncDiff

    path = run / "checkpoint.safetensors"
    shapes = {k.removeprefix("model."): v for k, v in tensor_shapes(path)[0].items() if k.startswith("model.")}
    return build_fitting(lambda: (maker or EncDiff)(config), shapes, path)


def begun_size(begun: dict, run: Path) -> int:
    """The size of the images that a run was begun with."""
    size = begun["fingerprint"].get("image_size")
    if not isinstance(size, int) or not 1 <= size <= 4096:
        raise InputError(
            f"{run}/config.json: names no image_size in 1..4096; is it the configuration of a training run?"
        )
    return size


def metric_names(given: str) -> list[str]:
    """The names in "a,b"; "all" among them are all of codes that any rows and factors have, no estimates."""
    from encdiff.evaluation.drawn import DRAWN
    from encdiff.metrics import METRICS

    every = [name for name in METRICS if name not in ("dci_quick", "tad", "flatness")]
    names = [each for name in given.split(",") for each in (every if name.strip() == "all" else [name.strip()])]
    if unknown := [name for name in names if name not in METRICS | DRAWN]:
        known = ", ".join(METRICS | DRAWN)
        raise InputError(f"--metrics: {unknown[0]!r} is unknown, must be among {known}, or all")
    return list(dict.fromkeys(names))


def parse_concepts(concepts: str | None, option: str = "--concepts") -> list[int] | None:
    """The numbers in "0,3"; None of none."""
    if not concepts:
        return None
    try:
        return [int(concept) for concept in concepts.split(",")]
    except ValueError:
        raise InputError(f"{option} {concepts!r} must be numbers such as 0,3") from None


def parse_numbers(option: str, text: str, within: Range, must: str) -> tuple[float, ...]:
    """The numbers in "0.01,0.1", all in the range, which `must` says in words."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(map(within.holds, numbers)):
        raise InputError(f"{option} {text!r} must be {must}")
    return numbers


def writable(path: Path) -> Path:
    """The path, its folder made, before long work is begun for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written; must be a file name in a folder that may be written to")
    return path


def writable_picture(path: Path) -> Path:
    """As `writable`, of a picture: pictures are PNG, whatever the name says."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: must end in .png: it becomes a PNG picture")
    return writable(path)


def importance_plot(scores: Path) -> Path:
    """The PNG beside a JSON of scores; each has its own, and a run's `metrics.json` the plain `importance.png`."""
    before = "" if scores.name == "metrics.json" else f"{scores.name.removesuffix('.json')}-"
    return scores.with_name(f"{before}importance.png")


def choose_device(name: str) -> str:
    import torch

    from encdiff.distributed.processes import processes

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: no GPU that PyTorch {torch.__version__} can use; take --device cpu")
    return processes().device(device)


def told_of_precision(device: str, precision: str) -> str:
    """The device; where it is a GPU that is to train in float32, the user is told of what is faster."""
    if device.startswith("cuda") and precision != "bf16":
        say(f"precision {precision}: on a GPU --precision bf16 is three times as fast and more (docs/performance.md)")
    return device


def open_data(data: str | None, image_size: int | None):
    from encdiff.data import open_dataset
    from encdiff.terminal import progress_bar

    if data is None:
        raise InputError("--data is missing: " + DATA_HELP)
    with ExitStack() as stack:

        @cache  # only a file that must be unpacked or read whole shows a bar
        def bar():
            return stack.enter_context(progress_bar("opening"))

        return open_dataset(data, image_size, lambda done, total: bar()(done, total))


def open_model(run: Path, data: str | None, device: str, attending: bool = False):
    """The trained model of a run or model folder, or one that comes with the package, and the data to show it on.

    `attending`: it must cross-attend to its concepts, as an EncDiff does and a VAE does not.
    """
    from encdiff.baselines import VAE, load_concepts
    from encdiff.training.runs import read_config

    folder = held(run)
    if not folder.is_dir():
        raise InputError(
            f"{run}: no such folder; must be a run, a folder that save_pretrained wrote, room64, room32 or quickstart"
        )
    of_run = (folder / "checkpoint.safetensors").is_file()
    model = load_concepts(folder / "model" if of_run else folder, device=choose_device(device))
    if attending and isinstance(model, VAE):
        raise InputError(f"{run}: is of a VAE, which has no cross-attention to its concepts; must be of an EncDiff")
    if data is None and (of_run or folder != run):
        data = read_config(folder if of_run else folder / "run")["data"]
    return model, open_data(data, model.config.image_size)


def held(run: Path) -> Path:
    """Where the files of a run are: its name may be that of a model that comes with the package."""
    return run if run.is_dir() or not (pretrained.FOLDER / run).is_dir() else pretrained.FOLDER / run


def results(run: Path) -> Path:
    """Where to write what is made of a run: into it; of a model that comes with the package into a folder of its own.

    Not `runs/NAME`, which may be a run of the user's.
    """
    return run if held(run) == run else Path("runs") / "packaged" / run


def draw_indices(dataset, indices: Sequence[int] | None, count: int, seed: int) -> list[int]:
    """These indices, or as many drawn from the data."""
    import numpy as np

    if indices is not None:
        return list(indices)
    if count > len(dataset):
        raise InputError(f"{dataset.name}: {len(dataset)} images, {count} are needed")
    return np.random.default_rng(seed).choice(len(dataset), count, replace=False).tolist()


def draw_pairs(dataset, count: int, seed: int) -> list[int]:
    """Indices of so many sources, then of as many targets; of a grid pairs that differ in every factor."""
    if dataset.is_complete:
        return [int(index) for rows in dataset.pairs(count, seed) for index in rows]
    return draw_indices(dataset, None, 2 * count, seed)


def draw_images(dataset, indices: Sequence[int] | None, count: int, seed: int, model):
    """The images of these indices, or as many drawn from the data, on the model's device."""
    return images_of(dataset, draw_indices(dataset, indices, count, seed), model)


def images_of(dataset, indices: Sequence[int], model):
    """Images as the model takes them, on its device."""
    from encdiff.data import to_float

    return to_float(dataset.images(indices)).to(next(model.parameters()).device)


def factor_groups(run: Path, model) -> dict[str, list[int]]:
    """The concepts that carry each factor, where the run has been evaluated."""
    from encdiff.evaluation import read_scores
    from encdiff.pictures import concept_groups

    path = held(run) / "metrics.json"
    if not path.is_file():
        return {}
    trained = read_scores(path)["trained"]
    if "dci" not in trained:  # scored by other metrics
        return {}
    importance, names = trained["dci"]["importance"], trained["data"]["factor_names"]
    if len(importance) != model.config.concepts:
        raise InputError(
            f"{path}: of {len(importance)} concepts, the model has {model.config.concepts}; evaluate again"
        )
    return concept_groups(importance, names)


def save_picture(picture, path: Path) -> None:
    from encdiff.pictures import save_png

    save_png(picture, path)
    say(f"picture: {path}")
