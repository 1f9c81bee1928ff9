"""`encdiff fields demo`."""

from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device, Seed
from encdiff.cli.support import choose_device, writable


def demo(
    run: Annotated[Path, typer.Option(help="The folder for pictures and tables.")] = Path("runs/fields-demo"),
    observed: Annotated[float, typer.Option(help="Share of the pixels with a sensor.")] = 0.01,
    noise: Annotated[float, typer.Option(help="Of the sensors, in standard deviations of a channel.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """New Darcy flows from a few sensors each. By darcy64, which comes with the package, beside nearest and Kriging."""
    from encdiff.fields.demo import demo as run_demo

    writable(run / "field-1.png")
    run_demo(run, seed, choose_device(device), observed, noise)
