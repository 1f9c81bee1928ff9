"""The cross-attention of a diffusers block at Stable Diffusion's sizes: stock processors beside a patched block.

What is timed is x + attn2(norm2(x), prompt). `plain` is diffusers' first processor, which writes the logits out,
`sdpa` its usual one, `ours` the block after `encdiff.patch`, `ours_anew` without keys and values kept between steps.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import encdiff
from bench.bench_cross_attention import STABLE_DIFFUSION, cost
from bench.cases import GPU, cases

IMPLS = ("plain", "sdpa", "ours_anew", "ours")
DTYPES = (torch.float32, torch.float16 if GPU else torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
BATCH = 2  # an image with guidance
CASES = [(size, impl, dtype) for size in STABLE_DIFFUSION for dtype in DTYPES for impl in IMPLS]


def block_of(channels: int, width: int) -> nn.Module:
    attention = pytest.importorskip("diffusers.models.attention", reason="the blocks are diffusers'")
    return attention.BasicTransformerBlock(channels, 8, channels // 8, cross_attention_dim=width).eval()


def stock(block: nn.Module, x: Tensor, prompt: Tensor) -> Tensor:
    return block.attn2(block.norm2(x), encoder_hidden_states=prompt) + x


def form_of(impl: str, block: nn.Module):
    """A function of (x, prompt)."""
    if impl in ("plain", "sdpa"):
        processors = pytest.importorskip("diffusers.models.attention_processor", reason="the processors are diffusers'")
        block.attn2.set_processor(processors.AttnProcessor() if impl == "plain" else processors.AttnProcessor2_0())
        return lambda x, prompt: stock(block, x, prompt)
    encdiff.patch(block)

    def ours(x: Tensor, prompt: Tensor) -> Tensor:
        if impl == "ours_anew":
            block.encdiff_patch.tokens.clear()
        return block._cross_attend(x, prompt, None, {})

    return ours


def decides(size, impl, dtype) -> bool:
    return dtype == DTYPES[GPU] and size == "SD 16x16"


@cases("size, impl, dtype", CASES, decides)
def test_diffusers_block(measure, rotated, smoke, device, size, impl, dtype):
    queries, channels, tokens, width = (64, 32, 7, 24) if smoke else STABLE_DIFFUSION[size]
    block = block_of(channels, width).to(device)
    exact, form = copy.deepcopy(block).double(), form_of(impl, block.to(dtype))
    costs = cost(BATCH, queries, channels, tokens, width, dtype, "forward")
    prompt = torch.randn(BATCH, tokens, width, device=device, dtype=dtype)
    sets = rotated(lambda: torch.randn(BATCH, queries, channels, device=device, dtype=dtype), costs["bytes"])
    with torch.no_grad():
        expected = stock(exact, sets[0].double(), prompt.double())
        assert (form(sets[0], prompt) - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    labels = {"op": "diffusers_block", "impl": impl, "phase": "forward", "shape": f"B={BATCH} {size}"}
    measure([torch.no_grad()(lambda x=x: form(x, prompt)) for x in sets], **labels, dtype=dtype, **costs)
