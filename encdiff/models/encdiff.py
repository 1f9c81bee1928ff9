"""The whole model, with its files."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin

from encdiff.errors import InputError
from encdiff.files.checkpoint import (
    build_fitting,
    load_model,
    load_state,
    locate,
    read_published,
    save_model,
    write_published,
)
from encdiff.files.temporaries import atomic_path
from encdiff.models.card import CARD
from encdiff.models.config import EncDiffConfig
from encdiff.models.sampling import EncDiffSampling

HUB = {"revision", "cache_dir", "force_download", "token", "local_files_only"}  # options of a download


class EncDiff(
    EncDiffSampling,
    ModelHubMixin,
    library_name="encdiff",
    tags=["disentanglement", "diffusion"],
    license="mit",
    paper_url="https://arxiv.org/abs/2402.09712",
    model_card_template=CARD,
):
    """The whole model. Images are float (B, 3, S, S) in [-1, 1], S the configuration's image size.

    The names in its state dict are those of the published checkpoints. Methods that show images (`reconstruct`, `swap`,
    `traverse`, `sample`, `attention_maps`) run in eval mode without gradients; `encode`, `tokens`, `denoise` and `loss`
    run in the mode the model is in, with gradients. Calling the model is `loss`.

    Source: arXiv 2402.09712.
    """

    @classmethod
    def from_preset(cls, name: str) -> "EncDiff":
        """A new, untrained model of a named configuration; see `PRESETS`."""
        return cls(EncDiffConfig.from_preset(name))

    @classmethod
    def load_published(
        cls, path: str | Path, preset: str | EncDiffConfig = "shapes3d", *, ema: bool = True
    ) -> "EncDiff":
        """Read a checkpoint of the published code, without running any code that it names.

        Args:
            path: a `.ckpt` of Lightning or of `torch.save`.
            preset: the configuration it was trained with, by name or in full.
            ema: take the averaged U-Net rather than the trained one.

        Raises:
            InputError: not such a file, or tensors missing, unexpected or of another shape (listed).
        """
        config = EncDiffConfig.from_preset(preset) if isinstance(preset, str) else preset
        state, scaling_factor = read_published(path, ema)
        config = replace(config, scaling_factor=scaling_factor)
        model = build_fitting(lambda: cls(config), {k: tuple(v.shape) for k, v in state.items()}, path)
        load_state(model, state, path)
        return model.eval()

    def save_published(self, path: str | Path) -> None:
        """Write a checkpoint in the published code's layout, which it reads if it knows the configuration.

        A model holds one U-Net: it becomes both the trained and the averaged copy. InputError for an objective that the
        published code cannot sample from: a flow, anchors.
        """
        if self.config.prediction == "flow" or self.config.anchors:
            said = "prediction is 'flow'" if self.config.prediction == "flow" else f"anchors is {self.config.anchors}"
            raise InputError(f"{said}, which the published code does not have; save_pretrained keeps it")
        write_published(path, self.state_dict(), self.config.scaling_factor)

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **hub: Any
    ) -> str | None:
        """Write `model.safetensors`, `config.json` and a model card to a folder, each whole or not at all.

        With `push_to_hub`, also upload it as `repo_id` (default: the folder's name); `hub` is for `push_to_hub`.
        """
        hub.pop("config", None)  # the base class passes it; ours is part of the model
        about = hub.pop("model_card_kwargs", None) or {}
        if hub and not push_to_hub:
            raise InputError(f"{min(hub)} is given, but is an option of push_to_hub, which is False")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, self.state_dict(), asdict(self.config))
        card = self.generate_model_card(**{"config": self.config} | about)
        with atomic_path(folder / "README.md") as temporary:
            temporary.write_text(str(card) + "\n", "utf-8")
        return self.push_to_hub(repo_id or folder.name, **hub) if push_to_hub else None

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the Hub's options are passed on by name
        cls, name: str | Path, *, device: str | torch.device = "cpu", **hub: Any
    ) -> "EncDiff":
        """Read a model, in eval mode.

        Args:
            name: a folder that `save_pretrained` wrote, `room64`, `room32` or `quickstart`, which come with it, or the
                name of a model on the Hub.
            device: where to put it.
            hub: for a model on the Hub: revision, cache_dir, force_download, token, local_files_only.

        Raises:
            InputError: no such folder or model, a file missing or truncated, or tensors of another configuration.
        """
        if unknown := sorted(hub.keys() - HUB):
            raise InputError(f"{unknown[0]} is no option here, must be device or one of {', '.join(sorted(HUB))}")
        config_path, weights_path = (locate(name, file, hub) for file in ("config.json", "model.safetensors"))
        model = load_model(lambda values: cls(_config(values, str(config_path))), config_path, weights_path)
        return model.to(device).eval()


def _config(values: Any, source: str) -> EncDiffConfig:
    if isinstance(values, dict) and values.get("kind") == "fields":
        raise InputError(f"{source}: is of a model of fields, must be of an EncDiff; `encdiff fields` takes the other")
    if isinstance(values, dict) and values.get("kind") == "vae":
        raise InputError(f"{source}: is of a VAE, must be of an EncDiff; `encdiff.baselines.VAE` reads the other")
    return EncDiffConfig.from_dict(values, source)
