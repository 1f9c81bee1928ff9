"""`encdiff swap`, `traverse` and `attend`: pictures of a trained model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device, Run, RunData, Seed
from encdiff.cli.support import (
    draw_images,
    draw_indices,
    draw_pairs,
    factor_groups,
    images_of,
    open_model,
    parse_concepts,
    results,
    save_picture,
    writable_picture,
)
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
Guidance = Annotated[
    float, typer.Option(help="Above 1: further from an image without concepts; needs a model of --objective guided.")
]
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
    guidance: Guidance = 1.0,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: each concept of one image put into another.

    After `evaluate`, all concepts that carry one factor are swapped together; --no-by-factor swaps each alone, and
    --concepts 0,3 these together. Of a grid of factors the true image that should come out stands beside each.
    """
    from encdiff.pictures import swap_grid, true_swaps

    model, dataset = open_model(run, data, device)
    if (source is None) != (target is None) or len(source or ()) != len(target or ()):
        raise InputError(f"--source {source} and --target {target} must be given together, as many of each")
    count = len(source) if source else min(pairs, max(1, len(dataset) // 2))
    chosen = [*source, *target] if source and target else draw_pairs(dataset, count, seed)
    images = images_of(dataset, chosen, model)
    path = writable_picture(out or results(run) / "pictures" / "swap.png")
    groups = factor_groups(run, model) if by_factor and not concepts else None
    if together := parse_concepts(concepts):
        groups = {"chosen": together}
    truth = true_swaps(dataset, chosen[:count], chosen[count:], groups or {})
    with progress_bar("sampling") as report:
        picture = swap_grid(
            model, images[:count], images[count:], groups=groups, truth=truth, sampler=sampler.value, steps=steps,
            guidance=guidance, seed=seed, progress=report,
        )  # fmt: skip
    save_picture(picture, path)


def traverse(
    run: Run,
    data: RunData = None,
    index: Annotated[int | None, typer.Option(help="The image's index in the data. Default: a random one.")] = None,
    concepts: Concepts = None,
    values: Annotated[int, typer.Option(help="How many values, of a factor at most.", min=2)] = 7,
    by_factor: Annotated[bool, typer.Option(help="Move together what carries one factor, once evaluated.")] = True,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    guidance: Guidance = 1.0,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: one image, with each factor or each concept moved from one end to the other.

    After `evaluate`, on a grid of factors, all concepts that carry one factor move together, through the values that
    they have in the images which differ in that factor alone, and the true images stand below. Otherwise, with
    --no-by-factor or of chosen --concepts, each scalar moves alone, those first that change the image most.
    """
    from encdiff.pictures import concept_labels, encode_images, factor_paths, factor_traversal, traversal

    model, dataset = open_model(run, data, device)
    chosen = draw_indices(dataset, None if index is None else [index], 1, seed)
    image = images_of(dataset, chosen, model)[0]
    path = writable_picture(out or results(run) / "pictures" / "traverse.png")
    groups = factor_groups(run, model)
    sizes = zip(dataset.factor_names, dataset.factor_sizes, strict=True)
    factors = {name.replace("_", " ") for name, size in sizes if size > 1}
    if by_factor and concepts is None and dataset.is_complete and factors & groups.keys():
        paths = factor_paths(dataset, chosen[0], groups, values)
        with progress_bar("sampling") as report:
            picture = factor_traversal(
                model, image, paths, sampler=sampler.value, steps=steps, guidance=guidance, seed=seed, progress=report
            )
        save_picture(picture, path)
        return
    labels = concept_labels(groups)
    codes = encode_images(model, draw_images(dataset, None, min(len(dataset), 1000), seed, model))
    with progress_bar("sampling") as report:
        picture = traversal(
            model, image, codes, concepts=parse_concepts(concepts), labels=labels, columns=values,
            sampler=sampler.value, steps=steps, guidance=guidance, seed=seed, progress=report,
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

    model, dataset = open_model(run, data, device, attending=True)
    chosen = draw_images(dataset, index, min(images, len(dataset)), seed, model)
    path = writable_picture(out or results(run) / "pictures" / "attend.png")
    labels = concept_labels(factor_groups(run, model))
    picture = attention_picture(model, chosen, concepts=parse_concepts(concepts), labels=labels, steps=steps, seed=seed)
    save_picture(picture, path)
