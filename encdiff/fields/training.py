"""Training a field model: sensors drawn for every sample, EDM's loss or the mean square, the loop of every training."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from encdiff.checked import check_types
from encdiff.errors import InputError
from encdiff.fields.condition import nearest
from encdiff.fields.config import FieldConfig
from encdiff.fields.layouts import scattered
from encdiff.fields.model import FieldModel
from encdiff.fields.network import Condition
from encdiff.fields.pictures import reconstruction_picture, save_figure
from encdiff.fields.recipes import FieldTrainConfig
from encdiff.fields.store import FieldData, Part
from encdiff.ops.philox import normal
from encdiff.training.descent import Descent
from encdiff.training.loop import fit

SHOWN = 0.01  # share of the pixels with a sensor, in the pictures of a training
SENSORS = 1 << 62  # in the key of the sensors' noise, which is another than the field's


class Drawn(NamedTuple):
    """Where the sensors of a batch lie and what they measure, before any value is read."""

    nearest: Tensor  # int64 (B, H W): the pixel of each pixel's nearest sensor
    age: Tensor  # int64 (B, H W): how many frames before the field's that sensor measured
    frame: Tensor  # int64 (B,): of the field
    noise: Tensor  # float32 (B,): deviation of the sensors' noise
    measured: Tensor  # float32 (B, C): 1 for channels that are measured


def draw_sensors(
    model: FieldConfig, config: FieldTrainConfig, times: np.ndarray | None, sample: tuple[int, int]
) -> list[np.ndarray]:
    """One sample's row of `Drawn`, as arrays; a function of the seed and the sample's id in the stream."""
    rng, grid = np.random.default_rng(sample), model.grid
    pixels, channels = grid.height * grid.width, len(model.channels)
    count = round(pixels * np.exp(rng.uniform(*np.log(config.observed))))
    points = rng.choice(pixels, min(max(count, 1), pixels), replace=False)
    noise = 0.0 if rng.random() < config.exact else rng.uniform(0, config.noise)
    measured = np.ones(channels)
    if rng.random() < config.partial and channels > 1:
        measured = np.zeros(channels)
        measured[rng.permutation(channels)[: rng.integers(1, channels)]] = 1
    frame, age = 0, np.zeros(len(points), dtype=np.int64)
    if times is not None:
        frame = int(rng.integers(len(times)))
        most = np.searchsorted(times[: frame + 1], times[frame] - model.memory)  # the first frame that still counts
        age = rng.integers(0, frame - most + 1, len(points)) if model.timed else age
    seconds = None if times is None else times[frame] - times[frame - age]
    found = nearest(grid, grid.centres[points], seconds, model.speed)
    return [points[found], age[found], np.array(frame), np.array(noise, np.float32), measured.astype(np.float32)]


class FieldTraining(Descent):
    """`Descent` of a field model's loss; the sensors of the next step are drawn by threads beside this one."""

    UNIT: ClassVar[str] = "fields"
    model: FieldModel
    config: FieldTrainConfig

    def __init__(
        self, model: FieldModel, config: FieldTrainConfig, times: np.ndarray | None = None, masters: bool | None = None
    ):
        model.network.unet.checkpoint_activations = config.checkpoint_activations
        super().__init__(model, "network", config, masters=masters)
        self.times = times
        self._seconds = None if times is None else torch.as_tensor(times, device=self.device)
        self._pool = ThreadPoolExecutor(4 if self.device.type == "cuda" else 1, thread_name_prefix="encdiff-sensors")
        self._next: tuple[int, list[Future]] | None = None

    def _drawn(self) -> Drawn:
        """The sensors of this step; those of the next are begun."""
        ready, self._next = self._next, None
        rows = ready[1] if ready and ready[0] == self.step else self._submit(self.step)
        self._next = self.step + 1, self._submit(self.step + 1)
        columns = zip(*(row.result() for row in rows), strict=True)
        return Drawn(*(torch.from_numpy(np.stack(column)).to(self.device, non_blocking=True) for column in columns))

    def _submit(self, step: int) -> list[Future]:
        size, known = self.config.batch_size, (self.model.config, self.config, self.times)
        ids = (step * size + row for row in self.share.rows(size).tolist())
        return [self._pool.submit(draw_sensors, *known, (self.config.seed, i)) for i in ids]

    def advance(self, images: Tensor, indices: Tensor) -> dict[str, Tensor | float]:
        """One step on fields float32 (B, C, H, W), or (B, T, C, H, W), in their own units; returns TERMS."""
        return self.descend(fields=images, **self._drawn()._asdict())

    def _loss(  # type: ignore[override]  # what `advance` gives
        self, fields: Tensor, nearest: Tensor, age: Tensor, frame: Tensor, noise: Tensor, measured: Tensor,
        sample_ids: Tensor, draw: Tensor,
    ) -> Tensor:  # fmt: skip
        fields = self.model.standardised(fields)
        fields = fields[:, None] if fields.ndim == 4 else fields
        seed = self.config.seed
        target = fields[torch.arange(len(fields), device=fields.device), frame]
        condition = self.measure(fields, Drawn(nearest, age, frame, noise, measured), seed, sample_ids, draw)
        with self._autocast():
            return self.computing.loss(
                target, condition, levels=self.config.sigma, seed=seed, sample_ids=sample_ids, draw=draw
            )

    def measure(self, fields: Tensor, drawn: Drawn, seed: int, sample_ids: Tensor, draw: Tensor) -> Condition:
        """The condition of standardised fields (B, T, C, H, W), whose sensors' noise is keyed."""
        b, t, c, h, w = fields.shape
        place = (drawn.frame[:, None] - drawn.age) * (h * w) + drawn.nearest  # (B, H W), in time and space
        read = fields.transpose(1, 2).reshape(b, c, t * h * w).gather(2, place[:, None].expand(-1, c, -1))
        noise = normal((b, c, h * w), seed ^ SENSORS, sample_ids, draw)
        noise = noise.gather(2, drawn.nearest[:, None].expand(-1, c, -1))
        level, told = drawn.noise[:, None, None], drawn.measured[:, :, None].expand(-1, -1, h * w)
        own = (drawn.nearest == torch.arange(h * w, device=fields.device)) & (drawn.age == 0)
        age = None
        if self.model.config.timed:
            assert self._seconds is not None, "fields in time"
            seconds = self._seconds[drawn.frame][:, None] - self._seconds[drawn.frame[:, None] - drawn.age]
            age = ((seconds.float() / self.model.config.memory)[:, None] * told).view(b, c, h, w)
        values, mask, sigma = (read + level * noise) * told, own[:, None] * told, level * told
        values, mask, sigma = (part.view(b, c, h, w) for part in (values, mask, sigma))
        return Condition(values, mask, sigma, age)

    def picture(self, images: Tensor, samples: Path) -> Path | None:
        """A field of (n, C, H, W), or the last frame of (n, T, C, H, W), reconstructed from sensors at SHOWN pixels."""
        model, field = self.averaged_model(), images[:1].cpu().numpy()
        config, path = model.config, samples / f"reconstruction-{self.step:07d}.png"
        sensors = scattered(field, config.grid, SHOWN, 0.0, self.times, config.memory)
        time = None if self.times is None else float(self.times[-1])
        found = model.reconstruct(sensors[0], ensemble=4, steps=8, time=time)
        truth = field[0] if field.ndim == 4 else field[0, -1]
        save_figure(reconstruction_picture(found, config.grid, sensors[0], truth, f"step {self.step:,}"), path)
        return path


def learnt_part(data: FieldData, held_out: float) -> Part:
    """All but the last share `held_out` of the data; it says that it is the whole, which a resumed run opens."""
    part = Part(data, 0, len(data) - round(len(data) * held_out))
    part.spec = data.spec
    return part


def fitted_config(config: FieldConfig, data: FieldData, held_out: float = 0.2, **changes: Any) -> FieldConfig:
    """The configuration, changed, for the data: its grid, of what is not held out the statistics, half its duration.

    InputError for a channel that is the same everywhere, which nothing can be learnt of, as for fields that do not fit.
    """
    mean, std = learnt_part(data, held_out).statistics()
    if data.times is not None and len(data.times) < 2:
        raise InputError(f"{data.name}: its samples have one frame, must have several, or no axis of time")
    for name, value, deviation in zip(data.grid.channels, mean, std, strict=True):
        if not deviation:
            raise InputError(f"{data.name}: {name} is {value:g} everywhere, must vary")
    grid, duration = data.grid, 0.0 if data.times is None else float(data.times[-1] - data.times[0])
    memory = config.memory or duration / 2
    try:
        return replace(
            config, channels=grid.channels, height=grid.height, width=grid.width, domain=grid.domain,
            periodic=grid.periodic, mean=tuple(map(float, mean)), std=tuple(map(float, std)),
            memory=memory, speed=config.speed or (1 / memory if memory else 0.0), **changes,
        )  # fmt: skip
    except InputError as error:
        raise InputError(f"{data.name}: {error}") from None


def train_fields(
    model: FieldModel,
    data: FieldData,
    run_dir: str | Path,
    config: FieldTrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    on_step: Callable[[FieldTraining], None] | None = None,
) -> FieldModel:
    """Train `model` in place on all fields but the last `held_out` of the data; returns its averaged copy.

    Args, the run's folder, stops and errors as in `encdiff.train`.
    """
    check_types(model=(model, FieldModel, ""), config=(config, FieldTrainConfig, "field_recipe"))
    if unlike := data.grid.differs(model.config.grid):
        raise InputError(f"{data.name}: is of another grid than the model: {unlike}")
    part = learnt_part(data, config.held_out)
    training = FieldTraining(model, config, data.times)
    fit(training, part, run_dir, resume=resume, overwrite=overwrite, tensorboard=tensorboard, on_step=on_step)
    return FieldModel.from_pretrained(Path(run_dir) / "model") if training.sharded else training.averaged_model()
