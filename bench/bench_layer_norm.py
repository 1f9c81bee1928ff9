"""LayerNorm at the paper's sizes: PyTorch's own, the same compiled, ours.

`bytes` counts what any form must move: forward the features in and out, with gradients features and upstream gradient
in and one gradient out, too. At batch 128 and 16x16 in bfloat16 that is 8 MB forward, 2.9 us at 2.9 TB/s, 21 MB with
gradients, 7.2 us: predicted, not measured.
"""

import pytest
import torch

from encdiff.ops.layer_norm import layer_norm, layer_norm_reference

BATCH = 128
SIZES = {"16x16": (256, 64), "8x8": (64, 128), "4x4": (16, 256), "2x2": (4, 256)}  # positions, channels
GPU = torch.cuda.is_available()
IMPLS = ("native", "native_compiled", "ours")


def prepare(impl: str):
    if impl == "native_compiled":
        return torch.compile(lambda *tensors: layer_norm(*tensors, impl="native"), dynamic=False)
    return lambda *tensors: layer_norm(*tensors, impl="native" if impl == "native" else None)


def check(op, tensors: list[torch.Tensor]) -> None:
    """Output and gradients against float64, before timing."""
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = op(*tensors), layer_norm_reference(*exact)
    upstream = torch.randn_like(y)
    actual = [y, *torch.autograd.grad(y, tensors, upstream)]
    for a, e in zip(actual, [expected, *torch.autograd.grad(expected, exact, upstream.double())], strict=True):
        assert (a - e).norm() <= 8 * torch.finfo(y.dtype).eps * e.norm()


def cost(x: torch.Tensor, phase: str) -> dict[str, int]:
    """Mean, variance and the rest 8 FLOP an element; backward twice that."""
    if phase == "forward":
        return {"bytes": 2 * x.nbytes, "flops": 8 * x.numel()}
    return {"bytes": 5 * x.nbytes, "flops": 24 * x.numel()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_layer_norm(measure, benchmark, device, size, dtype, phase, impl):
    if impl == "ours" and not GPU:
        pytest.skip("on a CPU ours is PyTorch's")
    if benchmark.disabled and (impl == "native_compiled" or size != "2x2"):
        pytest.skip("takes longer than a smoke test may")
    positions, channels = SIZES[size]
    shapes = ((BATCH, positions, channels), (channels,), (channels,))
    tensors = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    op = prepare(impl)
    check(op, tensors)
    upstream = torch.randn_like(tensors[0])

    def forward():
        with torch.no_grad():
            return op(*tensors)

    def forward_backward():
        return torch.autograd.grad(op(*tensors), tensors, upstream)

    forward()  # compiles anew without gradients
    labels = {"op": "layer_norm", "impl": impl, "phase": phase, "shape": f"B={BATCH} L={positions} C={channels}"}
    run = forward if phase == "forward" else forward_backward
    measure(run, **labels, dtype=dtype, **cost(tensors[0], phase))
