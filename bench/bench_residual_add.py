"""The end of a residual block at the paper's sizes, x + h + bias: PyTorch's two additions, the same compiled, ours.

`bytes` counts x and h in, y out; with gradients the upstream gradient in, too, for the bias: that of x and of h is the
upstream one itself.
"""

from itertools import product

import torch

from bench.baselines import compiled
from bench.cases import DTYPE, GPU, PHASES, cases, check, run_of
from encdiff.ops.residual_add import residual_add, residual_add_reference

BATCH = 128
SIZES = ((64, 16), (128, 8), (256, 4), (256, 2))  # channels, height and width
IMPLS = ("published", "compiled", "ours") if GPU else ("published", "compiled")  # on a CPU ours is PyTorch's
CASES = [(*size, *rest) for size, *rest in product(SIZES, (torch.float32, torch.bfloat16), PHASES, IMPLS)]


def draw(batch: int, channels: int, side: int, dtype, device) -> list[torch.Tensor]:
    """x, h, bias, each of which wants a gradient."""
    maps = [torch.randn(batch, channels, side, side, device=device) for _ in range(2)]
    maps = [t.to(dtype, memory_format=torch.channels_last) for t in maps]
    return [t.requires_grad_() for t in (*maps, torch.randn(channels, device=device).to(dtype))]


def cost(batch: int, channels: int, side: int, dtype, phase: str) -> dict[str, int]:
    elements, (maps, flops) = batch * channels * side**2, (3, 2) if phase == "forward" else (4, 3)
    return {"bytes": (maps * elements + channels) * dtype.itemsize, "flops": flops * elements}


def decides(channels, side, dtype, phase, impl) -> bool:
    return side == 16 and dtype == DTYPE and (phase == "forward_backward" if GPU else impl == "published")


@cases("channels, side, dtype, phase, impl", CASES, decides)
def test_residual_add(measure, rotated, smoke, device, channels, side, dtype, phase, impl):
    batch, name = 2 if smoke else BATCH, "triton" if impl == "ours" else "native"

    def op(x, h, bias):
        return residual_add(x, h, bias, impl=name)

    op = compiled(op, device, smoke) if impl == "compiled" else op
    costs = cost(batch, channels, side, dtype, phase)
    sets = rotated(lambda: draw(batch, channels, side, dtype, device), costs["bytes"])
    check(op, residual_add_reference, sets[0], 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    labels = {"op": "residual_add", "impl": impl, "phase": phase, "shape": f"B={batch} C={channels} {side}x{side}"}
    measure([run_of(phase, op, inputs) for inputs in sets], **labels, dtype=dtype, **costs)
