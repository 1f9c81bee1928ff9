"""GroupNorm, scale and shift, SiLU at the paper's sizes: PyTorch's (channels-last, contiguous, compiled), Triton.

`bytes` counts what any form must move: forward x in, y out; with gradients x and the upstream gradient in, dx out too.
"""

import pytest
import torch

from encdiff.ops.group_norm import group_norm, group_norm_reference

BATCH, GROUPS = 128, 32
SIZES = ((64, 16), (128, 16), (128, 8), (256, 4), (512, 4), (256, 2))  # channels, height and width
IMPLS = ("native", "native_contiguous", "native_compiled", "ours")


def prepare(impl: str, channels: int, side: int, dtype, device):
    """(op, its inputs): x, weight, bias, scale, shift, each of which wants a gradient."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, channels, side, side, device=device)
    order = torch.contiguous_format if impl == "native_contiguous" else torch.channels_last
    scale, shift = torch.randn(BATCH, 2 * channels, device=device).chunk(2, 1)
    inputs = [x, torch.randn(channels, device=device), torch.randn(channels, device=device), scale, shift]
    inputs = [t.to(dtype).requires_grad_() for t in (x.contiguous(memory_format=order), *inputs[1:])]
    name = "triton" if impl == "ours" else "native"

    def op(x, weight, bias, scale, shift):
        return group_norm(x, weight, bias, GROUPS, scale=scale, shift=shift, silu=True, impl=name)

    return torch.compile(op, dynamic=False) if impl == "native_compiled" else op, inputs


def check(op, inputs) -> None:
    """Output and every gradient against float64, before timing."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = group_norm_reference(*exact[:3], GROUPS, scale=exact[3], shift=exact[4], silu=True)
    y = op(*inputs)
    upstream = torch.randn_like(y)
    pairs = zip(
        [y, *torch.autograd.grad(y, inputs, upstream)],
        [expected, *torch.autograd.grad(expected, exact, upstream.double())],
        strict=True,
    )
    bound = 1e-5 if y.dtype == torch.float32 else 4 * torch.finfo(y.dtype).eps
    for a, e in pairs:
        assert (a - e).norm() <= bound * e.norm()


def cost(inputs, phase: str) -> dict[str, int]:
    """Statistics 5 FLOP per element, normalising and SiLU 6; three times as many with gradients."""
    feature, rest = inputs[0].nbytes, sum(t.nbytes for t in inputs[1:])
    flops = 11 * inputs[0].numel()
    if phase == "forward":
        return {"bytes": 2 * feature + rest, "flops": flops}
    return {"bytes": 5 * feature + 3 * rest, "flops": 3 * flops}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("channels, side", SIZES)
def test_group_norm(measure, benchmark, device, channels, side, dtype, phase, impl):
    if impl == "ours" and device.type != "cuda":
        pytest.skip("the Triton kernels need a GPU: interpreted, they take seconds")
    if benchmark.disabled and (impl == "native_compiled" or side > 4 or dtype != torch.float32):
        pytest.skip("takes longer than a smoke test may")
    op, inputs = prepare(impl, channels, side, dtype, device)
    check(op, inputs)
    upstream = torch.randn_like(inputs[0])

    def forward():
        with torch.no_grad():
            return op(*inputs)

    def forward_backward():
        return torch.autograd.grad(op(*inputs), inputs, upstream)

    forward()  # compiles anew without gradients
    labels = {"op": "norm", "impl": impl, "phase": phase, "shape": f"B={BATCH} C={channels} {side}x{side}"}
    run = forward if phase == "forward" else forward_backward
    measure(run, **labels, dtype=dtype, **cost(inputs, phase))
