"""Cross-attention: the four shapes of the paper's sixteen layers, and on a GPU Stable Diffusion's.

The form to beat is the published one: separate projections, einsum, softmax, LayerNorm and residual each on its own.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from encdiff.ops.cross_attention import cross_attention, cross_attention_reference
from encdiff.ops.cross_attention_folded import cross_attention_folded, fold

# queries, channels, tokens, token width
PAPER = {"16x16": (256, 64, 20, 16), "8x8": (64, 128, 20, 16), "4x4": (16, 256, 20, 16), "2x2": (4, 256, 20, 16)}
STABLE_DIFFUSION = {
    "SD 64x64": (4096, 320, 77, 768),
    "SD 32x32": (1024, 640, 77, 768),
    "SD 16x16": (256, 1280, 77, 768),
    "SD 8x8": (64, 1280, 77, 768),
}
HEADS = 8
GPU = torch.cuda.is_available()
CASES = [(name, batch) for name in PAPER for batch in ((1, 16, 128, 1024) if GPU else (16,))]
CASES += [(name, 8) for name in STABLE_DIFFUSION] if GPU else []
DTYPES = [torch.bfloat16, torch.float32] if GPU else [torch.float32]
IMPLS = ["published", "published_compiled", "sdpa", "ours"] if GPU else ["published", "sdpa", "ours"]
NAMES = ("x", "context", "w_q", "w_k", "w_v", "w_o", "b_o", "norm_weight", "norm_bias")
TOKEN_SIDE = NAMES[1:6]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def published(x, context, w_q, w_k, w_v, w_o, b_o, norm_weight, norm_bias):
    """As the published code computes it: the batch and the heads in one axis, the logits written out."""
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    q, k, v = F.linear(h, w_q), F.linear(context, w_k), F.linear(context, w_v)
    q, k, v = (s.unflatten(-1, (HEADS, -1)).transpose(1, 2).reshape(len(x) * HEADS, s.shape[1], -1) for s in (q, k, v))
    logits = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
    a = torch.einsum("bij,bjd->bid", logits.softmax(-1), v)
    a = a.unflatten(0, (len(x), HEADS)).transpose(1, 2).reshape(x.shape)
    return F.linear(a, w_o, b_o) + x


OPS = {
    "published": published,
    "published_compiled": torch.compile(published, mode="max-autotune-no-cudagraphs"),
    "sdpa": functools.partial(cross_attention, heads=HEADS, residual=True, impl="sdpa"),
    "ours": functools.partial(cross_attention, heads=HEADS, residual=True),
}


def inputs(batch, queries, channels, tokens, width, device, dtype) -> dict[str, torch.Tensor]:
    shapes = [(batch, queries, channels), (batch, tokens, width), (channels, channels)]
    shapes += [(channels, width)] * 2 + [(channels, channels)] + [(channels,)] * 3
    drawn = [torch.randn(s) / (s[-1] ** 0.5 if n[0] == "w" else 1) for n, s in zip(NAMES, shapes, strict=True)]
    return {n: t.to(device, dtype).requires_grad_() for n, t in zip(NAMES, drawn, strict=True)}


def cost(tensors: dict[str, torch.Tensor], phase: str, folded: tuple = ()) -> dict[str, int]:
    """Bytes of inputs and output once (with gradients: of both, and the inputs again), FLOP of the plain form.

    Folded: x, what `fold` made of the tokens, the channels' vectors and y; FLOP as if no head were folded.
    """
    (batch, queries, channels), (_, tokens, width) = tensors["x"].shape, tensors["context"].shape
    per_query = 4 * batch * queries * channels * (channels + tokens)
    per_token = 4 * batch * tokens * width * channels
    read, written = sum(t.nbytes for t in tensors.values()), tensors["x"].nbytes
    if phase == "folded":
        others = [t for t in folded if isinstance(t, torch.Tensor)] + [tensors[name] for name in NAMES[6:]]
        return {"bytes": 2 * written + sum(t.nbytes for t in others), "flops": per_query}
    if phase == "forward":
        return {"bytes": read + written, "flops": per_query + per_token}
    return {"bytes": 3 * read + 2 * written, "flops": 3 * (per_query + per_token)}


def check(op, tensors: dict[str, torch.Tensor]) -> None:
    """Output and every gradient against float64, before anything is timed."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    y, expected = op(**tensors), cross_attention_reference(**exact, heads=HEADS, residual=True)
    upstream = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, tensors.values(), upstream)]
    expected = [expected, *torch.autograd.grad(expected, exact.values(), upstream.double())]
    for name, a, e in zip(("y", *NAMES), actual, expected, strict=True):
        assert (a - e).norm() <= TOLERANCE[y.dtype] * e.norm(), name


def labels_of(impl: str, phase: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    (B, L, C), N = tensors["x"].shape, tensors["context"].shape[1]
    return {"op": "cross_attention", "impl": impl, "phase": phase, "shape": f"B={B} L={L} C={C} H={HEADS} N={N}"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("shape, batch", CASES)
def test_cross_attention(measure, device, shape, batch, phase, impl, dtype):
    tensors, op = inputs(batch, *(PAPER | STABLE_DIFFUSION)[shape], device, dtype), OPS[impl]
    check(op, tensors)
    upstream = torch.randn_like(tensors["x"])

    def forward():
        with torch.no_grad():
            return op(**tensors)

    def forward_backward():
        return torch.autograd.grad(op(**tensors), tensors.values(), upstream)

    run = forward if phase == "forward" else forward_backward
    measure(run, **labels_of(impl, phase, tensors), dtype=dtype, **cost(tensors, phase))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape, batch", [case for case in CASES if case[0] in PAPER])
def test_folded(measure, device, shape, batch, impl, dtype):
    """One sampler step: ours folded the tokens before, the others begin from the tokens."""
    tensors = {n: t.detach() for n, t in inputs(batch, *PAPER[shape], device, dtype).items()}
    rest = {n: t for n, t in tensors.items() if n not in TOKEN_SIDE}
    folded = fold(*(tensors[n] for n in TOKEN_SIDE), heads=HEADS)

    def ours():
        return cross_attention_folded(**rest, folded=folded, residual=True)

    run = ours if impl == "ours" else lambda: OPS[impl](**tensors)
    exact = cross_attention_reference(**{n: t.double() for n, t in tensors.items()}, heads=HEADS, residual=True)
    with torch.no_grad():
        assert (run() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
        measure(run, **labels_of(impl, "folded", tensors), dtype=dtype, **cost(tensors, "folded", folded))
