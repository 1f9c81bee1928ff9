"""Fields from sensors: the whole model, with its files."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from encdiff.diffusion.edm import edm_denoiser, edm_loss, edm_sigmas
from encdiff.errors import InputError
from encdiff.fields import sampling
from encdiff.fields.condition import make_condition
from encdiff.fields.config import SIGMA_DATA, FieldConfig
from encdiff.fields.network import Condition, FieldNetwork
from encdiff.fields.sensors import Sensors
from encdiff.files.checkpoint import load_model, locate, save_model
from encdiff.models.attention import Sampling, begin_sampling
from encdiff.models.mode import evaluating
from encdiff.ops.philox import normal

NOISE_SCALE = 1000.0  # of EDM's c_noise, so that it spans what the U-Net's embedding of timesteps resolves


class Reconstruction(NamedTuple):
    """Float32 arrays in the field's units; of several reconstructions each with a first axis for them."""

    mean: np.ndarray  # (C, H, W)
    spread: np.ndarray | None  # (C, H, W), the ensemble's standard deviation; None of a regression
    members: np.ndarray  # (E, C, H, W)

    def of(self, index: int) -> "Reconstruction":
        """One of several."""
        return Reconstruction(
            self.mean[index], None if self.spread is None else self.spread[index], self.members[index]
        )


def summarised(members: np.ndarray) -> Reconstruction:
    """Mean and spread of members (..., E, C, H, W)."""
    several = members.shape[-4] > 1
    return Reconstruction(members.mean(-4), members.std(-4, ddof=1) if several else None, members)


class FieldModel(nn.Module):
    """A diffusion model of fields that is told what sensors measured; as a regression, the Voronoi U-Net.

    `objective` and `condition` of the configuration say which: ("diffusion", "tokens") cross-attends to what was
    measured (arXiv 2409.00230); ("diffusion", "none") knows fields alone, and is guided to the measurements while it
    samples; ("regression", "input") is the deterministic net. Inside, fields are standardised, and to the diffusion of
    standard deviation 0.5.
    """

    mean: Tensor  # (C, 1, 1), float64
    std: Tensor

    def __init__(self, config: FieldConfig | None = None):
        super().__init__()
        self.config = config or FieldConfig()
        self.network = FieldNetwork(self.config)
        for name in ("mean", "std"):  # on the device: a captured step cannot copy from the host
            values = torch.tensor(getattr(self.config, name), dtype=torch.float64)
            self.register_buffer(name, values[:, None, None], persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def standardised(self, fields: Tensor) -> Tensor:
        """Fields (..., C, H, W) in their own units -> of mean 0 and deviation 1 in each channel, float32."""
        return ((fields.double() - self.mean) / self.std).float()

    def in_units(self, fields: Tensor) -> Tensor:
        """The inverse of `standardised`."""
        return (fields.double() * self.std + self.mean).float()

    def loss(
        self,
        fields: Tensor,
        condition: Condition,
        *,
        levels: tuple[float, float] = (-1.2, 1.2),
        seed: int,
        sample_ids: Tensor,
        draw: int | Tensor = 0,
    ) -> Tensor:
        """The training loss, a scalar, of standardised fields (B, C, H, W).

        A diffusion's is EDM's (arXiv 2206.00364), without noise where the field is known; a regression's the mean
        square. Noise, and its levels, log(sigma) of mean and deviation `levels`, are keyed as in `EncDiff.loss`.
        """
        tokens = self.network.tokens(condition)
        if self.config.objective == "regression":
            guess = self.network(None, torch.zeros_like(sample_ids), condition, tokens)
            return (guess.float() - fields).square().mean()
        sigma = edm_sigmas(seed, sample_ids, draw, mean=levels[0], std=levels[1])
        noise = normal(fields.shape, seed, sample_ids, draw)
        if self.config.condition != "none":
            noise = noise * (1 - condition.exact)
        return edm_loss(self._network(condition, tokens), SIGMA_DATA * fields, sigma, noise, sigma_data=SIGMA_DATA)

    forward = loss

    def _network(
        self, condition: Condition, tokens: Tensor, sampling: Sampling | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, c_noise: self.network(x, NOISE_SCALE * c_noise, condition, tokens, sampling).float()

    def reconstruct(
        self,
        sensors: Sensors | Sequence[Sensors],
        ensemble: int = 25,
        *,
        time: float | Sequence[float | None] | None = None,
        sampler: str = sampling.SAMPLER,
        steps: int = sampling.STEPS,
        seed: int = 0,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> Reconstruction:
        """Whole fields from what sensors measured.

        Args:
            sensors: of one field, or a list, of several.
            ensemble: members of each; a regression has one whatever is asked for.
            time: of the fields, where sensors have times; None: that of the latest sensor. Those later, or longer
                before than the configuration's `memory`, are left out.
            sampler, steps: dpm-solver++, heun (the published one, two calls a step), euler or unipc, along EDM's path.
            seed: of the noise; member e of field i is a function of seed and i * ensemble + e, whatever the batch.
            batch_size: members computed at once.
            progress: called with (members done, of how many).

        Raises:
            InputError: sensors that do not fit the model's grid, times before the first sensor or long after the last.
        """
        single = isinstance(sensors, Sensors)
        many = [sensors] if isinstance(sensors, Sensors) else list(sensors)
        if not many:
            raise InputError("sensors is an empty list, must hold those of one field or more")
        times = list(time) if isinstance(time, Sequence) else [None if time is None else float(time)] * len(many)
        members = self.members(make_condition(many, self.config, times, self.device), ensemble, sampler=sampler,
                               steps=steps, seed=seed, batch_size=batch_size, progress=progress)  # fmt: skip
        found = summarised(members)
        return found.of(0) if single else found

    @torch.no_grad()
    def members(
        self,
        condition: Condition,
        ensemble: int,
        *,
        sampler: str = sampling.SAMPLER,
        steps: int = sampling.STEPS,
        seed: int = 0,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Members (n, E, C, H, W) in the field's units, of n conditions; see `reconstruct`."""
        if self.config.objective == "regression":
            ensemble = 1
        if ensemble < 1 or batch_size < 1:
            raise InputError(f"ensemble and batch_size are {ensemble} and {batch_size}, must be at least 1")
        rows = torch.arange(len(condition.values) * ensemble, device=self.device)
        done = []
        with evaluating(self):
            for ids in rows.split(batch_size):
                of = ids // ensemble
                done.append(self.in_units(self._draw(condition, of, ids, sampler, steps, seed)).cpu())
                if progress:
                    progress(int(ids[-1]) + 1, len(rows))
        return torch.cat(done).unflatten(0, (-1, ensemble)).numpy()

    def _draw(self, condition: Condition, of: Tensor, ids: Tensor, sampler: str, steps: int, seed: int) -> Tensor:
        """Standardised members of these ids, each of the field `of`; tokens are made once for each field."""
        fields, back = torch.unique(of, return_inverse=True)
        tokens = self.network.tokens(condition.rows(fields))
        tokens, condition = tokens[back], condition.rows(of)
        if self.config.objective == "regression":
            return self.network(None, torch.zeros_like(ids), condition, tokens).float()
        kept = begin_sampling(tokens, self.network.unet.attending)
        denoise = edm_denoiser(self._network(condition, tokens, kept), SIGMA_DATA)
        values, known = SIGMA_DATA * condition.values, condition.exact.bool()
        if self.config.condition == "none":
            denoise = sampling.guided(denoise, values, condition.mask, SIGMA_DATA * condition.sigma, SIGMA_DATA)
        x0 = sampling.sample(
            denoise, tuple(values.shape), values=values, known=known, sampler=sampler, steps=steps, seed=seed,
            sample_ids=ids, device=values.device,
        )  # fmt: skip
        return x0 / SIGMA_DATA

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `model.safetensors` and `config.json`, each whole or not at all; weights in `dtype`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.state_dict().items()}
        save_model(folder, state, {"kind": "fields", **asdict(self.config)})

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu") -> "FieldModel":
        """Read a model, in eval mode, from a folder that `save_pretrained` wrote, or one that comes with the package.

        Raises InputError: no such folder, a file missing or truncated, or of another kind of model.
        """
        paths = [locate(name, file, {}, "fields") for file in ("config.json", "model.safetensors")]
        return load_model(lambda values: cls(_read(values, str(paths[0]))), *paths).to(device).eval()


def _read(values: Any, source: str) -> FieldConfig:
    if not (isinstance(values, dict) and values.get("kind") == "fields"):
        raise InputError(f"{source}: is of no model of fields; `encdiff fields train` makes one")
    return FieldConfig.from_dict({k: v for k, v in values.items() if k != "kind"}, source)
