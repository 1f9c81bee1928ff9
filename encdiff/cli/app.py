"""The application: `encdiff --help`."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encdiff import __version__
from encdiff.cli.bottleneck import bottleneck
from encdiff.cli.comparison import compare
from encdiff.cli.concept_edits import edit
from encdiff.cli.data import data_app
from encdiff.cli.doctor import doctor
from encdiff.cli.edits import direction, interpolate
from encdiff.cli.evaluation import evaluate
from encdiff.cli.experiments import ablate, demo, reproduce
from encdiff.cli.fields import fields_app
from encdiff.cli.pictures import attend, swap, traverse
from encdiff.cli.profile import profile
from encdiff.cli.ranking import rank
from encdiff.cli.sample import sample
from encdiff.cli.support import Commands, check_alone
from encdiff.cli.training import train, train_autoencoder
from encdiff.distributed.launch import ENDED, launched
from encdiff.errors import InputError, Lost, Stopped, Told
from encdiff.terminal import plain, say

if TYPE_CHECKING:
    from encdiff.distributed.processes import Processes

SHARED = ("train", "train-autoencoder", "evaluate", "reproduce", "ablate", "fields")  # by all processes of a launch

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
app.add_typer(fields_app, name="fields")


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    check_alone(context, SHARED)


for command in (
    train, train_autoencoder, evaluate, rank, swap, traverse, interpolate, direction, edit, attend, sample, demo,
    reproduce, ablate, compare, bottleneck, profile, doctor,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2, a bug with a traceback.

    Of several processes of one launch each runs it; one of them says what all meet.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are removed
    everyone: Processes | None = None
    try:
        with _processes() as everyone:
            app()
    except Stopped as stopped:
        if everyone is None or everyone.first:
            say(str(stopped))
        if ENDED in os.environ:
            Path(os.environ[ENDED]).touch()
    except (InputError, Lost, OSError) as error:
        if not isinstance(error, Told) if everyone is None else everyone.says(error):
            print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)


def _processes() -> AbstractContextManager[Processes | None]:
    """Those of a launch, joined; without one nothing, for which torch need not be loaded."""
    if not launched():
        return nullcontext()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what C++ says beside the one line of an error
    from encdiff.distributed.processes import joined

    return joined()
