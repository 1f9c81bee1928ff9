"""Sums over rows at the paper's sizes, the gradients of biases: PyTorch's, ours.

`bytes` counts the matrix once. At batch 128 and 16x16 in bfloat16 that is 4 MB, 1.4 us of an H100's 2.98 TB/s, where
PyTorch 2.11 takes 13 us for any of these sizes (docs/results/h100-run1/profile.json); ours: predicted 6 us for two
launches, 2 to 3 us for one.
"""

import pytest
import torch

from encdiff.ops.column_sum import column_sum

BATCH = 128
SIZES = {"16x16": (256, 64), "8x8": (64, 128), "4x4": (16, 256), "2x2": (4, 256)}  # positions, channels
GPU = torch.cuda.is_available()


def check(impl: str | None, x: torch.Tensor) -> None:
    """Against float64, before timing: the result's rounding and that of a running sum in float32."""
    y, exact = column_sum(x, impl=impl), x.double().sum(0)
    bound = torch.finfo(x.dtype).eps * exact.norm() + torch.finfo(torch.float32).eps * len(x) ** 0.5 * x.double().norm()
    assert (y - exact).norm() <= bound


@pytest.mark.parametrize("impl", ["native", "ours"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_column_sum(measure, benchmark, device, size, dtype, impl):
    if impl == "ours" and not GPU:
        pytest.skip("on a CPU ours is PyTorch's")
    positions, channels = SIZES[size]
    x = torch.randn(BATCH * positions, channels, device=device).to(dtype)
    impl = "native" if impl == "native" else None
    check(impl, x)
    labels = {"op": "column_sum", "impl": impl or "ours", "phase": "forward", "shape": f"M={len(x)} C={channels}"}
    measure(lambda: column_sum(x, impl=impl), **labels, dtype=dtype, bytes=x.nbytes, flops=x.numel())
