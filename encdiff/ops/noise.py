"""The noise engine: `q_sample` noises a batch for training, `step` advances a batch by one sampler step.

Every sample of the batch has its own timestep. Arithmetic is float32 whatever the storage type (float64 for float64
tensors, which only the reference serves). Noise is given, or drawn in the same pass from a key: see `ops.philox`.
"""

import math

import torch

from encdiff.errors import InputError
from encdiff.ops import _native, philox
from encdiff.ops._dispatch import Implementation, Op, always
from encdiff.ops._types import FLOATING

PREDICTIONS = ("epsilon", "v", "x0")
TARGETS = (*PREDICTIONS, "flow")


def q_sample_reference(
    x0, noise, t, alphas_cumprod, prediction="epsilon", *,
    seed=None, sample_ids=None, draw=0, weights=None, out=None,
):  # fmt: skip
    """`q_sample` in plain PyTorch; returns (x_t, target, weight or None)."""
    dtype = compute_dtype(x0)
    row = alphas_cumprod.double().index_select(0, t)  # unlike [t], refuses negative timesteps on a GPU too
    signal, sigma = row.unbind(1) if row.ndim == 2 else (row.sqrt(), (1 - row).sqrt())
    signal, sigma = (_per_sample(c.to(dtype), x0) for c in (signal, sigma))
    if noise is None:
        noise = philox.normal_reference(x0.shape, seed, sample_ids, draw, dtype)
    x, e = x0.to(dtype), noise.to(dtype)
    x_t = signal * x + sigma * e  # DDPM eq. 4
    if prediction == "v":
        target = signal * e - sigma * x
    else:
        target = {"epsilon": e, "x0": x}[prediction] if prediction != "flow" else e - x
    weight = None if weights is None else weights.index_select(0, t).float()
    return *_native.into(out, x_t.to(x0.dtype), target.to(x0.dtype)), weight


def step_reference(
    x_t, model_output, coefficients, noise=None, clip=None, *, quantile=None,
    unconditional=None, guidance=1.0, history=(), seed=None, sample_ids=None, draw=0, return_x0=False, out=None,
):  # fmt: skip
    """`step` in plain PyTorch; returns (x_prev, x0 or None)."""
    dtype = compute_dtype(x_t)
    c0, c1, c2, c3, c4, *c_history = (_per_sample(c, x_t) for c in coefficients.to(dtype).unbind(1))
    x, output = x_t.to(dtype), model_output.to(dtype)
    if unconditional is not None:
        output = unconditional.to(dtype) + guidance * (output - unconditional.to(dtype))
    x0 = c0 * x + c1 * output
    if quantile is not None and x0.numel():
        limit = _per_sample(threshold_reference(x0, clip, quantile), x0)
        x0 = x0.clamp(-limit, limit) * (torch.full_like(limit, clip) / limit)
    elif clip is not None:
        x0 = x0.clamp(-clip, clip)
    x_prev = c2 * x0 + c3 * x
    if noise is None and seed is not None:
        noise = philox.normal_reference(x_t.shape, seed, sample_ids, draw, dtype)
    if noise is not None:
        x_prev = x_prev + c4 * noise.to(dtype)
    for c, past in zip(c_history, history, strict=True):
        x_prev = x_prev + c * past.to(dtype)
    return _native.into(out, x_prev.to(x_t.dtype), x0.to(x_t.dtype) if return_x0 else None)


def threshold_reference(x0: torch.Tensor, clip: float, quantile: float) -> torch.Tensor:
    """The limit of Imagen's dynamic threshold: max(clip, quantile of |x0|) of each sample, (B,), without gradient."""
    values = x0.detach().abs().reshape(len(x0), math.prod(x0.shape[1:])).sort(1).values
    position = quantile * (values.shape[1] - 1)
    rank = int(position)
    value, following = values[:, rank], values[:, min(rank + 1, values.shape[1] - 1)]
    return (value + (position - rank) * (following - value)).clamp(min=clip)


def _q_sample_reasons(x0, noise, *_, **__) -> list[str]:
    return _native.tensor_reasons(x0, noise=noise)


def _step_reasons(
    x_t, model_output, coefficients, noise=None, clip=None, *, unconditional=None, history=(), **_
) -> list[str]:
    if coefficients.requires_grad and torch.is_grad_enabled():
        return ["the coefficients ask for a gradient"]
    past = {f"history[{i}]": h for i, h in enumerate(history)}
    return _native.tensor_reasons(x_t, noise=noise, model_output=model_output, unconditional=unconditional, **past)


q_sample_op = Op(
    "q_sample",
    [
        Implementation("native", _native.q_sample, _q_sample_reasons),
        Implementation("reference", q_sample_reference, always, composite=True),
    ],
)
step_op = Op(
    "step",
    [
        Implementation("native", _native.step, _step_reasons),
        Implementation("reference", step_reference, always, composite=True),
    ],
)


def q_sample(
    x0: torch.Tensor,
    noise: torch.Tensor | None,
    t: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction: str = "epsilon",
    *,
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
    draw: int | torch.Tensor = 0,
    weights: torch.Tensor | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Draw x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise and the target of the regression.

    x0 (B, ...) floating; noise: x0's shape, floating, or None with a `seed`: then it is `ops.normal(x0.shape, seed,
    sample_ids, draw)`, drawn in the same pass; sample_ids (B,) default to 0 .. B-1. t (B,) int32 or int64, 0 <= t < T;
    alphas_cumprod (T,) float64 or float32, its roots are taken in float64; or (T, 2), the signal's and the noise's
    factors themselves (`schedules.flow_table`); all on one device. `prediction` is the target: `epsilon` (the noise),
    `v` = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0 (arXiv 2202.00512), `x0`, or `flow` = noise - x0.
    Returns (x_t, target), both of x0's shape and dtype; target may be `noise` or `x0` itself. With `weights` (T,), one
    per timestep, also weights[t], float32 (B,). Differentiable in x0 and noise; not with `out` = (x_t, target), tensors
    to write into of x0's shape and dtype, of which one may be x0 or `noise` itself.
    Raises InputError for a wrong shape, dtype, device or name, and for t out of range where t is on the CPU; on a GPU
    reading t would stall the device, so a device-side assertion stops the program, as PyTorch's own indexing does.
    """
    if prediction not in TARGETS:
        raise InputError(f"prediction is {prediction!r}, must be one of {', '.join(TARGETS)}")
    _check_tensor("x0", x0)
    fits = alphas_cumprod.ndim == 1 or (alphas_cumprod.ndim == 2 and alphas_cumprod.shape[1] == 2)
    _check_table("alphas_cumprod", alphas_cumprod, "(T,) or (T, 2)", fits, "x0", x0)
    _check_timesteps(t, x0, len(alphas_cumprod))
    if weights is not None:
        shape = f"({len(alphas_cumprod)},) as alphas_cumprod"
        _check_table("weights", weights, shape, weights.shape == alphas_cumprod.shape[:1], "x0", x0)
    if noise is not None:
        _check_same("noise", noise, "x0", x0)
        seed = None
    else:
        if seed is None:
            raise InputError("noise is None, must be given where seed is None")
        sample_ids = _key(x0, "x0", seed, sample_ids, draw)
    if out is not None:
        _check_out(out, 2, x0, "x0", noise)
    x_t, target, weight = q_sample_op(
        x0, noise, t, alphas_cumprod, prediction,
        seed=seed, sample_ids=sample_ids, draw=draw, weights=weights, out=out, impl=impl,
    )  # fmt: skip
    return (x_t, target) if weights is None else (x_t, target, weight)


def step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: torch.Tensor,
    noise: torch.Tensor | None = None,
    clip: float | None = None,
    *,
    quantile: float | None = None,
    unconditional: torch.Tensor | None = None,
    guidance: float = 1.0,
    history: tuple[torch.Tensor, ...] = (),
    seed: int | None = None,
    sample_ids: torch.Tensor | None = None,
    draw: int | torch.Tensor = 0,
    return_x0: bool = False,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One step of any sampler that is linear in x_t, the model's output, its past and fresh noise.

        x0 = c0 x_t + c1 output, clipped to [-clip, clip]
        x_prev = c2 x0 + c3 x_t + c4 noise + c5 history[0] + c6 history[1] + ..

    output = model_output, or with `unconditional` given unconditional + guidance (model_output - unconditional).
    With a `quantile` (0.995, say) clipping is Imagen's dynamic threshold (arXiv 2205.11487, section 2.3): s = max(clip,
    that quantile of |x0| over the sample), x0 is clipped to [-s, s] and multiplied by clip/s; s gets no gradient.
    x_t (B, ...) floating; model_output, unconditional, noise, history (three at most): x_t's shape, any floating dtype;
    coefficients (B, 5 + len(history)) = c0, c1, .., or one such row (1, ..) for all, float32 or float64; all on one
    device. Without `noise` but with a `seed` it is `ops.normal(x_t.shape, seed, sample_ids, draw)`, drawn in the same
    pass.
    Returns x_prev of x_t's shape and dtype; with `return_x0` (x_prev, x0). Differentiable; not with `out`, tensors to
    write the result into, of which one may be x_t or another input itself.
    Raises InputError for a wrong shape, dtype or device, clip <= 0, a quantile without clip or outside (0, 1], and,
    where the coefficients are on the CPU, for c4 != 0 without noise.
    """
    _check_tensor("x_t", x_t)
    _check_same("model_output", model_output, "x_t", x_t)
    _check_past(x_t, unconditional, history)
    columns = 5 + len(history)
    fits = coefficients.ndim == 2 and coefficients.shape[1] == columns and len(coefficients) in (1, len(x_t))
    _check_table("coefficients", coefficients, f"({len(x_t)}, {columns}) or (1, {columns})", fits, "x_t", x_t)
    if noise is not None:
        _check_same("noise", noise, "x_t", x_t)
        seed = None
    elif seed is not None:
        sample_ids = _key(x_t, "x_t", seed, sample_ids, draw)
    elif philox.readable(coefficients) and coefficients[:, 4].any():
        raise InputError("noise is None, must be given (or a seed) where a coefficient c4 is not zero")
    if clip is not None and not clip > 0:
        raise InputError(f"clip is {clip}, must be positive or None")
    if quantile is not None and (clip is None or not 0 < quantile <= 1):
        raise InputError(f"quantile, clip are {quantile}, {clip}; must be in (0, 1], with a positive clip")
    if out is not None:
        out = tuple(out) if return_x0 else (out,)
        _check_out(out, 1 + return_x0, x_t, "x_t", model_output, noise, unconditional, *history)
        out = (*out, None)[:2]
    x_prev, x0 = step_op(
        x_t, model_output, coefficients, noise, clip, quantile=quantile, unconditional=unconditional,
        guidance=guidance, history=tuple(history), seed=seed, sample_ids=sample_ids, draw=draw, return_x0=return_x0,
        out=out, impl=impl,
    )  # fmt: skip
    return (x_prev, x0) if return_x0 else x_prev


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type arithmetic on `x` is done in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_prediction(prediction: str) -> None:
    """Raise InputError unless `prediction` names what a model predicts."""
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction is {prediction!r}, must be one of {', '.join(PREDICTIONS)}")


def _key(x: torch.Tensor, name: str, seed: int, sample_ids: torch.Tensor | None, draw) -> torch.Tensor:
    sample_ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    philox.check_key(x.shape[:1], seed, sample_ids, draw, name)
    if sample_ids.device != x.device:
        raise InputError(f"sample_ids is on {sample_ids.device}, must be on {name}'s {x.device}")
    return sample_ids


def _check_past(x_t: torch.Tensor, unconditional: torch.Tensor | None, history: tuple[torch.Tensor, ...]) -> None:
    if len(history) > 3:
        raise InputError(f"history has {len(history)} tensors, must have three at most")
    if unconditional is not None:
        _check_same("unconditional", unconditional, "x_t", x_t)
    for i, past in enumerate(history):
        _check_same(f"history[{i}]", past, "x_t", x_t)


def _check_out(out: tuple[torch.Tensor, ...], count: int, like: torch.Tensor, other: str, *inputs) -> None:
    if len(out) != count or any(out[0] is y for y in out[1:]):  # torch 2.11 does not compile `id`
        raise InputError(f"out has {len(out)} tensors, must have {count}, none of them twice")
    for y in out:
        _check_same("out", y, other, like)
        if y.dtype != like.dtype:
            raise InputError(f"out is {y.dtype}, must be of {other}'s {like.dtype}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (like, *inputs, *out)):
        raise InputError(f"out is given, must be None where {other} or another input asks for a gradient")


def _per_sample(c: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return c.view(-1, *[1] * (like.ndim - 1))


def _check_tensor(name: str, x: torch.Tensor) -> None:
    if x.dtype not in FLOATING or x.ndim == 0:
        raise InputError(f"{name} is {x.dtype} of shape {tuple(x.shape)}, must be floating point with a batch axis")


def _check_same(name: str, x: torch.Tensor, other: str, like: torch.Tensor) -> None:
    if x.shape != like.shape or x.device != like.device or x.dtype not in FLOATING:
        raise InputError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, must be floating point of {other}'s shape "
            f"{tuple(like.shape)} on {like.device}"
        )


def _check_table(name: str, table: torch.Tensor, shape: str, fits: bool, other: str, like: torch.Tensor) -> None:
    if not fits or table.device != like.device or table.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"{name} is {table.dtype} {tuple(table.shape)} on {table.device}, must be float32 or float64 {shape} on "
            f"{other}'s {like.device}, for {other} of shape {tuple(like.shape)}"
        )


def _check_timesteps(t: torch.Tensor, x0: torch.Tensor, num_timesteps: int) -> None:
    if t.shape != x0.shape[:1] or t.dtype not in (torch.int32, torch.int64) or t.device != x0.device:
        raise InputError(
            f"t is {t.dtype} {tuple(t.shape)} on {t.device}, must be int32 or int64 ({len(x0)},) on {x0.device}, "
            f"one per sample of x0 {tuple(x0.shape)}"
        )
    if philox.readable(t) and ((t < 0) | (t >= num_timesteps)).any():
        raise InputError(
            f"t spans {int(t.min())} to {int(t.max())}, must lie in 0 to {num_timesteps - 1}: alphas_cumprod has "
            f"{num_timesteps} entries"
        )
