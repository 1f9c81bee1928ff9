"""A field model small enough for every test, and fields for it."""

from dataclasses import replace

import numpy as np
import torch

from encdiff.fields import FieldConfig, FieldModel, Grid, Sensors
from encdiff.fields.store import FieldData

CONFIG = FieldConfig(
    channels=("a", "b"), height=16, width=16, mean=(5.0, -3.0), std=(2.0, 0.5), token_patch=4, token_width=16,
    token_depth=1, token_heads=2, patch=2, base_width=16, multipliers=(1,), attention_levels=(0,), heads=2, groups=8,
)  # fmt: skip
TIMED = replace(CONFIG, channels=("a",), mean=(5.0,), std=(2.0,), memory=2.0, speed=0.5)


def field_model(config: FieldConfig = CONFIG) -> FieldModel:
    """In eval mode; no weight in it is zero, as some are at first, where what was measured has no effect yet."""
    torch.manual_seed(0)
    model = FieldModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3 * parameter[0].numel() ** -0.5)
    return model.eval()


class Fields(FieldData):
    """Smooth random fields, in memory, about CONFIG's means and not far from its deviations."""

    name = "fields"

    def __init__(self, count: int = 20, grid: Grid = CONFIG.grid, times: np.ndarray | None = None):
        self.grid, self.times, rng = grid, times, np.random.default_rng(count)
        x, y = grid.centres.T.reshape(2, grid.height, grid.width)
        wave = rng.normal(size=(4, count, *self.sample_shape[:-2], 1, 1))
        shape = wave[0] + wave[1] * np.sin(3 * x + wave[2]) * np.cos(4 * y + wave[3])
        mean, std = (np.array(v[: len(grid.channels)])[:, None, None] for v in (CONFIG.mean, CONFIG.std))
        self.fields = np.float32(mean + std * shape)

    def __len__(self) -> int:
        return len(self.fields)

    def _read(self, order: np.ndarray) -> np.ndarray:
        return self.fields[order]


def some_sensors(seed: int = 0, count: int = 9, channels: int = 2, times=None, sigma: float = 0.0) -> Sensors:
    """At random places of the unit square."""
    rng = np.random.default_rng(seed)
    return Sensors.of(rng.random((count, 2)), 5 + rng.normal(size=(count, channels)), sigma, times)
