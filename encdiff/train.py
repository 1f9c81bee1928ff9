"""Training EncDiff: noise, predict, compare; AdamW, warm-up, EMA of the U-Net."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from encdiff import ops
from encdiff.checkpoint import load_state
from encdiff.data import Dataset, to_float
from encdiff.data.loader import Batches
from encdiff.engine import Graph, choose, float32_precision
from encdiff.errors import InputError
from encdiff.fields import Checked, Count, Fraction, Natural, NotNegative, Positive, Range
from encdiff.fit import fit
from encdiff.models import EncDiff
from encdiff.profiling import phase
from encdiff.runs import load_optimizer, optimizer_tensors
from encdiff.visualize import save_png, swap_grid

Beta = Annotated[float, Range(0, 0.999999)]


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How to train; the defaults are the paper's recipe in its public configuration."""

    steps: Count = 100_000
    batch_size: Count = 128
    learning_rate: Positive = 2.56e-4  # the paper's 2e-6 for each image of a batch
    warmup: Natural = 10_000  # steps of linear warm-up
    decay: Fraction = 0.0  # the last part of the steps, over which the rate falls to zero in a line; 0: constant
    weight_decay: NotNegative = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    gradient_clip: NotNegative = 0.0  # greatest norm of all gradients; 0: none
    ema: Fraction = 0.9999  # the U-Net's average decays by min(ema, (1 + n) / (10 + n))
    timesteps: Literal["uniform", "logit-normal", "power"] = "uniform"  # their distribution: ops.timesteps
    precision: Literal["float32", "tf32", "bf16"] = "float32"  # tf32: on a GPU; bf16: autocast
    engine: Literal["auto", "eager", "compile", "graph"] = "auto"  # how a step runs: encdiff/engine.py
    checkpoint_activations: bool = False  # compute residual blocks anew in the backward pass: less memory, more time
    seed: Natural = 0
    log_every: Count = 50
    checkpoint_every: Count = 1000
    picture_every: Count = 5000

    @classmethod
    def from_preset(cls, name: str, **changes) -> "TrainConfig":
        """A named recipe with some fields changed; the learning rate follows a changed batch size unless given."""
        if name not in RECIPES:
            raise InputError(f"preset {name!r} is unknown, must be one of {', '.join(RECIPES)}")
        recipe = RECIPES[name]
        changed = replace(recipe, **changes)
        if "batch_size" in changes and "learning_rate" not in changes:
            rate = recipe.learning_rate * changed.batch_size / recipe.batch_size
            changed = replace(changed, learning_rate=rate)
        return changed


PAPER = TrainConfig()

RECIPES: dict[str, TrainConfig] = {
    "shapes3d": PAPER,
    "mpi3d": PAPER,
    "cars3d": PAPER,
    "celeba": PAPER,
    "quickstart": TrainConfig(  # docs/recipes.md
        steps=3000,
        batch_size=64,
        learning_rate=2e-3,
        warmup=100,
        decay=0.3,
        weight_decay=0.0,
        betas=(0.9, 0.99),
        gradient_clip=1.0,
        timesteps="power",
        picture_every=1000,
    ),
}


class Training:
    """Everything that changes from step to step: model, EMA, optimiser, step count."""

    TERMS = ("loss", "gradient_norm", "learning_rate")

    def __init__(self, model: EncDiff, config: TrainConfig):
        # channels last: the faster layout of convolutions, on a CPU and a GPU
        self.model, self.config, self.step = model.train().to(memory_format=torch.channels_last), config, 0
        self.device = next(model.parameters()).device
        self.ema = copy.deepcopy(model.unet).requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            torch.tensor(config.learning_rate, device=self.device),  # a tensor: a captured graph reads it anew
            config.betas,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.latents: Tensor | None = None  # of the whole data set, if that pays
        engine = choose(config.engine, self.device)
        self._loss = torch.compile(self._loss) if engine == "compile" else self._loss
        self._run = Graph(self._work) if engine == "graph" else self._work
        model.unet.checkpoint_activations = config.checkpoint_activations

    def begin(self, images: Tensor) -> None:
        """Divide latents by their standard deviation over the first batch, as the published code does."""
        if self.model.config.first_stage == "vq":
            with torch.no_grad(), float32_precision(self.config.precision == "tf32"):
                deviation = self.model.first_stage.encode(images).std().item()
            if not (math.isfinite(deviation) and deviation > 0):
                raise InputError(f"first stage: its latents have standard deviation {deviation}; is it trained?")
            self.model.config = replace(self.model.config, scaling_factor=1 / deviation)

    def rate(self) -> float:
        """The learning rate of this step."""
        c = self.config
        rising = (self.step + 1) / max(1, c.warmup)
        falling = (c.steps - self.step) / (c.decay * c.steps) if c.decay else 1.0
        return c.learning_rate * min(1.0, rising, falling)

    def prepare(self, batches: Batches) -> None:
        """Encode the whole data set once, if the run will see each image more often and the latents can be kept."""
        visits = self.config.steps * self.config.batch_size
        if self.model.config.first_stage == "vq" and batches.resident and visits > len(batches.dataset):
            with float32_precision(self.config.precision == "tf32"):
                self.latents = torch.cat([self.model.to_latents(to_float(x)) for x in batches.everything()])

    def advance(self, images: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """One step on images uint8 (B, S, S, 3) and their indices int64 (B,), on the model's device; returns TERMS."""
        # the key of a sample is its place in the endless stream of shuffled images, whatever the batches it is cut into
        draw, first = divmod(self.step * self.config.batch_size, 2**32)
        inputs = {"images": images, "sample_ids": first + torch.arange(len(images), device=self.device)}
        if self.latents is not None:
            inputs["x0"] = self.latents[indices]
        rate, n = self.rate(), self.step + 1
        average = 1 - min(self.config.ema, (1 + n) / (10 + n))
        self.optimizer.param_groups[0]["lr"].fill_(rate)
        with float32_precision(self.config.precision == "tf32"):
            loss, norm = self._run(
                **inputs,
                draw=torch.full((), draw, device=self.device),
                average=torch.full((), average, device=self.device),
            )
        self.step += 1
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate}

    def _work(self, average: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The whole step on the device, nothing read back: loss, gradients, clipping, AdamW, EMA."""
        self.optimizer.zero_grad(set_to_none=True)
        with phase("forward"):
            loss = self._loss(**inputs)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip or math.inf)
            self.optimizer.step()
        with phase("average"), torch.no_grad():
            averages = list(self.ema.parameters())
            torch._foreach_lerp_(averages, list(self.model.unet.parameters()), [average] * len(averages))
        return loss.detach(), norm

    def _loss(self, images: Tensor, sample_ids: Tensor, draw: Tensor, x0: Tensor | None = None) -> Tensor:
        c, model = self.config, self.model
        t = ops.timesteps(model.config.num_timesteps, c.seed, sample_ids, draw, kind=c.timesteps)
        images = to_float(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=c.precision == "bf16"):
            return model.loss(images, t=t, x0=x0, seed=c.seed, sample_ids=sample_ids, draw=draw)

    def model_config(self) -> dict:
        return asdict(self.model.config)

    def tensors(self) -> dict[str, Tensor]:
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        ema = {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        return model | ema | optimizer_tensors(self.optimizer)

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, str], source: Path) -> None:
        """Continue from `tensors`; InputError, naming `source`, if they are of another configuration."""
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            load_state(module, own, source)
        load_optimizer(self.optimizer, tensors, source)
        self.model.config = replace(self.model.config, scaling_factor=float(metadata["scaling_factor"]))

    def averaged_model(self) -> EncDiff:
        """A copy to sample from: the averaged U-Net, encoder and bank as they stand; eval mode."""
        model = copy.deepcopy(self.model)
        model.unet.load_state_dict(self.ema.state_dict())
        return model.eval()

    def save_model(self, folder: Path) -> None:
        self.averaged_model().save_pretrained(folder)

    def picture(self, images: Tensor, samples: Path) -> None:
        """A swap grid of the images, the first half with the second."""
        if half := len(images) // 2:
            picture = swap_grid(self.averaged_model(), images[:half], images[half : 2 * half], steps=20)
            save_png(picture, samples / f"swap-{self.step:07d}.png")


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
    """Train `model` in place on a data set and return its averaged copy; every checkpoint saves it in `run_dir/model`.

    Args:
        model: on the device to train on.
        dataset: of the model's image size.
        run_dir: see `RunFolder`; refused when it holds something, unless `resume` or `overwrite`.
        resume: continue from the folder's checkpoint; on a CPU to the same weights as an unbroken run, to the bit.
        tensorboard: also write TensorBoard events, if that package is there.
        on_step: called after every step.

    Ctrl-C and SIGTERM end after the current step, with a checkpoint; `Stopped` is then raised.

    Raises:
        InputError: a data set of another image size, a folder or checkpoint that does not fit, or a loss that is no
            longer finite.
    """
    if dataset.image_size != model.config.image_size:
        raise InputError(f"{dataset.name}: images of {dataset.image_size}, the model takes {model.config.image_size}")
    if config.batch_size < 2 and model.config.normalize_scalars:
        raise InputError(f"batch_size is {config.batch_size}, must be at least 2 for a model with normalize_scalars")
    training = Training(model, config)
    try:
        fit(training, dataset, run_dir, resume=resume, overwrite=overwrite, tensorboard=tensorboard, on_step=on_step)
        return training.averaged_model()
    finally:
        training._run = training._loss = None  # methods bound to it: without the cycle its memory is free at once
