"""What the benchmarks of attention share: the published form, the forms beside it, the cases and what is drawn."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import GPU

HEADS = 8
DTYPES = (torch.bfloat16, torch.float32) if GPU else (torch.float32,)
IMPLS = ("published", "compiled", "sdpa", "ours") if GPU else ("published", "sdpa", "ours")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def published(x, context, w_q, w_k, w_v, w_o, b_o, norm_weight, norm_bias):
    """As the published code computes it: the batch and the heads in one axis, the logits written out.

    `context` None: x attends to itself.
    """
    h = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)
    tokens = h if context is None else context
    q, k, v = (F.linear(s, w) for s, w in ((h, w_q), (tokens, w_k), (tokens, w_v)))
    q, k, v = (s.unflatten(-1, (HEADS, -1)).transpose(1, 2).reshape(len(x) * HEADS, s.shape[1], -1) for s in (q, k, v))
    logits = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
    a = torch.einsum("bij,bjd->bid", logits.softmax(-1), v)
    a = a.unflatten(0, (len(x), HEADS)).transpose(1, 2).reshape(x.shape)
    return F.linear(a, w_o, b_o) + x


def fused(function, **options) -> Callable[..., Tensor]:
    """One of `ops` as a function of tensors alone, its norm given by position."""

    def run(*tensors):
        *rest, weight, bias = tensors
        return function(*rest, norm_weight=weight, norm_bias=bias, heads=HEADS, residual=True, **options)

    return run


def forms(baseline: Callable[..., Tensor], op) -> dict[str, Callable[..., Tensor]]:
    """By name: the published form, PyTorch's fused attention between projections, and what `op` chooses."""
    return {"published": baseline, "sdpa": fused(op, impl="sdpa"), "ours": fused(op)}


def draw(shapes: list[tuple[int, ...]], device, dtype) -> list[Tensor]:
    """Standard normal, matrices divided by the root of their columns; each wants a gradient."""
    drawn = [torch.randn(s) / (s[-1] ** 0.5 if len(s) == 2 else 1) for s in shapes]
    return [t.to(device, dtype).requires_grad_() for t in drawn]
