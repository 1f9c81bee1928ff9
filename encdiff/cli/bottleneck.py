"""`encdiff bottleneck`."""

from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.support import writable_picture
from encdiff.terminal import say


def bottleneck(
    preset: Annotated[str, typer.Option(help="Whose noise schedule and latent.")] = "quickstart",
    compare: Annotated[
        Path | None, typer.Option(help="The run of an AnnealVAE, or another VAE, to stand beside it. Default: none.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The PNG to write. Default: bottleneck.png, in that run.")] = None,
) -> None:
    """A picture: how much each noise level lets through. With --compare beside what a VAE's latents held as it trained.

    AnnealVAE opens its capacity over the steps of training, a diffusion model over the steps of each sample.
    """
    from encdiff.experiments.capacity import model_bottleneck, plot_capacities, read_rise
    from encdiff.models import EncDiffConfig

    of = model_bottleneck(EncDiffConfig.from_preset(preset))
    rise = read_rise(compare) if compare else None
    path = writable_picture(out or (compare or Path()) / "bottleneck.png")
    plot_capacities(rise, of, path, title=preset)
    if rise is not None:
        held = float(rise.latents[-1].sum())
        used = int((rise.latents[-1] > 0.1).sum())
        at = of.opens(held)
        level = "at none of its noise levels" if at is None else f"from timestep {at} of {len(of.levels)} down, at most"
        say(f"{compare}: {used} of {rise.latents.shape[1]} latents hold more than 0.1 nats, all together {held:.2f}")
        say(f"{preset}: so much comes through {level}")
    say(f"picture: {path}")
