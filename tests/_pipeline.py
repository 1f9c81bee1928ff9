"""The pipelines of diffusers, made of tiny random parts.

They import transformers for a text encoder that no test needs. Beside this checkout transformers cannot be imported: it
takes our folder `kernels/` for PyPI's package of that name. So an empty stand-in is there while they are imported.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

HOME = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"


class Empty(ModuleType):
    """Whatever is asked of it is an empty class, or for a constant its name."""

    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return name if name.isupper() else type(name, (), {})


@cache
def classes() -> tuple[type, type]:
    """`StableDiffusionPipeline` and the one from image to image."""
    diffusers = pytest.importorskip("diffusers.utils.import_utils", reason="the pipelines are those of diffusers")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("transformers", "transformers.utils", "tokenizers"):
            empty = Empty(name)
            empty.__spec__ = ModuleSpec(name, None)
            patch.setitem(sys.modules, name, empty)
        patch.delitem(sys.modules, "diffusers.loaders", raising=False)  # it may have been imported without
        patch.setattr(diffusers, "_transformers_available", True)
        patch.setattr(diffusers, "_transformers_version", "5.0.0")
        text, image = import_module(HOME), import_module(f"{HOME}_img2img")
    return text.StableDiffusionPipeline, image.StableDiffusionImg2ImgPipeline


def stable_diffusion(scheduler, from_image: bool = False):
    """A pipeline of 16x16 images, 8x8 latents and 5 tokens of width 8; the same weights each time."""
    make = classes()[from_image]
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
            attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **_twice("EncoderBlock2D"))
    pipeline = make(
        vae=vae, unet=unet, scheduler=scheduler, text_encoder=None, tokenizer=None, feature_extractor=None,
        safety_checker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _twice(kind: str) -> dict[str, tuple[str, str]]:
    down, up = f"Down{kind}", f"Up{kind.replace('Encoder', 'Decoder')}"
    return {"down_block_types": (down, down), "up_block_types": (up, up)}
