"""Cross-attention whose token side was computed before: fold once per image, attend at every sampler step.

With q = LN(x) Wq^T and the keys k, values v of head h (docs/math.md):

    logits = q_h k_h^T / sqrt(d) = LN(x) A_h^T     A_h = k_h Wq_h / sqrt(d)   (N, C)
    sum over h of P_h v_h Wo_h^T = sum P_h W_h     W_h = v_h Wo_h^T           (N, C)
"""

from importlib.util import find_spec
from os import environ
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.kernels._cross_attention_plan import FOLDED_CHANNELS, FOLDED_TOKENS, can_fold
from encdiff.ops._attention import exact, has_gradient, kernel_bias, layer_norm, product_dtype, products_out, softmax
from encdiff.ops._dispatch import Implementation, Op, always

TRITON = find_spec("triton") is not None


class Folded(NamedTuple):
    """The tokens of every sample, taken into the channel space: keys A and values W, both (B, heads, N, C)."""

    keys: Tensor
    values: Tensor


def fold(context: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, *, heads: int) -> Folded:
    """Everything of `cross_attention` that depends on the tokens alone; arguments as there. Exact, differentiable."""
    k, v = (F.linear(context, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (w_k, w_v))  # (B, H, N, d)
    width = k.shape[-1]
    keys = k @ (w_q.unflatten(0, (heads, width)) * width**-0.5)
    values = v @ w_o.unflatten(1, (heads, width)).permute(1, 2, 0)
    return Folded(keys, values)


def fold_pays(context: Tensor, channels: int, heads: int) -> bool:
    """Whether attending to folded tokens is expected to be faster than to the tokens, however many the queries.

    On a GPU where the kernels serve it: one launch in place of six; elsewhere where it saves products.
    """
    tokens, size = context.shape[1], product_dtype(context).itemsize
    return can_fold(channels, tokens, size) if context.is_cuda else heads * tokens <= channels


def cross_attention_folded_reference(
    x, folded, b_o=None, *,
    norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
):  # fmt: skip
    """Two products in plain PyTorch, in float32 whatever the storage type; see `cross_attention_folded`."""
    with exact(x) as dtype:
        h = layer_norm(x.to(dtype), norm_weight, norm_bias, norm_eps)
        keys, values = (t.to(dtype).flatten(1, 2) for t in folded)  # (B, H*N, C)
        logits = (keys @ h.mT).unflatten(1, folded.keys.shape[1:3])  # queries last: the softmax runs in vectors of them
        p = softmax(logits, token_bias, dim=-2)
        y = products_out(p.flatten(1, 2).mT, values, b_o, x if residual else None).to(x.dtype)
    if maps is None:
        return y
    return y, (p.mT if maps == "head" else p.mean(1).mT).to(x.dtype)


def cross_attention_folded_triton(
    x, folded, b_o=None, *,
    norm_weight=None, norm_bias=None, norm_eps=1e-5, residual=False, token_bias=None, maps=None,
):  # fmt: skip
    """One pass over x, LayerNorm to residual."""
    from encdiff.kernels.cross_attention import cross_attention_folded as kernel

    keys, values = (t.to(product_dtype(x)).contiguous() for t in folded)  # under autocast not x's type
    bias = kernel_bias(token_bias, keys.shape[1])
    y, p = kernel(x, keys, values, b_o, norm_weight, norm_bias, bias, norm_eps, residual, maps or "none")
    return y if maps is None else (y, p)


def _triton_reasons(x, folded, b_o=None, *, maps=None, **options) -> list[str]:
    reasons = triton_reasons(x, maps, *folded, b_o, *options.values())
    (channels, tokens), size = (x.shape[2], folded.keys.shape[2]), product_dtype(x).itemsize
    if not can_fold(channels, tokens, size):
        reasons.append(
            f"{channels} channels and {tokens} tokens must be a multiple of 8 up to {FOLDED_CHANNELS.get(size, 0)} "
            f"and 1 to {FOLDED_TOKENS}"
        )
    return reasons


def triton_reasons(x: Tensor, maps: str | None, *tensors) -> list[str]:
    """Why no kernel of cross-attention can serve, whatever the route."""
    reasons = []
    if not TRITON:
        reasons.append("triton is not installed")
    if not x.is_cuda and environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"x is on {x.device.type}")
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        reasons.append("the GPU is older than compute capability 8.0")
    if product_dtype(x) not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"x is {x.dtype}")
    if maps is not None and has_gradient(x, *tensors):
        reasons.append("attention maps have no gradient there")
    return reasons


def interpreted(x: Tensor, *args, **kwargs) -> list[str]:
    """The doubt about a Triton kernel that serves only tests."""
    return [] if x.is_cuda else ["kernels are interpreted on the CPU"]


_op = Op(
    "cross_attention_folded",
    [
        Implementation("triton", cross_attention_folded_triton, _triton_reasons, interpreted),
        Implementation("reference", cross_attention_folded_reference, always),
    ],
)


def cross_attention_folded(
    x: Tensor,
    folded: Folded,
    b_o: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    residual: bool = False,
    token_bias: Tensor | None = None,
    maps: Literal["head", "mean"] | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`cross_attention` with the tokens and their weights folded before, by `fold`.

    The other arguments, the result and its types are those of `cross_attention`; gradients reach the folded tensors.
    Raises InputError for shapes, devices or dtypes that do not fit, or a forced implementation that cannot serve.
    """
    keys, values = folded
    fits = keys.ndim == 4 and keys.shape == values.shape and x.ndim == 3
    if not fits or (keys.shape[0], keys.shape[3]) != (x.shape[0], x.shape[2]):
        raise InputError(
            f"folded keys {tuple(keys.shape)} and values {tuple(values.shape)} must both be (B, heads, N, C), "
            f"and x {tuple(x.shape)} (B, L, C)"
        )
    if keys.device != x.device:
        raise InputError(f"folded is on {keys.device}, must be on x's device {x.device}")
    check_options(x, keys.shape[1], keys.shape[2], norm_weight, norm_bias, token_bias, maps)
    return _op(
        x, folded, b_o, norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=norm_eps, residual=residual,
        token_bias=token_bias, maps=maps, impl=impl,
    )  # fmt: skip


def check_options(x, heads, tokens, norm_weight, norm_bias, token_bias, maps) -> None:
    """Raise InputError unless these options of cross-attention fit x."""
    if not x.is_floating_point():
        raise InputError(f"x is {x.dtype}, must be floating point")
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if (t is None) != (norm_weight is None) or (t is not None and tuple(t.shape) != (x.shape[2],)):
            shape = None if t is None else tuple(t.shape)
            raise InputError(f"{name} is {shape}, must be ({x.shape[2]},), or None as the other one")
    if token_bias is not None and tuple(token_bias.shape) not in ((x.shape[0], tokens), (x.shape[0], heads, tokens)):
        raise InputError(f"token_bias is {tuple(token_bias.shape)}, must be (B, N) or (B, heads, N) with N = {tokens}")
    if maps not in (None, "head", "mean"):
        raise InputError(f"maps is {maps!r}, must be None, 'head' or 'mean'")
