"""The commands that train and score many models: `encdiff reproduce` and `encdiff ablate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli_support import DATA_HELP, choose_device, console, given_options, open_data

# Modules that load torch are imported inside the commands, so that --help answers at once.


class Target(StrEnum):
    shapes3d = "shapes3d"
    mpi3d = "mpi3d"
    cars3d = "cars3d"
    celeba = "celeba"


Steps = Annotated[int | None, typer.Option(help="Of each training. Default: the preset's.", min=1)]
BatchSize = Annotated[int | None, typer.Option(help="Default: the preset's; the rate follows.", min=1)]
Precision = Annotated[str | None, typer.Option(help="float32, tf32 or bf16. Default: the preset's.")]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints.", min=1)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
FirstStage = Annotated[Path | None, typer.Option(help="A run of train-autoencoder.", show_default=False)]


def _say(text: str) -> None:
    console.print(text, style="bold", markup=False, highlight=False)


def _show(path: Path) -> None:
    from rich.markdown import Markdown

    console.print(Markdown(path.read_text()))
    console.print(f"table:  {path}\nscores: {path.with_suffix('.json')}")


def reproduce(
    target: Annotated[Target, typer.Argument(help="Whose figures.", show_default=False)],
    data: Annotated[str | None, typer.Option(help=DATA_HELP + " Default: a procedural room in its place.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/reproduce-TARGET.", show_default=False)] = None,
    first_stage: FirstStage = None,
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
) -> None:
    """From a data file to the paper's table: first stage, training, scores over seeds, beside the published figures.

    Ctrl-C keeps what is done; the same command continues there.
    """
    from encdiff.reproduce import reproduce as run

    out = out or Path("runs") / f"reproduce-{target.value}{'-quick' * quick}"
    options = given_options(
        steps=steps, batch_size=batch_size, precision=precision, checkpoint_every=checkpoint_every,
        first_stage_steps=first_stage_steps, first_stage=first_stage,
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
    first_stage: FirstStage = None,
    protocol: Annotated[str, typer.Option(help="paper, or quick (fewer samples, not comparable).")] = "paper",
    device: Device = "auto",
) -> None:
    """Train and score a preset under each ablation of the paper, and write a table.

    Ctrl-C keeps what is done; the same command continues there.
    """
    from encdiff.ablations import ablate as run
    from encdiff.ablations import ablated

    dataset = open_data(data, ablated(preset, "unchanged").image_size)
    changes = given_options(steps=steps, batch_size=batch_size, checkpoint_every=checkpoint_every)
    names = only.split(",") if only else None
    run(
        dataset, out, preset=preset, only=names, seeds=seeds, protocol=protocol, device=choose_device(device),
        first_stage=first_stage, say=_say, **changes,
    )  # fmt: skip
    _show(out / "ablations.md")
