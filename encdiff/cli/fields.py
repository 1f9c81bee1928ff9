"""The commands `encdiff fields ...`."""

import typer

from encdiff.cli.fields_data import info, render
from encdiff.cli.fields_demo import demo
from encdiff.cli.fields_train import train
from encdiff.cli.fields_use import evaluate, reconstruct
from encdiff.cli.support import check_alone

fields_app = typer.Typer(help="Whole fields from a few sensors.", no_args_is_help=True)


@fields_app.callback()
def options(context: typer.Context) -> None:
    check_alone(context, ("train",))


for command in (demo, render, info, train, reconstruct, evaluate):
    fields_app.command()(command)
