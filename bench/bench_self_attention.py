"""Self-attention with its projections at the paper's shapes: published einsum form, compiled, SDPA, ours.

Predicted for an H200-class card, 16 bits, batch 128, 256 queries of 64 channels in 8 heads. Bytes
that any form must move: 8.4 MB, 2 us at 4.3 TB/s. Between launches ours moves 63 MB (LayerNorm, q k v, attention,
projection and residual each go to memory), 15 us. The attention's products, heads padded to 16, are 4.3 GFLOP, 11 us at
400 TFLOP/s; its 67 M exponentials take 19 us at 16 a clock for each of 132 multiprocessors at 1.7 GHz. So these bound
it, and projections fused into the kernel, which each of an image's programs would have to take anew, would gain little.
An H200 takes 59 us, 202 with gradients (docs/results/h200/run4/ops.json).
"""

from itertools import product

import torch

from bench import attention
from bench.attention import DTYPES, IMPLS, TOLERANCE, draw, forms, fused
from bench.baselines import compiled
from bench.cases import DTYPE, GPU, LAYERS, PHASES, cases, check, run_of
from encdiff.ops.self_attention import self_attention, self_attention_reference

BATCHES = (1, 16, 128, 1024) if GPU else (16,)


def published(x, *rest):
    return attention.published(x, None, *rest)


OPS = forms(published, self_attention)
reference = fused(self_attention_reference)


def inputs(batch, queries, channels, device, dtype) -> list[torch.Tensor]:
    """x, the four weights, their bias, the norm's weight and bias."""
    shapes = [(batch, queries, channels), *[(channels, channels)] * 4, *[(channels,)] * 3]
    return draw(shapes, device, dtype)


def cost(batch, queries, channels, dtype, phase: str) -> dict[str, int]:
    """Bytes of inputs and output once (with gradients: of both, and the inputs again), FLOP of the plain form."""
    flops = 4 * batch * queries * channels * (2 * channels + queries)
    written = batch * queries * channels * dtype.itemsize
    read = written + (4 * channels**2 + 3 * channels) * dtype.itemsize
    if phase == "forward":
        return {"bytes": read + written, "flops": flops}
    return {"bytes": 3 * read + 2 * written, "flops": 3 * flops}


def decides(shape, batch, phase, impl, dtype) -> bool:
    shapes = ("16x16", "8x8", "4x4") if phase == "forward_backward" or not GPU else ("16x16", "8x8")
    return shape in shapes and batch in (16, 128)[GPU:] and impl != "sdpa" and dtype == DTYPE


@cases("shape, batch, phase, impl, dtype", product(LAYERS, BATCHES, PHASES, IMPLS, DTYPES), decides)
def test_self_attention(measure, rotated, smoke, device, shape, batch, phase, impl, dtype):
    sizes = (2 if smoke else batch, *LAYERS[shape])
    op = compiled(published, device, smoke) if impl == "compiled" else OPS[impl]
    costs = cost(*sizes, dtype, phase)
    sets = rotated(lambda: inputs(*sizes, device, dtype), costs["bytes"])
    check(op, reference, sets[0], TOLERANCE[dtype])
    labels = {"op": "self_attention", "impl": impl, "phase": phase, "shape": "B={} L={} C={} H=8".format(*sizes)}
    measure([run_of(phase, op, tensors) for tensors in sets], **labels, dtype=dtype, **costs)
