"""Codes of many images, a batch at a time."""

import torch
from torch import Tensor

from encdiff.models.edits import ConceptModel
from encdiff.models.mode import evaluating

BATCH = 64  # images encoded at once


def encode_images(model: ConceptModel, images: Tensor) -> Tensor:
    """Scalars (n, N) of images (n, 3, S, S) in [-1, 1], on the images' device, in eval mode, without gradients."""
    device = next(model.parameters()).device
    with evaluating(model):
        return torch.cat([model.encode(batch.to(device)).to(images.device) for batch in images.split(BATCH)])
