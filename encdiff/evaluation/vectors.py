"""Models whose concepts are vectors, seen through one number each, as the scores need them."""

import numpy as np
import torch
from torch import Tensor, nn

from encdiff.data import Dataset, to_float
from encdiff.metrics.principal import first_components
from encdiff.models import ConceptModel

PCA_IMAGES, BATCH = 10_000, 256


def as_scalars(model: ConceptModel, dataset: Dataset) -> "ConceptModel | FirstComponents":
    """What can be scored: the model itself, or, where its concepts are vectors, `FirstComponents` of it."""
    return FirstComponents(model, dataset) if model.config.code_shape[1:] else model


class FirstComponents(nn.Module):
    """A model in eval mode whose concepts are vectors, with codes (B, N): each vector's first principal component.

    The components are those of PCA_IMAGES images, evenly spaced in the data, or of all where there are fewer.
    """

    @torch.no_grad()
    def __init__(self, model: ConceptModel, dataset: Dataset):
        super().__init__()
        self.model, device = model, next(model.parameters()).device
        chosen = np.linspace(0, len(dataset) - 1, min(len(dataset), PCA_IMAGES)).astype(np.int64)
        parts = [dataset.images(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
        codes = torch.cat([model.encode(to_float(part).to(device)).cpu() for part in parts])
        self.mean, self.axis = (torch.from_numpy(a).to(device, torch.float32) for a in first_components(codes.numpy()))

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> (B, N)."""
        return ((self.model.encode(images) - self.mean) * self.axis).sum(-1)
