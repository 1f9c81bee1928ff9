"""Training of the VQ first stage (arXiv 2112.10752, section 3.1): L1 + codebook loss, LPIPS, discriminator."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from encdiff import __version__
from encdiff.checkpoint import atomic_path, load_state, load_tensors, save_tensors
from encdiff.data import Dataset, to_float, to_uint8
from encdiff.data.loader import Batches
from encdiff.errors import InputError
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.runs import (
    CsvLog,
    Interrupt,
    RunFolder,
    Stopped,
    load_optimizer,
    optimizer_tensors,
    progress_bar,
    step_generator,
    training_bar,
)

TERMS = ("loss", "l1", "lpips", "codebook", "adversarial", "discriminator", "codes_used")
COLUMNS = ("step", *TERMS, "images_per_second", "seconds")


@dataclass(frozen=True)
class AutoencoderTrainConfig:
    """How to train a first stage; the defaults are the published recipe but for `fit_codebook` and the absent LPIPS."""

    steps: int = 50_000
    batch_size: int = 32
    learning_rate: float = 4.5e-6  # times batch_size
    fit_codebook: bool = True  # begin with codes drawn from the first batch's latents, lest most never be used
    discriminator: bool = True
    disc_weight: float = 0.75
    disc_start: int = 0  # steps before the discriminator takes part
    disc_layers: int = 3  # each halves the resolution; images must be at least 3 * 2**disc_layers wide
    lpips_weights: str | None = None  # path of torchvision's VGG16 weights; None: no LPIPS
    precision: str = "float32"  # or "bf16": autocast
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    picture_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "disc_layers", "log_every", "checkpoint_every", "picture_every"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise InputError(f"{name} is {value!r}, must be a positive integer")
        for name in ("seed", "disc_start"):
            if not isinstance(value := getattr(self, name), int) or value < 0:
                raise InputError(f"{name} is {value!r}, must be an integer of at least 0")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is {self.learning_rate!r}, must be positive")
        if self.precision not in ("float32", "bf16"):
            raise InputError(f"precision is {self.precision!r}, must be 'float32' or 'bf16'")


class PatchDiscriminator(nn.Sequential):
    """Images (B,3,H,W) to logits (B,1,h,w), one per patch, positive for real: PatchGAN (arXiv 1611.07004)."""

    def __init__(self, layers: int = 3, width: int = 64):
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            out, stride = width * min(2**i, 8), 2 if i < layers else 1
            modules += [nn.Conv2d(channels, out, 4, stride, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            channels = out
        super().__init__(*modules, nn.Conv2d(channels, 1, 4, 1, 1))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss () for its logits, any shapes: half of mean max(0, 1 - real) + mean max(0, 1 + fake)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio () of the two losses' gradient norms at the decoder's last layer, at most 1e4 (2012.09841, eq. 7)."""
    r, a = (torch.autograd.grad(x, last_layer, retain_graph=True)[0] for x in (reconstruction_loss, adversarial_loss))
    return (r.norm() / (a.norm() + 1e-4)).clamp(0, 1e4)


def load_lpips(vgg_weights: str | Path) -> nn.Module:
    """The frozen LPIPS distance, (B,3,H,W) and (B,3,H,W) in [-1,1] to (B,1,1,1), on VGG16 weights read from disk.

    Raises:
        InputError: the optional package `lpips` is not usable, or the file is not torchvision's VGG16.
    """
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise InputError(f"lpips_weights: needs the package lpips (pip install lpips): {error}") from None
    with torch.random.fork_rng(devices=[]):
        distance = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)  # pnet_rand: download nothing
    try:
        vgg = torch.load(vgg_weights, map_location="cpu", weights_only=True)
        trunk = distance.net.state_dict()  # "slice2.5.weight" here is "features.5.weight" in torchvision
        distance.net.load_state_dict({name: vgg["features." + name.split(".", 1)[1]] for name in trunk})
    except Exception as error:  # by kind of damage: OSError, UnpicklingError, KeyError, ...
        kind = type(error).__name__
        raise InputError(f"lpips_weights: {vgg_weights}; must be torchvision's vgg16-397923af.pth ({kind})") from error
    return distance.requires_grad_(False)


class AutoencoderTraining:
    """Everything that changes from step to step: autoencoder, discriminator, their optimisers, step count."""

    def __init__(self, model: VQAutoencoder, config: AutoencoderTrainConfig):
        self.model, self.config, self.step = model.train(), config, 0
        self.device = next(model.parameters()).device
        self.lpips = load_lpips(config.lpips_weights).to(self.device) if config.lpips_weights else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.discriminator = (
                PatchDiscriminator(config.disc_layers).to(self.device) if config.discriminator else None
            )
        rate = config.learning_rate * config.batch_size
        self.optimizers = {
            name: torch.optim.Adam(m.parameters(), rate, (0.5, 0.9)) for name, m in self.modules().items()
        }

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({"discriminator": self.discriminator} if self.discriminator else {})

    @torch.no_grad()
    def fit_codebook(self, images: Tensor) -> None:
        """Draw the codes from the latents of float images (B,3,S,S)."""
        self.model.quantize.fit(self.model.encode(images.to(self.device)), step_generator(self.config.seed, 0))

    def advance(self, images: Tensor) -> dict[str, Tensor]:
        """One step on float images (B,3,S,S) in [-1,1]: the autoencoder's, then the discriminator's; returns TERMS."""
        images = images.to(self.device)
        adversarial = self.discriminator is not None and self.step >= self.config.disc_start
        with self._autocast():
            terms, reconstruction = self._autoencoder_terms(images, adversarial)
        self._descend("model", terms["loss"])
        if adversarial:
            with self._autocast():
                real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
                terms["discriminator"] = hinge_loss(real.float(), fake.float())
            self._descend("discriminator", terms["discriminator"])
        self.step += 1
        return {name: term.detach() for name, term in terms.items()}

    def _autoencoder_terms(self, images: Tensor, adversarial: bool) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the autoencoder's loss, by name, and the reconstruction."""
        reconstruction, indices, codebook = self.model(images)
        terms = {"l1": F.l1_loss(reconstruction.float(), images), "codebook": codebook}
        used = images.new_zeros(self.model.config["codebook_size"]).scatter_(0, indices.flatten(), 1.0)
        terms["codes_used"] = used.sum()
        fidelity = terms["l1"]
        if self.lpips:
            terms["lpips"] = self.lpips(images, reconstruction).float().mean()
            fidelity = fidelity + terms["lpips"]
        loss = fidelity + codebook
        if adversarial:
            self.discriminator.requires_grad_(False)  # judges here, learns after
            terms["adversarial"] = -self.discriminator(reconstruction).float().mean()
            self.discriminator.requires_grad_(True)
            weight = adaptive_weight(fidelity, terms["adversarial"], self.model.decoder.conv_out.weight)
            loss = loss + self.config.disc_weight * weight * terms["adversarial"]
        return {"loss": loss, **terms}, reconstruction

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[name].step()

    def save(self, path: Path) -> None:
        """Everything that `load` needs, in one safetensors file. InputError if the weights are no longer finite."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules().items():
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
            tensors |= optimizer_tensors(self.optimizers[name], f"{name}_optimizer")
        if not all(v.isfinite().all() for v in tensors.values()):
            raise _diverged(self.step, path)
        save_tensors(path, tensors, {"step": str(self.step)})

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote. InputError if it is damaged or of another configuration."""
        tensors, metadata = load_tensors(path)  # on the CPU, where Adam wants its step count
        if not metadata.get("step", "").isdigit():
            raise InputError(f"{path}: names no step; is it a checkpoint of a training run?")
        for name, module in self.modules().items():
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            load_state(module, own, path)
            load_optimizer(self.optimizers[name], tensors, f"{name}_optimizer")
        self.step = int(metadata["step"])


def train_autoencoder(
    model: VQAutoencoder,
    dataset: Dataset,
    run_dir: str | Path,
    config: AutoencoderTrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> VQAutoencoder:
    """Train `model` in place on a data set; it is saved in `run_dir/model` and returned in eval mode.

    The loss is L1 (+ LPIPS) + codebook loss + disc_weight * adaptive weight * adversarial loss, the discriminator's the
    hinge loss, both by Adam(0.5, 0.9). One reconstruction serves both updates; the published code makes a second.

    Args:
        model: on the device to train on; `fit_codebook` replaces its codes, so switch that off for a trained one.
        dataset: of an image size that the model and the discriminator take.
        run_dir: see `RunFolder`; refused when it holds something, unless `resume` or `overwrite`.
        resume: continue from the folder's checkpoint; on a CPU to the same weights as an unbroken run, to the bit.

    Ctrl-C and SIGTERM end after the current step, with a checkpoint; `Stopped` is then raised.

    Raises:
        InputError: the data set, LPIPS weights, folder or checkpoint do not fit, or the loss stops being finite.
    """
    folder = RunFolder(run_dir, resume, overwrite)
    _check_size(model, dataset, config)
    training = AutoencoderTraining(model, config)
    with progress_bar("reading images") as report:
        batches = Batches(dataset, config.batch_size, config.seed, progress=report)
    described = {
        "model": model.config,
        "training": asdict(config),
        "data": dataset.spec or dataset.name,
        "version": __version__,
    }
    if resume:
        folder.check_same_run(described)
        training.load(folder.checkpoint)
    elif config.fit_codebook:
        training.fit_codebook(to_float(batches.images(0)))
    folder.begin()
    folder.write_config(described)
    _loop(training, batches, folder, folder.log(COLUMNS, training.step))
    model.eval().save_pretrained(folder.model)
    return model


def _check_size(model: VQAutoencoder, dataset: Dataset, config: AutoencoderTrainConfig) -> None:
    size, least = dataset.image_size, 3 * 2**config.disc_layers
    if size % model.downsampling:
        raise InputError(
            f"{dataset.name}: images of {size}, must be a multiple of {model.downsampling} for these levels"
        )
    if config.discriminator and size < least:
        raise InputError(
            f"disc_layers is {config.disc_layers}: needs images of at least {least}, not {size}; use fewer layers"
        )


def _loop(training: AutoencoderTraining, batches: Batches, folder: RunFolder, log: CsvLog) -> None:
    config, began, since = training.config, time.monotonic(), training.step
    shown = to_float(batches.images(0)[:8])
    with Interrupt() as interrupt, training_bar(config.steps, training.step) as bar:
        while training.step < config.steps and not interrupt.requested:
            terms = training.advance(to_float(batches.images(training.step)))
            step = training.step
            bar.update(0, completed=step)
            if step % config.log_every == 0 or step == config.steps:
                values = _values(terms, step, folder)
                seconds = time.monotonic() - began
                speed = (step - since) * config.batch_size / seconds
                log.write(step=step, **values, images_per_second=round(speed, 1), seconds=round(seconds, 2))
                bar.update(0, loss=values["loss"], speed=speed)
            if step % config.checkpoint_every == 0:
                training.save(folder.checkpoint)
            if step % config.picture_every == 0 or step == config.steps:
                _picture(training.model, shown.to(training.device), folder.samples / f"reconstruction-{step:07d}.png")
    training.save(folder.checkpoint)
    if training.step < config.steps:
        raise Stopped(f"stopped after step {training.step}; saved {folder.checkpoint}, continue with --resume")


def _values(terms: dict[str, Tensor], step: int, folder: RunFolder) -> dict[str, float]:
    """The terms as numbers, 0 for those not in use; InputError when the loss is not finite."""
    values = {name: terms[name].item() if name in terms else 0.0 for name in TERMS}
    if not math.isfinite(values["loss"]):
        raise _diverged(step, folder.checkpoint)
    return values


def _diverged(step: int, checkpoint: Path) -> InputError:
    return InputError(f"learning_rate: training diverged by step {step}; lower it; {checkpoint} was not replaced")


@torch.no_grad()
def _picture(model: VQAutoencoder, images: Tensor, path: Path) -> None:
    """Images (n,3,S,S) above their reconstructions."""
    rows = torch.stack([images, model(images)[0]])
    picture = to_uint8(rearrange(rows, "r n c h w -> 1 c (r h) (n w)"))[0]
    with atomic_path(path) as temporary:
        Image.fromarray(picture.cpu().numpy()).save(temporary)
