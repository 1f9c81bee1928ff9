"""Whole experiments: `encdiff demo`, `reproduce` and `ablate`."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import CheckpointEvery, Device, Objective, Seed, Several
from encdiff.cli.support import DATA_HELP, choose_device, given_options, open_data, spread
from encdiff.terminal import console, say, say_table

# Modules that load torch are imported inside the commands, so that --help answers at once.

DEMO = Path("runs/demo")


class Target(StrEnum):
    shapes3d = "shapes3d"
    mpi3d = "mpi3d"
    cars3d = "cars3d"
    celeba = "celeba"


Steps = Annotated[int | None, typer.Option(help="Of each training. Default: the preset's.", min=1)]
BatchSize = Annotated[int | None, typer.Option(help="Default: the preset's; the rate follows.", min=1)]
Precision = Annotated[str | None, typer.Option(help="float32, tf32 or bf16. Default: the preset's.")]

_say = partial(say, style="bold")


def _show(path: Path) -> None:
    """The notes and the table of a Markdown file, and where it lies; of several processes by the first."""
    if console.quiet:
        return
    lines = path.read_text("utf-8", "surrogateescape").splitlines()
    notes = [line.removeprefix("# ") for line in lines if line and not line.startswith("|")]
    header, _, *rows = ([c.strip(" *") for c in line[1:-1].split("|")] for line in lines if line.startswith("|"))
    say("\n".join(notes))
    say_table(header, rows)
    say(f"table:  {path}\nscores: {path.with_suffix('.json')}")


def demo(
    run: Annotated[Path, typer.Option(help="The folder of the run; an earlier run in it is replaced.")] = DEMO,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """From nothing to disentangled concepts. On this machine: render, train, evaluate, draw."""
    from encdiff.experiments.demo import demo as run_demo

    run_demo(run, seed, choose_device(device))


def reproduce(
    target: Annotated[Target, typer.Argument(help="Whose figures.", show_default=False)],
    data: Annotated[str | None, typer.Option(help=DATA_HELP + " Default: a procedural room in its place.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/reproduce-TARGET.", show_default=False)] = None,
    objective: Objective = None,
    first_stage: Annotated[Path | None, typer.Option(help="A run of train-autoencoder. Default: one is made.")] = None,
    first_stage_steps: Annotated[int | None, typer.Option(help="Default: 50,000.", min=1)] = None,
    seeds: Annotated[int | None, typer.Option(help="Trainings. Default: 3; quick: 1.", min=1)] = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    precision: Precision = None,
    checkpoint_every: CheckpointEvery = None,
    quick: Annotated[bool, typer.Option("--quick", help="A narrow network for a few steps: does every phase work?")] = (
        False
    ),
    device: Device = "auto",
    several: Several = None,
) -> None:
    """From a data file to the paper's table. First stage, training, scores over seeds, beside the published figures.

    Ctrl-C keeps what is done; the same command continues there.
    """
    spread(several)
    from encdiff.experiments.reproduce import reproduce as run

    out = out or Path("runs") / f"reproduce-{target.value}{'-quick' * quick}"
    options = given_options(
        steps=steps, batch_size=batch_size, precision=precision, checkpoint_every=checkpoint_every,
        first_stage_steps=first_stage_steps, first_stage=first_stage, objective=objective,
    )  # fmt: skip
    seeds = seeds or (1 if quick else 3)
    run(target.value, out, data=data, seeds=seeds, quick=quick, device=choose_device(device), say=_say, **options)
    _show(out / "results.md")


def ablate(
    data: Annotated[str, typer.Option(help=DATA_HELP)] = "procedural:5,5,5,4,4,5",
    out: Annotated[Path, typer.Option(help="The folder of the runs and of the table.")] = Path("runs/ablations"),
    preset: Annotated[str, typer.Option(help="What is changed.")] = "quickstart",
    only: Annotated[str | None, typer.Option(help="Some ablations, such as vectors,shared. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each ablation.", min=1)] = 1,
    steps: Steps = None,
    batch_size: BatchSize = None,
    checkpoint_every: CheckpointEvery = None,
    first_stage: Annotated[
        Path | None, typer.Option(help="The run of train-autoencoder that presets with VQ need. Default: none.")
    ] = None,
    protocol: Annotated[str, typer.Option(help="paper, or quick (fewer samples, not comparable).")] = "paper",
    device: Device = "auto",
    several: Several = None,
) -> None:
    """Train and score a preset under the paper's ablations. Their table is written, too.

    Ctrl-C keeps what is done; the same command continues there.
    """
    spread(several)
    from encdiff.experiments.ablations import ablate as run
    from encdiff.experiments.ablations import ablated

    dataset = open_data(data, ablated(preset, "unchanged").image_size)
    changes = given_options(steps=steps, batch_size=batch_size, checkpoint_every=checkpoint_every)
    names = only.split(",") if only else None
    run(
        dataset, out, preset=preset, only=names, seeds=seeds, protocol=protocol, device=choose_device(device),
        first_stage=first_stage, say=_say, **changes,
    )  # fmt: skip
    _show(out / "ablations.md")
