"""GEGLU's gate at the paper's sizes: PyTorch's chunk, GELU and product, the same compiled, ours.

`bytes` counts what any form must move: forward both halves in, the product out; with gradients both halves and the
upstream gradient in and two gradients out too. At batch 128 and 16x16 in bfloat16 that is 50 MB forward, 12 us at
4.3 TB/s, 134 MB with gradients, 31 us. On an H200 ours takes 17.8 and 41.3 us (docs/results/h200/run1/ops.json).
"""

from itertools import product

import torch

from bench.baselines import compiled
from bench.cases import DTYPE, GPU, LAYERS, PHASES, cases, check, run_of
from encdiff.ops.geglu import geglu, geglu_reference

BATCH = 128
FACTOR = 4  # the gated features are so many times wider
IMPLS = ("published", "compiled", "ours") if GPU else ("published", "compiled")  # on a CPU ours is PyTorch's
CASES = list(product(LAYERS, (torch.float32, torch.bfloat16), PHASES, IMPLS))


def cost(elements: int, dtype: torch.dtype, phase: str) -> dict[str, int]:
    """GELU 20 FLOP with its erf, the product 1; backward twice that and the derivative's exponential."""
    reads, flops = (3, 21) if phase == "forward" else (8, 70)
    return {"bytes": reads * elements * dtype.itemsize, "flops": flops * elements}


def decides(size, dtype, phase, impl) -> bool:
    return size == "16x16" and dtype == DTYPE and phase == "forward_backward" and (GPU or impl == "published")


@cases("size, dtype, phase, impl", CASES, decides)
def test_geglu(measure, rotated, smoke, device, size, dtype, phase, impl):
    positions, channels = LAYERS[size]
    shape = (2 if smoke else BATCH, positions, FACTOR * channels)

    def op(x):
        return geglu(x, impl=None if impl == "ours" else "native")

    op = compiled(op, device, smoke) if impl == "compiled" else op
    costs = cost(shape[0] * shape[1] * shape[2], dtype, phase)
    sets = rotated(
        lambda: torch.randn(*shape[:2], 2 * shape[2], device=device).to(dtype).requires_grad_(), costs["bytes"]
    )
    check(op, geglu_reference, sets[:1], 4 * torch.finfo(dtype).eps)
    labels = {"op": "geglu", "impl": impl, "phase": phase, "shape": "B={} L={} N={}".format(*shape)}
    measure([run_of(phase, op, [x]) for x in sets], **labels, dtype=dtype, **costs)
