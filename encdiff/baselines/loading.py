"""A model of concepts by the kind that its folder names."""

from pathlib import Path

import torch

from encdiff.baselines.config import KIND
from encdiff.baselines.model import VAE
from encdiff.files.reading import read_json
from encdiff.models import EncDiff
from encdiff.models.edits import ConceptModel


def load_concepts(folder: str | Path, *, device: str | torch.device = "cpu") -> ConceptModel:
    """The `VAE` or `EncDiff` that a folder of `save_pretrained` holds, in eval mode.

    Raises InputError as the `from_pretrained` of either.
    """
    path = Path(folder) / "config.json"
    if path.is_file() and is_vae(read_json(path)):
        return VAE.from_pretrained(folder, device=device)
    return EncDiff.from_pretrained(folder, device=device)


def is_vae(described: object) -> bool:
    """Whether a configuration, as `config.json` holds it, is a VAE's."""
    return isinstance(described, dict) and described.get("kind") == KIND
