"""Self-attention with its projections at the paper's shapes: published einsum form, compiled, SDPA, ours.

Predicted for an H200-class card, 16 bits, batch 128, 256 queries of 64 channels in 8 heads; nothing is measured. Bytes
that any form must move: 8.4 MB, 2 us at 4.3 TB/s. Between launches ours moves 63 MB (LayerNorm, q k v, attention,
projection and residual each go to memory), 15 us. The attention's products, heads padded to 16, are 4.3 GFLOP, 11 us at
400 TFLOP/s; its 67 M exponentials take 19 us at 16 a clock for each of 132 multiprocessors at 1.7 GHz. So these bound
it, and projections fused into the kernel, which each of an image's programs would have to take anew, would gain little.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from encdiff.ops.self_attention import self_attention, self_attention_reference

PAPER = {"16x16": (256, 64), "8x8": (64, 128), "4x4": (16, 256), "2x2": (4, 256)}  # queries, channels
HEADS = 8
GPU = torch.cuda.is_available()
CASES = [(name, batch) for name in PAPER for batch in ((1, 16, 128, 1024) if GPU else (16,))]
DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
IMPLS = ["published", "published_compiled", "sdpa", "ours"] if GPU else ["published", "sdpa", "ours"]
NAMES = ("x", "w_q", "w_k", "w_v", "w_o", "b_o", "norm_weight", "norm_bias")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def published(x, w_q, w_k, w_v, w_o, b_o, norm_weight, norm_bias):
    """As the published code computes it: the batch and the heads in one axis, the logits written out."""
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    q, k, v = (F.linear(h, w).unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1) for w in (w_q, w_k, w_v))
    logits = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
    a = torch.einsum("bij,bjd->bid", logits.softmax(-1), v)
    a = a.unflatten(0, (len(x), HEADS)).transpose(1, 2).reshape(x.shape)
    return F.linear(a, w_o, b_o) + x


OPS = {
    "published": published,
    "published_compiled": torch.compile(published, mode="max-autotune-no-cudagraphs"),
    "sdpa": functools.partial(self_attention, heads=HEADS, residual=True, impl="sdpa"),
    "ours": functools.partial(self_attention, heads=HEADS, residual=True),
}


def inputs(batch, queries, channels, device, dtype) -> dict[str, torch.Tensor]:
    shapes = [(batch, queries, channels), *[(channels, channels)] * 4, *[(channels,)] * 3]
    drawn = [torch.randn(s) / (s[-1] ** 0.5 if n[0] == "w" else 1) for n, s in zip(NAMES, shapes, strict=True)]
    return {n: t.to(device, dtype).requires_grad_() for n, t in zip(NAMES, drawn, strict=True)}


def cost(tensors: dict[str, torch.Tensor], phase: str) -> dict[str, int]:
    """Bytes of inputs and output once (with gradients: of both, and the inputs again), FLOP of the plain form."""
    batch, queries, channels = tensors["x"].shape
    flops = 4 * batch * queries * channels * (2 * channels + queries)
    read, written = sum(t.nbytes for t in tensors.values()), tensors["x"].nbytes
    if phase == "forward":
        return {"bytes": read + written, "flops": flops}
    return {"bytes": 3 * read + 2 * written, "flops": 3 * flops}


def check(op, tensors: dict[str, torch.Tensor]) -> None:
    """Output and every gradient against float64, before anything is timed."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    y, expected = op(**tensors), self_attention_reference(**exact, heads=HEADS, residual=True)
    upstream = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, tensors.values(), upstream)]
    expected = [expected, *torch.autograd.grad(expected, exact.values(), upstream.double())]
    for name, a, e in zip(("y", *NAMES), actual, expected, strict=True):
        assert (a - e).norm() <= TOLERANCE[y.dtype] * e.norm(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape, batch", CASES)
def test_self_attention(measure, benchmark, device, shape, batch, phase, impl, dtype):
    if benchmark.disabled and shape == "16x16" and not GPU:
        pytest.skip("takes longer than a smoke test may")
    tensors, op = inputs(batch, *PAPER[shape], device, dtype), OPS[impl]
    check(op, tensors)
    upstream = torch.randn_like(tensors["x"])

    def forward():
        with torch.no_grad():
            return op(**tensors)

    def forward_backward():
        return torch.autograd.grad(op(**tensors), tensors.values(), upstream)

    B, L, C = tensors["x"].shape
    labels = {"op": "self_attention", "impl": impl, "phase": phase, "shape": f"B={B} L={L} C={C} H={HEADS}"}
    run = forward if phase == "forward" else forward_backward
    measure(run, **labels, dtype=dtype, **cost(tensors, phase))
