"""What was measured as tokens: patches of the Voronoi field, scaled and shifted by those of the mask, attend."""

import math

import torch
import torch.nn as nn
from torch import Tensor

from encdiff.models.attention import Conditioning, TransformerBlock
from encdiff.models.layers import Conv2d, zero_init


class ConditionEncoder(nn.Module):
    """Voronoi fields and masks -> tokens (B, N, D), one for each patch (arXiv 2409.00230, section 3.2).

    Args:
        fields: channels of the Voronoi fields, with what else is known of each pixel's sensor.
        masks: channels of the masks.
        rows, columns: patches below and beside each other, N = rows * columns.
        patch: pixels on a side of one.
        width: D.
    """

    def __init__(
        self, fields: int, masks: int, rows: int, columns: int, patch: int, width: int, depth: int, heads: int
    ):
        super().__init__()
        self.fields = Conv2d(fields, width, patch, stride=patch)
        self.masks = zero_init(Conv2d(masks, 2 * width, patch, stride=patch))
        self.blocks = nn.ModuleList(TransformerBlock(width, None, heads, True, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("positions", sine_positions(rows, columns, width), persistent=False)

    def forward(self, fields: Tensor, masks: Tensor) -> Tensor:
        """fields (B, F, H, W) and masks (B, M, H, W)."""
        scale, shift = self.masks(masks).flatten(2).mT.chunk(2, dim=-1)
        h = self.fields(fields).flatten(2).mT
        h = h * (1 + scale) + shift + self.positions.to(h.dtype)
        for block in self.blocks:
            h = block(h, Conditioning(h))
        return self.norm(h)


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the row in one half of the width, of the column in the other: (rows * columns, width)."""
    quarter = width // 4
    frequencies = torch.exp(-math.log(10000) * torch.arange(quarter) / quarter)
    i, j = (torch.arange(n)[:, None] * frequencies for n in (rows, columns))
    i, j = (torch.cat([a.sin(), a.cos()], dim=1) for a in (i, j))
    return torch.cat([i.repeat_interleave(columns, 0), j.repeat(rows, 1)], dim=1)
