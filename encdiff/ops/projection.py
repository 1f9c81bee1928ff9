"""A linear layer with what stands around it in a transformer: y = [GEGLU](LN(x) W^T + b) [+ residual]."""

from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._attention import check_norm, exact
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._projection import kernel_reasons, projection_triton
from encdiff.ops._triton import has_gradient, interpreted
from encdiff.ops._types import check_floating, mixed
from encdiff.ops.geglu import geglu, geglu_reference
from encdiff.ops.layer_norm import layer_norm, layer_norm_reference
from encdiff.ops.linear import linear


def projection_reference(
    x, weight, bias=None, *, norm_weight=None, norm_bias=None, norm_eps=1e-5, gated=False, residual=None
):
    """The formula in float32, whatever the storage type; see `projection`."""
    with exact(x) as dtype:
        h = x.to(dtype)
        if norm_weight is not None:
            h = layer_norm_reference(h, norm_weight, norm_bias, norm_eps)
        y = h @ weight.to(dtype).T
        y = y if bias is None else y + bias.to(dtype)
        y = geglu_reference(y) if gated else y
        return (y if residual is None else residual.to(dtype) + y).to(x.dtype)


def projection_native(
    x, weight, bias=None, *, norm_weight=None, norm_bias=None, norm_eps=1e-5, gated=False, residual=None
):
    """One op after the other: LayerNorm, the product, GEGLU, the sum."""
    h = x if norm_weight is None else layer_norm(x, norm_weight, norm_bias, norm_eps)
    if not gated:
        return linear(h, weight, bias, residual=residual)
    y = geglu(linear(h, weight, bias))
    return y if residual is None else residual + y


def _native_reasons(x, weight, bias=None, *, residual=None, **_) -> list[str]:
    return mixed(x, weight, bias, residual)


def _triton_reasons(x, weight, bias=None, *, norm_weight=None, norm_bias=None, residual=None, **options) -> list[str]:
    asked = has_gradient(x, weight, bias, norm_weight, norm_bias, residual)
    given = {"norm_weight": norm_weight, "norm_bias": norm_bias, "residual": residual}
    return ["a gradient is asked for"] * asked or kernel_reasons(x, weight, bias, **given, **options)


def _triton_doubts(x, *_, norm_weight=None, gated=False, residual=None, **__) -> list[str]:
    alone = norm_weight is None and residual is None and not gated
    return interpreted(x) + ["nothing stands around it, so PyTorch's own is as fast"] * alone


def projects(x: Tensor, weight: Tensor, *args, **options) -> bool:
    """Whether an op of which this is a part should take the kernel: the choice of `projection`, and no error where one
    is forced that serves that op and not this part of it.
    """
    return _op.fuses(x, weight, *args, **options)


_op = Op(
    "projection",
    [
        Implementation("triton", projection_triton, _triton_reasons, _triton_doubts),
        Implementation("native", projection_native, _native_reasons, composite=True),
        Implementation("reference", projection_reference, always, composite=True),
    ],
)


def projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    gated: bool = False,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """A linear layer, LayerNorm before it, GEGLU or a residual behind it.

    Args:
        x: (..., I).
        weight: (O, I), with `gated` (2 O, I).
        bias: (O,), with `gated` (2 O,), or None.
        norm_weight, norm_bias: (I,) of a LayerNorm over x; both None: no LayerNorm.
        gated: the first half of what the layer gives, times GELU of the other, as `geglu`.
        residual: (..., O), added last; None: nothing.
        impl: force an implementation (`encdiff.explain` lists them); None chooses.

    Returns:
        y (..., O) in x's dtype. The fused kernel rounds once, at the end, where the single ops round after each; it has
        no gradients, so where these are asked for the single ops run.

    Raises:
        InputError: shapes or dtypes that do not fit, other devices, or a forced implementation that cannot serve.
    """
    check_floating(
        x=x, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual
    )  # fmt: skip
    _check(x, weight, bias, gated, residual)
    check_norm(x, norm_weight, norm_bias)
    given = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias, "residual": residual}
    for name, t in given.items():
        if t is not None and t.device != x.device:
            raise InputError(f"{name} is on {t.device}, must be on x's device {x.device}")
    options = {"norm_weight": norm_weight, "norm_bias": norm_bias, "gated": gated, "residual": residual}
    if impl is None and _op._default() == "triton" and _triton_reasons(x, weight, bias, **options):
        impl = "native"  # what is forced for every op is no reason to fail in a training
    return _op(x, weight, bias, **options, norm_eps=norm_eps, impl=impl)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, gated: bool, residual: Tensor | None) -> None:
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[1] != x.shape[-1] or (gated and len(weight) % 2):
        wanted = "(2 O, I)" if gated else "(O, I)"
        raise InputError(f"weight is {tuple(weight.shape)}, must be {wanted} for x {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias is {tuple(bias.shape)}, must be ({len(weight)},)")
    shape = (*x.shape[:-1], len(weight) // (1 + gated))
    if residual is not None and tuple(residual.shape) != shape:
        raise InputError(f"residual is {tuple(residual.shape)}, must be {shape}")
