"""U-Nets of other libraries, small and random: the three families of Stable Diffusion, ControlNet, latent diffusion."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import encdiff
from bench.baselines import SMOKE
from bench.published import UNet as Published

SMALL: dict[str, Any] = dict(
    sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
)  # fmt: skip
UP = ("UpBlock2D", "CrossAttnUpBlock2D")
# attention_head_dim is the number of heads, as it is misnamed there
FAMILIES: dict[str, dict[str, Any]] = {
    "sd1": SMALL | dict(cross_attention_dim=24, attention_head_dim=8),
    "sd2": SMALL | dict(
        cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True,
    ),
    "sdxl": SMALL | dict(
        cross_attention_dim=40, attention_head_dim=(2, 4), use_linear_projection=True,
        transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    ),
}  # fmt: skip
TOKENS = 7


def unet_of(family: str, **options: Any) -> nn.Module:
    """In eval mode, every weight drawn: zero layers would hide what lies before them."""
    diffusers = pytest.importorskip("diffusers", reason="the U-Nets are diffusers'")
    torch.manual_seed(0)
    config = FAMILIES[family] | options
    up = UP[::-1] if config["down_block_types"][0] == "DownBlock2D" else UP
    return diffusers.UNet2DConditionModel(**config, up_block_types=up).eval()


def transformer() -> nn.Module:
    """One block of diffusers between its projections: what compiles in a second."""
    diffusers = pytest.importorskip("diffusers", reason="the transformer is diffusers'")
    torch.manual_seed(0)
    return diffusers.Transformer2DModel(2, 8, in_channels=16, norm_num_groups=8, cross_attention_dim=24).eval()


def controlnet_of(family: str) -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="ControlNet is diffusers'")
    torch.manual_seed(1)
    config = {name: value for name, value in FAMILIES[family].items() if name != "sample_size"}
    net = diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(8, 16)).eval()
    for parameter in net.parameters():  # its ways out are zero at first
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return net


def ldm_unet() -> nn.Module:
    """The published code's form, in `bench.published`."""
    torch.manual_seed(0)
    unet = Published(SMOKE, 3, "einsum").eval()
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return unet


def inputs(family: str, batch: int = 2, size: int = 16, tokens: int = TOKENS, **kinds: Any) -> dict[str, Any]:
    """Arguments of a call by name; `kinds`: dtype, device."""
    width = FAMILIES[family]["cross_attention_dim"]
    given: dict[str, Any] = dict(
        sample=torch.randn(batch, 4, size, size, **kinds), timestep=7,
        encoder_hidden_states=torch.randn(batch, tokens, width, **kinds),
    )  # fmt: skip
    if family == "sdxl":
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 16, **kinds), "time_ids": torch.randn(batch, 6, **kinds)
        }  # fmt: skip
    return given


def assert_as_stock(unet: nn.Module, given: dict[str, Any], actual: Tensor) -> None:
    """That the patched U-Net, which is unpatched now, gave what it gives without."""
    encdiff.unpatch(unet)
    with torch.no_grad():
        assert relative(actual, unet(**given).sample) < 1e-5


def relative(actual: Tensor, expected: Tensor) -> float:
    """The greatest error over the greatest value."""
    return float((actual - expected).abs().max() / expected.abs().max())
