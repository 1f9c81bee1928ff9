"""GEGLU's gate at the paper's sizes: PyTorch's chunk, GELU and product, the same compiled, ours.

`bytes` counts what any form must move: forward both halves in, the product out; with gradients both halves and the
upstream gradient in and two gradients out too. At batch 128 and 16x16 in bfloat16 that is 50 MB forward, 12 us at
4.3 TB/s, 134 MB with gradients, 31 us: predicted, not measured.
"""

import pytest
import torch

from encdiff.ops.geglu import geglu, geglu_reference

BATCH = 128
SIZES = {"16x16": (256, 64), "8x8": (64, 128), "4x4": (16, 256), "2x2": (4, 256)}  # positions, channels
FACTOR = 4  # the gated features are so many times wider
GPU = torch.cuda.is_available()
IMPLS = ("native", "native_compiled", "ours")


def prepare(impl: str):
    if impl == "native_compiled":
        return torch.compile(lambda x: geglu(x, impl="native"), dynamic=False)
    return lambda x: geglu(x, impl="native" if impl == "native" else None)


def check(op, x: torch.Tensor) -> None:
    """Output and gradient against float64, before timing."""
    exact = x.detach().double().requires_grad_()
    y, expected = op(x), geglu_reference(exact)
    upstream = torch.randn_like(y)
    pairs = [(y, expected), (torch.autograd.grad(y, x, upstream)[0],
                             torch.autograd.grad(expected, exact, upstream.double())[0])]  # fmt: skip
    for a, e in pairs:
        assert (a - e).norm() <= 4 * torch.finfo(y.dtype).eps * e.norm()


def cost(x: torch.Tensor, phase: str) -> dict[str, int]:
    """GELU 20 FLOP with its erf, the product 1; backward twice that and the derivative's exponential."""
    half, elements = x.nbytes // 2, x.numel() // 2
    if phase == "forward":
        return {"bytes": 3 * half, "flops": 21 * elements}
    return {"bytes": 8 * half, "flops": 70 * elements}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_geglu(measure, benchmark, device, size, dtype, phase, impl):
    if impl == "ours" and not GPU:
        pytest.skip("on a CPU ours is PyTorch's")
    if benchmark.disabled and (impl == "native_compiled" or size != "2x2"):
        pytest.skip("takes longer than a smoke test may")
    positions, channels = SIZES[size]
    x = torch.randn(BATCH, positions, 2 * FACTOR * channels, device=device).to(dtype).requires_grad_()
    op = prepare(impl)
    check(op, x)
    upstream = torch.randn_like(x[..., : x.shape[-1] // 2])

    def forward():
        with torch.no_grad():
            return op(x)

    def forward_backward():
        return torch.autograd.grad(op(x), x, upstream)

    forward()  # compiles anew without gradients
    labels = {"op": "geglu", "impl": impl, "phase": phase, "shape": f"B={BATCH} L={positions} N={FACTOR * channels}"}
    run = forward if phase == "forward" else forward_backward
    measure(run, **labels, dtype=dtype, **cost(x, phase))
