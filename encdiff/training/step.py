"""Training EncDiff: noise, predict, compare; AdamW, warm-up, EMA of the U-Net."""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from encdiff import ops
from encdiff.checked import check_types
from encdiff.data import Dataset, to_float
from encdiff.data.loader import Batches
from encdiff.engine import Graph, choose, float32_precision
from encdiff.engine.graph import unowned
from encdiff.errors import InputError
from encdiff.files.checkpoint import load_state, positive_number
from encdiff.models import EncDiff
from encdiff.models.layers import channels_last
from encdiff.pictures import save_png, swap_grid
from encdiff.profiling import phase
from encdiff.training.loop import fit
from encdiff.training.masters import Masters
from encdiff.training.recipes import TrainConfig
from encdiff.training.runs import load_optimizer, optimizer_tensors


class Training:
    """Everything that changes from step to step: model, EMA, optimiser, step count.

    Args:
        masters: for precision "bf16": float32 masters beside a bfloat16 copy that computes (`training.masters`), in
            place of autocast; None: on a GPU. Checkpoints are the same. The model's parameters then must stay where
            they are.
        aside: with masters, in a captured step: gradients of weights are computed on a stream beside the backward pass
            (`encdiff.ops._beside`), to the same bits, which takes a sixth off the paper's step on an H200 and keeps at
            most half a gigabyte longer. Not with `checkpoint_activations`, which is to save memory.
    """

    TERMS: ClassVar[tuple[str, ...]] = ("loss", "gradient_norm", "learning_rate")

    def __init__(self, model: EncDiff, config: TrainConfig, masters: bool | None = None, aside: bool = True):
        if masters and config.precision != "bf16":
            raise InputError(f"masters is True, needs precision 'bf16', but it is {config.precision!r}")
        self.model, self.config, self.step = channels_last(model.train()), config, 0
        self.device = next(model.parameters()).device
        model.unet.checkpoint_activations = config.checkpoint_activations
        self.ema = copy.deepcopy(model.unet).requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters: Masters | None = None  # or `optimizer`, one of them
        self.optimizer: AdamW | None = None
        engine, on_gpu = choose(config.engine, self.device), self.device.type == "cuda"
        if masters or (masters is None and config.precision == "bf16" and on_gpu):
            aside = aside and engine == "graph" and not config.checkpoint_activations  # which is to save memory
            self.masters = Masters(model, self.ema, config.betas, config.weight_decay, aside)
        else:
            self.optimizer = self._adamw()
        self.computing = model if self.masters is None else self.masters.compute  # whose loss it is
        self.latents: Tensor | None = None  # of the whole data set, if that pays
        # one graph for each shape; on a GPU inside the CUDA graph, since compiled parts alone wait for the host
        compute = type(self)._loss
        self._compute = torch.compile(compute, dynamic=False) if engine == "compile" else compute
        work = unowned(self._work)
        self._run = Graph(work) if engine == "graph" or (engine == "compile" and on_gpu) else work

    def _adamw(self) -> AdamW:
        return AdamW(
            self.parameters,
            torch.tensor(self.config.learning_rate, device=self.device),  # a tensor: a captured graph reads it anew
            self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )

    def begin(self, images: Tensor) -> None:
        """Divide latents by their standard deviation over the first batch, as the published code does."""
        if self.model.config.first_stage == "vq":
            with torch.no_grad(), float32_precision(self.config.precision != "float32"):
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
            with float32_precision(self.config.precision != "float32"):
                self.latents = torch.cat([self.model.to_latents(to_float(x)) for x in batches.everything()])

    def advance(self, images: Tensor, indices: Tensor) -> dict[str, Tensor | float]:
        """One step on images uint8 (B, S, S, 3) and their indices int64 (B,), on the model's device; returns TERMS."""
        # the key of a sample is its place in the endless stream of shuffled images, whatever the batches it is cut into
        draw, first = divmod(self.step * self.config.batch_size, 2**32)
        inputs = {"images": images, "sample_ids": first + torch.arange(len(images), device=self.device)}
        if self.latents is not None:
            inputs["x0"] = self.latents[indices]
        rate, n = self.rate(), self.step + 1
        follow = 1 - min(self.config.ema, (1 + n) / (10 + n))
        inputs["draw"] = torch.full((), draw, device=self.device)
        if self.masters is None:
            cast(AdamW, self.optimizer).param_groups[0]["lr"].fill_(rate)
            inputs["follow"] = torch.full((), follow, device=self.device)
        else:
            self.masters.check()
            self.masters.prepare(rate, follow)
        with float32_precision(self.config.precision != "float32"):  # bf16: of the first stage
            loss, norm = self._run(**inputs)
        self.step += 1
        if self.masters is not None:
            self.masters.updates += 1
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate}

    def _work(self, follow: Tensor | None = None, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The whole step on the device, nothing read back: loss, gradients, clipping, AdamW, EMA."""
        (self.masters or cast(AdamW, self.optimizer)).zero_grad()
        with phase("forward"):
            loss = self._compute(self, **inputs)
        with phase("backward"):
            try:
                loss.backward()
            finally:  # also after an error: a capture must not end before what it began
                if self.masters is not None:
                    self.masters.beside.join()
        with phase("optimizer"):
            if self.masters is not None:
                return loss.detach(), self.masters.step(self.config.gradient_clip)
            norm = self._clip()
            cast(AdamW, self.optimizer).step()
        assert follow is not None, "without masters `advance` gives it"
        with phase("average"), torch.no_grad():
            lerp(list(self.ema.parameters()), list(self.model.unet.parameters()), follow)
        return loss.detach(), norm

    def _clip(self) -> Tensor:
        """The norm of all gradients, which then is at most `gradient_clip`."""
        if self.config.gradient_clip:
            return nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _loss(self, images: Tensor, sample_ids: Tensor, draw: Tensor, x0: Tensor | None = None) -> Tensor:
        c, model = self.config, self.computing
        t = ops.timesteps(model.config.num_timesteps, c.seed, sample_ids, draw, kind=c.timesteps)
        images = to_float(images).contiguous(memory_format=torch.channels_last)
        x0 = self.model.to_latents(images) if x0 is None else x0  # in float32, whatever the rest computes in
        autocast = c.precision == "bf16" and self.masters is None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            return model.loss(images, t=t, x0=x0, seed=c.seed, sample_ids=sample_ids, draw=draw)

    def model_config(self) -> dict:
        return asdict(self.model.config)

    def tensors(self) -> dict[str, Tensor]:
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        ema = {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        return (
            model | ema | (self.masters.tensors() if self.masters else optimizer_tensors(cast(AdamW, self.optimizer)))
        )

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, str], source: Path) -> None:
        """Continue from `tensors`; InputError, naming `source`, if they are of another configuration."""
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            load_state(module, own, source)
        if self.masters is None:
            load_optimizer(cast(AdamW, self.optimizer), tensors, source)
        else:
            self.masters.load(tensors, source)
        scale = positive_number(metadata.get("scaling_factor"), "scaling_factor", source)
        self.model.config = replace(self.model.config, scaling_factor=scale)

    def averaged_model(self) -> EncDiff:
        """A copy to sample from: the averaged U-Net, encoder and bank as they stand; eval mode."""
        model = copy.deepcopy(self.model)
        model.unet.load_state_dict(self.ema.state_dict())
        return model.eval()

    def save_model(self, folder: Path) -> None:
        self.averaged_model().save_pretrained(folder)

    def picture(self, images: Tensor, samples: Path) -> Path | None:
        """A swap grid of the images, the first half with the second; none of a single image."""
        if not (half := len(images) // 2):
            return None
        path = samples / f"swap-{self.step:07d}.png"
        save_png(swap_grid(self.averaged_model(), images[:half], images[half : 2 * half], steps=20), path)
        return path


def lerp(into: list[Tensor], of: list[Tensor], weight: Tensor) -> None:
    """into += weight (of - into) for each pair, weight a number on their device, float32."""
    if into[0].is_cuda:  # there `_foreach_lerp_` takes such a weight one tensor at a time
        difference = torch._foreach_sub(of, into)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(into, difference)
    else:
        torch._foreach_lerp_(into, of, [weight] * len(into))


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
    check_types(
        model=(model, EncDiff, ""), dataset=(dataset, Dataset, "open_dataset"),
        config=(config, TrainConfig, "TrainConfig.from_preset"),
    )  # fmt: skip
    if dataset.image_size != model.config.image_size:
        raise InputError(f"{dataset.name}: images of {dataset.image_size}, the model takes {model.config.image_size}")
    if config.batch_size < 2 and model.config.normalize_scalars:
        raise InputError(f"batch_size is {config.batch_size}, must be at least 2 for a model with normalize_scalars")
    training = Training(model, config)
    fit(training, dataset, run_dir, resume=resume, overwrite=overwrite, tensorboard=tensorboard, on_step=on_step)
    return training.averaged_model()
