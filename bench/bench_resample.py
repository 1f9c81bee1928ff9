"""Half and twice the resolution at the paper's sizes: PyTorch's pooling and interpolation, the same compiled, ours.

`bytes` counts what any form must move: the large map and the small one, once forward and once backward. Of 64 channels
at batch 128 between 16x16 and 8x8 in bfloat16 that is 5 MB, 1.2 us at 4.3 TB/s: predicted, not measured.
"""

from itertools import product
from math import prod

import torch

from bench.baselines import compiled
from bench.cases import DTYPE, GPU, PHASES, cases, check, run_of
from encdiff.ops.resample import resample, resample_reference

BATCH = 128
SIZES = {"16x16": 64, "8x8": 128, "4x4": 256}  # of the large map: channels
IMPLS = ("published", "compiled", "ours") if GPU else ("published", "compiled")  # on a CPU ours is PyTorch's
CASES = list(product(("down", "up"), SIZES, (torch.float32, torch.bfloat16), PHASES, IMPLS))


def cost(elements: int, dtype: torch.dtype, phase: str) -> dict[str, int]:
    """Of the large map: a multiply or an addition for each of its elements."""
    times = 1 if phase == "forward" else 2
    return {"bytes": times * elements * 5 // 4 * dtype.itemsize, "flops": times * elements}


def decides(kind, size, dtype, phase, impl) -> bool:
    decisive = kind == "down" and size == "16x16" and phase == "forward_backward"  # which runs both kernels
    return decisive and dtype == DTYPE and (GPU or impl == "published")


@cases("kind, size, dtype, phase, impl", CASES, decides)
def test_resample(measure, rotated, smoke, device, kind, size, dtype, phase, impl):
    side, channels = int(size.partition("x")[0]), SIZES[size]
    large = 2 if smoke else BATCH, channels, side, side
    shape = large if kind == "down" else (*large[:2], side // 2, side // 2)

    def op(x):
        return resample(x, kind, impl=None if impl == "ours" else "native")

    op = compiled(op, device, smoke) if impl == "compiled" else op
    costs = cost(prod(large), dtype, phase)

    def inputs():
        x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        return x.requires_grad_()

    sets = rotated(inputs, costs["bytes"])
    check(op, lambda x: resample_reference(x, kind), sets[:1], 4 * torch.finfo(dtype).eps)
    labels = {"op": f"resample {kind}", "impl": impl, "phase": phase, "shape": "B={} C={} {}x{}".format(*shape)}
    measure([run_of(phase, op, [x]) for x in sets], **labels, dtype=dtype, **costs)
