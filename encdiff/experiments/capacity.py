"""AnnealVAE's capacity beside EncDiff's bottleneck: what one opens over training, the other opens over noise levels."""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from encdiff.diffusion.bottleneck import bottleneck, channel_capacity
from encdiff.diffusion.schedules import alphas_cumprod, make_betas
from encdiff.errors import InputError
from encdiff.files.reading import refuse_special
from encdiff.files.temporaries import atomic_path
from encdiff.models import EncDiff, EncDiffConfig

LABELLED = 8  # latents that the legend names: those that hold the most


class Rise(NamedTuple):
    """What a VAE's latents held over its training, in nats for each image."""

    steps: np.ndarray  # (S,)
    latents: np.ndarray  # (S, N)
    capacity: np.ndarray | None  # (S,) of an AnnealVAE, C(t)


class Bottleneck(NamedTuple):
    """What noise levels let through, in nats an image, were its latent's dimensions independent normal numbers."""

    steps: Tensor  # (T - 1,) float64, at t = 1 .. T - 1: KL of a reverse step, `diffusion.bottleneck`
    levels: Tensor  # (T,) float64, at t = 0 .. T - 1: what x_t can say of the image, `diffusion.channel_capacity`
    dimensions: int

    def opens(self, nats: float) -> int | None:
        """The greatest timestep whose level lets so much through, to which sampling, from T - 1 down, comes first."""
        through = (self.levels >= nats).nonzero()
        return int(through[-1]) if len(through) else None


def read_rise(run: str | Path) -> Rise:
    """From the log of a VAE's run; InputError for any other."""
    path = Path(run) / "log.csv"
    if not path.is_file():
        raise InputError(f"{run}: holds no log.csv; must be the folder of a VAE's training, such as --preset annealvae")
    refuse_special(path)
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        rows, columns = list(reader), reader.fieldnames or []
    names = [name for name in columns if name.startswith("kl_")]
    if not names or not rows:
        raise InputError(f"{path}: has no kl_0, kl_1, ... of latents; must be of a VAE, such as --preset annealvae")
    try:
        numbers = {
            name: np.array([float(row[name]) for row in rows])
            for name in columns
            if name in {*names, "step", "capacity"}
        }
    except (TypeError, ValueError):
        raise InputError(f"{path}: holds a row that is torn or no numbers; it is damaged") from None
    return Rise(numbers["step"], np.stack([numbers[name] for name in names], 1), numbers.get("capacity"))


def model_bottleneck(config: EncDiffConfig) -> Bottleneck:
    """Of a configuration's noise schedule and latent."""
    if config.prediction == "flow":
        raise InputError("prediction is 'flow', without the reverse steps of DDPM whose bottleneck this is")
    with torch.device("meta"):
        dimensions = math.prod(EncDiff(config).latent_shape)
    alpha_bar = alphas_cumprod(make_betas(config.schedule, config.num_timesteps, config.beta_start, config.beta_end))
    return Bottleneck(bottleneck(alpha_bar) * dimensions, channel_capacity(alpha_bar) * dimensions, dimensions)


def plot_capacities(rise: Rise | None, of: Bottleneck, path: str | Path, title: str = "EncDiff") -> None:
    """Save a PNG: EncDiff's bottleneck over the timesteps in the order of sampling and, of a VAE, what its latents held
    over the steps of its training, one scale of nats for both.
    """
    figure = Figure(figsize=(6 if rise is None else 11, 4.2), layout="constrained")
    panels = figure.subplots(1, 1 if rise is None else 2, sharey=True, squeeze=False)[0]
    if rise is not None:
        _draw_rise(panels[0], rise)
    _draw_bottleneck(panels[-1], of, title, None if rise is None else float(rise.latents[-1].sum()))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_rise(axes: Axes, rise: Rise) -> None:
    order = np.argsort(-rise.latents[-1])
    for rank, latent in enumerate(order):
        label = f"latent {latent}" if rank < LABELLED else None
        axes.plot(rise.steps, rise.latents[:, latent], linewidth=1, alpha=0.9, label=label)
    axes.plot(rise.steps, rise.latents.sum(1), color="black", linewidth=2, label="all latents")
    if rise.capacity is not None:
        axes.plot(rise.steps, rise.capacity, color="black", linestyle="--", label="C(t)")
    axes.set_title("AnnealVAE: KL over training" if rise.capacity is not None else "VAE: KL over training")
    axes.set_xlabel("step of training")
    axes.set_ylabel("nats an image")
    axes.legend(fontsize=7, loc="upper left", ncols=2)
    axes.grid(alpha=0.3)


def _draw_bottleneck(axes: Axes, of: Bottleneck, title: str, held: float | None) -> None:
    t = np.arange(len(of.levels))
    axes.plot(
        t[1:],
        of.steps.numpy(),
        color="C3",
        linewidth=2,
        label="KL(q(x_{t-1} | x_t, x_0) || N(0, I)), EncDiff's figure 2b",
    )
    axes.plot(t, of.levels.numpy(), color="C0", linewidth=2, label="what x_t can say of x_0, at most")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.01)
    axes.legend(fontsize=7, loc="lower right")
    axes.invert_xaxis()  # as sampling goes
    axes.set_title(f"{title}: bottleneck over noise levels")
    axes.set_xlabel("timestep, in the order of sampling")
    axes.grid(alpha=0.3)
    if held is None:
        axes.set_ylabel("nats an image")
    elif (at := of.opens(held)) is not None:
        axes.axhline(held, color="black", linewidth=1)
        axes.plot(at, held, "ko")
        axes.annotate(
            f"the VAE's {held:.1f} nats\nfrom t = {at} down", (at, held), xytext=(10, -28), textcoords="offset points"
        )
