"""`encdiff fields render` and `info`: files of whole fields."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Seed
from encdiff.cli.support import given_options
from encdiff.errors import InputError
from encdiff.terminal import progress_bar, say, say_table

# Modules that load torch are imported inside the commands, so that --help answers at once.

FIELDS_HELP = (
    "A file or folder of fields (docs/data.md): darcy.h5, an HDF5 of PDEBench, .npy; darcy.h5:0:900 is a part."
)
Fields = Annotated[str, typer.Argument(help=FIELDS_HELP, show_default=False)]
Out = Annotated[Path, typer.Argument(help="The .h5 file to write.", show_default=False)]


class Kind(StrEnum):
    darcy = "darcy"
    vorticity = "vorticity"


def render(
    out: Out,
    kind: Annotated[Kind, typer.Option(help="The equation.")] = Kind.darcy,
    size: Annotated[int, typer.Option(help="Pixels on a side.", min=4)] = 64,
    count: Annotated[int, typer.Option(help="Samples.", min=1)] = 1000,
    frames: Annotated[int | None, typer.Option(help="Of vorticity: frames of a sample. Default: 20.", min=2)] = None,
    duration: Annotated[float | None, typer.Option(help="Of vorticity: time of the last frame. Default: 2.")] = None,
    viscosity: Annotated[float | None, typer.Option(help="Of vorticity. Default: 0.001.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of vorticity: its root mean square at time 0. Default: 5.")
    ] = None,
    low: Annotated[float | None, typer.Option(help="Of darcy: the lower permeability. Default: 3.")] = None,
    high: Annotated[float | None, typer.Option(help="Of darcy: the higher permeability. Default: 12.")] = None,
    processes: Annotated[int | None, typer.Option(help="At most so many. Default: one for each core.", min=1)] = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Solve an equation many times, into an HDF5 file.

    darcy: the pressure of a flow through a random medium of two permeabilities. vorticity: frames of a decaying flow
    in two dimensions. After an interruption the same command goes on where that one ended.
    """
    from encdiff.fields.rendering import render

    if out.suffix not in (".h5", ".hdf5"):
        raise InputError(f"{out}: must end in .h5: it becomes an HDF5 file")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; use --overwrite to replace it")
    settings = given_options(
        frames=frames, duration=duration, viscosity=viscosity, strength=strength, low=low, high=high
    )
    with progress_bar("solving") as report:
        render(out, kind.value, size, count, seed, processes, report, overwrite, **settings)
    say(f"{count:,} samples: {out}")


def info(data: Fields) -> None:
    """What a file of fields is. Grid, times, the channels' ranges, and the fingerprint that runs store."""
    from encdiff.data import describe
    from encdiff.fields.formats import open_fields

    fields = open_fields(data)
    found, grid = describe(fields), fields.grid
    several = "" if fields.times is None else f" of {len(fields.times)} frames"
    x0, x1, y0, y1 = grid.domain
    say(f"{found['name']}: {len(fields):,} samples{several} of {grid.height}x{grid.width}")
    say(f"domain: x {x0:g} to {x1:g}, y {y0:g} to {y1:g}{', periodic' * grid.periodic}")
    if fields.times is not None:
        say(f"times: {fields.times[0]:g} to {fields.times[-1]:g}")
    summary = fields.summary()
    rows = zip(grid.channels, *(map("{:.4g}".format, column) for column in summary[:4]), strict=True)
    say_table(("channel", "mean", "deviation", "least", "greatest"), list(rows))
    if summary.samples < len(fields):
        say(f"over {summary.samples:,} samples, drawn at random")
    say(f"sha256 of 8 samples: {found['sha256']}")
