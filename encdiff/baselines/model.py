"""The VAEs of the disentanglement field on EncDiff's image encoder: the whole model, with its files."""

from pathlib import Path

import torch
from torch import Tensor

from encdiff import ops
from encdiff.baselines import objectives
from encdiff.baselines.config import VAEConfig
from encdiff.baselines.network import Decoder, Discriminator
from encdiff.diffusion.gate import Gate
from encdiff.diffusion.schedulers import Sampler
from encdiff.errors import InputError
from encdiff.files.checkpoint import load_model, locate, save_model
from encdiff.models.edits import ConceptModel, Progress
from encdiff.models.encoder import ImageEncoder
from encdiff.models.mode import evaluating

PERMUTED = 1  # the stream of the permutations' numbers, beside that of the noise


class VAE(ConceptModel):
    """EncDiff's image encoder with 2N outputs, mean and log-variance of N latents, and a deconvolutional decoder.

    The configuration's `objective` is what it minimises: beta-VAE, AnnealVAE, beta-TCVAE, FactorVAE, DIP-VAE-I or -II.
    A concept is a latent, its code the posterior's mean. Images are float (B, 3, S, S) in [-1, 1]; the likelihood is
    Bernoulli, on images in [0, 1]. `swap`, `traverse` and the others are those of every `ConceptModel`.
    """

    config: VAEConfig

    def __init__(self, config: VAEConfig | None = None):
        super().__init__()
        self.config = c = config or VAEConfig()
        self.image_encoder = ImageEncoder(c.image_size, 2 * c.concepts, c.encoder_width)
        self.decoder = Decoder(c.image_size, c.concepts, c.decoder_hidden, c.decoder_width)
        if c.discriminator_width and c.discriminator_depth:
            self.discriminator = Discriminator(c.concepts, c.discriminator_width, c.discriminator_depth)

    @property
    def encoder(self) -> ImageEncoder:
        return self.image_encoder

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) -> mean and log-variance of q(z|x), each (B, N), float32."""
        mean, log_variance = self.encoder(self._check_images(images)).float().chunk(2, 1)
        return mean, log_variance

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> codes (B, N): the posterior's means."""
        return self.posterior(images)[0]

    def sample(
        self, scalars: Tensor, *,
        x_T: Tensor | None = None, sampler: Sampler = "dpm-solver++", steps: int = 20, eta: float = 0.0,
        gate: Gate = None, guidance: float = 1.0, seed: int = 0, sample_ids: Tensor | None = None,
        token_bias: Tensor | None = None, progress: Progress | None = None,
    ) -> Tensor:  # fmt: skip
        """Codes (B, N) -> images (B, 3, S, S) in [-1, 1], the decoder's means.

        It draws in one pass and without noise, so that of the options of `EncDiff.sample` sampler, steps, eta, gate,
        seed and sample_ids have no effect, and x_T, token_bias and guidance are refused; `progress` is called once.
        """
        given = {"x_T": x_T is not None, "token_bias": token_bias is not None, "guidance": guidance != 1}
        if refused := [name for name, there in given.items() if there]:
            raise InputError(f"{refused[0]} is given, must be left out: a VAE draws from its codes alone")
        if not isinstance(scalars, Tensor):
            raise InputError(f"scalars are {type(scalars).__name__}, must be a torch.Tensor (B, N); encode gives them")
        if scalars.ndim != 2 or scalars.shape[1:] != self.config.code_shape:
            raise InputError(f"scalars are {tuple(scalars.shape)}, must be (B, {self.config.concepts})")
        with evaluating(self):
            images = self.logits(scalars).float().sigmoid() * 2 - 1
        if progress:
            progress(1, 1)
        return images

    def logits(self, z: Tensor) -> Tensor:
        """Codes (B, N) -> logits of images in [0, 1], (B, 3, S, S)."""
        return self.decoder(z.to(next(self.decoder.parameters()).dtype))

    def terms(
        self, images: Tensor, *, seed: int, sample_ids: Tensor, draw: int | Tensor = 0, capacity: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The objective and what it is made of, means over the batch in nats for each image.

        `loss` and `reconstruction`, scalars; `kl` (N,), of each latent; `total_correlation` (tc, factor), `dip` and
        `discriminator`, the cross-entropy of FactorVAE's, which is in the loss, too. What is random is keyed by (seed,
        sample_ids (B,), draw) as in `ops.normal`; `capacity` is AnnealVAE's C, a scalar.
        """
        mean, log_variance = self.posterior(images)
        noise = ops.normal(tuple(mean.shape), seed, sample_ids, draw)
        z = mean + (0.5 * log_variance).exp() * noise
        found = {
            "reconstruction": objectives.bernoulli(self.logits(z), (images + 1) / 2).mean(),
            "kl": objectives.kl(mean, log_variance).mean(0),
        }
        kl, p = found["kl"].sum(), self.config.parameters
        match self.config.objective:
            case "beta":
                regulariser = p["beta"] * kl
            case "anneal":
                if capacity is None:
                    raise InputError("capacity is None, must be C(t), a scalar tensor, for objective 'anneal'")
                regulariser = p["gamma"] * (kl - capacity).abs()
            case "tc":
                found["total_correlation"] = objectives.total_correlation(z, mean, log_variance)
                regulariser = kl + (p["beta"] - 1) * found["total_correlation"]
            case "factor":
                found |= self._discriminated(z, ops.uniform(tuple(z.shape), seed, sample_ids, draw, stream=PERMUTED))
                regulariser = kl + p["gamma"] * found["total_correlation"] + found["discriminator"]
            case "dip-i":
                found["dip"] = objectives.dip(mean, None, **p)
                regulariser = kl + found["dip"]
            case "dip-ii":
                found["dip"] = objectives.dip(mean, log_variance, **p)
                regulariser = kl + found["dip"]
        return {"loss": found["reconstruction"] + regulariser, **found}

    def _discriminated(self, z: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """FactorVAE's two terms in one step: the first gives the codes alone a gradient, the second its weights."""
        apart, dtype = z.detach(), next(self.discriminator.parameters()).dtype
        both = torch.cat([apart, objectives.permuted(apart, keys)]).to(dtype)
        return {
            "total_correlation": self.discriminator(z.to(dtype), fixed=True).mean(),
            "discriminator": objectives.discriminator_loss(*self.discriminator(both).chunk(2)),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json`, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, self.state_dict(), self.config.described())

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu") -> "VAE":
        """Read a model, in eval mode, from a folder that `save_pretrained` wrote.

        Raises InputError: no such folder, a file missing or truncated, or of another kind of model.
        """
        config, weights = (locate(name, file, {}) for file in ("config.json", "model.safetensors"))
        return load_model(lambda values: cls(VAEConfig.read(values, str(config))), config, weights).to(device).eval()
