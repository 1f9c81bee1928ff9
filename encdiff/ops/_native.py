"""The native engine (csrc/), noise and CPU attention: loaded at first use, its ops with fakes, gradients and calls."""

import ctypes
import math
import threading

import torch

from encdiff.kernels._second import refusal
from encdiff.ops import _build
from encdiff.ops._compiling import asked_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {"x0": 0, "epsilon": 1, "v": 2, "flow": 3}  # csrc/noise.h: Target
_RANDOM = {"normal": 0, "uniform": 1}


_lock = threading.Lock()
_loaded: tuple[str | None, bool] | None = None


def load() -> tuple[str | None, bool]:
    """Load the library once, building it if need be: why that failed or None, and whether it has its CUDA half."""
    global _loaded
    if _loaded is None:
        with _lock:
            _loaded = _loaded or _load()
    return _loaded


def _load() -> tuple[str | None, bool]:
    try:
        path = str(_build.find_or_build(torch.version.cuda is not None))
    except (_build.BuildError, OSError) as error:
        return f"the native engine is not built: {error}", False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the native engine does not load: {error}", False
    _register()
    return None, hasattr(ctypes.CDLL(path), "encdiff_has_cuda")


@asked_once
def _problem(device: str) -> str | None:
    problem, has_cuda = load()
    return problem or (None if device == "cpu" or has_cuda else "the native engine was built without its CUDA half")


def reasons(x: torch.Tensor) -> list[str]:
    """Why the engine cannot serve a tensor where `x` is; loads the engine only if nothing else speaks against it."""
    if x.device.type not in ("cpu", "cuda"):
        return [f"on {x.device.type}"]
    problem = _problem(x.device.type)
    return [problem] if problem else []


def tensor_reasons(x: torch.Tensor, **others: torch.Tensor | None) -> list[str]:
    """As `reasons`, for an op on `x` and others of its dtype."""
    against = [] if x.dtype in DTYPES else [f"dtype is {x.dtype}"]
    if x.numel() == 0:
        against.append("the batch is empty")
    against += [
        f"{name} is {other.dtype}, unlike the batch's {x.dtype}"
        for name, other in others.items()
        if other is not None and other.dtype != x.dtype
    ]
    return against or reasons(x)


def random(kind, shape, seed, sample_ids, draw, dtype, stream, out=None):
    """As `ops.philox.normal_reference` and `uniform_reference`."""
    direct = out is not None and out.is_contiguous()
    made = out if direct else torch.empty(shape, dtype=dtype, device=sample_ids.device)
    if made.numel():
        draw, draw_tensor = _split(draw)
        ids = sample_ids.contiguous()
        torch.ops.encdiff_native.random_out(_RANDOM[kind], ids, draw_tensor, draw, _signed(seed), stream, made)
    return made if direct or out is None else out.copy_(made)


def q_sample(
    x0, noise, t, schedule, prediction="epsilon", *, seed=None, sample_ids=None, draw=0, weights=None, out=None
):
    """As `ops.noise.q_sample_reference`."""
    draw, draw_tensor = _split(draw)
    order = _order(x0) if noise is not None else None
    given = prediction == "x0" or (prediction == "epsilon" and noise is not None)
    inputs = (
        _dense(x0, order), _dense(noise, order), t.contiguous(), schedule.contiguous(), _contiguous(weights),
        0 if given else _KINDS[prediction], _contiguous(sample_ids) if noise is None else None, draw_tensor, draw,
        _signed(seed or 0),
    )  # fmt: skip
    if _direct(out, order):
        if given and out[1] is not (known := x0 if prediction == "x0" else noise):
            out[1].copy_(known)  # before x_t, which may be the same tensor
        weight = None if weights is None else x0.new_empty(len(x0), dtype=torch.float32)
        targets = _dense(out[0], order), None if given else _dense(out[1], order), weight
        torch.ops.encdiff_native.q_sample_out(*inputs, *targets)
        return *out, weight
    x_t, target, weight = torch.ops.encdiff_native.q_sample(*inputs)
    target = (x0 if prediction == "x0" else noise) if given else _restore(target, order, x0)
    return *into(out, _restore(x_t, order, x0), target), weight if weights is not None else None


def step(
    x_t, output, coefficients, noise=None, clip=None, *, quantile=None,
    unconditional=None, guidance=1.0, history=(), seed=None, sample_ids=None, draw=0, return_x0=False, out=None,
):  # fmt: skip
    """As `ops.noise.step_reference`."""
    draw, draw_tensor = _split(draw)
    keyed = seed is not None and noise is None
    order = None if keyed else _order(x_t)  # a drawn number belongs to its place in the contiguous layout
    past = [_dense(h, order) for h in (*history, None, None, None)[:3]]
    model = _dense(x_t, order), _dense(output, order), _dense(unconditional, order), coefficients.contiguous()
    limits = None
    if quantile is not None:
        detached = (None if x is None else x.detach() for x in model)
        limits = torch.ops.encdiff_native.threshold(*detached, clip, guidance, quantile)
    inputs = (
        *model, limits, _dense(noise, order), *past, _contiguous(sample_ids) if keyed else None, draw_tensor, draw,
        _signed(seed or 0), math.inf if clip is None else clip, guidance,
    )  # fmt: skip
    if _direct(out, order):
        torch.ops.encdiff_native.step_out(*inputs, *(_dense(y, order) for y in out))
        return out
    x_prev, x0 = torch.ops.encdiff_native.step(*inputs, return_x0)
    return into(out, _restore(x_prev, order, x_t), _restore(x0, order, x_t) if return_x0 else None)


def _direct(out, order) -> bool:
    """Whether the library can write into `out` itself."""
    return out is not None and all(y is None or (y if order is None else y.permute(order)).is_contiguous() for y in out)


def into(out, *results):
    """The results, or `out` with the results copied into it."""
    if out is None:
        return results
    for y, result in reversed(list(zip(out, results, strict=True))):  # a target may be the input that x_t goes over
        if y is not None and y is not result:
            y.copy_(result)
    return out


def _split(draw):
    return (0, draw.contiguous()) if isinstance(draw, torch.Tensor) else (int(draw), None)


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def _contiguous(x):
    return None if x is None else x.contiguous()


def _order(x: torch.Tensor) -> list[int] | None:
    """The dimensions by falling stride where x is dense with the batch outermost (channels-last), but not contiguous.

    Permuted so, x is contiguous: what does not depend on the element's index runs without a copy.
    """
    if x.is_contiguous():
        return None
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda d: (-strides[d], d))
    return order if order[0] == 0 and x.permute(order).is_contiguous() else None


def _dense(x, order):
    return None if x is None else (x if order is None else x.permute(order)).contiguous()


def _restore(y: torch.Tensor, order: list[int] | None, like: torch.Tensor) -> torch.Tensor:
    """Back to the strides that elementwise PyTorch would give."""
    if order is not None:
        return y.permute([order.index(d) for d in range(len(order))])
    return y if like.is_contiguous() else torch.empty_like(like).copy_(y)


def _per_sample(c: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return c.float().view(-1, *[1] * (like.ndim - 1))


def _register() -> None:
    library = torch.library
    library.register_fake("encdiff_native::q_sample", _q_sample_fake)
    library.register_fake("encdiff_native::step", _step_fake)
    library.register_fake("encdiff_native::threshold", lambda x, *args: x.new_empty(len(x), dtype=torch.float32))
    for name in ("q_sample_out", "step_out", "random_out"):
        library.register_fake(f"encdiff_native::{name}", lambda *args: None)
    library.register_autograd("encdiff_native::q_sample", _q_sample_backward, setup_context=_q_sample_context)
    library.register_autograd("encdiff_native::step", _step_backward, setup_context=_step_context)
    library.register_fake("encdiff_native::attention", _attention_fake)
    library.register_fake("encdiff_native::attention_backward", _attention_backward_fake)
    library.register_autograd("encdiff_native::attention", _attention_backward, setup_context=_attention_context)
    library.register_autograd("encdiff_native::attention_backward", refusal("encdiff_native::attention_backward"))


def _q_sample_fake(x0, noise, t, schedule, loss_weights, kind, sample_ids, draw_tensor, draw, seed):
    target = torch.empty_like(x0) if kind else x0.new_empty(0)
    weight = x0.new_empty(len(x0) if loss_weights is not None else 0, dtype=torch.float32)
    return torch.empty_like(x0), target, weight


def _step_fake(x, *args):
    want_x0 = args[-1]
    return torch.empty_like(x), torch.empty_like(x) if want_x0 else x.new_empty(0)


def _q_sample_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.kind, ctx.noisy = inputs[5], inputs[1] is not None
    ctx.mark_non_differentiable(output[2])


def _q_sample_backward(ctx, g_x_t, g_target, _):
    t, schedule = ctx.saved_tensors
    row = schedule.double().index_select(0, t)
    signal, sigma = row.unbind(1) if row.ndim == 2 else (row.sqrt(), (1 - row).sqrt())
    signal, sigma, g = _per_sample(signal, g_x_t), _per_sample(sigma, g_x_t), g_x_t.float()
    g_x0, g_noise = signal * g, sigma * g
    if ctx.kind:  # target = a noise + b x0
        h = g_target.float()
        a, b = {1: (1, 0), 2: (signal, -sigma), 3: (1, -1)}[ctx.kind]
        g_x0, g_noise = g_x0 + b * h, g_noise + a * h
    g_noise = g_noise.to(g_x_t.dtype) if ctx.noisy else None
    return g_x0.to(g_x_t.dtype), g_noise, *[None] * 8


def _step_context(ctx, inputs, output):
    x, model_output, unconditional, coefficients, limits, noise, *history, _, _, _, _, clip, guidance, _ = inputs
    clipped = math.isfinite(clip)
    ctx.save_for_backward(coefficients, *((x, model_output, unconditional, limits) if clipped else (None,) * 4))
    ctx.given = [other is not None for other in (unconditional, noise, *history)]
    ctx.clip, ctx.guidance = clip if clipped else None, guidance


def _step_backward(ctx, g_x_prev, g_x0):
    coefficients, x, output, unconditional, limits = ctx.saved_tensors
    c = [_per_sample(column, g_x_prev) for column in coefficients.unbind(1)]
    g, dtype = g_x_prev.float(), g_x_prev.dtype
    to_x0 = c[2] * g if g_x0.numel() == 0 else c[2] * g + g_x0.float()
    if ctx.clip is not None:
        o = output.float()
        if unconditional is not None:
            o = unconditional.float() + ctx.guidance * (o - unconditional.float())
        limit = ctx.clip if limits is None else _per_sample(limits, g_x_prev)
        to_x0 = to_x0 * ((c[0] * x.float() + c[1] * o).abs() <= limit) * (ctx.clip / limit)
    to_output, mixed = c[1] * to_x0, ctx.given[0]
    grads = [
        c[0] * to_x0 + c[3] * g,
        (ctx.guidance if mixed else 1) * to_output,
        (1 - ctx.guidance) * to_output if mixed else None,
        None,
        None,
        c[4] * g if ctx.given[1] else None,
        *(c[5 + i] * g if given else None for i, given in enumerate(ctx.given[2:])),
    ]
    return *(gradient if gradient is None else gradient.to(dtype) for gradient in grads), *[None] * 7


def _attention_fake(q, k, v, heads):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], heads, 2, q.shape[1]), dtype=torch.float32)


def _attention_backward_fake(grad_out, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _attention_context(ctx, inputs, output):
    *qkv, ctx.heads = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx, grad_out, _):
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    return *torch.ops.encdiff_native.attention_backward(grad_out, *ctx.saved_tensors, ctx.heads), None
