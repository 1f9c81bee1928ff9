"""LayerNorm at the paper's sizes: PyTorch's own, the same compiled, ours.

`bytes` counts what any form must move: forward the features in and out, with gradients features and upstream gradient
in and one gradient out, too. At batch 128 and 16x16 in bfloat16 that is 8 MB forward, 2.0 us at 4.2 TB/s, 21 MB with
gradients, 5.0 us. On an H200 ours takes 4.1 and 13.6 us (docs/results/h200/run4/ops.json).
"""

from itertools import product

import torch

from bench.baselines import compiled
from bench.cases import DTYPE, GPU, LAYERS, PHASES, cases, check, run_of
from encdiff.ops.layer_norm import layer_norm, layer_norm_reference

BATCH = 128
IMPLS = ("published", "compiled", "ours") if GPU else ("published", "compiled")  # on a CPU ours is PyTorch's
CASES = list(product(LAYERS, (torch.float32, torch.bfloat16), PHASES, IMPLS))


def cost(elements: int, dtype: torch.dtype, phase: str) -> dict[str, int]:
    """Mean, variance and the rest 8 FLOP an element; backward twice that."""
    reads, flops = (2, 8) if phase == "forward" else (5, 24)
    return {"bytes": reads * elements * dtype.itemsize, "flops": flops * elements}


def decides(size, dtype, phase, impl) -> bool:
    return size == "16x16" and dtype == DTYPE and phase == "forward_backward" and (GPU or impl == "published")


@cases("size, dtype, phase, impl", CASES, decides)
def test_layer_norm(measure, rotated, smoke, device, size, dtype, phase, impl):
    (positions, channels), batch = LAYERS[size], 2 if smoke else BATCH
    shapes = ((batch, positions, channels), (channels,), (channels,))

    def op(*tensors):
        return layer_norm(*tensors, impl=None if impl == "ours" else "native")

    op = compiled(op, device, smoke) if impl == "compiled" else op
    costs = cost(batch * positions * channels, dtype, phase)
    sets = rotated(lambda: [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes], costs["bytes"])
    check(op, layer_norm_reference, sets[0], 8 * torch.finfo(dtype).eps)
    labels = {"op": "layer_norm", "impl": impl, "phase": phase, "shape": f"B={batch} L={positions} C={channels}"}
    measure([run_of(phase, op, tensors) for tensors in sets], **labels, dtype=dtype, **costs)
