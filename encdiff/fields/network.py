"""The network of a field model: a U-Net over patches, and what it is told of the sensors."""

from typing import NamedTuple

import torch
import torch.nn as nn
from einops import rearrange
from torch import Tensor

from encdiff.fields.config import FieldConfig
from encdiff.fields.encoding import ConditionEncoder
from encdiff.models.attention import Sampling
from encdiff.models.layers import part
from encdiff.models.unet import UNet


class Condition(NamedTuple):
    """What is known of each pixel, from its nearest sensor, standardised: all (B, C, H, W).

    A channel that is nowhere measured is 0 in all of them.
    """

    values: Tensor  # the Voronoi field
    mask: Tensor  # 1 where the sensor lies in the pixel and measured at the field's time, else 0
    sigma: Tensor  # of the sensor's noise
    age: Tensor | None = None  # of what it measured, in units of the configuration's memory

    def rows(self, which: Tensor) -> "Condition":
        """Of these fields, by index."""
        age = None if self.age is None else self.age[which]
        return Condition(self.values[which], self.mask[which], self.sigma[which], age)

    @property
    def exact(self) -> Tensor:
        """Where the field is known, 1 or 0."""
        return self.mask * (self.sigma == 0)


class FieldNetwork(nn.Module):
    """Predicts a field (B, C, H, W) from a noisy one and a condition, or, as a regression, from the condition."""

    def __init__(self, config: FieldConfig):
        super().__init__()
        self.config = c = config
        count, told = len(c.channels), (3 + c.timed) * len(c.channels)
        here = told if c.condition == "input" else count * (c.condition == "tokens")
        entering = (here if c.objective == "regression" else count + here) * c.patch**2
        self.unet = UNet(
            entering, c.token_width if c.condition == "tokens" else None, c.base_width, c.multipliers, c.depth,
            c.attention_levels, c.heads, 1, c.self_attention, 2, True, "residual", c.groups,
            out_channels=count * c.patch**2,
        )  # fmt: skip
        self.encoder: ConditionEncoder | None = None
        if c.condition == "tokens":
            rows, columns = c.height // c.token_patch, c.width // c.token_patch
            self.encoder = ConditionEncoder(
                told - count, count, rows, columns, c.token_patch, c.token_width, c.token_depth, c.token_heads
            )

    @property
    def dtype(self) -> torch.dtype:
        return part(self.unet.out, 2, nn.Conv2d).weight.dtype

    def tokens(self, condition: Condition) -> Tensor:
        """(B, N, D); without an encoder none, (B, 0, 1)."""
        if self.encoder is None:
            return condition.values.new_zeros(len(condition.values), 0, 1)
        told = [condition.values, condition.sigma, *([condition.age] if condition.age is not None else [])]
        return self.encoder(torch.cat(told, 1).to(self.dtype), condition.mask.to(self.dtype))

    def forward(
        self,
        x: Tensor | None,
        t: Tensor,
        condition: Condition,
        tokens: Tensor,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """x (B, C, H, W) or None, times t (B,), and `tokens(condition)` -> (B, C, H, W); `sampling` as of the U-Net."""
        entering = [] if x is None else [x]
        if self.config.condition == "tokens":
            entering.append(condition.exact)
        if self.config.condition == "input":
            entering += [part for part in condition if part is not None]
        p = self.config.patch
        h = rearrange(torch.cat(entering, 1), "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        h = self.unet(h.to(self.dtype), t, tokens, sampling=sampling)
        return rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)
