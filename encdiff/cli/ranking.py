"""`encdiff rank`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from encdiff.cli.options import RUN_HELP, Device, RunData, Seed
from encdiff.cli.support import open_model, writable
from encdiff.errors import InputError
from encdiff.terminal import Tasks, say, say_table

# Modules that load torch are imported inside the command, so that --help answers at once.


class Kind(StrEnum):
    spearman = "spearman"
    lasso = "lasso"


def rank(
    runs: Annotated[
        list[Path], typer.Argument(help=RUN_HELP + "; or an .npz of codes. Two or more.", show_default=False)
    ],
    data: RunData = None,
    kind: Annotated[Kind, typer.Option(help="How codes are compared.")] = Kind.spearman,
    images: Annotated[int, typer.Option(help="Encode so many, drawn by --seed.", min=2)] = 10_000,
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = Path("udr.json"),
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Rank models without factors, by how well each agrees with the others (UDR).

    Of one configuration, trained on the same data with several seeds: those that found the same codes rank first. An
    .npz holds codes (n, N) of all images of the data, in order. What the score says: docs/metrics.md.
    """
    from encdiff.evaluation import write_metrics
    from encdiff.evaluation.ranking import rank_models

    names = [str(run) for run in runs]
    if len(set(names)) < max(2, len(names)):
        raise InputError(f"{', '.join(names)}: must be two models or more, each named once")
    writable(out)
    with Tasks() as tasks:
        given = {name: _open(run, data, device) for name, run in zip(names, runs, strict=True)}
        found = rank_models(given, images=images, kind=kind.value, seed=seed, progress=tasks)
    scores = zip(found["udr"], names, found["num_active_dims"], strict=True)
    say_table(("model", "UDR", "active codes"), [[n, f"{s:.3f}", str(a)] for s, n, a in sorted(scores, reverse=True)])
    write_metrics(out, found)
    say(f"scores: {out}")


def _open(run: Path, data: str | None, device: str) -> Any:
    from encdiff.evaluation.codes import read_codes_alone

    return read_codes_alone(run) if run.suffix.lower() == ".npz" and not run.is_dir() else open_model(run, data, device)
