"""Training EncDiff: noise, predict, compare; AdamW, warm-up, EMA of the U-Net; a run folder that can be resumed."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from encdiff import __version__
from encdiff.checkpoint import load_state, load_tensors, save_tensors
from encdiff.data import Dataset, to_float
from encdiff.data.loader import Batches
from encdiff.diffusion.losses import sample_timesteps
from encdiff.errors import InputError
from encdiff.models import EncDiff
from encdiff.runs import (
    Interrupt,
    RunFolder,
    Stopped,
    load_optimizer,
    optimizer_tensors,
    progress_bar,
    step_generator,
    training_bar,
)
from encdiff.visualize import save_png, swap_grid

COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "images_per_second", "seconds")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the paper's recipe in its public configuration."""

    steps: int = 100_000
    batch_size: int = 128
    learning_rate: float = 2.56e-4  # 2e-6 * batch size
    encoder_learning_rate: float | None = None  # of the image encoder and the MLP bank; None: as learning_rate
    warmup: int = 10_000  # steps of linear warm-up
    decay: bool = False  # after it: constant, or down to zero along a cosine
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: float = 1.0  # norm of all gradients; 0: none
    ema: float = 0.9999  # the U-Net's average decays by min(ema, (1 + n) / (10 + n))
    timesteps: str = "uniform"  # or "logit-normal", "power": diffusion/losses.py
    timesteps_mean: float = 0.0
    timesteps_std: float = 1.0
    timesteps_power: float = 0.5
    precision: str = "float32"  # or "bf16": autocast
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    picture_every: int = 5000

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "picture_every"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise InputError(f"{name} is {value!r}, must be a positive integer")
        if not self.learning_rate > 0 or (
            self.encoder_learning_rate is not None and not self.encoder_learning_rate > 0
        ):
            raise InputError(f"learning_rate is {self.learning_rate!r}, must be positive")
        if self.precision not in ("float32", "bf16"):
            raise InputError(f"precision is {self.precision!r}, must be 'float32' or 'bf16'")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(f"seed is {self.seed!r}, must be an integer of at least 0")

    @classmethod
    def from_preset(cls, name: str, **changes) -> "TrainConfig":
        if name not in RECIPES:
            raise InputError(f"preset {name!r} is unknown, must be one of {', '.join(RECIPES)}")
        return replace(RECIPES[name], **changes)


PAPER = TrainConfig()

RECIPES: dict[str, TrainConfig] = {
    "shapes3d": PAPER,
    "mpi3d": PAPER,
    "cars3d": PAPER,
    "celeba": PAPER,
    "quickstart": TrainConfig(  # docs/recipes.md
        steps=3000, batch_size=64, learning_rate=1e-3, warmup=100, decay=True, checkpoint_every=500, picture_every=1000
    ),
}


class Training:
    """Everything that changes from step to step: model, EMA, optimiser, step count."""

    def __init__(self, model: EncDiff, config: TrainConfig):
        # channels last: the faster layout of convolutions, on a CPU and a GPU
        self.model, self.config, self.step = model.train().to(memory_format=torch.channels_last), config, 0
        self.device = next(model.parameters()).device
        self.ema = copy.deepcopy(model.unet).requires_grad_(False)
        rate = config.learning_rate
        groups = [
            {"params": list(model.unet.parameters()), "peak": rate},
            {"params": list(model.cond_stage_model.parameters()), "peak": config.encoder_learning_rate or rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, rate, config.betas, weight_decay=config.weight_decay, fused=True)
        self.parameters = [p for group in groups for p in group["params"]]

    def learning_rate(self) -> float:
        """Of this step, as a fraction of the peak."""
        c = self.config
        if self.step < c.warmup:
            return (self.step + 1) / c.warmup
        if not c.decay:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (self.step - c.warmup) / max(1, c.steps - c.warmup)))

    def advance(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One step on float images (B, 3, S, S); returns loss and gradient norm, on the device."""
        c, model = self.config, self.model
        generator = step_generator(c.seed, self.step)
        t = sample_timesteps(
            len(images), model.config.num_timesteps, kind=c.timesteps, mean=c.timesteps_mean, std=c.timesteps_std,
            power=c.timesteps_power, generator=generator,
        )  # fmt: skip
        noise = torch.randn(len(images), *model.latent_shape, generator=generator).to(self.device)
        images = images.to(self.device, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
            loss = model.loss(images, t=t.to(self.device), noise=noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, c.gradient_clip or math.inf)
        fraction = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * fraction
        self.optimizer.step()
        self.step += 1
        self._average()
        return loss.detach(), norm

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.unet.parameters()), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        ema = {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        return model | ema | optimizer_tensors(self.optimizer)

    def load(self, tensors: dict[str, Tensor], step: int, source: Path) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        load_state(self.model, under("model."), source)
        load_state(self.ema, under("ema."), source)
        load_optimizer(self.optimizer, tensors)
        self.step = step

    def averaged_model(self) -> EncDiff:
        """A copy to sample from: the averaged U-Net, encoder and bank as they stand; eval mode."""
        model = EncDiff(self.model.config).to(self.device)
        model.load_state_dict(self.model.state_dict())
        model.unet.load_state_dict(self.ema.state_dict())
        return model.eval()


def train(
    model: EncDiff,
    dataset: Dataset,
    run_dir: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    on_step: Callable[[Training], None] | None = None,
) -> EncDiff:
    """Train `model` in place on a data set and return its averaged copy, which is also saved in `run_dir/model`.

    Args:
        model: on the device to train on.
        dataset: of the model's image size.
        run_dir: see `RunFolder`; refused when it holds something, unless `resume` or `overwrite`.
        resume: continue from the folder's checkpoint; on a CPU to the same weights as an unbroken run, to the bit.
        tensorboard: also write TensorBoard events, if that package is there.
        on_step: called after every step.

    Ctrl-C and SIGTERM end after the current step, with a checkpoint; `Stopped` is then raised.

    Raises:
        InputError: a data set of another image size, or a folder or checkpoint that does not fit.
    """
    if dataset.image_size != model.config.image_size:
        raise InputError(f"{dataset.name}: images of {dataset.image_size}, the model takes {model.config.image_size}")
    if config.batch_size < 2 and model.config.normalize_scalars:
        raise InputError(f"batch_size is {config.batch_size}, must be at least 2 for a model with normalize_scalars")
    folder = RunFolder(run_dir, resume, overwrite)
    with progress_bar("reading images") as report:
        batches = Batches(dataset, config.batch_size, config.seed, progress=report)
    if resume:
        model.config = replace(model.config, scaling_factor=folder.read_config()["model"]["scaling_factor"])
    elif model.config.first_stage == "vq":
        _fit_scaling_factor(model, to_float(batches.images(0)))
    training = Training(model, config)
    described = {
        "model": asdict(model.config),
        "training": asdict(config),
        "data": dataset.spec or dataset.name,
        "version": __version__,
    }
    if resume:
        folder.check_same_run(described)
        _resume(training, folder)
    folder.begin()
    folder.write_config(described)
    log = folder.log(COLUMNS, training.step)
    writer = _tensorboard(folder) if tensorboard else None
    _loop(training, batches, folder, log, writer, on_step)
    averaged = training.averaged_model()
    averaged.save_pretrained(folder.model)
    return averaged


def _loop(training: Training, batches: Batches, folder: RunFolder, log, writer, on_step) -> None:
    config, began, since = training.config, time.monotonic(), training.step
    fixed = to_float(batches.dataset.images(batches.batch_indices(0)[:8])) if len(batches.dataset) > 1 else None
    with Interrupt() as interrupt, training_bar(config.steps, training.step) as bar:
        while training.step < config.steps and not interrupt.requested:
            loss, norm = training.advance(to_float(batches.images(training.step)))
            step = training.step
            if on_step:
                on_step(training)
            if step % config.log_every == 0 or step == config.steps:
                seconds = time.monotonic() - began
                speed = (step - since) * config.batch_size / seconds
                row = dict(step=step, loss=_finite(loss, step, folder), gradient_norm=norm.item())
                rate = training.optimizer.param_groups[0]["lr"]
                log.write(**row, learning_rate=rate, images_per_second=round(speed, 1), seconds=round(seconds, 2))
                bar.update(0, completed=step, loss=row["loss"], speed=speed)
                if writer:
                    for name, value in row.items():
                        writer.add_scalar(name, value, step)
            if step % config.checkpoint_every == 0:
                _finite(loss, step, folder)
                _save(training, folder)
            if step % config.picture_every == 0 and fixed is not None:
                _picture(training, fixed, folder)
    _save(training, folder)
    if training.step < config.steps:
        raise Stopped(f"stopped after step {training.step}; saved {folder.checkpoint}, continue with --resume")


def _finite(loss: Tensor, step: int, folder: RunFolder) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise InputError(
            f"loss is {value} at step {step}: lower the learning rate or use float32; "
            f"{folder.checkpoint} is older and whole"
        )
    return value


def _save(training: Training, folder: RunFolder) -> None:
    save_tensors(folder.checkpoint, training.tensors(), {"step": str(training.step)})


def _resume(training: Training, folder: RunFolder) -> None:
    tensors, metadata = load_tensors(folder.checkpoint)
    if not metadata.get("step", "").isdigit():
        raise InputError(f"{folder.checkpoint}: names no step; is it a checkpoint of a training run?")
    training.load(tensors, int(metadata["step"]), folder.checkpoint)


def _picture(training: Training, images: Tensor, folder: RunFolder) -> None:
    half = len(images) // 2
    picture = swap_grid(
        training.averaged_model(),
        images[:half].to(training.device),
        images[half : 2 * half].to(training.device),
        steps=20,
    )
    save_png(picture, folder.samples / f"swap-{training.step:07d}.png")


@torch.no_grad()
def _fit_scaling_factor(model: EncDiff, images: Tensor) -> None:
    """Divide latents by their standard deviation over the first batch, as the published code does."""
    latents = model.first_stage.encode(images.to(model.alphas_cumprod.device))
    model.config = replace(model.config, scaling_factor=1 / latents.std().item())


def _tensorboard(folder: RunFolder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("tensorboard is not installed; pip install tensorboard, or leave out --tensorboard") from None
    return SummaryWriter(str(folder.path / "tensorboard"))
