"""Training of the VQ first stage (arXiv 2112.10752, section 3.1): L1 + codebook loss, LPIPS, discriminator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from encdiff.checked import Batch, Checked, Count, Natural, NotNegative, Positive, Range, Seed, check_types
from encdiff.data import Dataset, to_float, to_uint8
from encdiff.data.loader import Batches
from encdiff.distributed.processes import Processes, processes
from encdiff.distributed.share import Share
from encdiff.errors import InputError
from encdiff.files.checkpoint import load_state
from encdiff.files.temporaries import atomic_path
from encdiff.metrics.reconstruction import load_lpips
from encdiff.models import EncDiff
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.models.layers import BatchNorm2d, share_statistics
from encdiff.training.loop import fit, share_start
from encdiff.training.runs import load_optimizer, optimizer_tensors, step_generator

Layers = Annotated[int, Range(1, 12)]


@dataclass(frozen=True)
class AutoencoderTrainConfig(Checked):
    """How to train a first stage: the published rates and losses, but for `fit_codebook`, LPIPS, which is optional, and
    the codebook loss, which is the paper's: `VectorQuantizer` says how the published code differs."""

    steps: Count = 50_000
    batch_size: Batch = 32
    learning_rate: Positive = 1.44e-4  # the published 4.5e-6 for each image of a batch
    fit_codebook: bool = True  # begin with codes drawn from the first batch's latents, lest most never be used
    discriminator: bool = True
    disc_weight: NotNegative = 0.75
    disc_start: Natural = 0  # steps before the discriminator takes part
    disc_layers: Layers = 3  # each halves the resolution; images must be at least 3 * 2**disc_layers wide
    lpips_weights: str | None = None  # path of torchvision's VGG16 weights; None: no LPIPS
    precision: Literal["float32", "bf16"] = "float32"  # bf16: autocast
    seed: Seed = 0
    log_every: Count = 50
    checkpoint_every: Count = 1000
    picture_every: Count = 1000


class PatchDiscriminator(nn.Sequential):
    """Images (B,3,H,W) to logits (B,1,h,w), one per patch, positive for real: PatchGAN (arXiv 1611.07004)."""

    def __init__(self, layers: int = 3, width: int = 64):
        modules: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers + 1):
            out, stride = width * min(2**i, 8), 2 if i < layers else 1
            modules += [nn.Conv2d(channels, out, 4, stride, 1, bias=False), BatchNorm2d(out), nn.LeakyReLU(0.2)]
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


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, among: Processes | None = None
) -> Tensor:
    """Ratio () of the two losses' gradient norms at the decoder's last layer, at most 1e4 (2012.09841, eq. 7).

    `among` several processes the gradients are those of the whole batch.
    """
    r, a = (torch.autograd.grad(x, last_layer, retain_graph=True)[0] for x in (reconstruction_loss, adversarial_loss))
    if among is not None:
        among.mean_all_([r, a])
    return (r.norm() / (a.norm() + 1e-4)).clamp(0, 1e4)


class AutoencoderTraining:
    """Everything that changes from step to step: autoencoder, discriminator, their optimisers, step count."""

    TERMS: ClassVar[tuple[str, ...]] = ("loss", "l1", "lpips", "codebook", "adversarial", "discriminator", "codes_used")
    UNIT: ClassVar[str] = "images"

    def __init__(self, model: VQAutoencoder, config: AutoencoderTrainConfig):
        self.model, self.config, self.step = model.train(), config, 0
        self.processes, self.asked = processes(), False
        self.share = Share(self.processes.rank, self.processes.size)
        self.share.count(config.batch_size)  # refuses one that cannot be shared
        self.device = next(model.parameters()).device
        self.lpips = load_lpips(config.lpips_weights).to(self.device) if config.lpips_weights else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.discriminator = (
                PatchDiscriminator(config.disc_layers).to(self.device) if config.discriminator else None
            )
        share_start(self.model_config(), config, self.modules().values(), self.processes)
        for module in self.modules().values():
            share_statistics(module)
        rate = config.learning_rate
        self.optimizers = {
            name: torch.optim.Adam(m.parameters(), rate, (0.5, 0.9)) for name, m in self.modules().items()
        }

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"model": self.model}
        if self.discriminator is not None:
            found["discriminator"] = self.discriminator
        return found

    @torch.no_grad()
    def begin(self, images: Tensor) -> None:
        """Draw the codes from the latents of uint8 images (B,S,S,3), if `fit_codebook`."""
        if self.config.fit_codebook:
            latents = self.processes.stacked(self.model.encode(to_float(images).to(self.device))).flatten(0, 1)
            self.model.quantize.fit(latents, step_generator(self.config.seed, 0))

    def prepare(self, batches: Batches) -> None:
        pass

    def advance(self, images: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """One step on uint8 images (B,S,S,3): the autoencoder's, then the discriminator's; returns TERMS."""
        images = to_float(images)
        judge = self.discriminator if self.step >= self.config.disc_start else None
        with self._autocast():
            terms, reconstruction = self._autoencoder_terms(images, judge)
        self._descend("model", terms["loss"])
        if judge is not None:
            with self._autocast():
                real, fake = judge(images), judge(reconstruction.detach())
                terms["discriminator"] = hinge_loss(real.float(), fake.float())
            self._descend("discriminator", terms["discriminator"])
        self.step += 1
        return self._told({name: term.detach() for name, term in terms.items()})

    def _told(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of the whole batch, and whether any process is asked to stop."""
        if self.processes.size > 1:
            terms |= {"asked": torch.full((), float(self.asked), device=self.device)}
            self.processes.mean_all_([term for name, term in terms.items() if name != "codes_used"])
        return terms

    def _autoencoder_terms(self, images: Tensor, judge: PatchDiscriminator | None) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the autoencoder's loss, by name, and the reconstruction."""
        reconstruction, indices, codebook = self.model(images)
        terms = {"l1": F.l1_loss(reconstruction.float(), images), "codebook": codebook}
        used = images.new_zeros(self.model.config["codebook_size"]).scatter_(0, indices.flatten(), 1.0)
        terms["codes_used"] = self.processes.stacked(used).amax(0).sum()
        fidelity = terms["l1"]
        if self.lpips:
            terms["lpips"] = self.lpips(images, reconstruction).float().mean()
            fidelity = fidelity + terms["lpips"]
        loss = fidelity + codebook
        if judge is not None:
            judge.requires_grad_(False)  # judges here, learns after
            terms["adversarial"] = -judge(reconstruction).float().mean()
            judge.requires_grad_(True)
            last = self.model.decoder.conv_out.weight
            weight = adaptive_weight(fidelity, terms["adversarial"], last, self.processes)
            loss = loss + self.config.disc_weight * weight * terms["adversarial"]
        return {"loss": loss, **terms}, reconstruction

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _descend(self, name: str, loss: Tensor) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        parameters = self.modules()[name].parameters()
        self.processes.mean_all_([p.grad for p in parameters if p.grad is not None])
        self.optimizers[name].step()

    def model_config(self) -> dict:
        return dict(self.model.config)

    def assembled(self) -> AbstractContextManager[None]:
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules().items():
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
            tensors |= optimizer_tensors(self.optimizers[name], f"{name}_optimizer")
        return tensors

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, str], source: Path) -> None:
        """Continue from `tensors`; InputError, naming `source`, if they are of another configuration."""
        for name, module in self.modules().items():
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            load_state(module, own, source)
            prefix = f"{name}_optimizer"
            if name == "model" or any(k.startswith(prefix + ".") for k in tensors):  # it may begin later
                load_optimizer(self.optimizers[name], tensors, source, prefix)

    def save_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    @torch.no_grad()
    def picture(self, images: Tensor, samples: Path) -> Path:
        """Images uint8 (n,S,S,3) above their reconstructions."""
        images = to_float(images)
        rows = torch.stack([images, self.model(images)[0]])
        pixels = to_uint8(rearrange(rows, "r n c h w -> 1 c (r h) (n w)"))[0]
        path = samples / f"reconstruction-{self.step:07d}.png"
        with atomic_path(path) as temporary:
            Image.fromarray(pixels.cpu().numpy()).save(temporary, format="PNG")
        return path


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
    check_types(
        model=(model, VQAutoencoder, ""), dataset=(dataset, Dataset, "open_dataset"),
        config=(config, AutoencoderTrainConfig, ""),
    )  # fmt: skip
    _check_size(model, dataset, config)
    fit(AutoencoderTraining(model, config), dataset, run_dir, resume=resume, overwrite=overwrite)
    return model.eval()


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


def load_first_stage(model: EncDiff, first_stage: Path | None) -> None:
    """Put the first stage of a run, or of a model folder, into a model.

    InputError where a model that needs one gets none, or one that needs none gets one.
    """
    if (model.config.first_stage == "vq") != (first_stage is not None):
        needs = "needs one; make it with encdiff train-autoencoder" if first_stage is None else "takes none"
        raise InputError(f"first_stage (--first-stage) is {first_stage}: this preset {needs}")
    if first_stage is not None:
        folder = first_stage / "model" if (first_stage / "model").is_dir() else first_stage
        load_state(model.first_stage, VQAutoencoder.from_pretrained(folder).state_dict(), folder)
