"""GroupNorm, scale and shift, SiLU at the paper's sizes: PyTorch's (contiguous, channels-last, compiled), Triton.

`published` is contiguous, the others are channels-last. `bytes` counts what any form must move: forward x in, y out;
with gradients x and the upstream gradient in, dx out too.
"""

from itertools import product

import torch

from bench.baselines import compiled
from bench.cases import DTYPE, GPU, PHASES, cases, check, run_of
from encdiff.ops.group_norm import group_norm, group_norm_reference

BATCH, GROUPS = 128, 32
SIZES = ((64, 16), (128, 16), (128, 8), (256, 4), (512, 4), (256, 2))  # channels, height and width
IMPLS = ("published", "channels_last", "compiled", "ours") if GPU else ("published", "channels_last", "compiled")
CASES = [(*size, *rest) for size, *rest in product(SIZES, (torch.float32, torch.bfloat16), PHASES, IMPLS)]


def draw(batch: int, channels: int, side: int, impl: str, dtype, device) -> list[torch.Tensor]:
    """x, weight, bias, scale, shift, each of which wants a gradient."""
    x = torch.randn(batch, channels, side, side, device=device)
    order = torch.contiguous_format if impl == "published" else torch.channels_last
    scale, shift = torch.randn(batch, 2 * channels, device=device).chunk(2, 1)
    inputs = [x, torch.randn(channels, device=device), torch.randn(channels, device=device), scale, shift]
    return [t.to(dtype).requires_grad_() for t in (x.contiguous(memory_format=order), *inputs[1:])]


def reference(x, weight, bias, scale, shift):
    return group_norm_reference(x, weight, bias, GROUPS, scale=scale, shift=shift, silu=True)


def cost(batch: int, channels: int, side: int, dtype, phase: str) -> dict[str, int]:
    """Statistics 5 FLOP per element, normalising and SiLU 6; three times as many with gradients."""
    elements, rest = batch * channels * side**2, 2 * channels * (1 + batch)
    features, others, flops = (2, 1, 11) if phase == "forward" else (5, 3, 33)
    return {"bytes": (features * elements + others * rest) * dtype.itemsize, "flops": flops * elements}


def decides(channels, side, dtype, phase, impl) -> bool:
    if dtype != DTYPE or impl == ("channels_last" if GPU else "compiled"):
        return False
    return (channels, side) == (64, 16) or ((channels, side) == (128, 8) and not GPU)


@cases("channels, side, dtype, phase, impl", CASES, decides)
def test_group_norm(measure, rotated, smoke, device, channels, side, dtype, phase, impl):
    batch, name = 2 if smoke else BATCH, "triton" if impl == "ours" else "native"

    def op(x, weight, bias, scale, shift):
        return group_norm(x, weight, bias, GROUPS, scale=scale, shift=shift, silu=True, impl=name)

    op = compiled(op, device, smoke) if impl == "compiled" else op
    costs = cost(batch, channels, side, dtype, phase)
    sets = rotated(lambda: draw(batch, channels, side, impl, dtype, device), costs["bytes"])
    check(op, reference, sets[0], 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    labels = {"op": "norm", "impl": impl, "phase": phase, "shape": f"B={batch} C={channels} {side}x{side}"}
    measure([run_of(phase, op, inputs) for inputs in sets], **labels, dtype=dtype, **costs)
