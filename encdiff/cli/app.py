"""The application: `encdiff --help`."""

import signal
import sys
from typing import Annotated

import typer

from encdiff import __version__
from encdiff.cli.concept_edits import edit
from encdiff.cli.data import data_app
from encdiff.cli.doctor import doctor
from encdiff.cli.edits import direction, interpolate
from encdiff.cli.evaluation import evaluate
from encdiff.cli.experiments import ablate, demo, reproduce
from encdiff.cli.fields import fields_app
from encdiff.cli.pictures import attend, swap, traverse
from encdiff.cli.profile import profile
from encdiff.cli.sample import sample
from encdiff.cli.support import Commands
from encdiff.cli.training import train, train_autoencoder
from encdiff.errors import InputError, Stopped
from encdiff.terminal import plain, say

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
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


for command in (
    train, train_autoencoder, evaluate, swap, traverse, interpolate, direction, edit, attend, sample, demo, reproduce,
    ablate, profile, doctor,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command line; bad input ends it with one line and exit code 2, a bug with a traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half-written files are removed
    try:
        app()
    except Stopped as stopped:
        say(str(stopped))
    except (InputError, OSError) as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(2)
