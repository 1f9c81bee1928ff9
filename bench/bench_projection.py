"""A transformer's feed-forward at the paper's sizes, without gradients: PyTorch's own, compiled, two projections.

`bytes` counts what any form must move: features in and out, and the weights. At batch 128 and 16x16 in bfloat16 that is
8.5 MB, 2 us at 4.2 TB/s, beside 3.2 GFLOP; with the gated features written and read again 42 MB, 10 us. Predicted for
our two launches: 20 us, where LayerNorm, two products, GEGLU and the sum take 50 one after the other; not measured.
"""

from itertools import product

import torch
import torch.nn.functional as F

from bench.baselines import compiled
from bench.cases import DTYPE, GPU, LAYERS, cases, run_of
from encdiff.ops import projection
from encdiff.ops.projection import projection_reference

BATCH, FACTOR = 128, 4  # the gated features are so many times wider
IMPLS = ("published", "compiled", "single ops", "ours") if GPU else ("published", "compiled")
CASES = list(product(LAYERS, (torch.float32, torch.bfloat16), IMPLS))


def cost(rows: int, channels: int, dtype: torch.dtype) -> dict[str, int]:
    weights = 3 * FACTOR * channels**2
    return {"bytes": (2 * rows * channels + weights) * dtype.itemsize, "flops": 2 * rows * weights}


def published(x, norm_weight, norm_bias, first, first_bias, second, second_bias):
    h, g = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias), first, first_bias).chunk(2, -1)
    return x + F.linear(h * F.gelu(g), second, second_bias)


def feed_forward(op, **options):
    def run(x, norm_weight, norm_bias, first, first_bias, second, second_bias):
        h = op(x, first, first_bias, norm_weight=norm_weight, norm_bias=norm_bias, gated=True, **options)
        return op(h, second, second_bias, residual=x, **options)

    return run


def decides(size, dtype, impl) -> bool:
    return size == "16x16" and dtype == DTYPE and impl in (("published", "ours") if GPU else ("published",))


@cases("size, dtype, impl", CASES, decides)
@torch.no_grad()
def test_projection(measure, rotated, smoke, device, size, dtype, impl):
    (positions, C), batch = LAYERS[size], 2 if smoke else BATCH
    inner = FACTOR * C
    shapes = ((batch, positions, C), (C,), (C,), (2 * inner, C), (2 * inner,), (C, inner), (C,))

    def inputs():
        return [(torch.randn(s, device=device) * (s[-1] ** -0.5 if len(s) == 2 else 1)).to(dtype) for s in shapes]

    forms = {"ours": feed_forward(projection), "single ops": feed_forward(projection, impl="native")}
    op = compiled(published, device, smoke) if impl == "compiled" else forms.get(impl, published)
    costs = cost(batch * positions, C, dtype)
    sets = rotated(inputs, costs["bytes"])
    exact = feed_forward(projection_reference)(*(t.double() for t in sets[0]))
    assert (op(*sets[0]) - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()
    labels = {"op": "projection", "impl": impl, "phase": "forward", "shape": f"B={batch} L={positions} C={C}"}
    measure([run_of("forward", op, tensors) for tensors in sets], **labels, dtype=dtype, **costs)
