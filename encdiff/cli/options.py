"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.support import DATA_HELP

RunData = Annotated[str | None, typer.Option(help=DATA_HELP + " Default: what the run was trained on.")]
RUN_HELP = "A run, a folder that save_pretrained wrote, room64, room32 or quickstart"
Run = Annotated[Path, typer.Argument(help=RUN_HELP + ".", show_default=False)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")]
Seed = Annotated[int, typer.Option(help="Of all that is random.", min=0)]
Objective = Annotated[
    str | None,
    typer.Option(help="flow, flow-orthogonal, dyga, mutual-information or guided. Default: the preset's own."),
]
CheckpointEvery = Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 1,000.", min=1)]
Several = Annotated[
    int | None,
    typer.Option(
        "--processes", help="So many on this machine, on GPUs one each. Default: 1; machines: docs/scale.md.", min=1
    ),
]
