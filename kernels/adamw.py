"""AdamW, the average of the weights and their rounded copy: one launch. The contract is that of `encdiff.ops.adamw`.

Memory-bound: for each element, with a bfloat16 gradient, 14 bytes are read and 12 written, 2 more for the copy, 8 more
for the average. Where the lengths are multiples of 16, loads and stores are of 16 bytes.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._gate import GateCase, gate_signature

BLOCK = 1024  # elements of one program: 8 of each thread, 16 bytes of bfloat16


@triton.jit
def adamw_kernel(
    p_master, p_gradient, p_exp_avg, p_exp_avg_sq, p_schedule, p_average, p_weights, p_scale, n, k,
    rest1, beta2, rest2, eps, weight_decay,
    BLOCK: tl.constexpr, HAS_AVERAGE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """rest1 = 1 - beta1, rest2 = 1 - beta2, rounded once."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o < n
    rate, follow = tl.load(p_schedule), tl.load(p_schedule + 1)
    bias1, bias2 = tl.load(p_schedule + 2), tl.load(p_schedule + 3)
    g = tl.load(p_gradient + o, mask=m_n, other=0.0).to(tl.float32)
    m = tl.load(p_exp_avg + o, mask=m_n, other=0.0)
    v = tl.load(p_exp_avg_sq + o, mask=m_n, other=0.0)
    p = tl.load(p_master + o, mask=m_n, other=0.0)
    if HAS_SCALE:
        g *= tl.load(p_scale).to(tl.float32)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p *= 1 - rate * weight_decay
    p -= rate / bias1 * (m / (tl.sqrt(v) / tl.sqrt(bias2) + eps))
    tl.store(p_exp_avg + o, m, mask=m_n)
    tl.store(p_exp_avg_sq + o, v, mask=m_n)
    tl.store(p_master + o, p, mask=m_n)
    if HAS_WEIGHTS:
        tl.store(p_weights + o, p.to(p_weights.dtype.element_ty), mask=m_n)
    if HAS_AVERAGE:
        m_k = o < k
        a = tl.load(p_average + o, mask=m_k, other=0.0)
        tl.store(p_average + o, a + follow * (p - a), mask=m_k)


@torch.library.custom_op("encdiff::adamw", mutates_args=("master", "exp_avg", "exp_avg_sq", "average", "weights"))
def adamw(
    master: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, schedule: Tensor, average: Tensor | None,
    weights: Tensor | None, scale: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """master, gradient, moments, weights (n,), average (k,), schedule (4,), scale (); all but three are written."""
    n, k = len(master), 0 if average is None else len(average)
    options = {"HAS_AVERAGE": k > 0, "HAS_WEIGHTS": weights is not None, "HAS_SCALE": scale is not None}
    given = (t if t is not None else schedule for t in (average, weights, scale))  # anything to point at
    if n:
        with torch.cuda.device_of(master):
            adamw_kernel[triton.cdiv(n, BLOCK),](
                master, gradient, exp_avg, exp_avg_sq, schedule, *given, n, k,
                1 - beta1, beta2, 1 - beta2, eps, weight_decay, BLOCK=BLOCK, **options,
            )  # fmt: skip


@adamw.register_fake
def _(master, *_):
    return None


def gate_cases() -> Iterator[GateCase]:
    """Both kinds of segment, their lengths multiples of 16 and not, with clipping and without."""
    for kind, weights in (("bf16", "bf16"), ("fp32", None)):
        for length in ("i32:16", "i32"):
            for scale in (False, True):
                yield _case(kind, weights, length, scale)


def _case(kind: str, weights: str | None, length: str, scale: bool) -> GateCase:
    constexprs = {"BLOCK": BLOCK, "HAS_AVERAGE": True, "HAS_WEIGHTS": weights is not None, "HAS_SCALE": scale}
    types = {n: "*fp32" for n in adamw_kernel.arg_names if n.startswith("p_")}
    types |= {"p_gradient": f"*{kind}", "p_weights": f"*{weights or 'fp32'}", "n": length, "k": length}
    types |= dict.fromkeys(("rest1", "beta2", "rest2", "eps", "weight_decay"), "fp32")
    name = f"adamw_kernel {kind}{' aligned' if ':' in length else ''}{' clipped' if scale else ''}"
    signature = gate_signature(adamw_kernel, types, constexprs)
    return GateCase(name, adamw_kernel, signature, constexprs, num_stages=3, tensor_cores=False)
