"""The image encoder: an image becomes N scalars."""

import torch.nn as nn
from torch import Tensor

from encdiff.errors import InputError
from encdiff.models.layers import BatchNorm1d, BatchNorm2d, Conv2d, Linear


class ImageEncoder(nn.Sequential):
    """Convolutions that halve the image down to 4x4, two residual blocks, one linear layer to N scalars.

    Args:
        image_size: side of the square image, 4 * 2**k with k >= 1; the paper's is 64.
        concepts: N, the number of scalars.
        width: channels throughout; the paper's is 128.
        normalize: end with a BatchNorm without parameters: scalars of unit variance; the paper's has none.
        in_channels: 3 for RGB.

    Maps (B, in_channels, image_size, image_size) in [-1, 1] to scalars (B, N).

    Source: arXiv 2402.09712, appendix; the layer positions are those of the published checkpoints.
    """

    def __init__(
        self, image_size: int = 64, concepts: int = 20, width: int = 128, normalize: bool = False, in_channels: int = 3
    ):
        halvings = (image_size // 4).bit_length() - 1
        if halvings < 1 or 4 * 2**halvings != image_size:
            raise InputError(f"image_size is {image_size}, must be 4 * 2**k with k >= 1: 8, 16, 32, 64, 128, ...")
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers.append(Conv2d(in_channels if i == 0 else width, width, 4, stride=2, padding=1))
            layers.append(BatchNorm2d(width))
            if i != halvings - 2:  # the last convolution but one has no ReLU, as published
                layers.append(nn.ReLU())
        layers += [ResidualBlock(width), BatchNorm2d(width), nn.ReLU(), ResidualBlock(width)]
        layers += [nn.Flatten(), Linear(width * 16, concepts)]
        if normalize:
            layers.append(BatchNorm1d(concepts, affine=False))
        super().__init__(*layers)


class ResidualBlock(nn.Module):
    """x + Conv1x1(ReLU(BatchNorm(Conv3x3(ReLU(x)))))."""

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.Sequential(
            nn.ReLU(),
            Conv2d(width, width, 3, padding=1),
            BatchNorm2d(width),
            nn.ReLU(),
            Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)
