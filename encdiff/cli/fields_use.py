"""`encdiff fields reconstruct` and `evaluate`: a trained model of fields at work."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from encdiff import pretrained
from encdiff.checked import Range
from encdiff.cli.fields_data import FIELDS_HELP
from encdiff.cli.options import Device, Seed
from encdiff.cli.support import choose_device, held, parse_numbers, results, writable, writable_picture
from encdiff.errors import InputError
from encdiff.terminal import progress_bar, say, say_table

Run = Annotated[
    Path, typer.Argument(help="A run, a folder that save_pretrained wrote, or darcy64.", show_default=False)
]
Members = Annotated[int, typer.Option("--ensemble", help="Reconstructions of each field.", min=1)]
Steps = Annotated[int, typer.Option(help="Of the sampler.", min=1)]
NEAR = 0.3  # of the domain, a localisation; without one the mean became worse (docs/results/fields)
SHARE, NOISE = Range(0, 1, above=True), Range(0, 1e3)


class Sampler(StrEnum):
    heun = "heun"
    euler = "euler"
    dpm_solver_pp = "dpm-solver++"
    unipc = "unipc"


def reconstruct(
    run: Run,
    sensors: Annotated[
        Path,
        typer.Argument(help="A CSV of x, y, a column for each channel that is measured; t and sigma, if there are."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where mean, spread and members go: .npz or .h5. Default: beside the CSV.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Default: beside the CSV.")] = None,
    ensemble: Members = 25,
    time: Annotated[float | None, typer.Option(help="Of the field. Default: that of the last sensor.")] = None,
    more: Annotated[
        Path | None,
        typer.Option(help="A CSV of later measurements, which correct the ensemble by its covariance. Default: none."),
    ] = None,
    localisation: Annotated[
        float | None,
        typer.Option(
            help="Of --more: the length over which covariances fade. Default: 0.3 of the domain's longer side."
        ),
    ] = None,
    sampler: Annotated[Sampler, typer.Option(help="How fields are drawn.")] = Sampler.dpm_solver_pp,
    steps: Steps = 10,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Whole fields from your own sensors. With the spread of what agrees with them, and a picture."""
    from encdiff.fields import read_sensors, reconstruction_picture, save_figure, update
    from encdiff.fields.model import summarised
    from encdiff.fields.output import check_suffix, write_reconstruction
    from encdiff.files.checkpoint import is_there

    for path in (sensors, *([more] if more else [])):
        is_there(path)
    model = open_field_model(run, device)
    out = writable(check_suffix(out or sensors.with_name(f"{sensors.stem}-fields.npz")))
    picture = writable_picture(picture or sensors.with_name(f"{sensors.stem}-fields.png"))
    grid = model.config.grid
    measured, later = read_sensors(sensors, grid, time), None if more is None else read_sensors(more, grid)
    if time is not None and measured.times is None:
        raise InputError(f"--time is {time:g}, but {sensors} has no column t")
    _check_update(later, localisation, 1 if model.config.objective == "regression" else ensemble)
    with progress_bar("sampling") as report:
        found = model.reconstruct(
            measured, ensemble, time=time, sampler=sampler.value, steps=steps, seed=seed, progress=report
        )
    if later is not None:
        length = localisation or NEAR * float(grid.extent.max())
        found = summarised(update(found.members, later, grid, localisation=length))
        measured = measured if measured.times is not None else measured.joined(later)
    write_reconstruction(out, found, grid)
    save_figure(reconstruction_picture(found, grid, measured, title=sensors.name), picture)
    say(f"fields: {out}\npicture: {picture}")


def _check_update(later, localisation: float | None, members: int) -> None:
    """InputError, before any field is drawn, for what `update` would not take."""
    if later is not None and later.times is not None:
        raise InputError(
            f"{later.source}: has times; what --more corrects is the field at its time: leave out column t"
        )
    if localisation is not None and later is None:
        raise InputError("--localisation is given without --more, whose option it is")
    if localisation is not None and not 0 < localisation < float("inf"):
        raise InputError(f"--localisation is {localisation}, must be a length above 0")
    if later is not None and members < 2:
        raise InputError("--more needs an ensemble of at least 2 members; here there is one")


def evaluate(
    run: Run,
    data: Annotated[str | None, typer.Option(help=FIELDS_HELP + " Default: what the run was trained on.")] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Another run for the same table; may be given several times. Default: none."),
    ] = None,
    baselines: Annotated[
        str, typer.Option(help="Methods without training: nearest, linear, cubic, kriging, or none.")
    ] = "nearest,linear,cubic,kriging",
    observed: Annotated[str, typer.Option(help="Shares of the pixels with a sensor.")] = "0.003,0.01,0.03,0.1",
    noise: Annotated[str, typer.Option(help="Of the sensors, in standard deviations of a channel.")] = "0,0.05,0.1,0.2",
    count: Annotated[int, typer.Option(help="Fields, the last ones of the data.", min=1)] = 32,
    ensemble: Members = 25,
    sampler: Annotated[Sampler, typer.Option(help="How fields are drawn.")] = Sampler.dpm_solver_pp,
    steps: Steps = 10,
    out: Annotated[Path | None, typer.Option(help="The folder for table and pictures. Default: RUN/fields.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Keep what the table there has of other methods.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the table there.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Score reconstructions of held-out fields. Beside methods without training, as a table and pictures."""
    from encdiff.fields import evaluate_fields, of_baseline, of_model, open_fields
    from encdiff.fields.output import added, report_rows, write_evaluation

    shares = parse_numbers("--observed", observed, SHARE, "shares above 0, at most 1, such as 0.01,0.1")
    levels = parse_numbers("--noise", noise, NOISE, "numbers of 0 or more, such as 0,0.1")
    plain = _methods(baselines)
    runs = _named([run, *(beside or [])], plain)
    models = {name: open_field_model(path, device) for name, path in runs.items()}
    model = next(iter(models.values()))
    fields = open_fields(data or _data_of(run))
    for name, one in models.items():
        if unlike := one.config.grid.differs(fields.grid):
            raise InputError(f"{name}: is of another grid than {fields.name}: {unlike}")
        if not (least := _unseen(runs[name], fields)):
            raise InputError(f"{fields.name}: {name} was trained on all of it, must hold other fields")
        if count > least:
            raise InputError(f"--count is {count}, must be at most {least}: {name} was trained on the other fields")
    methods = {name: of_model(one, fields, sampler=sampler.value, steps=steps) for name, one in models.items()}
    methods |= {name: of_baseline(name, fields.grid) for name in plain}
    folder = out or results(run) / "fields"
    if writable(folder / "fields.json").is_file() and not (add or overwrite):
        raise InputError(f"{folder}: holds a table; --add to it, --overwrite it, or choose another folder by --out")
    protocol: dict[str, Any] = {"observed": shares, "noise": levels, "count": count, "members": ensemble, "seed": seed}
    protocol["memory"] = model.config.memory
    if add:
        added(evaluate_fields({}, fields, **protocol), folder)  # refuses before the work, not after
    with progress_bar("evaluating") as report:
        result = evaluate_fields(methods, fields, **protocol, progress=report)
    result = added(result, folder) if add else result
    say_table(*report_rows(result))
    for path in write_evaluation(folder, result):
        say(f"written: {path}")


def open_field_model(run: Path, device: str):
    """The trained model of a run or folder, or one that comes with the package."""
    from encdiff.fields import FieldModel

    folder = held(run)
    if not folder.is_dir():
        ours = "".join(f" or {name}" for name in pretrained.names("fields"))
        raise InputError(f"{run}: no such folder; must be a run, a folder that save_pretrained wrote{ours}")
    of_run = (folder / "checkpoint.safetensors").is_file()
    return FieldModel.from_pretrained(folder / "model" if of_run else folder, device=choose_device(device))


def _methods(given: str) -> list[str]:
    from encdiff.fields import BASELINES

    names = [] if given == "none" else [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in BASELINES]:
        raise InputError(f"--baselines: {unknown[0]!r} is unknown, must be among {', '.join(BASELINES)}, or none")
    return names


def _named(paths: list[Path], others: list[str]) -> dict[str, Path]:
    """Runs by the names of their folders, which stand in the table."""
    names = [path.absolute().name for path in paths]
    if twice := [name for name in names if (names + others).count(name) > 1]:
        raise InputError(f"--beside: two rows would be called {twice[0]}; rename the folder of one")
    return dict(zip(names, paths, strict=True))


def _begun(run: Path) -> dict | None:
    """What a run was begun with; None of a folder that holds a model alone."""
    from encdiff.training.runs import read_config

    folder = held(run)
    folder = folder.parent if folder.name == "model" else folder
    places = (folder, folder / "run") if (folder / "checkpoint.safetensors").is_file() else (folder / "run",)
    return next((read_config(place) for place in places if (place / "config.json").is_file()), None)


def _data_of(run: Path) -> str:
    begun = _begun(run)
    if begun is None or held(run) != run:
        raise InputError(f"--data is missing, and {run} names none that is here: " + FIELDS_HELP)
    return begun["data"]


def _unseen(run: Path, fields) -> int:
    """How many of the last fields a run was not trained on: all, where the data does not hold what it was."""
    from encdiff.data import describe

    begun = _begun(run) or {}
    fingerprint, part = begun.get("fingerprint", {}), re.search(r":(\d+):\d+$", str(begun.get("data")))
    whole, first = fields.whole()
    used = fingerprint.get("images")
    for start in {0, int(part[1]) if part else 0}:  # of what it was trained on, in the file
        end = start + used if isinstance(used, int) and used > 0 else len(whole) + 1
        if end <= len(whole) and describe(whole.part(start, end))["sha256"] == fingerprint.get("sha256"):
            return max(0, first + len(fields) - max(first, end))
    return len(fields)
