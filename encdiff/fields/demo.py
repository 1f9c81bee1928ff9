"""A model that comes with the package at work: new Darcy flows are solved, measured at a few places, reconstructed."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from encdiff.errors import InputError
from encdiff.fields.darcy import Darcy
from encdiff.fields.equations import samples
from encdiff.fields.evaluation import of_baseline, of_model
from encdiff.fields.grid import Grid
from encdiff.fields.layouts import scattered
from encdiff.fields.model import FieldModel, summarised
from encdiff.fields.pictures import reconstruction_picture, save_figure
from encdiff.fields.scores import nrmse
from encdiff.fields.sensors import Sensors
from encdiff.fields.table import write_sensors
from encdiff.terminal import say, say_table

MODEL = "darcy64"
COUNT, MEMBERS = 3, 25
SEED = 1_000_000  # of the flows, beside the user's: far from the seeds that models are trained on
BESIDE = ("nearest", "kriging")


def demo(
    folder: str | Path, seed: int = 0, device: str = "cpu", observed: float = 0.01, noise: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Write `field-N.png` and `sensors-N.csv` of COUNT flows to a folder, and print the errors of each method.

    `observed` is the share of the pixels with a sensor, `noise` their deviation in those of each channel. Returns by
    method the `nrmse` of each channel, averaged over the flows, and the `seconds` for each flow. InputError for an
    impossible share or noise.
    """
    if not 0 <= noise < np.inf:
        raise InputError(f"noise is {noise}, must be 0 or more")
    folder, model = Path(folder), FieldModel.from_pretrained(MODEL, device=device)
    grid, equation = model.config.grid, Darcy(model.config.height)
    truth = samples(equation, SEED + seed, 0, COUNT)
    sensors = scattered(truth, grid, observed, noise * np.array(model.config.std), seed=seed)
    methods = {MODEL: of_model(model)} | {name: of_baseline(name, grid) for name in BESIDE}
    result: dict[str, dict[str, Any]] = {}
    drawn: dict[str, np.ndarray] = {}
    for name, method in methods.items():
        began = time.perf_counter()
        drawn[name] = method(sensors, MEMBERS, seed)
        seconds = (time.perf_counter() - began) / COUNT
        errors = nrmse(drawn[name].mean(1), truth).mean(0).tolist()
        result[name] = {"nrmse": dict(zip(grid.channels, errors, strict=True)), "seconds": seconds}
    folder.mkdir(parents=True, exist_ok=True)
    for i, (members, one, field) in enumerate(zip(drawn[MODEL], sensors, truth, strict=True), 1):
        _write(folder, i, members, one, field, grid)
    say(f"{COUNT} new flows, {len(sensors[0])} sensors each; root mean square error over that of the field:")
    rows = [(name, *map("{:.3f}".format, r["nrmse"].values()), f"{r['seconds']:.2g}") for name, r in result.items()]
    say_table(("method", *grid.channels, "seconds a flow"), rows)
    say(f"pictures: {folder / 'field-1.png'}, ...\nsensors:  {folder / 'sensors-1.csv'}, ...")
    say(f"next:     encdiff fields reconstruct {MODEL} {folder / 'sensors-1.csv'}")
    return result


def _write(folder: Path, i: int, members: np.ndarray, sensors: Sensors, truth: np.ndarray, grid: Grid) -> None:
    title = f"a new flow, {len(sensors)} sensors, {len(members)} members of {MODEL}"
    save_figure(reconstruction_picture(summarised(members), grid, sensors, truth, title), folder / f"field-{i}.png")
    write_sensors(folder / f"sensors-{i}.csv", sensors, grid)
