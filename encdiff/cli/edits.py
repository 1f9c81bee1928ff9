"""`encdiff interpolate` and `direction`: codes moved in a straight line."""

import re
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device, Run, RunData, Seed
from encdiff.cli.pictures import Out, Sampler, SamplerName, Steps
from encdiff.cli.support import (
    draw_images,
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
from encdiff.terminal import progress_bar, say, say_table

MOST = 64  # columns of a picture
LISTED = 5  # concepts that are printed
SUFFIX = ".safetensors"
REACH = 3  # strengths go from -REACH to REACH


def interpolate(
    run: Run,
    data: RunData = None,
    source: Annotated[int | None, typer.Option(help="Index of the image to begin with. Default: drawn.")] = None,
    target: Annotated[int | None, typer.Option(help="Index of the image to end with. Default: drawn.")] = None,
    values: Annotated[int, typer.Option(help="How many steps of the way to show.", min=2, max=MOST)] = 7,
    concepts: Annotated[str | None, typer.Option(help="Such as 0,3: these alone move. Default: none.")] = None,
    by_factor: Annotated[bool, typer.Option(help="A row for each factor, once evaluated.")] = True,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """A picture: from one image to another, all concepts moving in a straight line.

    After `evaluate`, a row below for each factor, in which only its concepts move; --concepts gives one of your own.
    """
    from encdiff.pictures import interpolation

    model, dataset = open_model(run, data, device)
    if (source is None) != (target is None):
        raise InputError(f"--source {source} and --target {target} must be given together")
    chosen = draw_pairs(dataset, 1, seed) if source is None or target is None else [source, target]
    first, last = images_of(dataset, chosen, model)
    path = writable_picture(out or results(run) / "pictures" / "interpolate.png")
    if alone := parse_concepts(concepts):
        groups = {"these alone": alone}
    else:
        groups = factor_groups(run, model) if by_factor else {}
    with progress_bar("rows") as report:
        picture = interpolation(
            model, first, last, groups=groups, columns=values, sampler=sampler.value, steps=steps, seed=seed,
            progress=report,
        )  # fmt: skip
    save_picture(picture, path)


def direction(
    run: Run,
    factor: Annotated[
        str | None, typer.Option(help="The data's factor or attribute that labels it. Default: --file's.")
    ] = None,
    value: Annotated[
        int | None, typer.Option(help="Against the rest, from 0 up. Default: none; a factor without order needs it.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A direction that this command wrote, in place of --factor. Default: none.")
    ] = None,
    data: RunData = None,
    strengths: Annotated[int, typer.Option(help=f"How many, from -{REACH} to {REACH}.", min=2, max=MOST)] = 7,
    images: Annotated[int, typer.Option(help="How many images to draw and move.", min=1)] = 4,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """The direction in which codes change with a label: its score, a picture of images moved along it, and a file.

    A factor with an order is fitted by ridge regression on its values, one without by logistic regression of --value
    against the rest, an attribute by logistic regression; on 10,000 images at most, of which a fifth is held out.
    """
    from encdiff.pictures import edits

    if (factor is None) == (file is None) or (file and value is not None):
        raise InputError("either --factor, with or without --value, or --file must be given")
    model, dataset = open_model(run, data, device)
    chosen = draw_images(dataset, None, min(images, len(dataset)), seed, model)
    if file is None:
        found, path = _fit(model, dataset, factor, value, out, run, seed)
    else:
        found, path = _read(file, out, run)
    with progress_bar("rows") as report:
        picture = edits(
            model, chosen, found, strengths=_spread(strengths), sampler=sampler.value, steps=steps, seed=seed,
            progress=report,
        )  # fmt: skip
    say(f"{found.name}: {found.score_name} {found.score:.3f} held out, {found.baseline:.3f} with shuffled labels")
    moved = [(str(concept), f"{by:+.2f}") for concept, by in found.ranked()[:LISTED]]
    say_table(("concept", "standard deviations per unit of strength"), moved)
    save_picture(picture, path)
    if file is None:
        found.save(path.with_suffix(SUFFIX))
        say(f"direction: {path.with_suffix(SUFFIX)}")


def _fit(model, dataset, factor: str | None, value: int | None, out: Path | None, run: Path, seed: int):
    """The direction, and where its picture goes; what is asked for is checked before images are encoded."""
    from encdiff.evaluation import factor_direction, factor_labels

    assert factor is not None, "or there is a file"
    name = factor_labels(dataset, [], factor, value).name
    path = _picture(out, run, name)
    _refuse_others(path.with_suffix(SUFFIX))
    with progress_bar("encoding") as report:
        return factor_direction(model, dataset, factor, value, seed=seed, progress=report), path


def _read(file: Path, out: Path | None, run: Path):
    from encdiff.evaluation import load_direction

    found = load_direction(file)
    return found, _picture(out, run, found.name)


def _picture(out: Path | None, run: Path, name: str) -> Path:
    letters = re.sub(r"\W+", "-", name)[:50]
    path = out or results(run) / "pictures" / f"direction-{letters}.png"
    if path.suffix == SUFFIX:
        raise InputError(f"--out {path}: must be a picture such as direction.png; the direction is written beside it")
    return writable_picture(path)


def _refuse_others(path: Path) -> None:
    """InputError for a file that is there and no direction: a model's weights have the same ending."""
    from encdiff.evaluation import load_direction

    if not path.exists():
        return
    try:
        load_direction(path)
    except InputError:
        raise InputError(f"{path}: is no direction and would be overwritten; choose another --out") from None


def _spread(count: int) -> list[float]:
    """So many strengths from -REACH to REACH."""
    return [REACH * (2 * i / (count - 1) - 1) for i in range(count)]
