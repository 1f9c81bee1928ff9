"""The commands `encdiff data ...`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.support import DATA_HELP, open_data
from encdiff.errors import InputError
from encdiff.terminal import progress_bar, say, say_table

# Modules that load torch are imported inside the commands, so that --help answers at once.

data_app = typer.Typer(help="Make, rewrite and look at data sets.", no_args_is_help=True)

Data = Annotated[str, typer.Argument(help=DATA_HELP, show_default=False)]
Out = Annotated[Path, typer.Argument(help="The .h5 file to write.", show_default=False)]
ImageSize = Annotated[int | None, typer.Option(help="Reduce images to this size. Default: as they are.", min=4)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


class Kind(StrEnum):
    room = "room"
    sprites = "sprites"


@data_app.command()
def render(
    out: Out,
    kind: Annotated[Kind, typer.Option(help="room: Shapes3D's factors. sprites: those of dSprites.")] = Kind.room,
    image_size: Annotated[int, typer.Option(help="Pixels on a side.", min=4)] = 64,
    grid: Annotated[str | None, typer.Option(help="Values per factor, such as 5,5,5,4,4,5. Default: all.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Render a room, or sprites, into an HDF5 file.

    A room with floor, wall and object, or white sprites on black; the format is that of 3dshapes.h5.
    """
    from encdiff.data import open_dataset

    name = {Kind.room: "procedural", Kind.sprites: "sprites"}[kind]
    _write(open_dataset(name if grid is None else f"{name}:{grid}", image_size), out, overwrite)


@data_app.command()
def convert(
    data: Data,
    out: Annotated[
        Path, typer.Argument(help="The .h5 file, or with --shards the folder, to write.", show_default=False)
    ],
    image_size: ImageSize = None,
    shards: Annotated[
        str | None,
        typer.Option(help="Write a folder of .npy files of at most this size, such as 1GB. Default: one .h5 file."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Rewrite a data set. Smaller, or so that random batches are read fast.

    A grid of factors becomes a 3dshapes file, anything else, a folder of photos too, a folder of .npy files (--shards).
    """
    if shards is None:
        return _write(open_data(data, image_size), out, overwrite)
    from encdiff.data.sharding import check_place, parse_bytes, write_shards

    size = parse_bytes(shards)
    check_place(out, overwrite)
    dataset = open_data(data, image_size)
    with progress_bar("writing") as report:
        write_shards(out, dataset, size, overwrite, report)
    say(f"{len(dataset):,} images: {out}")


@data_app.command()
def info(data: Data, image_size: ImageSize = None) -> None:
    """What a data set is. Images, factors with their numbers of values, and the fingerprint that runs store."""
    from encdiff.data import describe

    dataset = open_data(data, image_size)
    found = describe(dataset)
    factors = zip(found["factor_names"], found["factor_sizes"], dataset.label_values, strict=True)
    rows = [[name, str(size), f"{values[0]:g}", f"{values[-1]:g}"] for name, size, values in factors]
    several = f", {dataset.instances} of each combination" if dataset.instances > 1 else ""
    say(f"{found['name']}: {len(dataset):,} images of {dataset.image_size}x{dataset.image_size}{several}")
    if rows:
        say_table(("factor", "values", "from", "to"), rows)
    else:
        say("no labels")
    if rows and not dataset.is_grid:
        say("attributes, no complete grid of factors")
    say(f"sha256 of 8 images: {found['sha256']}")


def _write(dataset, out: Path, overwrite: bool) -> None:
    from encdiff.data.shapes3d import write_shapes3d

    if out.suffix not in (".h5", ".hdf5"):
        raise InputError(f"{out}: must end in .h5: it becomes an HDF5 file (convert --shards 1GB writes a folder)")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; use --overwrite to replace it")
    with progress_bar("writing") as report:
        write_shapes3d(out, dataset, max(256, dataset.images_per_chunk), progress=report)
    say(f"{len(dataset):,} images: {out}")
