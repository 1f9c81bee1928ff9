"""The decoder of the field's VAEs, and FactorVAE's discriminator."""

from collections.abc import Iterable
from typing import cast

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from encdiff.models.layers import Linear

SLOPE = 0.2  # of the discriminator's leaky ReLU, below 0


class Decoder(nn.Sequential):
    """Codes (B, N) -> logits of images (B, 3, S, S): two linear layers, then transposed convolutions from 4x4.

    Args:
        image_size: 4 * 2**k.
        concepts: N.
        hidden: width of the first layer.
        width: channels; of the last two maps before the image half as many.

    At 64x64 with 256 and 64 it is the deconvolutional decoder of Locatello et al. 2019, table 1 of their appendix.
    """

    def __init__(self, image_size: int = 64, concepts: int = 10, hidden: int = 256, width: int = 64):
        doublings = (image_size // 4).bit_length() - 1
        widths = [*[width] * max(1, doublings - 2), *[width // 2] * min(2, doublings - 1)]  # into each convolution
        layers: list[nn.Module] = [Linear(concepts, hidden), nn.ReLU(), Linear(hidden, 16 * widths[0]), nn.ReLU()]
        layers.append(nn.Unflatten(1, (widths[0], 4, 4)))
        for before, after in zip(widths, [*widths[1:], 3], strict=True):
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers[:-1])


class Discriminator(nn.Module):
    """Codes (B, N) -> log q(z) / prod_l q(z_l), (B,): the logit of "these are of the joint" (arXiv 1802.05983).

    One logit in place of the published two, of which only the difference counts.
    """

    def __init__(self, concepts: int = 10, width: int = 1000, depth: int = 6):
        super().__init__()
        widths = [concepts, *[width] * depth, 1]
        self.layers = nn.ModuleList(Linear(*pair) for pair in zip(widths, widths[1:], strict=False))

    def forward(self, z: Tensor, fixed: bool = False) -> Tensor:
        """`fixed`: its weights get no gradient, only the codes do."""
        for i, layer in enumerate(cast(Iterable[Linear], self.layers)):
            z = F.leaky_relu(z, SLOPE) if i else z
            z = F.linear(z, layer.weight.detach(), layer.bias.detach()) if fixed else layer(z)
        return z[:, 0].float()
