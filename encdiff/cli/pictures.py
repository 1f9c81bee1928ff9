"""`encdiff swap`, `traverse` and `attend`: pictures of a trained model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device, Run, RunData, Seed
from encdiff.cli.support import draw_images, factor_groups, open_model, parse_concepts, results, save_picture, writable
from encdiff.errors import InputError
from encdiff.terminal import progress_bar


class SamplerName(StrEnum):
    dpm_solver_pp = "dpm-solver++"
    unipc = "unipc"
    ddim = "ddim"
    ddpm = "ddpm"
    euler = "euler"
    heun = "heun"


Out = Annotated[Path | None, typer.Option(help="The PNG to write. Default: in the run's pictures/.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.", min=1)]
Sampler = Annotated[SamplerName, typer.Option(help="The paper's pictures: ddim with 200 steps.")]
Concepts = Annotated[
    str | None, typer.Option(help="Such as 0,3. Default: those that carry a factor, if known, or all.")
]


def swap(
    run: Run,
    data: RunData = None,
    source: Annotated[
        list[int] | None, typer.Option(help="Index of a source image; may be repeated. Default: drawn.")
    ] = None,
    target: Annotated[
        list[int] | None, typer.Option(help="Index of a target image, one per source. Default: drawn.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="How many pairs to draw, where no indices are given.", min=1)] = 4,
    concepts: Concepts = None,
    by_factor: Annotated[bool, typer.Option(help="Swap together what carries one factor, once evaluated.")] = True,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: each concept of one image put into another.

    After `evaluate`, all concepts that carry one factor are swapped together; --no-by-factor swaps each alone.
    """
    from encdiff.pictures import swap_grid

    model, dataset = open_model(run, data, device)
    if (source is None) != (target is None) or len(source or ()) != len(target or ()):
        raise InputError(f"--source {source} and --target {target} must be given together, as many of each")
    count = len(source) if source else min(pairs, max(1, len(dataset) // 2))
    images = draw_images(dataset, [*source, *target] if source and target else None, 2 * count, seed, model)
    path = writable(out or results(run) / "pictures" / "swap.png")
    groups = factor_groups(run, model) if by_factor and not concepts else None
    if alone := parse_concepts(concepts):
        groups = {f"concept {i}": [i] for i in alone}
    with progress_bar("sampling") as report:
        picture = swap_grid(
            model, images[:count], images[count:], groups=groups, sampler=sampler.value, steps=steps, seed=seed,
            progress=report,
        )  # fmt: skip
    save_picture(picture, path)


def traverse(
    run: Run,
    data: RunData = None,
    index: Annotated[int | None, typer.Option(help="The image's index in the data. Default: a random one.")] = None,
    concepts: Concepts = None,
    values: Annotated[int, typer.Option(help="How many values per concept.", min=2)] = 7,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: each concept moved from low to high. It shows one image with that concept's scalar changed."""
    from encdiff.pictures import concept_labels, encode_images, traversal

    model, dataset = open_model(run, data, device)
    image = draw_images(dataset, None if index is None else [index], 1, seed, model)[0]
    path = writable(out or results(run) / "pictures" / "traverse.png")
    labels = concept_labels(factor_groups(run, model))
    codes = encode_images(model, draw_images(dataset, None, min(len(dataset), 1000), seed, model))
    with progress_bar("sampling") as report:
        picture = traversal(
            model, image, codes, concepts=parse_concepts(concepts), labels=labels, columns=values,
            sampler=sampler.value, steps=steps, seed=seed, progress=report,
        )  # fmt: skip
    save_picture(picture, path)


def attend(
    run: Run,
    data: RunData = None,
    index: Annotated[list[int] | None, typer.Option(help="Index of an image; may be repeated. Default: drawn.")] = None,
    images: Annotated[int, typer.Option(help="How many images to draw, where no index is given.", min=1)] = 4,
    concepts: Concepts = None,
    steps: Annotated[int, typer.Option(help="Noise levels to average over.", min=1)] = 10,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: where the U-Net attends to each concept."""
    from encdiff.pictures import attention_picture, concept_labels

    model, dataset = open_model(run, data, device)
    chosen = draw_images(dataset, index, min(images, len(dataset)), seed, model)
    path = writable(out or results(run) / "pictures" / "attend.png")
    labels = concept_labels(factor_groups(run, model))
    picture = attention_picture(model, chosen, concepts=parse_concepts(concepts), labels=labels, steps=steps, seed=seed)
    save_picture(picture, path)
