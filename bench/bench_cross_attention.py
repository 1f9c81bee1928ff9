"""Cross-attention: the four shapes of the paper's sixteen layers, and on a GPU Stable Diffusion's.

The form to beat is the published one: separate projections, einsum, softmax, LayerNorm and residual each on its own.
By default a training's calls (with gradients) and a sampler's (tokens folded before) are timed.
"""

from itertools import product

import torch

from bench.attention import DTYPES, HEADS, IMPLS, TOLERANCE, draw, forms, fused, published
from bench.baselines import compiled
from bench.cases import DTYPE, GPU, LAYERS, PHASES, cases, check, run_of
from bench.clock import Run
from encdiff.ops.cross_attention import cross_attention, cross_attention_reference
from encdiff.ops.cross_attention_folded import cross_attention_folded, fold

# queries, channels, tokens, token width
PAPER = {name: (*layer, 20, 16) for name, layer in LAYERS.items()}
STABLE_DIFFUSION = {
    "SD 64x64": (4096, 320, 77, 768),
    "SD 32x32": (1024, 640, 77, 768),
    "SD 16x16": (256, 1280, 77, 768),
    "SD 8x8": (64, 1280, 77, 768),
    "SD 64x64, 256 tokens": (4096, 320, 256, 768),
    "SD 32x32, 1024 tokens": (1024, 640, 1024, 768),
}
SHAPES = [(name, batch) for name in PAPER for batch in ((1, 16, 128, 1024) if GPU else (16,))]
SHAPES += [(name, 8) for name in STABLE_DIFFUSION] if GPU else []
CASES = [(*shape, *rest) for shape, *rest in product(SHAPES, (*PHASES, "folded"), IMPLS, DTYPES)
         if shape[0] in PAPER or rest[0] != "folded"]  # fmt: skip
OPS = forms(published, cross_attention)
reference = fused(cross_attention_reference)


def inputs(batch, queries, channels, tokens, width, device, dtype) -> list[torch.Tensor]:
    """x, context, w_q, w_k, w_v, w_o, b_o, the norm's weight and bias."""
    shapes = [(batch, queries, channels), (batch, tokens, width), (channels, channels)]
    shapes += [(channels, width)] * 2 + [(channels, channels)] + [(channels,)] * 3
    return draw(shapes, device, dtype)


def folded_tokens(tensors: list[torch.Tensor]):
    """What ours makes of the tokens and their weights, once before all of a sampler's steps."""
    return fold(*(t.detach() for t in tensors[1:6]), heads=HEADS)


def folded_run(tensors: list[torch.Tensor]) -> Run:
    """A sampler's step of ours."""
    folded, (x, *_, b_o, weight, bias) = folded_tokens(tensors), (t.detach() for t in tensors)
    return lambda: cross_attention_folded(x, folded, b_o, norm_weight=weight, norm_bias=bias, residual=True)


def cost(batch, queries, channels, tokens, width, dtype, phase: str) -> dict[str, int]:
    """Bytes of inputs and output once (with gradients: of both, and the inputs again), FLOP of the plain form.

    Folded: x, the channels' vectors and y, to which come the folded tokens; FLOP as if no head were folded.
    """
    per_query = 4 * batch * queries * channels * (channels + tokens)
    per_token = 4 * batch * tokens * width * channels
    vectors, features = 3 * channels * dtype.itemsize, batch * queries * channels * dtype.itemsize
    weights = 2 * channels**2 + 2 * channels * width
    read = features + vectors + (batch * tokens * width + weights) * dtype.itemsize
    if phase == "folded":
        return {"bytes": 2 * features + vectors, "flops": per_query}
    if phase == "forward":
        return {"bytes": read + features, "flops": per_query + per_token}
    return {"bytes": 3 * read + 2 * features, "flops": 3 * (per_query + per_token)}


def decides(shape, batch, phase, impl, dtype) -> bool:
    shapes = {"forward_backward": ("16x16", "8x8", "4x4"), "folded": ("16x16", "8x8")}
    return shape in shapes.get(phase, ()) and batch in (16, 128)[GPU:] and impl != "sdpa" and dtype == DTYPE


@cases("shape, batch, phase, impl, dtype", CASES, decides)
def test_cross_attention(measure, rotated, smoke, device, shape, batch, phase, impl, dtype):
    sizes = (2 if smoke else batch, *(PAPER | STABLE_DIFFUSION)[shape])
    op = compiled(published, device, smoke) if impl == "compiled" else OPS[impl]
    costs = cost(*sizes, dtype, phase)
    sets = rotated(lambda: inputs(*sizes, device, dtype), costs["bytes"])
    if phase == "folded":
        runs = [folded_run(s) if impl == "ours" else run_of("forward", op, s) for s in sets]
        exact = reference(*(t.detach().double() for t in sets[0]))
        assert (runs[0]() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
        costs["bytes"] += sum(t.nbytes for t in folded_tokens(sets[0]))
    else:
        check(op, reference, sets[0], TOLERANCE[dtype])
        runs = [run_of(phase, op, s) for s in sets]
    labels = {"op": "cross_attention", "impl": impl, "phase": phase, "shape": "B={} L={} C={} H=8 N={}".format(*sizes)}
    measure(runs, **labels, dtype=dtype, **costs)
