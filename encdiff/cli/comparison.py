"""`encdiff compare`."""

from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device
from encdiff.cli.support import choose_device, open_data
from encdiff.terminal import say

ROOM, SPRITES = "procedural:5,5,5,4,4,5", "sprites:3,4,10,8,8"


def compare(
    data: Annotated[
        list[str] | None,
        typer.Option(help=f"A complete grid of factors; may be repeated. Default: {ROOM} and {SPRITES}."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder of the runs, rows, tables and figures.")] = Path("runs/compare"),
    methods: Annotated[
        str | None, typer.Option(help="Some, such as encdiff,annealvae; docs/compare.md names them. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each method.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Of EncDiff, to which the others are made equal.", min=1)] = 1000,
    batch_size: Annotated[int, typer.Option(help="Of all.", min=2)] = 64,
    equal: Annotated[
        str, typer.Option(help="seconds: as long as EncDiff takes; samples: as many images; or both.")
    ] = "seconds,samples",
    protocols: Annotated[
        str, typer.Option(help="Of the scores: paper, heldout, quick; what is drawn is scored with the first.")
    ] = "paper,heldout",
    pairs: Annotated[int, typer.Option(help="Swaps that are judged, for each factor.", min=1)] = 64,
    device: Device = "auto",
) -> None:
    """Train and score EncDiff, its variants and VAEs at equal cost. Over several seeds, with intervals and tests.

    Ctrl-C keeps what is done; the same command continues there.
    """
    from encdiff.experiments.compare import compare as run

    opened = [open_data(name, 32) for name in data or (ROOM, SPRITES)]
    run(
        opened, out, methods=methods.split(",") if methods else None, seeds=seeds, steps=steps, batch_size=batch_size,
        equal=equal.split(","), protocols=protocols.split(","), pairs=pairs, device=choose_device(device),
        say=lambda text: say(text, "bold"),
    )  # fmt: skip
    say((out / "compare.md").read_text("utf-8", "surrogateescape"))
    say(f"table: {out / 'compare.md'}\nscores: {out / 'compare.json'}, figures beside it")
