"""The noise engine: `q_sample` noises a batch for training, `step` advances a batch by one sampler step.

Every sample of the batch has its own timestep. Arithmetic is float32 whatever the storage type (float64 for float64
tensors, which only the reference serves).
"""

import torch

from encdiff.errors import InputError
from encdiff.ops._dispatch import Implementation, Op, always

PREDICTIONS = ("epsilon", "v", "x0")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def q_sample_reference(x0, noise, t, alphas_cumprod, prediction="epsilon"):
    """`q_sample` in plain PyTorch."""
    dtype = compute_dtype(x0)
    alpha_bar = alphas_cumprod.double().index_select(0, t)  # unlike [t], refuses negative timesteps on a GPU too
    signal, sigma = (_per_sample(c.to(dtype), x0) for c in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    x, e = x0.to(dtype), noise.to(dtype)
    x_t = signal * x + sigma * e  # DDPM eq. 4
    target = signal * e - sigma * x if prediction == "v" else e if prediction == "epsilon" else x
    return x_t.to(x0.dtype), target.to(x0.dtype)


def step_reference(x_t, model_output, coefficients, noise=None, clip=None):
    """`step` in plain PyTorch."""
    dtype = compute_dtype(x_t)
    c0, c1, c2, c3, c4 = (_per_sample(c, x_t) for c in coefficients.to(dtype).unbind(1))
    x = x_t.to(dtype)
    x0 = c0 * x + c1 * model_output.to(dtype)
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
    x_prev = c2 * x0 + c3 * x
    if noise is not None:
        x_prev = x_prev + c4 * noise.to(dtype)
    return x_prev.to(x_t.dtype)


q_sample_op = Op("q_sample", [Implementation("reference", q_sample_reference, always)])
step_op = Op("step", [Implementation("reference", step_reference, always)])


def q_sample(
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction: str = "epsilon",
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise and the target of the regression.

    x0 (B, ...) floating; noise: x0's shape, floating; t (B,) int32 or int64, 0 <= t < T; alphas_cumprod (T,) float64 or
    float32, its roots are taken in float64; all on one device. `prediction` names the target: `epsilon` (the noise),
    `v` = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0 (arXiv 2202.00512), or `x0`.
    Returns (x_t, target), both of x0's shape and dtype; target may be `noise` or `x0` itself. Differentiable.
    Raises InputError for a wrong shape, dtype, device or name, and for t out of range where t is on the CPU; on a GPU
    reading t would stall the device, and PyTorch's device-side index check stops the program instead.
    """
    check_prediction(prediction)
    _check_tensor("x0", x0)
    _check_same("noise", noise, "x0", x0)
    _check_table("alphas_cumprod", alphas_cumprod, "(T,)", alphas_cumprod.ndim == 1, "x0", x0)
    _check_timesteps(t, x0, len(alphas_cumprod))
    return q_sample_op(x0, noise, t, alphas_cumprod, prediction=prediction, impl=impl)


def step(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    coefficients: torch.Tensor,
    noise: torch.Tensor | None = None,
    clip: float | None = None,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """One step of any sampler that is linear in x_t, the model's output and fresh noise.

        x0 = c0 x_t + c1 model_output, clipped to [-clip, clip];  x_prev = c2 x0 + c3 x_t + c4 noise

    x_t (B, ...) floating; model_output, noise: x_t's shape, any floating dtype; coefficients (B, 5) = c0 .. c4, float32
    or float64; all on one device. Returns x_prev of x_t's shape and dtype. Differentiable.
    Raises InputError for a wrong shape, dtype or device, clip <= 0, and, where the coefficients are on the CPU, for
    c4 != 0 without noise.
    """
    _check_tensor("x_t", x_t)
    _check_same("model_output", model_output, "x_t", x_t)
    _check_table("coefficients", coefficients, f"({len(x_t)}, 5)", coefficients.shape == (len(x_t), 5), "x_t", x_t)
    if noise is not None:
        _check_same("noise", noise, "x_t", x_t)
    elif _readable(coefficients) and coefficients[:, 4].any():
        raise InputError("noise is None, must be given where a coefficient c4 is not zero")
    if clip is not None and not clip > 0:
        raise InputError(f"clip is {clip}, must be positive or None")
    return step_op(x_t, model_output, coefficients, noise=noise, clip=clip, impl=impl)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The type arithmetic on `x` is done in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_prediction(prediction: str) -> None:
    """Raise InputError unless `prediction` names what a model predicts."""
    if prediction not in PREDICTIONS:
        raise InputError(f"prediction is {prediction!r}, must be one of {', '.join(PREDICTIONS)}")


def _per_sample(c: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return c.view(-1, *[1] * (like.ndim - 1))


def _readable(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()  # neither a device stall nor a graph break


def _check_tensor(name: str, x: torch.Tensor) -> None:
    if x.dtype not in _FLOATING or x.ndim == 0:
        raise InputError(f"{name} is {x.dtype} of shape {tuple(x.shape)}, must be floating point with a batch axis")


def _check_same(name: str, x: torch.Tensor, other: str, like: torch.Tensor) -> None:
    if x.shape != like.shape or x.device != like.device or x.dtype not in _FLOATING:
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
    if _readable(t) and ((t < 0) | (t >= num_timesteps)).any():
        raise InputError(
            f"t spans {int(t.min())} to {int(t.max())}, must lie in 0 to {num_timesteps - 1}: alphas_cumprod has "
            f"{num_timesteps} entries"
        )
