"""What the benchmarks of whole models share: configurations, models with the same weights, and other libraries'."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.published import Published
from encdiff.models import EncDiff, EncDiffConfig

PAPER = EncDiffConfig()
SMOKE = EncDiffConfig(
    image_size=16, concepts=3, encoder_width=8, token_width=4, bank_widths=(8, 8), vq_width=32, vq_multipliers=(1, 2),
    vq_depth=1, vq_codes=16, width=16, multipliers=(1, 2), depth=1, attention_levels=(0, 1), heads=2, groups=8,
)  # fmt: skip


def fresh_model(config: EncDiffConfig, device: torch.device) -> EncDiff:
    """Ours, every matrix drawn anew, on the device: at the published initialisation whole branches are zero."""
    torch.manual_seed(0)
    with torch.device(device):
        model = EncDiff(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.to(device)


def published_twin(model: EncDiff, attention: str = "einsum") -> Published:
    """The published form with the weights, the device and the mode of ours."""
    twin = Published(model.config, attention)
    twin.load_state_dict(model.state_dict())
    return twin.to(next(model.parameters()).device).train(model.training)


def diffusers_unet(config: EncDiffConfig) -> nn.Module:
    """diffusers' U-Net of the same widths, depths, heads and context; down and up by plain convolutions.

    Called as `unet(x, t, tokens)`, it gives a tensor.
    """
    diffusers = pytest.importorskip("diffusers", reason="one of the baselines is diffusers")
    levels = range(len(config.multipliers))
    attending = [level in config.attention_levels for level in levels]
    unet = diffusers.UNet2DConditionModel(
        sample_size=config.image_size // config.downsampling,
        in_channels=3,
        out_channels=3,
        block_out_channels=[config.width * m for m in config.multipliers],
        layers_per_block=config.depth,
        attention_head_dim=config.heads,  # the number of heads, as it is misnamed there
        cross_attention_dim=config.token_width,
        norm_num_groups=config.groups,
        resnet_time_scale_shift="scale_shift",
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attending],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attending)],
    )
    return Positional(unet)


class Rounded(nn.Module):
    """The U-Net in bfloat16, without autocast."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = copy.deepcopy(unet).to(torch.bfloat16).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.unet(x.bfloat16(), t, tokens.bfloat16())


class Positional(nn.Module):
    """Calls diffusers' model with the arguments in our order."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(x, t, encoder_hidden_states=tokens, return_dict=False)[0]


def compiled(function: Callable, device: torch.device, smoke: bool) -> Callable:
    """The function compiled as hard as the device allows; as it is in a smoke test, which may not take minutes.

    Anew for each case: one compiled function over many shapes would turn dynamic, or not be compiled again at all.
    Without CUDA graphs of its own: `measure` captures it, like every other form.
    """
    if smoke:
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs" if device.type == "cuda" else None)


def as_exact(actual: Tensor, published: Tensor, exact: Tensor) -> bool:
    """Whether `actual` lies at most twice as far from the float32 result as the published form in the same dtype."""
    return bool((actual - exact).norm() <= 2 * (published - exact).norm() + 1e-4 * exact.norm())
