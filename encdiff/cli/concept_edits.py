"""`encdiff edit`: cross-attention changed so that a concept or factor shows one value."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device, Run, RunData, Seed
from encdiff.cli.pictures import Sampler, SamplerName, Steps
from encdiff.cli.support import draw_images, factor_groups, open_model, parse_concepts, results, save_picture, writable
from encdiff.errors import InputError
from encdiff.terminal import Tasks, progress_bar, say

SUFFIX = ".safetensors"
REACH = 3  # half-widths of a concept's range, from its middle, within which --as makes sense


class MethodName(StrEnum):
    mist = "mist"
    uce = "uce"


def edit(
    run: Run,
    concept: Annotated[int | None, typer.Option(help="The concept to edit. Default: none, by --factor.", min=0)] = None,
    factor: Annotated[
        str | None, typer.Option(help="The data's factor, whose concepts are edited. Default: none, by --concept.")
    ] = None,
    value: Annotated[
        float | None, typer.Option("--as", help="What it should always show: a scalar, within three times the "
                                   "concept's range in the data, or a factor's value from 0 up. Default: none; needed "
                                   "but with --apply.")
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(help="An edit that this command wrote, to draw it again. Default: none.")
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Concepts such as 0,3 to keep. Default: all others.")] = None,
    method: Annotated[MethodName, typer.Option(help="mist edits values, uce keys and values.")] = MethodName.uce,
    strength: Annotated[float, typer.Option(help="Of the edit: 0 is none, 1 the whole; within 1,000,000.")] = 1.0,
    lam: Annotated[float, typer.Option(help="What a change of the weights costs.", min=0)] = 0.5,
    keep_scale: Annotated[float, typer.Option(help="What a change of what is kept costs.", min=0)] = 0.2,
    judge: Annotated[bool, typer.Option("--judge", help="With --factor: count wanted and unwanted changes.")] = False,
    data: RunData = None,
    images: Annotated[int, typer.Option(help="How many images to draw, and to judge.", min=1)] = 4,
    sampler: Sampler = SamplerName.dpm_solver_pp,
    steps: Steps = 20,
    out: Annotated[
        Path | None,
        typer.Option(help="The edit to write, its picture beside it; with --apply the picture. Default: in the run's "
                     "pictures/, with --apply FILE-again.png.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:  # fmt: skip
    """A concept edit: a file of cross-attention weights with which every image shows one value, and its picture.

    The model is left as it is: `edit = Edit.load(FILE)` and `edit.apply(model)` edit it, `edit.undo(model)` takes it
    back. Unlike `direction`, which moves the codes of chosen images, an edit changes the model, for whatever codes it
    is given.
    """
    from encdiff.edit import Edit
    from encdiff.pictures import edited_sheet

    _check(concept, factor, value, apply, keep, judge, strength)
    model, dataset = open_model(run, data, device, attending=True)
    note = ""
    if apply is None:
        name = f"{f'concept {concept}' if factor is None else factor.replace('_', ' ')} as {value:g}"
        path = _place(out, run, name)
        targets, note = _targets(run, model, dataset, concept, factor, value, parse_concepts(keep, "--keep"), seed)
        made = _make(method.value, model, targets, name, lam, keep_scale)
    else:
        again = f"{apply.stem}-again{f'-{seed}' if seed else ''}.png"  # beside the picture of the edit's making
        made, path = Edit.load(apply, model), out or results(run) / "pictures" / again
        if path.suffix == SUFFIX:
            raise InputError(f"--out {path}: must be a picture such as edit.png, since --apply writes no edit")
    drawn = writable(path.with_suffix(".png"))
    chosen = draw_images(dataset, None, min(images, len(dataset)), seed, model)
    shown = sorted({0.0, strength / 2, strength})
    if judge:
        note += _effect(model, made, dataset, factor, value, strength, images, sampler.value, steps, seed)
    with progress_bar("strengths") as report:
        picture = edited_sheet(
            model, made, chosen, strengths=shown, sampler=sampler.value, steps=steps, seed=seed, note=note,
            progress=report,
        )  # fmt: skip
    save_picture(picture, drawn)
    if apply is None:
        made.save(path)
        say(f"edit: {path}")


def _place(out: Path | None, run: Path, name: str) -> Path:
    """Where the edit goes."""
    letters = re.sub(r"[^\w.-]+", "-", name)[:50]
    path = out or results(run) / "pictures" / f"edit-{letters}{SUFFIX}"
    if path.suffix != SUFFIX:
        raise InputError(f"--out {path}: must end in {SUFFIX}; its picture is written beside it")
    _refuse_others(path)
    return writable(path)


def _check(concept, factor, value, apply, keep, judge, strength) -> None:
    from encdiff.edit.edit import STRONGEST

    given = sum(way is not None for way in (concept, factor, apply))
    if given != 1:
        raise InputError(f"{'only ' if given else ''}one of --concept, --factor and --apply must be given")
    if (value is None) != (apply is not None):
        raise InputError("--as must be given with --concept and --factor, and left out with --apply")
    if keep is not None and apply is not None:
        raise InputError("--keep must be left out with --apply, whose edit is made already")
    if judge and factor is None:
        raise InputError("--judge must be left out without --factor: what a concept should change is not known")
    if not abs(strength) <= STRONGEST:  # false for NaN
        bounds = f"{-STRONGEST:,.0f} to {STRONGEST:,.0f}"
        raise InputError(f"--strength {strength:g}: must be a number from {bounds}; 1 is the whole edit")
    if factor is not None and not value.is_integer():
        raise InputError(f"--as {value:g}: must be a whole number, since it is a factor's value")


def _targets(run: Path, model, dataset, concept, factor, value, keep, seed: int):
    """Tokens to edit, wanted and to keep, and what the picture says of the value.

    A factor's concepts are those of the run's evaluation, where there is one.
    """
    from encdiff.edit import concept_targets, factor_targets
    from encdiff.edit.concepts import check_value

    if factor is None:
        note = _range_told(model, dataset, concept, value, seed)
        targets = concept_targets(model, dataset, concept, value, keep=keep, seed=seed)
        say(f"concept {concept}: edited to its token at {value:g}; {note}")
        return targets, f"Concept {concept} at {value:g}; {note}."
    name, column = factor.replace("_", " "), check_value(dataset, factor, int(value))
    owned = factor_groups(run, model).get(name)
    targets = factor_targets(model, dataset, factor, int(value), concepts=owned, keep=keep, seed=seed)
    if owned:
        say(f"{name}: carried by concepts {', '.join(map(str, owned))}")
    label = f", {dataset.label_values[column][int(value)]:.4g} in the data" if dataset.label_values else ""
    return targets, f"Value {value:g} of {name}, of 0..{dataset.factor_sizes[column] - 1}{label}."


def _range_told(model, dataset, concept: int, value: float, seed: int) -> str:
    """The concept's range in the data; InputError for a value far outside, of which no token was learnt."""
    from encdiff.edit import concept_range

    low, high = concept_range(model, dataset, concept, seed=seed)
    middle, reach = (low + high) / 2, REACH * (high - low) / 2
    told = f"in the data its scalar goes from {low:.3g} to {high:.3g}"
    if not abs(value - middle) <= reach:  # false for NaN
        most = f"must be in {middle - reach:.3g}..{middle + reach:.3g}, {REACH} times as wide"
        raise InputError(f"--as {value:g}: concept {concept} has learnt no such value, {told}; {most}")
    return told


def _make(method: str, model, targets, name: str, lam: float, keep_scale: float):
    from encdiff.edit.methods import edit_by

    made = edit_by(method, model, *targets, name=name, lam=lam, keep_scale=keep_scale)
    kept = 0 if targets.keep is None else len(targets.keep)
    say(
        f"{name}: {method} of {len(made.weights)} of {made.layers} projections, {len(targets.edited)} tokens edited, "
        f"{kept} kept"
    )
    return made


def _effect(model, made, dataset, factor, value, strength, images, sampler, steps, seed) -> str:
    """What the judge counts, printed, and as the picture says it."""
    from encdiff.evaluation import edit_effect

    with Tasks() as tasks:
        effect = edit_effect(
            model, made, dataset, factor, int(value), strength=strength, images=images, sampler=sampler, steps=steps,
            seed=seed, progress=tasks,
        )  # fmt: skip
    told = {}
    for stage in ("before", "after"):
        wanted, unwanted = effect[stage]["wanted"], effect[stage]["unwanted"]
        told[stage] = f"{wanted:.0%} of {effect['images']} images wanted, {unwanted:.0%} with another factor changed"
        say(f"{stage}: {told[stage]}")
    return f" Judged at strength {strength:g}: {told['after']}; before the edit: {told['before']}."


def _refuse_others(path: Path) -> None:
    """InputError for a file that is there and no edit: a model's weights have the same ending."""
    from encdiff.edit import Edit

    if not path.exists():
        return
    try:
        Edit.load(path)
    except InputError:
        raise InputError(f"{path}: is no edit and would be overwritten; choose another --out") from None
