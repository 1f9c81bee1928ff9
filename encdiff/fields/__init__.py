"""Whole fields from a few sensors: a diffusion model that cross-attends to what was measured (arXiv 2409.00230).

    data = open_fields("darcy.h5")
    model = FieldModel.from_pretrained("darcy64")
    found = model.reconstruct(read_sensors("sensors.csv", model.config.grid), ensemble=25)
    found.mean, found.spread, found.members

Import the names below from here; the room stands on models, diffusion and training.
"""

from encdiff.fields.baselines import BASELINES
from encdiff.fields.config import FieldConfig
from encdiff.fields.evaluation import evaluate_fields, of_baseline, of_model
from encdiff.fields.formats import open_fields
from encdiff.fields.grid import Grid
from encdiff.fields.kalman import update
from encdiff.fields.layouts import lattice, measure, random_pixels, scattered, tracks
from encdiff.fields.model import FieldModel, Reconstruction
from encdiff.fields.pictures import calibration_picture, error_curves, reconstruction_picture, save_figure
from encdiff.fields.recipes import FIELD_PRESETS, FieldTrainConfig, field_recipe
from encdiff.fields.rendering import render
from encdiff.fields.sensors import Sensors
from encdiff.fields.store import FieldData
from encdiff.fields.table import read_sensors, write_sensors
from encdiff.fields.training import FieldTraining, fitted_config, train_fields

__all__ = [
    "BASELINES", "FIELD_PRESETS", "FieldConfig", "FieldData", "FieldModel", "FieldTrainConfig", "FieldTraining",
    "Grid", "Reconstruction", "Sensors", "calibration_picture", "error_curves", "evaluate_fields", "field_recipe",
    "fitted_config", "lattice", "measure", "of_baseline", "of_model", "open_fields", "random_pixels", "read_sensors",
    "reconstruction_picture", "render", "save_figure", "scattered", "tracks", "train_fields", "update",
    "write_sensors",
]  # fmt: skip
