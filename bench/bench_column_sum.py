"""Sums over rows at the paper's sizes, the gradients of biases: PyTorch's, the same compiled, ours.

`bytes` counts the matrix once. At batch 128 and 16x16 in bfloat16 that is 4 MB, 1.4 us of an H100's 2.98 TB/s, where
PyTorch 2.11 takes 13 us for any of these sizes (docs/results/h100/run1/profile.json); ours: predicted 6 us for two
launches, 2 to 3 us for one.
"""

from itertools import product

import torch

from bench.baselines import compiled
from bench.cases import DTYPE, GPU, LAYERS, cases
from encdiff.ops.column_sum import column_sum

BATCH = 128
IMPLS = ("published", "compiled", "ours") if GPU else ("published", "compiled")  # on a CPU ours is PyTorch's
CASES = list(product(LAYERS, (torch.float32, torch.bfloat16), IMPLS))


def check(op, x: torch.Tensor) -> None:
    """Against float64, before timing: the result's rounding and that of a running sum in float32."""
    y, exact = op(x), x.double().sum(0)
    bound = torch.finfo(x.dtype).eps * exact.norm() + torch.finfo(torch.float32).eps * len(x) ** 0.5 * x.double().norm()
    assert (y - exact).norm() <= bound


def decides(size, dtype, impl) -> bool:
    return size == "16x16" and dtype == DTYPE and (GPU or impl == "published")


@cases("size, dtype, impl", CASES, decides)
def test_column_sum(measure, rotated, smoke, device, size, dtype, impl):
    positions, channels = LAYERS[size]
    rows = (2 if smoke else BATCH) * positions

    def op(x):
        return column_sum(x, impl=None if impl == "ours" else "native")

    op = compiled(op, device, smoke) if impl == "compiled" else op
    sets = rotated(lambda: torch.randn(rows, channels, device=device).to(dtype), rows * channels * dtype.itemsize)
    check(op, sets[0])
    labels = {"op": "column_sum", "impl": impl, "phase": "forward", "shape": f"M={rows} C={channels}"}
    runs = [lambda x=x: op(x) for x in sets]
    measure(runs, **labels, dtype=dtype, bytes=sets[0].nbytes, flops=sets[0].numel())
