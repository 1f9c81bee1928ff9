"""The command `encdiff doctor`: this machine, and every kernel on it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device
from encdiff.cli.support import choose_device, writable
from encdiff.files.temporaries import atomic_path
from encdiff.terminal import progress_bar, say

# Modules that load torch are imported inside the command, so that --help answers at once.


def doctor(
    device: Device = "auto",
    kernels: Annotated[
        str | None, typer.Option(help="Check these alone, such as group_norm,adamw. Default: all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write all of it here, as JSON. Default: nowhere.", show_default=False)
    ] = None,
) -> None:
    """Check this machine, and every kernel on it.

    Versions, processor, GPU and compilers; every kernel against float64; what each op would take, and why.

    Exits with 1 if something is wrong. On a GPU its verdicts replace those that kernels got at their first use there;
    without one kernels are interpreted, which takes a minute or two.
    """
    from encdiff.health import doctor as run_doctor

    on, out = choose_device(device), out and writable(out)
    with progress_bar("checking kernels") as report:
        found = run_doctor(on, [name.strip() for name in kernels.split(",")] if kernels else None, report)
    if out:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(found.to_dict(), indent=1) + "\n", "utf-8")
    say(str(found))
    if out:
        say(f"report: {out}")
    if not found.ok:
        raise typer.Exit(1)
