"""The families of attention: see `_families`."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from encdiff.kernels.cross_attention import plan
from encdiff.ops._attention import merge_heads, softmax, split_heads
from encdiff.ops._check import TYPES, Draw, Family, Outputs, Tensors, Variant
from encdiff.ops.cross_attention_folded import Folded, cross_attention_folded_reference, cross_attention_folded_triton
from encdiff.ops.self_attention import LENGTHS, representative

HALVES = ("bfloat16", "float16")
PLAIN, LEARNT = (True, True, "none", "none"), (True, True, "learnt", "none")  # norm, residual, token bias, maps
MAPPED = (True, False, "given", "mean")


def _size(dtype: str) -> int:
    return TYPES[dtype].itemsize


def _bias(draw: Draw, *shape: int) -> Tensor:
    """(B, H, N) with one token masked."""
    bias = draw(*shape)
    bias[..., 1] = -float("inf")
    return bias


def _folded(draw: Draw, x: str, dtype: str, own: str, C: int, norm: bool, residual: bool, bias: str, _: str) -> Tensors:
    """Three samples, three heads; own: the type of the parameters."""
    inputs = {n: draw(3, 3, 20, C, scale=C**-0.5).to(TYPES[dtype]) for n in ("keys", "values")}
    inputs |= {"x": draw(3, 80, C).to(TYPES[x]), "b_o": draw(C).to(TYPES[own])}
    if norm:
        inputs |= {"norm_weight": draw(C, scale=0.1, shift=1).to(TYPES[own]), "norm_bias": draw(C).to(TYPES[own])}
    return inputs | ({"token_bias": _bias(draw, 3, 3, 20)} if bias != "none" else {})


def _given_bias(i: Tensors, bias: str) -> Tensors:
    """One that is only given asks for no gradient: the kernels then write none."""
    return {} if bias == "none" else {"token_bias": i["token_bias"] if bias == "learnt" else i["token_bias"].detach()}


def _folded_with(op):
    def run(i: Tensors, x, dtype, own, C, norm, residual, bias, maps) -> Outputs:
        options = {n: i[n] for n in ("norm_weight", "norm_bias") if n in i} | _given_bias(i, bias)
        x, folded = i["x"], Folded(i["keys"], i["values"])
        with torch.autocast(x.device.type, folded.keys.dtype, enabled=x.dtype != folded.keys.dtype):
            y = op(x, folded, i["b_o"], **options, residual=residual, maps=None if maps == "none" else maps)
        return y if isinstance(y, tuple) else (y,)

    return run


def _folded_variants() -> Iterator[Variant]:
    for dtype in TYPES:
        for C in sorted({c for _, half, c in plan.FOLDED_TILES if half == (dtype in HALVES)}):
            yield dtype, dtype, dtype, C, *PLAIN
            yield dtype, dtype, dtype, C, *LEARNT
    for C in (64, 128, 256):
        for x in ("float32", "bfloat16"):
            yield x, "bfloat16", "float32", C, *PLAIN  # as under autocast
        yield "bfloat16", "bfloat16", "bfloat16", C, *MAPPED
    yield "bfloat16", "bfloat16", "bfloat16", 40, *PLAIN


def _heads(draw: Draw, dtype: str, width: int, N: int, short: bool, bias: str, maps: bool) -> Tensors:
    L, H = 16 if short else 80, 3
    shapes = {"q": (2, L, H * width), "k": (2, N, H * width), "v": (2, N, H * width)}
    inputs = {n: draw(*shape).to(TYPES[dtype]) for n, shape in shapes.items()}
    return inputs | ({"token_bias": _bias(draw, 2, H, N)} if bias != "none" else {})


def _heads_kernel(i: Tensors, dtype, width, N, short, bias, maps) -> Outputs:
    from encdiff.kernels.cross_attention import cross_attention_heads as fused

    o, _, p = fused(i["q"], i["k"], i["v"], _given_bias(i, bias).get("token_bias"), 3, width**-0.5, maps)
    return (o, p) if maps else (o,)


def _heads_exact(i: Tensors, dtype, width, N, short, bias, maps) -> Outputs:
    q, k, v = (split_heads(i[n], 3) for n in "qkv")
    p = softmax(q @ k.mT * width**-0.5, _given_bias(i, bias).get("token_bias"))
    return (merge_heads(p @ v), p) if maps else (merge_heads(p @ v),)


def _heads_variants() -> Iterator[Variant]:
    for dtype in TYPES:
        for width in (8, 16, *sorted({d for _, half, d in plan.HEADS_TILES if half == (dtype in HALVES)})):
            for N in (20, 100, 150) if not plan.is_tiled(100, width, _size(dtype)) else (20, 150):
                yield dtype, width, N, False, "none", False
    for width in (8, 16, 32):
        yield "bfloat16", width, 20, True, "none", False
    for bias in ("learnt", "given"):
        yield "bfloat16", 16, 20, False, bias, False
        yield "bfloat16", 64, 150, False, bias, False


def _self(draw: Draw, dtype: str, width: int, L: int) -> Tensors:
    return {"qkv": draw(1 if L > 128 else 2, L, 3 * 2 * width).to(TYPES[dtype])}


def _self_kernel(i: Tensors, dtype: str, width: int, L: int) -> Outputs:
    from encdiff.kernels.self_attention import self_attention as fused

    return (fused(i["qkv"], 2, width**-0.5)[0],)


def _self_exact(i: Tensors, dtype: str, width: int, L: int) -> Outputs:
    q, k, v = (split_heads(t, 2) for t in i["qkv"].chunk(3, -1))
    return (merge_heads((q @ k.mT * width**-0.5).softmax(-1) @ v),)


def _self_variants() -> Iterator[Variant]:
    for dtype, width in product(TYPES, (8, 16, 32)):
        lengths = {representative(L, width, _size(dtype)) for L in LENGTHS}
        for L in sorted(lengths) if dtype != "float16" else (256,):
            yield dtype, width, L


FAMILIES = [
    Family("cross_attention_folded", _folded_variants, _folded,
           _folded_with(cross_attention_folded_triton), _folded_with(cross_attention_folded_reference), products=True),
    Family("cross_attention_heads", _heads_variants, _heads, _heads_kernel, _heads_exact, products=True),
    Family("self_attention", _self_variants, _self, _self_kernel, _self_exact, products=True),
]  # fmt: skip
