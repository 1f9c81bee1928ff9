"""Cross-attention on the paper's shapes: the sixteen layers of one U-Net evaluation have one of these four."""

import pytest
import torch

from encdiff.ops.cross_attention import cross_attention, cross_attention_reference

QUERIES_CHANNELS = {"16x16": (256, 64), "8x8": (64, 128), "4x4": (16, 256), "2x2": (4, 256)}
HEADS, TOKENS, WIDTH = 8, 20, 16
BATCH = {"cpu": 16, "cuda": 128}
IMPLS = {"eager": "reference", "sdpa": "sdpa"}
NAMES = ("x", "context", "w_q", "w_k", "w_v", "w_o", "b_o", "norm_weight", "norm_bias")


def inputs(batch: int, queries: int, channels: int, device) -> dict[str, torch.Tensor]:
    shapes = [(batch, queries, channels), (batch, TOKENS, WIDTH), (channels, channels)]
    shapes += [(channels, WIDTH)] * 2 + [(channels, channels)] + [(channels,)] * 3
    drawn = [
        torch.randn(s, device=device) / (s[-1] ** 0.5 if n[0] == "w" else 1) for n, s in zip(NAMES, shapes, strict=True)
    ]
    return {name: tensor.requires_grad_() for name, tensor in zip(NAMES, drawn, strict=True)}


def cost(tensors: dict[str, torch.Tensor], phase: str) -> dict[str, int]:
    """Bytes of inputs and output once (with gradients: of both, and the inputs again), FLOP of the plain form."""
    batch, queries, channels = tensors["x"].shape
    forward = 2 * batch * channels * (2 * queries * channels + 2 * TOKENS * WIDTH + 2 * queries * TOKENS)
    read, written = sum(t.nbytes for t in tensors.values()), tensors["x"].nbytes
    if phase == "forward":
        return {"bytes": read + written, "flops": forward}
    return {"bytes": 3 * read + 2 * written, "flops": 3 * forward}


def check(op, tensors: dict[str, torch.Tensor], options: dict) -> None:
    """Output and every gradient against float64, before anything is timed."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    y, expected = op(**tensors, **options), cross_attention_reference(**exact, **options)
    upstream = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, tensors.values(), upstream)]
    expected = [expected, *torch.autograd.grad(expected, exact.values(), upstream.double())]
    for name, a, e in zip(("y", *NAMES), actual, expected, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape", QUERIES_CHANNELS)
def test_cross_attention(measure, device, shape, phase, impl):
    queries, channels = QUERIES_CHANNELS[shape]
    tensors = inputs(BATCH[device.type], queries, channels, device)
    options = {"heads": HEADS, "residual": True}

    def op(**arguments):
        return cross_attention(**arguments, impl=IMPLS[impl])

    check(op, tensors, options)
    upstream = torch.randn_like(tensors["x"])

    def forward():
        with torch.no_grad():
            return op(**tensors, **options)

    def forward_backward():
        return torch.autograd.grad(op(**tensors, **options), tensors.values(), upstream)

    shape = f"B={len(upstream)} L={queries} C={channels} H={HEADS} N={TOKENS}"
    labels = {"op": "cross_attention", "impl": impl, "phase": phase, "shape": shape}
    run = forward if phase == "forward" else forward_backward
    measure(run, **labels, dtype=upstream.dtype, **cost(tensors, phase))
