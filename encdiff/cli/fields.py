"""The commands `encdiff fields ...`."""

import typer

from encdiff.cli.fields_data import info, render

fields_app = typer.Typer(help="Whole fields from a few sensors.", no_args_is_help=True)

for command in (render, info):
    fields_app.command()(command)
